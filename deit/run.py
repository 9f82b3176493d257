"""The wiring of a training run, from a configuration to a finished run folder."""

import math
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from deit import checkpoint
from deit.announce import announce, report
from deit.config import Config, to_dict
from deit.console import clock, progress, say
from deit.datasets.loader import TrainLoader
from deit.datasets.splits import load_splits
from deit.engine import Job, train_epoch
from deit.environment import create_accelerator, describe
from deit.errors import ConfigError, DataError, NumericsError
from deit.metrics import agreement, topk_accuracy
from deit.models.layers import depths_of, hold_still
from deit.models.saved import build_student
from deit.models.start import Found
from deit.models.student import has_two_heads
from deit.optim import WeightAverage, build_optimizer, layer_scales
from deit.parts import Parts, State
from deit.prediction import answers_of
from deit.preparation import begin, facts_of, found_start, settled
from deit.records import head_logits
from deit.saving import as_begun, restore, save
from deit.teaching import Faculty
from deit.validation import validate


def train(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    arguments: list[str] | None = None,
) -> dict[str, Any]:
    """Train the student of a configuration and leave a run folder. Returns its state.

    dry_run: one training and one evaluation step, nothing written.
    Raises the errors of deit.errors; everything a check can find is found before the first step.
    """
    config = validate(config)
    if not dry_run:
        checkpoint.check_folder(out, resume=resume)
        checkpoint.check_writable(out, option="--out")
    # A run that goes on has weights of its own: what it started from may be gone by now.
    begun = resume and (out / "last").is_dir()
    found = None if begun else found_start(config)
    config = as_begun(config, out) if begun else settled(config, found)
    accelerator = create_accelerator(config.run, accumulate=config.optim.accumulate)
    faculty = Faculty(config)
    parts = _furnish(config, out, accelerator, faculty, found)
    environment = describe(accelerator, arguments or [])
    announce(parts, environment)
    parts.teacher_answers = faculty.check(parts.splits, accelerator, parts.loader)
    parts.view_epochs = faculty.stored_epochs
    if dry_run:
        _dry_run(parts)
        return asdict(parts.state)
    # Nothing was written so far; and every process has checked the folder before one fills it.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        checkpoint.open_folder(out)
    accelerator.wait_for_everyone()
    if resume:
        restore(parts)
    if accelerator.is_main_process and parts.state.epoch < config.optim.epochs:
        checkpoint.write_json(out / checkpoint.CONFIG, to_dict(config))
        first = "environment.json" if parts.state.epoch == 0 else "environment-resumed.json"
        checkpoint.write_json(out / first, environment)
        if parts.start_notes is not None:
            checkpoint.write_json(out / "start.json", parts.start_notes)
    _fit(parts)
    say(
        f"finished in {clock(parts.state.seconds)}; "
        f"next: python evaluate_deit.py {shlex.quote(str(out))}"
    )
    accelerator.wait_for_everyone()
    return asdict(parts.state)


def _furnish(
    config: Config, out: Path, accelerator: Accelerator, faculty: Faculty, found: Found | None
) -> Parts:
    """Build every part of a run. found: what the student starts from; None: random weights."""
    splits = load_splits(config.data)
    if len(splits.validation.labels) < accelerator.num_processes:
        raise DataError("data.validation_fraction: fewer validation images than processes")
    facts = facts_of(config, splits)
    loader, panel = faculty.load(splits, accelerator)
    with torch.random.fork_rng():
        torch.manual_seed(config.run.seed)
        student = build_student(facts)
    notes = None if found is None else begin(student.network, found, config, facts)
    hold_still(student.network, config.optim.trained)
    student.still = config.optim.trained == "heads"
    student = student.to(accelerator.device)
    _check_student(config, student)
    average = None
    if config.optim.ema_epochs > 0:
        # Copied before Accelerate binds its own forward to the student.
        horizon = config.optim.ema_epochs * loader.steps_per_epoch
        average = WeightAverage(student, horizon=horizon)
    optimizer = build_optimizer(student, config.optim, _scales(config, student))
    student, optimizer = accelerator.prepare(student, optimizer)
    return Parts(
        config=config,
        out=out,
        accelerator=accelerator,
        splits=splits,
        facts=facts,
        panel=panel,
        loader=loader,
        student=student,
        optimizer=optimizer,
        average=average,
        state=State(fingerprint=splits.fingerprint, targets=faculty.digests),
        start_notes=notes,
    )


def _scales(config: Config, student: nn.Module) -> dict[str, float] | None:
    """The factor of the learning rate of each of the student's parameters; None: 1 for all."""
    if config.optim.layer_decay == 1:
        return None
    scales = layer_scales(depths_of(student.network), config.optim.layer_decay)
    return {f"network.{name}": scale for name, scale in scales.items()}


