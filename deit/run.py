"""The wiring of a training run, from a configuration to a finished run folder."""

import os
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from deit import checkpoint
from deit.announce import announce, report
from deit.config import Config, to_dict
from deit.console import is_main_process, progress, say
from deit.datasets.loader import TrainLoader
from deit.datasets.splits import load_splits
from deit.disk import check_space, check_writable, finish_replacing, hold, write_json
from deit.engine import Job, Tally, train_epoch
from deit.environment import (
    choose_linear,
    compiled,
    create_accelerator,
    describe,
    peak_memory_mb,
    records_graphs,
)
from deit.errors import ConfigError, DataError, NumericsError, Stopped, out_of_memory
from deit.faults import reach
from deit.interruption import Interruption
from deit.launcher import STOPPING
from deit.metrics import agreement, topk_accuracy
from deit.mishaps import NumberWatch, check_memory, fit_memory, recomputes, understood
from deit.models.base import Base, base_of
from deit.models.layers import depths_of, hold_still
from deit.models.linear import use_onednn
from deit.models.masks import Held
from deit.models.saved import build_student
from deit.models.start import Found
from deit.models.student import has_two_heads
from deit.optim import WeightAverage, build_optimizer, layer_scales, lr_at
from deit.parts import Parts, State
from deit.prediction import answers_of
from deit.preparation import begin, facts_of, found_start, masks_of, settled
from deit.records import head_logits
from deit.restoring import (
    as_begun,
    check_best,
    check_same_run,
    restore,
    warn_of_another_machine,
)
from deit.saving import close_epoch, finish, save, space_of
from deit.sharding import divide, mesh_of, number_of_parts
from deit.summary import SUMMARY, print_summary, summary_of
from deit.teaching import Faculty
from deit.trackers import check_trackers, track, tracked
from deit.validation import validate


def train(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    arguments: list[str] | None = None,
) -> dict[str, Any]:
    """Train the student of a configuration and leave a run folder. Returns what its result.json
    holds.

    dry_run: one training and one evaluation step, nothing written.
    Raises the errors of deit.errors; everything a check can find is found before the first step.
    """
    config = validate(config)
    check_trackers(config)
    if not dry_run:
        checkpoint.check_folder(out, resume=resume)
    finished = checkpoint.result_of(out) if resume else None
    if not dry_run and finished is None:
        check_writable(out, option="--out")
    # A run that goes on has weights of its own: what it started from may be gone by now.
    begun = resume and bool(checkpoint.found(out))
    with ExitStack() as stack:
        guard = None
        if begun and finished is None and not dry_run and is_main_process():
            guard = stack.enter_context(hold(out, option="--out"))  # the work below takes a while
        found = None if begun else found_start(config)
        config = as_begun(config, out) if begun else settled(config, found)
        accelerator = create_accelerator(config.run, accumulate=config.optim.accumulate)
        config = config.replace(run={"linear": choose_linear(config.run, accelerator)})
        faculty = Faculty(config)
        parts = _furnish(config, out, accelerator, faculty, found, resumed=begun)
        stack.callback(parts.loader.close)
        environment = describe(accelerator, arguments or [])
        environment["teachers"] = faculty.class_orders
        announce(parts, environment)
        if finished is not None and not dry_run:
            check_same_run(parts, finished)
            check_best(parts)
            say(f"{out}: already complete after {finished['epochs']} epochs")
            return finished
        if not dry_run:
            check_space(out, space_of(parts), option="--out")
        check_memory(parts, faculty.answering)
        _ask_teachers(parts, faculty)
        if config.run.fit_memory:
            fit_memory(parts)
        if dry_run:
            _dry_run(parts)
            return asdict(parts.state)
        # Nothing was written so far; and every process has checked the folder before one fills it.
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            checkpoint.open_folder(out)
            if not begun:
                guard = stack.enter_context(hold(out, option="--out"))
                checkpoint.check_folder(out, resume=resume)  # another may have been quicker
            finish_replacing(out)
            parts.guard = guard
        accelerator.wait_for_everyone()
        interruption = stack.enter_context(Interruption(accelerator))
        stack.enter_context(understood(parts, lambda: interruption.noted))
        _begin(parts, environment, resume=resume)
        with tracked(accelerator, config, out):
            _fit(parts, interruption)
        result = finish(parts)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            told = summary_of(config, out, result)
            write_json(out / SUMMARY, told)
            print_summary(told)
        interruption.check(now=True)  # who called may have more to do, and should not
    return result


