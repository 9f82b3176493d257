"""Our training beside one made of timm's own parts: the rows of `benchmark.py train`."""

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
from scripts.benchmarks.interleaved import Case, measured, rate
from scripts.benchmarks.memory import memory_of
from scripts.benchmarks.ours import our_batches, ours
from scripts.benchmarks.timm_trainer import (
    TIMM_WORKERS,
    configuration,
    first_losses,
    our_student,
    theirs,
    timm_batches,
)

_SAME_LOSS = 1e-3
_AHEAD = 3  # batches that workers made while the other side was measured
_FEW, _MANY = (0, 1, 2), (4, 8, 16)  # workers that are tried, without and with a GPU
_LOOK_S = 4.0
_ON_CPU = (("deit_micro", 32, 128),)
_ON_GPU = (("deit_tiny", 32, 1024), ("deit_tiny", 32, 128), ("deit_small", 224, 256))
"""Students, sides [px] of their images, and batches."""


class Row(NamedTuple):
    """One comparison. taught: by `no teacher`, `ResNet-18` at every step, or its stored answers."""

    what: str
    taught: str
    peer: str

    @property
    def resident(self) -> bool:
        """Whether all updates are on one batch: the step alone."""
        return self.what == _STEP


_STEP, _WHOLE, _DATA = "step on one batch", "end to end", "data alone"
_NONE, _ONLINE, _STORED = "no teacher", "ResNet-18 online", "stored teacher outputs"
_BEST, _PLAIN = "timm, best settings", "timm, default settings"
_KINDS = {
    _BEST: ((_DATA, _NONE), (_STEP, _NONE), (_STEP, _ONLINE), (_WHOLE, _ONLINE), (_WHOLE, _STORED)),
    _PLAIN: ((_STEP, _NONE), (_STEP, _ONLINE), (_WHOLE, _ONLINE), (_WHOLE, _STORED)),
}


def train(rounds: int, seconds: float, wanted: str = "") -> list[dict[str, Any]]:
    """The rows of `benchmark.py train` whose name holds the wanted text."""
    found = []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for student, side, batch in _ON_GPU if device == "cuda" else _ON_CPU:
        rows = {
            f"{student} {side} px, batch {batch}: {what}, {taught}, compared with {peer}": Row(
                what, taught, peer
            )
            for peer, kinds in _KINDS.items()
            for what, taught in kinds
        }
        rows = {name: row for name, row in rows.items() if wanted in name}
        if not rows:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            config = configuration(folder, student=student, batch=batch, device=device, side=side)
            found += _rows(rows, config, folder, rounds=rounds, seconds=seconds)
    return found


def _rows(
    rows: dict[str, Row], config: Config, folder: Path, *, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """The rows of one student, measured one after the other."""
    mine, other = first_losses(config)
    if abs(mine - other) > _SAME_LOSS:
        raise SystemExit(f"the sides do not compute the same: {mine:.5f}, {other:.5f}")
    info(f"loss of the first step: ours {mine:.5f}, timm's {other:.5f}")
    configs = {_NONE: dataclasses.replace(config, loss=LOSS_PRESETS["none"]), _ONLINE: config}
    if any(row.taught == _STORED for row in rows.values()):
        write_targets(config, folder / "store")
        stored = {"source": (), "target_stores": (str(folder / "store"),)}
        configs[_STORED] = config.replace(teacher=stored)
    side, batch = config.student.image_size, config.optim.batch_size
    student, device = our_student(config), config.run.device
    work = 3 * 2 * cost_of(student, side=side, batch=2).gmacs
    peak, copy = _peak_gflop_s(device), _copy_gb_s(device)
    moved = _moved_gb(student, bytes_each=2 if device == "cuda" else 4)
    # One after the other: a kernel waits for its products or for memory.
    floor = 1 / (work / peak + moved / copy)
    found = []
    for number, (name, row) in enumerate(rows.items(), start=1):
        sides, workers = _sides(row, config, configs[row.taught])
        said = measured(Case(name, *sides, row.peer, _AHEAD), rounds=rounds, seconds=seconds)
        said |= {"what": row.what, "taught": row.taught, "batch_size": batch}
        said["peer_workers"] = workers
        said |= {"gflop_of_an_image": work, "peak_gflop_s": peak}
        said |= {"gb_of_an_image": moved, "copy_gb_s": copy, "floor_images_per_s": floor}
        if row.what != _DATA:
            said["share_of_peak"] = said["ours_images_per_s"] * work / peak
        said["losses_of_first_step"] = [mine, other]
        if row.what == _WHOLE:
            for whose, memory in zip(("ours", "peer"), map(memory_of, sides)):
                said[f"{whose}_memory_mb"] = memory
        found.append(said)
        info(
            f"{number}/{len(rows)} {name}: {said['ours_images_per_s']:.0f} images/s, timm "
            f"{said['peer_images_per_s']:.0f}, ratio {said['ratio']:.2f}"
        )
    return found


def _sides(row: Row, config: Config, own: Config) -> tuple[tuple[Callable, Callable], int]:
    """What makes ours and what makes timm's (both can be sent to another process), and how many
    workers timm's loader has: as many as its train script comes with, or, for its best settings,
    those that measure fastest for this very row."""
    if row.what == _DATA:
        mine, other = partial(our_batches, own), partial(_timm_sizes, config)
    else:
        mine = partial(ours, own, resident=row.resident)
        settings = {"best": row.peer == _BEST, "resident": row.resident}
        other = partial(theirs, config, alone=row.taught == _NONE, **settings)
    workers = TIMM_WORKERS
    if row.peer == _BEST and not row.resident:
        tried = _MANY if config.run.device == "cuda" else _FEW
        workers = max(tried, key=lambda number: _short_look(partial(other, workers=number)))
    return (mine, partial(other, workers=workers)), workers


def _short_look(make: Callable) -> float:
    """About how many images/s a side has, once it is under way."""
    side = make()
    for _ in range(1 + _AHEAD):
        next(side)
    found = rate(side, _LOOK_S)
    side.close()
    return found


def _timm_sizes(config: Config, *, workers: int) -> Iterator[int]:
    for images, _ in timm_batches(config, workers=workers):
        yield len(images)


def _peak_gflop_s(device: str) -> float:
    """What matrix products reach here, in the precision of the run: the floor of a step is its
    arithmetic at that speed."""
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    ways: list[Callable[..., Tensor]] = [torch.matmul]
    if device == "cpu" and available():
        ways.append(partial(product, bias=None))
    best = float("inf")
    for way in ways * 5:
        started = time.perf_counter()
        way(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best / 1e9


def _copy_gb_s(device: str) -> float:
    """How fast memory is read and written here [10**9 bytes/s], both counted."""
    one = torch.zeros(2**28 if device == "cuda" else 2**26, device=device)
    other, best = torch.empty_like(one), float("inf")
    for _ in range(5):
        started = time.perf_counter()
        other.copy_(one)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * one.nbytes / best / 1e9


def _moved_gb(student: Student, *, bytes_each: int) -> float:
    """What an image makes a ViT read and write, forward and backward [10**9 bytes], where a norm is
    one kernel with the sum before it: a block's kernels take in and give out 36 times the width of
    each token forward and 69 times backward."""
    network = student.network
    tokens = network.patch_embed.num_patches + network.num_prefix_tokens
    return 105 * network.embed_dim * tokens * len(network.blocks) * bytes_each / 1e9
