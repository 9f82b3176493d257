"""What it costs that a run can be trusted: of a training step, and of a checkpoint of DeiT-S."""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from deit.config.presets import LOSS_PRESETS
from deit.config.recipes.handwriting import digits
from deit.config.schema import RunConfig
from deit.config.student_section import StudentConfig
from deit.core.accelerator import environment_info, raise_malloc_threshold
from deit.core.console import info
from deit.core.filesystem import format_bytes
from deit.core.signals import GracefulStop
from deit.core.types import Batch
from deit.datasets.splits import load_splits
from deit.distill.build import build_accelerator, build_train_loader, model_info_from
from deit.distill.losses import distillation_loss
from deit.distill.run_teachers import RunTeachers
from deit.models.saved import build_student
from deit.training.loop import MetricAccumulator, StepContext, seed_torch, train_epoch
from deit.training.optimizer import EMA, build_optimizer, lr_at, set_lr
from deit.training.save import save_checkpoint
from deit.training.state import TrainingRun, TrainState


def job_of(name: str, side: int, batch: int) -> tuple[StepContext, list[Batch], TrainingRun]:
    """A student of CIFAR's or ImageNet's size, without a teacher, and batches of noise for it."""
    config = digits().replace(
        student=StudentConfig(name=name, image_size=side, patch_size=16 if side > 64 else 4),
        loss=LOSS_PRESETS["none"],
        optim={"batch_size": batch, "ema_epochs": 1.0},
        run={"device": "cpu"},
    )
    accelerator = build_accelerator(config.run)
    splits = load_splits(config.data)
    facts = model_info_from(config.student, config.views, splits)
    student = build_student(facts)
    average = EMA(student, horizon=100)
    optimizer = build_optimizer(student, config.optim)
    student, optimizer = accelerator.prepare(student, optimizer)
    loss, optim = config.loss, config.optim
    job = StepContext(accelerator, student, None, optimizer, average, loss, optim, 0)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, side, side, generator=generator)
    targets = torch.eye(10)[torch.arange(batch) % 10]
    places = torch.arange(batch)
    batches = [Batch(images, None, targets, places, 0, places)]
    loader = build_train_loader(config, splits, accelerator, teacher_size=None, for_teacher=False)
    run = TrainingRun(
        config=config,
        out=Path(),
        accelerator=accelerator,
        splits=splits,
        model_info=facts,
        teachers=RunTeachers(config.teacher, config.loss),
        ensemble=None,
        loader=loader,
        student=student,
        optimizer=optimizer,
        average=average,
        state=TrainState(),
    )
    return job, batches, run


def guarded(job: StepContext, batches: list[Batch], interruption: GracefulStop) -> Iterator[None]:
    """Updates as a run makes them: noticed where they are not finite, stopped by signals."""
    endless = (batches[0] for _ in range(10**9))
    for _ in train_epoch(job, endless, MetricAccumulator(job.accelerator, {}), step=0, steps=10**6):
        interruption.pending_signal()
        yield


def bare(job: StepContext, batches: list[Batch]) -> Iterator[None]:
    """The same updates and the same sums, believed to be finite."""
    tally, student, optimizer = MetricAccumulator(job.accelerator, {}), job.student, job.optimizer
    student.train()
    for step in range(10**9):
        seed_torch(job, step, 0)
        with job.accelerator.accumulate(student):
            outputs = student(batches[0].images)
            losses = distillation_loss(outputs, batches[0].targets, None, job.loss, epoch=0.0)
            job.accelerator.backward(losses["total"])
        tally.add(losses, outputs, batches[0], None)
        tally.commit(torch.tensor(True))
        set_lr(optimizer, lr_at(step, optim=job.optim, steps_per_epoch=10**6))
        optimizer.step()
        optimizer.zero_grad()
        job.average.update(job.accelerator.unwrap_model(student), applied=torch.tensor(True))
        yield


def in_turns(
    ours: Iterator[None], theirs: Iterator[None], rounds: int, seconds: float
) -> dict[str, Any]:
    """Seconds of an update of each side, in turns, and the share that ours takes more."""

    def turn(side: Iterator[None]) -> float:
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            next(side)
            done += 1
        return (time.perf_counter() - started) / done

    for side in (ours, theirs):
        turn(side)  # warm
    pairs = []
    for number in range(rounds):
        sides = (ours, theirs) if number % 2 else (theirs, ours)
        took = {id(side): turn(side) for side in sides}
        pairs.append((took[id(ours)], took[id(theirs)]))
    shares = [mine / other - 1 for mine, other in pairs]
    return {
        "guarded_s": statistics.median(mine for mine, _ in pairs),
        "bare_s": statistics.median(other for _, other in pairs),
        "cost": statistics.median(shares),
        "cost_range": [min(shares), max(shares)],
    }


def checkpoint_cost(rounds: int) -> dict[str, Any]:
    """Seconds of a whole checkpoint of DeiT-S at 224 px (weights, AdamW, average): written, synced,
    read back, verified, the one before the last removed."""
    job, batches, parts = job_of("deit_small", 224, 2)
    next(guarded(job, batches, GracefulStop(job.accelerator)))
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        parts.out = Path(folder)
        took = []
        for step in range(1, rounds + 3):
            parts.state.step = step
            started = time.perf_counter()
            save_checkpoint(parts, MetricAccumulator(job.accelerator, {}), in_hash_chain=True)
            took.append(time.perf_counter() - started)
        newest = max(parts.out.glob("checkpoint-*"))
        number = sum(path.stat().st_size for path in newest.iterdir())
    took = took[2:]  # the first two have nothing to remove
    return {"bytes": number, "seconds": statistics.median(took), "range": [min(took), max(took)]}


def main() -> None:
    """Print both; with --json also write them, with command, machine and commit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side (9)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a turn (4)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    raise_malloc_threshold()
    found: dict[str, Any] = {"steps": {}}
    for name, batch in (("deit_micro", 128), ("deit_tiny", 64)):
        sides: list[Callable[[StepContext, list[Batch]], Iterator[None]]] = []
        job, batches, _ = job_of(name, 32, batch)
        other, same, _ = job_of(name, 32, batch)
        sides = [guarded(job, batches, GracefulStop(job.accelerator)), bare(other, same)]
        row = in_turns(*sides, rounds=options.rounds, seconds=options.seconds)
        found["steps"][name] = row
        low, high = row["cost_range"]
        info(
            f"{name}, batch {batch}: an update takes {1000 * row['guarded_s']:.1f} ms, unguarded "
            f"{1000 * row['bare_s']:.1f} ms: {100 * row['cost']:+.1f} % "
            f"({100 * low:+.1f} to {100 * high:+.1f}, n = {options.rounds})"
        )
    row = found["checkpoint"] = checkpoint_cost(options.rounds)
    low, high = row["range"]
    info(
        f"checkpoint of DeiT-S with AdamW and average, {format_bytes(row['bytes'])}: "
        f"{row['seconds']:.2f} s ({low:.2f} to {high:.2f}, n = {options.rounds})"
    )
    if options.json is not None:
        found["command"] = " ".join(["python", "scripts/safety_overhead.py", *sys.argv[1:]])
        found["rounds"] = options.rounds
        found["environment"] = environment_info(build_accelerator(RunConfig(device="cpu")))
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        info(f"wrote {options.json}")


if __name__ == "__main__":
    main()
