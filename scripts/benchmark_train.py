"""Our training beside one made of timm's own parts: the rows of `benchmark.py train`.

timm's side is its TokenDistillationTask, its loader and its optimizer factory, called in the order
of its train script, and read as that script does: the loss at every update. Once as it comes, once
with its best settings for the machine. Both sides start from the same weights and see the same
sizes, batches and kinds of views; the loss of the first step must be the same.
"""

import dataclasses
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from PIL import Image
from torch import Tensor, nn

from deit.config import Config, ViewsConfig, derive
from deit.console import say
from deit.losses import objective
from deit.models.cost import cost_of
from deit.models.linear import available, product
from deit.models.saved import Facts, build_student
from deit.models.student import Student
from deit.presets import OBJECTIVES
from deit.recipes import cifar10_micro
from deit.run import job_of, parts_of
from deit.target_writer import write_targets
from scripts.sides import ours, timm_loader
from scripts.turns import Case, measured, photographs

NUMBER = 6400  # images: fifty updates an epoch
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
VIEWS = ViewsConfig(
    crop="random_resized",
    crop_scale=(0.8, 1.0),
    flip=0.5,
    policy="randaugment",
    erasing=0.25,
    mixup_alpha=0.8,
    cutmix_alpha=1.0,
    mean=MEAN,
    std=STD,
)
_SAME_LOSS = 1e-3
_ON_GPU = {"precision": "bf16", "compile": "default"}
_AHEAD = 3  # batches that workers made while the other side was measured


def teacher() -> nn.Module:
    """ResNet-18 with random weights: how it answers does not matter for the speed."""
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=10)
    network.pretrained_cfg.update(mean=MEAN, std=STD)
    return network.eval()


def configuration(folder: Path, *, student: str, batch: int, device: str) -> Config:
    """CIFAR-10's shape and DeiT's augmentation, on scikit-learn's photographs in class folders."""
    root = folder / "pictures"
    if not root.exists():
        for index, array in enumerate(photographs(NUMBER, 32)):
            place = root / "train" / f"class {index % 10}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(place / f"{index:05d}.png")
            if index < 320:
                place = root / "validation" / f"class {index % 10}"
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(place / f"{index:05d}.png")
    return derive(
        cifar10_micro(),
        data={"source": "folder", "root": str(root)},
        views=VIEWS,
        student={"name": student, "drop_path": 0.1, "initialisation": "timm"},
        teacher={
            "source": (f"{Path(__file__)}:teacher",),
            "allow_weak": True,
            "mean": MEAN,
            "std": STD,
        },
        loss=OBJECTIVES["deit-hard"],
        optim={"epochs": 2, "batch_size": batch, "weight_decay": 0.05, "ema_epochs": 0.0},
        run={"device": device, **(_ON_GPU if device == "cuda" else {})},
    )


def our_student(config: Config) -> Student:
    """The student that both sides start from."""
    names = tuple(f"class {label}" for label in range(10))
    torch.manual_seed(0)
    return build_student(Facts(config.student, names, MEAN, STD, 1.0))


def _timm_batches(config: Config) -> Iterator[tuple[Tensor, Tensor]]:
    """Mixed batches of timm's loader without end; one worker, on a GPU's machine sixteen."""
    from timm.data import FastCollateMixup

    views, device = config.views, torch.device(config.run.device)
    loader = timm_loader(
        photographs(NUMBER, 32),
        views,
        32,
        workers=16 if device.type == "cuda" else 1,
        batch_size=config.optim.batch_size,
        mean=MEAN,
        std=STD,
        collate_fn=FastCollateMixup(
            mixup_alpha=views.mixup_alpha,
            cutmix_alpha=views.cutmix_alpha,
            label_smoothing=config.loss.label_smoothing,
            num_classes=10,
        ),
        pin_memory=device.type == "cuda",
        device=device,
    )
    while True:
        yield from loader


class Theirs(NamedTuple):
    """What timm's train script trains with. autocast: whether forward passes are in bf16."""

    task: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    autocast: bool


def timm_side(config: Config, *, best: bool) -> Theirs:
    """timm's parts, with the weights our student starts from. best: with the settings that are
    fastest for it on this kind of machine, else as they come."""
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.task import TokenDistillationTask

    device = torch.device(config.run.device)
    own = our_student(config).network
    width, depth = own.embed_dim, len(own.blocks)
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224",
        num_classes=10,
        img_size=32,
        patch_size=4,
        embed_dim=width,
        depth=depth,
        num_heads=own.blocks[0].attn.num_heads,
        drop_path_rate=config.student.drop_path,
    )
    model.load_state_dict(own.state_dict())
    model.pretrained_cfg.update(mean=MEAN, std=STD)
    model.to(device)
    task = TokenDistillationTask(
        model,
        teacher_model=teacher().to(device),
        criterion=SoftTargetCrossEntropy(),
        distill_type="hard",
        task_loss_weight=0.5,
        device=device,
        verbose=False,
    )
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=1e-4, weight_decay=0.05, **({"fused": True} if best else {})
    )
    if best and device.type == "cuda":
        task.compile()
    return Theirs(task, optimizer, device, device.type == "cuda")


