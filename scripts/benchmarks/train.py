"""Compare our training with one made of timm's parts: the rows of `benchmark.py train`."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deit.config.presets import LOSS_PRESETS
from deit.config.schema import Config
from deit.core.console import info
from deit.distill.write_targets import write_targets
from deit.models.cost import cost_of
from deit.models.onednn_linear import available, product
from deit.models.student import Student
from scripts.benchmarks.interleaved import Case, measure, rate
from scripts.benchmarks.memory import memory_of
from scripts.benchmarks.ours import our_batches, our_steps
from scripts.benchmarks.timm_trainer import (
    TIMM_WORKERS,
    configuration,
    first_losses,
    our_student,
    timm_batches,
    timm_steps,
)

_SAME_LOSS = 1e-3
_AHEAD = 3  # batches that workers make while the other side is measured
_CPU_WORKERS, _GPU_WORKERS = (0, 1, 2), (4, 8, 16)  # numbers of workers to try
_QUICK_S = 4.0
_ON_CPU = (("deit_micro", 32, 128),)
_ON_GPU = (("deit_tiny", 32, 1024), ("deit_tiny", 32, 128), ("deit_small", 224, 256))
"""Students, image sizes [px] and batch sizes."""


class Row(NamedTuple):
    """A comparison. what: the part that is measured. taught: the kind of teacher."""

    what: str
    taught: str
    peer: str

    @property
    def fixed_batch(self) -> bool:
        """Return whether all steps use the same batch, so that no data is loaded."""
        return self.what == _ONE_BATCH


_ONE_BATCH, _END_TO_END, _DATA = "step on one batch", "end to end", "data alone"
_NO_TEACHER, _ONLINE, _STORED = "no teacher", "ResNet-18 online", "stored teacher outputs"
_BEST, _DEFAULT = "timm, best settings", "timm, default settings"
_KINDS = {
    _BEST: (
        (_DATA, _NO_TEACHER),
        (_ONE_BATCH, _NO_TEACHER),
        (_ONE_BATCH, _ONLINE),
        (_END_TO_END, _ONLINE),
        (_END_TO_END, _STORED),
    ),
    _DEFAULT: (
        (_ONE_BATCH, _NO_TEACHER),
        (_ONE_BATCH, _ONLINE),
        (_END_TO_END, _ONLINE),
        (_END_TO_END, _STORED),
    ),
}


def train(rounds: int, seconds: float, name_part: str = "") -> list[dict[str, Any]]:
    """Measure the rows of `benchmark.py train` whose names contain `name_part`."""
    results = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for student, side, batch in _ON_GPU if device == "cuda" else _ON_CPU:
        rows = {
            f"{student} {side} px, batch {batch}: {what}, {taught}, compared with {peer}": Row(
                what, taught, peer
            )
            for peer, kinds in _KINDS.items()
            for what, taught in kinds
        }
        rows = {name: row for name, row in rows.items() if name_part in name}
        if not rows:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            config = configuration(folder, student=student, batch=batch, device=device, side=side)
            results += _rows(rows, config, folder, rounds=rounds, seconds=seconds)
    return results


def _rows(
    rows: dict[str, Row], config: Config, folder: Path, *, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Measure the rows of a student, one after another."""
    our_loss, timm_loss = first_losses(config)
    if abs(our_loss - timm_loss) > _SAME_LOSS:
        raise SystemExit(
            f"the losses of the first step differ: deit {our_loss:.5f}, timm {timm_loss:.5f}"
        )
    info(f"loss of the first step: deit {our_loss:.5f}, timm {timm_loss:.5f}")
    configs = {_NO_TEACHER: dataclasses.replace(config, loss=LOSS_PRESETS["none"]), _ONLINE: config}
    if any(row.taught == _STORED for row in rows.values()):
        write_targets(config, folder / "store")
        stored = {"source": (), "target_stores": (str(folder / "store"),)}
        configs[_STORED] = config.replace(teacher=stored)
    side, batch = config.student.image_size, config.optim.batch_size
    student, device = our_student(config), config.run.device
    work = 3 * 2 * cost_of(student, side=side, batch=2).gmacs
    peak, copy = _peak_gflop_s(device), _copy_gb_s(device)
    moved = _moved_gb(student, bytes_each=2 if device == "cuda" else 4)
    # The sum of both: a kernel waits either for its arithmetic or for memory.
    floor = 1 / (work / peak + moved / copy)
    results = []
    for index, (name, row) in enumerate(rows.items(), start=1):
        sides, workers = _sides(row, config, configs[row.taught])
        result = measure(Case(name, *sides, row.peer, _AHEAD), rounds=rounds, seconds=seconds)
        result |= {"what": row.what, "taught": row.taught, "batch_size": batch}
        result["peer_workers"] = workers
        result |= {"gflop_of_an_image": work, "peak_gflop_s": peak}
        result |= {"gb_of_an_image": moved, "copy_gb_s": copy, "floor_images_per_s": floor}
        if row.what != _DATA:
            result["share_of_peak"] = result["ours_images_per_s"] * work / peak
        result["losses_of_first_step"] = [our_loss, timm_loss]
        if row.what == _END_TO_END:
            for prefix, memory in zip(("ours", "peer"), map(memory_of, sides)):
                result[f"{prefix}_memory_mb"] = memory
        results.append(result)
        info(
            f"{index}/{len(rows)} {name}: {result['ours_images_per_s']:.0f} images/s, timm "
            f"{result['peer_images_per_s']:.0f}, ratio {result['ratio']:.2f}"
        )
    return results