def _check_student(config: Config, student: nn.Module) -> None:
    """What the name of a timm model cannot promise, the built network must show."""
    name, side = config.student.name, config.student.image_size
    taught = config.loss.kind != "none" and config.loss.through == "distillation"
    if taught and not has_two_heads(student.network):
        raise ConfigError(f"student.name = {name!r}: has no distillation head to distil through")
    images = torch.zeros(2, 3, side, side, device=next(student.parameters()).device)
    try:
        with torch.no_grad():
            student.eval()(images)
    except RuntimeError as error:
        raise ConfigError(
            f"student.image_size = {side}: {name} cannot take images of this size "
            f"({str(error).splitlines()[0]})"
        ) from None


def _dry_run(parts: Parts) -> None:
    """One training epoch of one update and one evaluation step."""
    config = parts.config
    batches = parts.loader.epoch(0)
    first = (next(batches) for _ in range(config.optim.accumulate))
    means = train_epoch(_job(parts), first, step=0, steps=parts.loader.steps_per_epoch)
    number = max(config.run.evaluation_batch, parts.accelerator.num_processes)
    few = parts.splits.validation.select(slice(number))
    answers_of(parts.accelerator, parts.student, few, config, "dry run")
    say(f"dry run: one update (loss {means['loss']:.4f}) and one evaluation step; nothing written")


def _job(parts: Parts) -> Job:
    return Job(
        accelerator=parts.accelerator,
        student=parts.student,
        teach=parts.panel,
        optimizer=parts.optimizer,
        average=parts.average,
        loss=parts.config.loss,
        optim=parts.config.optim,
        seed=parts.config.run.seed,
    )


def _fit(parts: Parts) -> None:
    """Train, evaluate, log and save, epoch by epoch."""
    config, state, loader = parts.config, parts.state, parts.loader
    epochs, steps = config.optim.epochs, loader.steps_per_epoch
    if state.epoch == epochs:
        say(f"{parts.out}: already complete after {epochs} epochs")
    for epoch in range(state.epoch, epochs):
        started = time.monotonic()
        batches = progress(
            loader.epoch(epoch if parts.view_epochs is None else epoch % parts.view_epochs),
            total=steps * config.optim.accumulate,
            title=f"epoch {epoch + 1}/{epochs}",
        )
        means = train_epoch(_job(parts), batches, step=state.step, steps=steps)
        trained_s = time.monotonic() - started
        if not math.isfinite(means["loss"]):
            raise NumericsError(
                f"epoch {epoch + 1}: the training loss is {means['loss']}; {parts.out} keeps the "
                f"{epoch} epochs before; a lower optim.lr or optim.clip_norm 1 usually helps"
            )
        state.epoch, state.step = epoch + 1, state.step + steps
        state.samples_seen += steps * config.optim.batch_size
        row = {"epoch": state.epoch, "step": state.step, "train": means}
        row["images_per_s"] = steps * config.optim.batch_size / trained_s
        row["loader"] = _of_loader(loader, trained_s)
        due = state.epoch % config.run.evaluate_every == 0 or state.epoch == epochs
        if due:
            row["validation"] = _validate_heads(parts)
        state.seconds += time.monotonic() - started
        row["seconds"] = state.seconds
        save(parts, row)
        report(row, epochs, config.loss)


def _of_loader(loader: TrainLoader, trained_s: float) -> dict[str, Any]:
    """Images/s of each stage (`reading`: of one worker) and the share of the time they took; both
    of the main process."""
    seconds = loader.stages.seconds()
    own = sum(took for stage, took in seconds.items() if stage != "reading")
    return {"share": own / trained_s, "images_per_s": loader.stages.rates()}


def _validate_heads(parts: Parts) -> dict[str, float]:
    """Top-1 by head on the validation split, of the average too where there is one, and how often
    the fused (or only) head agrees with the teacher."""
    labels = parts.splits.validation.labels
    models = {"": parts.student}
    if parts.average is not None:
        models["average_"] = parts.average.model
    found: dict[str, float] = {}
    for prefix, model in models.items():
        outputs = answers_of(
            parts.accelerator, model, parts.splits.validation, parts.config, "evaluating"
        )
        heads = head_logits(outputs)
        heads.pop("fused_softmax", None)
        for name, logits in heads.items():
            found[f"{prefix}{name}_top1"] = topk_accuracy(logits, labels)
        if parts.teacher_answers is not None:
            fused = heads.get("fused", heads["class"]).argmax(dim=1)
            found[f"{prefix}agreement"] = agreement(fused, parts.teacher_answers)
    return found
