"""Measure the overhead of safety checks in a training step, and the time of a checkpoint."""

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
from deit.config.sections.run import RunConfig
from deit.config.sections.student import StudentConfig
from deit.core.accelerator import environment_info, raise_malloc_threshold
from deit.core.console import info
from deit.core.filesystem import format_bytes
from deit.core.signals import GracefulStop
from deit.core.types import Batch
from deit.datasets.splits import load_splits
from deit.distill.build import build_accelerator, build_train_loader, model_info_from
from deit.distill.losses import distillation_loss
from deit.distill.run_teachers import RunTeachers
from deit.models.saved_student import student_from_info
from deit.training.loop import MetricAccumulator, StepContext, seed_torch, train_epoch
from deit.training.lr_schedule import lr_at, set_lr
from deit.training.optimizer import EMA, build_optimizer
from deit.training.save import save_checkpoint
from deit.training.state import TrainingRun, TrainState


def make_job(
    name: str, image_size: int, batch: int
) -> tuple[StepContext, list[Batch], TrainingRun]:
    """Return a student without a teacher, and a batch of noise for it. image_size: in pixels; above
    64 px the patches are those of ImageNet, otherwise those of CIFAR."""
    config = digits().replace(
        student=StudentConfig(
            name=name, image_size=image_size, patch_size=16 if image_size > 64 else 4
        ),
        loss=LOSS_PRESETS["none"],
        optim={"batch_size": batch, "ema_epochs": 1.0},
        run={"device": "cpu"},
    )
    accelerator = build_accelerator(config.run)
    splits = load_splits(config.data)
    model_info = model_info_from(config.student, config.views, splits)
    student = student_from_info(model_info)
    average = EMA(student, horizon=100)
    optimizer = build_optimizer(student, config.optim)
    student, optimizer = accelerator.prepare(student, optimizer)
    loss, optim = config.loss, config.optim
    job = StepContext(accelerator, student, None, optimizer, average, loss, optim, 0)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, image_size, image_size, generator=generator)
    targets = torch.eye(10)[torch.arange(batch) % 10]
    ids = torch.arange(batch)
    batches = [Batch(images, None, targets, ids, 0, ids)]
    loader = build_train_loader(
        config, splits, accelerator, teacher_size=None, with_teacher_images=False
    )
    run = TrainingRun(
        config=config,
        out=Path(),
        accelerator=accelerator,
        splits=splits,
        model_info=model_info,
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
    """Make the steps of a run, which detects nonfinite values and stops on signals."""
    endless = (batches[0] for _ in range(10**9))
    for _ in train_epoch(job, endless, MetricAccumulator(job.accelerator, {}), step=0, steps=10**6):
        interruption.pending_signal()
        yield


def bare(job: StepContext, batches: list[Batch]) -> Iterator[None]:
    """Make the same steps with the same metrics, without these checks."""
    metrics, student, optimizer = MetricAccumulator(job.accelerator, {}), job.student, job.optimizer
    student.train()
    for step in range(10**9):
        seed_torch(job, step, 0)
        with job.accelerator.accumulate(student):
            outputs = student(batches[0].images)
            losses = distillation_loss(outputs, batches[0].targets, None, job.loss, epoch=0.0)
            job.accelerator.backward(losses["loss"])
        metrics.add(losses, outputs, batches[0], None)
        metrics.commit(torch.tensor(True))
        set_lr(optimizer, lr_at(step, optim=job.optim, steps_per_epoch=10**6))
        optimizer.step()
        optimizer.zero_grad()
        job.average.update(job.accelerator.unwrap_model(student), applied=torch.tensor(True))
        yield


def interleaved_times(
    guarded_steps: Iterator[None], baseline: Iterator[None], rounds: int, seconds: float
) -> dict[str, Any]:
    """Return the seconds of a step with and without checks, measured in turns, and the overhead."""

    def turn(side: Iterator[None]) -> float:
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            next(side)
            done += 1
        return (time.perf_counter() - started) / done

    for side in (guarded_steps, baseline):
        turn(side)  # warm-up
    pairs = []
    for index in range(rounds):
        sides = (guarded_steps, baseline) if index % 2 else (baseline, guarded_steps)
        seconds_of = {id(side): turn(side) for side in sides}
        pairs.append((seconds_of[id(guarded_steps)], seconds_of[id(baseline)]))
    shares = [a / b - 1 for a, b in pairs]
    return {
        "guarded_s": statistics.median(a for a, _ in pairs),
        "bare_s": statistics.median(b for _, b in pairs),
        "cost": statistics.median(shares),
        "cost_range": [min(shares), max(shares)],
    }


def checkpoint_cost(rounds: int) -> dict[str, Any]:
    """Return the seconds of a checkpoint of DeiT-S at 224 px (weights, AdamW, average).

    The checkpoint is written, synced, read back and verified, and an old one is removed.
    """
    job, batches, run = make_job("deit_small", 224, 2)
    next(guarded(job, batches, GracefulStop(job.accelerator)))
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        run.out = Path(folder)
        times = []
        for step in range(1, rounds + 3):
            run.state.step = step
            started = time.perf_counter()
            save_checkpoint(run, MetricAccumulator(job.accelerator, {}), in_hash_chain=True)
            times.append(time.perf_counter() - started)
        newest = max(run.out.glob("checkpoint-*"))
        num_bytes = sum(path.stat().st_size for path in newest.iterdir())
    times = times[2:]  # the first two have nothing to remove
    return {
        "bytes": num_bytes,
        "seconds": statistics.median(times),
        "range": [min(times), max(times)],
    }


def main() -> None:
    """Print both results. --json writes them with command, machine and commit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side (default: 9)")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="length of a turn in seconds (default: 4)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    raise_malloc_threshold()
    results: dict[str, Any] = {"steps": {}}
    for name, batch in (("deit_micro", 128), ("deit_tiny", 64)):
        iterators: list[Callable[[StepContext, list[Batch]], Iterator[None]]] = []
        job, batches, _ = make_job(name, 32, batch)
        bare_job, bare_batches, _ = make_job(name, 32, batch)
        iterators = [
            guarded(job, batches, GracefulStop(job.accelerator)),
            bare(bare_job, bare_batches),
        ]
        row = interleaved_times(*iterators, rounds=options.rounds, seconds=options.seconds)
        results["steps"][name] = row
        low, high = row["cost_range"]
        info(
            f"{name}, batch {batch}: a step takes {1000 * row['guarded_s']:.1f} ms, without checks "
            f"{1000 * row['bare_s']:.1f} ms: {100 * row['cost']:+.1f} % "
            f"({100 * low:+.1f} to {100 * high:+.1f}, n = {options.rounds})"
        )
    row = results["checkpoint"] = checkpoint_cost(options.rounds)
    low, high = row["range"]
    info(
        f"checkpoint of DeiT-S with AdamW and average, {format_bytes(row['bytes'])}: "
        f"{row['seconds']:.2f} s ({low:.2f} to {high:.2f}, n = {options.rounds})"
    )
    if options.json is not None:
        results["command"] = " ".join(["python", "scripts/safety_overhead.py", *sys.argv[1:]])
        results["rounds"] = options.rounds
        results["environment"] = environment_info(build_accelerator(RunConfig(device="cpu")))
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        info(f"wrote {options.json}")


if __name__ == "__main__":
    main()