def _sides(row: Row, config: Config, our_config: Config) -> tuple[tuple[Callable, Callable], int]:
    """Return picklable functions that make both sides, and the number of workers of timm's loader.

    It is the default of timm's train script, or for its best settings the fastest for this row.
    """
    if row.what == _DATA:
        our_side, timm_side = partial(our_batches, our_config), partial(_timm_sizes, config)
    else:
        our_side = partial(our_steps, our_config, fixed_batch=row.fixed_batch)
        settings = {"best": row.peer == _BEST, "fixed_batch": row.fixed_batch}
        timm_side = partial(timm_steps, config, labels_only=row.taught == _NO_TEACHER, **settings)
    workers = TIMM_WORKERS
    if row.peer == _BEST and not row.fixed_batch:
        tried = _GPU_WORKERS if config.run.device == "cuda" else _CPU_WORKERS
        workers = max(
            tried, key=lambda num_workers: _quick_rate(partial(timm_side, workers=num_workers))
        )
    return (our_side, partial(timm_side, workers=workers)), workers


def _quick_rate(make: Callable) -> float:
    """Return a quick estimate of the images/s of a side after its start."""
    side = make()
    for _ in range(1 + _AHEAD):
        next(side)
    images_per_s = rate(side, _QUICK_S)
    side.close()
    return images_per_s


def _timm_sizes(config: Config, *, workers: int) -> Iterator[int]:
    for images, _ in timm_batches(config, workers=workers):
        yield len(images)


def _peak_gflop_s(device: str) -> float:
    """Return the speed of matrix products on this machine, in the precision of the run."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    products: list[Callable[..., Tensor]] = [torch.matmul]
    if device == "cpu" and available():
        products.append(partial(product, bias=None))
    best = float("inf")
    for multiply in products * 5:
        started = time.perf_counter()
        multiply(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best / 1e9


def _copy_gb_s(device: str) -> float:
    """Return the speed of copying memory, reads plus writes [10**9 bytes/s]."""
    source = torch.zeros(2**28 if device == "cuda" else 2**26, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        started = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best / 1e9


def _moved_gb(student: Student, *, bytes_each: int) -> float:
    """Return the memory traffic of a ViT per image, forward and backward [10**9 bytes].

    A norm and the sum before it count as one kernel. The kernels of a block then read and write 36
    times the width of each token in the forward pass, and 69 times in the backward pass.
    """
    network = student.network
    tokens = network.patch_embed.num_patches + network.num_prefix_tokens
    return 105 * network.embed_dim * tokens * len(network.blocks) * bytes_each / 1e9