def parts_of(config: Config) -> Parts:
    """The parts of a run that is only to be looked at: as `train` builds them, teachers and stores
    checked, networks compiled if that is asked for; nothing is written, `out` is no folder.

    Raises the errors of deit.errors.
    """
    found = found_start(config)
    config = settled(config, found)
    accelerator = create_accelerator(config.run, accumulate=config.optim.accumulate)
    config = config.replace(run={"linear": choose_linear(config.run, accelerator)})
    faculty = Faculty(config)
    parts = _furnish(config, Path("nowhere"), accelerator, faculty, found)
    _ask_teachers(parts, faculty)
    return parts


def _ask_teachers(parts: Parts, faculty: Faculty) -> None:
    """Check teachers and stores, and have the networks compiled that stay."""
    parts.teacher_answers = faculty.check(parts.splits, parts.accelerator, parts.loader)
    parts.view_epochs = faculty.stored_epochs
    if parts.config.run.compile != "none" and parts.panel is not None:
        parts.panel.compile(parts.config.run.compile)  # not before: it was shown other batches


def _begin(parts: Parts, environment: dict[str, Any], *, resume: bool) -> None:
    """Go back to where the run was, and write down what it is and where it goes on."""
    out = parts.out
    first = not (out / checkpoint.CONFIG).is_file()
    if resume and not first and restore(parts):
        warn_of_another_machine(out, environment, parts.config)
    parts.accelerator.wait_for_everyone()
    if parts.accelerator.is_main_process:
        name = checkpoint.ENVIRONMENT if first else checkpoint.RESUMED
        write_json(out / checkpoint.CONFIG, to_dict(parts.config))
        # From the folder, above it: it moves with what lies around it, and holds no user's name.
        directory = os.path.relpath(Path.cwd(), out.resolve())
        above = all(part == ".." for part in Path(directory).parts)
        write_json(out / name, {**environment, "directory": directory if above else None})
        if parts.start_notes is not None:
            write_json(out / "start.json", parts.start_notes)


def _furnish(
    config: Config,
    out: Path,
    accelerator: Accelerator,
    faculty: Faculty,
    found: Found | None,
    *,
    resumed: bool = False,
) -> Parts:
    """Build every part of a run. found: what the student starts from; None: random weights.
    resumed: whether a checkpoint will bring weights and masks."""
    splits = load_splits(config.data)
    if len(splits.validation.labels) < accelerator.num_processes:
        raise DataError("data.validation_fraction: fewer validation images than processes")
    facts = facts_of(config, splits)
    loader, panel = faculty.load(splits, accelerator)
    _check_update(config, loader)
    config = config.replace(teacher={"layout": faculty.layouts})
    with torch.random.fork_rng():
        torch.manual_seed(config.run.seed)
        student = build_student(facts)
    notes = None if found is None else begin(student.network, found, config, facts)
    masks = None if resumed else masks_of(config, found, student.network)
    hold_still(student.network, config.optim.trained)
    student.still = config.optim.trained in ("heads", "adapters")
    if config.run.linear == "onednn":
        use_onednn(student)
    if config.run.recompute:
        _recompute(config, student.network)
    pieces = number_of_parts(config.run.shard, accelerator.num_processes)
    if pieces == 1:  # else no device is asked to hold it whole, not even for a moment
        student = student.to(accelerator.device)
    _check_student(config, student)
    average = None
    if config.optim.ema_epochs > 0:
        # Copied before Accelerate binds its own forward to the student.
        horizon = config.optim.ema_epochs * loader.steps_per_epoch
        average = WeightAverage(student, horizon=horizon, device=accelerator.device)
    if pieces > 1:
        mesh = mesh_of(pieces, accelerator.num_processes, accelerator.device, config.run.timeout)
        for model in (student, average.model) if average is not None else (student,):
            divide(model, mesh, compressed=config.run.gradient_compression == "bf16")
    held = None if masks is None else Held(masks, student.network)
    optimizer = build_optimizer(student, config.optim, _scales(config, student))
    if config.run.compile != "none":
        compiled(student, config.run.compile)
    student = accelerator.prepare_model(student, evaluation_mode=pieces > 1)  # then not in DDP too
    optimizer = accelerator.prepare_optimizer(optimizer)
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
        state=State(
            epoch=config.start.update // loader.steps_per_epoch,
            step=config.start.update,
            fingerprint=splits.fingerprint,
            targets=faculty.digests,
            teachers=faculty.weights,
        ),
        held=held,
        base=None if notes is None else _base_of(config, out, notes),
        start_notes=notes,
    )