def theirs(config: Config, *, best: bool, resident: bool, alone: bool = False) -> Iterator[int]:
    """Updates of timm's, the images of each. alone: the student's own, on labels."""
    side = timm_side(config, best=best)
    batches = _timm_batches(config)
    if resident:
        batch = next(batches)
        batches = (batch for _ in range(10**9))
    side.task.train()
    for images, targets in batches:
        with torch.autocast(side.device.type, torch.bfloat16, enabled=side.autocast):
            if alone:
                found = sum(side.task.trainable_module(images)) / 2
                loss = side.task.criterion(found, targets)
            else:
                loss = side.task(images, targets)["loss"]
        loss.backward()
        side.optimizer.step()
        loss.item()  # its loop adds up the loss of every update
        side.optimizer.zero_grad()
        yield len(images)


def first_losses(config: Config) -> tuple[float, float]:
    """The loss of the first step of either side, on one batch of ours, without drop path."""
    config = derive(config, student={"drop_path": 0.0})
    parts = parts_of(config)
    batch, job = next(parts.loader.epoch(0)), job_of(parts)
    job.student.train()
    losses = objective(job.student(batch.images), batch.targets, job.teach(batch), job.loss)
    task = timm_side(config, best=False).task.train()
    mean, std = (torch.tensor(v, device=batch.images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    smoothed = batch.targets * (1 - job.loss.label_smoothing) + job.loss.label_smoothing / 10
    return losses["total"].item(), task((batch.images - mean) / std, smoothed)["loss"].item()


class Row(NamedTuple):
    """One comparison. taught: by `no teacher`, `ResNet-18` at every step, or its stored answers."""

    what: str
    taught: str
    peer: str

    @property
    def resident(self) -> bool:
        """Whether all updates are on one batch: the step alone."""
        return self.what == _STEP


_STEP, _WHOLE = "step on one batch", "end to end"
_NONE, _ONLINE, _STORED = "no teacher", "ResNet-18 online", "its answers stored"
_BEST, _PLAIN = "timm, best settings", "timm, as it comes"
_KINDS = ((_STEP, _NONE), (_STEP, _ONLINE), (_WHOLE, _ONLINE), (_WHOLE, _STORED))


def train(rounds: int, seconds: float, wanted: str = "") -> list[dict[str, Any]]:
    """The rows of `benchmark.py train` whose name holds the wanted text."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, batch = ("deit_tiny", 1024) if device == "cuda" else ("deit_micro", 128)
    rows = {
        f"{student} 32 px, batch {batch}: {what}, {taught}, beside {peer}": Row(what, taught, peer)
        for peer in (_BEST, _PLAIN)
        for what, taught in _KINDS
    }
    rows = {name: row for name, row in rows.items() if wanted in name}
    if not rows:
        return []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = configuration(folder, student=student, batch=batch, device=device)
        mine, other = first_losses(config)
        if abs(mine - other) > _SAME_LOSS:
            raise SystemExit(f"the sides do not compute the same: {mine:.5f}, {other:.5f}")
        say(f"loss of the first step: ours {mine:.5f}, timm's {other:.5f}")
        configs = {_NONE: dataclasses.replace(config, loss=OBJECTIVES["none"]), _ONLINE: config}
        if any(row.taught == _STORED for row in rows.values()):
            write_targets(config, folder / "store")
            stored = {"source": (), "targets": (str(folder / "store"),)}
            configs[_STORED] = derive(config, teacher=stored)
        cost = cost_of(our_student(config), side=config.student.image_size, batch=2)
        work, peak = 3 * 2 * cost.gmacs, _peak_gflop_s(device)
        found = []
        for number, (name, row) in enumerate(rows.items(), start=1):
            sides = (
                partial(ours, configs[row.taught], resident=row.resident),
                partial(
                    theirs,
                    config,
                    best=row.peer == _BEST,
                    resident=row.resident,
                    alone=row.taught == _NONE,
                ),
            )
            said = measured(Case(name, *sides, row.peer, _AHEAD), rounds=rounds, seconds=seconds)
            said |= {"batch_size": batch, "gflop_of_an_image": work, "peak_gflop_s": peak}
            said["share_of_peak"] = said["ours_images_per_s"] * work / peak
            said["losses_of_first_step"] = [mine, other]
            if row.what == _WHOLE:
                said |= dict(zip(("ours_memory_mb", "peer_memory_mb"), map(_memory_mb, sides)))
            found.append(said)
            say(
                f"{number}/{len(rows)} {name}: {said['ours_images_per_s']:.0f} images/s, timm "
                f"{said['peer_images_per_s']:.0f}, ratio {said['ratio']:.2f}"
            )
        return found


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


def _memory_mb(make: Callable[[], Iterator[int]]) -> float:
    """The most memory [10**6 bytes] that three updates in a process of their own take: of the GPU,
    or of that process (not its workers)."""
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=_report_memory, args=(make, torch.get_num_threads(), answer))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("a side ended with an error in a process of its own; see above")
    return answer.get()


def _report_memory(make: Callable, threads: int, answer: Any) -> None:
    torch.set_num_threads(threads)
    multiprocessing.set_start_method("fork", force=True)  # for workers: as in any training
    side = make()
    for _ in range(3):
        next(side)
    # Not getrusage: what it tells begins with the memory of the process that started this one.
    status = Path("/proc/self/status").read_text()
    most = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    if torch.cuda.is_available():
        most = torch.cuda.max_memory_allocated()
    answer.put(most / 1e6)
    side.close()