def _base_of(config: Config, out: Path, notes: dict[str, Any]) -> Base | None:
    """What adapters that are trained alone belong to. notes: what `begin` gave."""
    if config.optim.trained != "adapters":
        return None
    return base_of(notes["source"], notes["weights"], config.start.kernel, out=out)


def _check_update(config: Config, loader: TrainLoader) -> None:
    """Refuse to begin behind the end. Raises ConfigError."""
    updates = config.optim.epochs * loader.steps_per_epoch
    if config.start.update >= updates:
        raise ConfigError(f"start.update = {config.start.update}: the run has {updates} updates")
    if late := [one for one in config.run.keep_updates if one > updates]:
        raise ConfigError(f"run.keep_updates = {late[0]}: the run has {updates} updates")


def _recompute(config: Config, network: nn.Module) -> None:
    """Have a network compute its blocks again in the backward pass. Raises ConfigError."""
    if not recomputes(network):
        raise ConfigError(
            f"run.recompute = True: {config.student.name} has no blocks that it could compute "
            "again; --optim.accumulate saves memory too"
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
        if out_of_memory(error):  # which says nothing of the size
            raise
        raise ConfigError(
            f"student.image_size = {side}: {name} cannot take images of this size "
            f"({str(error).splitlines()[0]})"
        ) from None


def _dry_run(parts: Parts) -> None:
    """One training epoch of one update and one evaluation step."""
    config = parts.config
    batches = parts.loader.epoch(0)
    first = (next(batches) for _ in range(config.optim.accumulate))
    tally = Tally(parts.accelerator, {})
    steps = parts.loader.steps_per_epoch
    for update in train_epoch(job_of(parts), first, tally, step=0, steps=steps):
        if not update.applied:
            raise NumericsError("the loss or gradient of the first update is not finite")
    number = max(config.run.evaluation_batch, parts.accelerator.num_processes)
    few = parts.splits.validation.select(slice(number))
    answers_of(parts.accelerator, parts.student, few, config, "dry run")
    loss = tally.means()["loss"]
    say(f"dry run: one update (loss {loss:.4f}) and one evaluation step; nothing written")


def job_of(parts: Parts) -> Job:
    """What the training loop needs of a run's parts."""
    return Job(
        accelerator=parts.accelerator,
        student=parts.student,
        teach=parts.panel,
        optimizer=parts.optimizer,
        average=parts.average,
        loss=parts.config.loss,
        optim=parts.config.optim,
        seed=parts.config.run.seed,
        graphs=records_graphs(parts.config.run),
        held=parts.held,
    )


def _fit(parts: Parts, interruption: Interruption) -> None:
    """Train, save, evaluate and log, epoch by epoch, from wherever the state is.

    Saved before the evaluation: a run that is killed there evaluates again, and trains nothing
    again. Raises Stopped, after a checkpoint, where a signal asks for it.
    """
    config, state, steps = parts.config, parts.state, parts.loader.steps_per_epoch
    while state.epoch < config.optim.epochs:
        tally = Tally(parts.accelerator, state.tally)
        speed = _train_rest(parts, tally, interruption)
        started = time.monotonic()
        state.epoch += 1
        last = lr_at(state.step - 1, optim=config.optim, steps_per_epoch=steps)
        row = {"epoch": state.epoch, "step": state.step, "train": {**tally.means(), "lr": last}}
        row |= speed
        if state.epoch % config.run.evaluate_every == 0 or state.epoch == config.optim.epochs:
            row["validation"] = _validate_heads(parts, interruption)
        state.tally = {}
        state.seconds += time.monotonic() - started
        row["seconds"] = state.seconds
        close_epoch(parts, row)
        track(parts.accelerator, row)
        report(row, config.optim.epochs, config.loss)


def _train_rest(parts: Parts, tally: Tally, interruption: Interruption) -> dict[str, Any]:
    """Train what is left of the epoch, with a checkpoint at its end; how fast that was."""
    config, state, loader = parts.config, parts.state, parts.loader
    epoch, steps = state.epoch, loader.steps_per_epoch
    begun = state.step - epoch * steps
    if begun == steps:
        return {}  # a resumed run that was evaluating
    views = epoch if parts.view_epochs is None else epoch % parts.view_epochs
    batches = progress(
        interruption.micro_batches(loader.epoch(views, done=begun), each=config.optim.accumulate),
        total=steps * config.optim.accumulate,
        done=begun * config.optim.accumulate,
        title=f"epoch {epoch + 1}/{config.optim.epochs}",
    )
    started, before = time.monotonic(), state.seconds
    interruption.begin()
    watch, ended, saved = NumberWatch(parts), False, True
    for update in train_epoch(job_of(parts), batches, tally, step=state.step, steps=steps):
        state.step += 1
        state.samples_seen += config.optim.batch_size
        state.seconds = before + time.monotonic() - started
        watch(state.step, update)
        reach("update")
        ended = state.step == (epoch + 1) * steps
        every = config.run.save_every
        regular = ended or (every is not None and state.step % every == 0)
        regular |= state.step in config.run.keep_updates
        signal = interruption.asked(now=ended)
        saved = bool(regular or signal)
        if saved:
            watch.settle()
            save(parts, tally, regular=regular)
        if signal in STOPPING:
            raise Stopped(signal)
    if not ended:  # a signal came before the next images
        if not saved:
            watch.settle()
            save(parts, tally, regular=False)
        raise Stopped(interruption.noted)
    trained_s, trained = state.seconds - before, (steps - begun) * config.optim.batch_size
    return {
        "images_per_s": trained / trained_s,
        "memory_mb": peak_memory_mb(parts.accelerator.device),
        "loader": _of_loader(loader, trained_s),
    }


def _of_loader(loader: TrainLoader, trained_s: float) -> dict[str, Any]:
    """Images/s of each stage (`reading`: of one worker) and the share of the time they took; both
    of the main process."""
    seconds = loader.stages.seconds()
    own = sum(took for stage, took in seconds.items() if stage != "reading")
    return {"share": own / trained_s, "images_per_s": loader.stages.rates()}


def _validate_heads(parts: Parts, interruption: Interruption) -> dict[str, float]:
    """Top-1 by head on the validation split, of the average too where there is one, and how often
    the fused (or only) head agrees with the teacher."""
    labels = parts.splits.validation.labels
    models = {"": parts.student}
    if parts.average is not None:
        models["average_"] = parts.average.model
    found: dict[str, float] = {}
    for prefix, model in models.items():
        interruption.begin()
        with interruption.at_once():
            outputs = answers_of(
                parts.accelerator,
                model,
                parts.splits.validation,
                parts.config,
                "evaluating",
                interruption=interruption,
            )
        heads = head_logits(outputs)
        heads.pop("fused_softmax", None)
        for name, logits in heads.items():
            found[f"{prefix}{name}_top1"] = topk_accuracy(logits, labels)
        if parts.teacher_answers is not None:
            fused = heads.get("fused", heads["class"]).argmax(dim=1)
            found[f"{prefix}agreement"] = agreement(fused, parts.teacher_answers)
    return found
