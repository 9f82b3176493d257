"""The wiring of a training run, from a configuration to a finished run folder."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from deit.config.schema import Config, to_dict
from deit.config.validation import validate
from deit.core import run_folder
from deit.core.accelerator import (
    environment_info,
    peak_memory_mb,
    uses_cuda_graphs,
)
from deit.core.console import info, is_main_process, progress
from deit.core.errors import (
    NumericsError,
    StoppedBySignal,
)
from deit.core.fault_injection import fault_point
from deit.core.filesystem import check_space, check_writable, clean_leftovers, lock_dir, write_json
from deit.core.metrics import agreement, topk_accuracy
from deit.core.parent_process import STOPPING
from deit.core.signals import GracefulStop
from deit.core.types import logits_by_head
from deit.datasets.loader import TrainLoader
from deit.distill.build import build_accelerator
from deit.distill.inference import predict_split
from deit.distill.run_teachers import RunTeachers
from deit.distill.student_init import load_init_weights, with_init_normalization
from deit.models.onednn_linear import resolve_linear_backend
from deit.training.build import build, check_run_teachers
from deit.training.loop import MetricAccumulator, StepContext, train_epoch
from deit.training.memory import check_memory, find_micro_batch
from deit.training.nonfinite import NonFiniteMonitor
from deit.training.optimizer import lr_at
from deit.training.progress_log import log_epoch, log_setup
from deit.training.resume import (
    check_best,
    check_same_run,
    resume_run,
    warn_if_not_reproducible,
    with_normalization_of,
)
from deit.training.save import finish_epoch, required_bytes, save_checkpoint, write_result
from deit.training.state import TrainingRun
from deit.training.summary import SUMMARY, print_summary, summary_of
from deit.training.trackers import check_trackers, track, tracked
from deit.training.translate_errors import translate_errors


class _Beginning(NamedTuple):
    """How a call of `train` begins: with a new run, one to resume, or a finished one.

    finished: the content of its result.json, None where it is not finished.
    """

    resuming: bool
    finished: dict[str, Any] | None


def train(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Train the student of a configuration and write a run folder.

    resume: continue the run in the folder from its latest valid checkpoint. dry_run: one training
    and one evaluation step; nothing is written. command: for environment.json.
    Returns the content of result.json; of a dry run, the state after its step.
    Raises the errors of deit.core.errors; everything a check can find is found before the first
    step.
    """
    config, out = validate(config), Path(out)
    beginning = _beginning(config, out, resume=resume, dry_run=dry_run)
    with ExitStack() as stack:
        waits = beginning.resuming and beginning.finished is None and not dry_run
        lock = _lock(stack, out) if waits else None  # what follows takes a while
        run, teachers, environment = _build(config, out, beginning, command)
        stack.callback(run.loader.close)
        if beginning.finished is not None and not dry_run:
            return _check_finished(run, beginning.finished)
        _check_before_training(run, teachers, dry_run=dry_run)
        if dry_run:
            _dry_run(run)
            return asdict(run.state)
        _open_folder(run, stack, lock, beginning, resume=resume)
        interruption = stack.enter_context(GracefulStop(run.accelerator))
        stack.enter_context(translate_errors(run, lambda: interruption.noted))
        _restore_and_record(run, environment, resume=resume)
        with tracked(run.accelerator, run.config, out):
            _train_epochs(run, interruption)
        result = _finish(run)
        interruption.raise_if_stopped(now=True)  # the caller may have more to do, and should not
    return result


def _beginning(config: Config, out: Path, *, resume: bool, dry_run: bool) -> _Beginning:
    """Check what needs nothing built. Raises the errors of deit.core.errors."""
    check_trackers(config)
    if not dry_run:
        run_folder.check_run_dir(out, resume=resume)
    finished = run_folder.read_result(out) if resume else None
    if not dry_run and finished is None:
        check_writable(out, option="--out")
    return _Beginning(resume and bool(run_folder.list_checkpoints(out)), finished)


def _lock(stack: ExitStack, out: Path) -> Callable[[], None] | None:
    """Lock the folder until the end, in the main process only. Return what checks the lock."""
    return stack.enter_context(lock_dir(out, option="--out")) if is_main_process() else None


def _build(
    config: Config, out: Path, beginning: _Beginning, command: str
) -> tuple[TrainingRun, RunTeachers, dict[str, Any]]:
    """Resolve every choice of the configuration, build the run, and log both."""
    # A resumed run has weights of its own: the ones it was initialized with may be gone.
    init_weights = None if beginning.resuming else load_init_weights(config)
    if beginning.resuming:
        config = with_normalization_of(config, out)
    else:
        config = with_init_normalization(config, init_weights)
    accelerator = build_accelerator(config.run, grad_accum_steps=config.optim.grad_accum_steps)
    config = config.replace(run={"linear_backend": resolve_linear_backend(config.run, accelerator)})
    teachers = RunTeachers(config)
    run = build(config, out, accelerator, teachers, init_weights, resumed=beginning.resuming)
    environment = environment_info(accelerator, command)
    environment["teachers"] = teachers.class_orders
    log_setup(run, environment)
    return run, teachers, environment


def _check_finished(run: TrainingRun, finished: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a finished run. Raises where data, teachers or best weights changed."""
    check_same_run(run, finished)
    check_best(run)
    info(f"{run.out}: already complete after {finished['epochs']} epochs")
    return finished


def _check_before_training(run: TrainingRun, teachers: RunTeachers, *, dry_run: bool) -> None:
    """Check disk, memory and teachers; find a micro-batch that fits where that is asked for."""
    if not dry_run:
        check_space(run.out, required_bytes(run), option="--out")
    check_memory(run, teachers.answering)
    check_run_teachers(run, teachers)
    if run.config.run.auto_micro_batch:
        find_micro_batch(run)


def _open_folder(
    run: TrainingRun,
    stack: ExitStack,
    lock: Callable[[], None] | None,
    beginning: _Beginning,
    *,
    resume: bool,
) -> None:
    """Create the folder and lock it. lock: that of a run to resume, which is locked already."""
    # Nothing was written so far; and every process has checked the folder before one fills it.
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        run_folder.create_run_dir(run.out)
        if not beginning.resuming:
            lock = _lock(stack, run.out)
            run_folder.check_run_dir(run.out, resume=resume)  # another may have been quicker
        clean_leftovers(run.out)
        run.check_lock = lock
    run.accelerator.wait_for_everyone()


def _finish(run: TrainingRun) -> dict[str, Any]:
    """Write result and summary; return the result."""
    result = write_result(run)
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        summary = summary_of(run.config, run.out, result)
        write_json(run.out / SUMMARY, summary)
        print_summary(summary)
    return result


def _restore_and_record(run: TrainingRun, environment: dict[str, Any], *, resume: bool) -> None:
    """Go back to where the run was, and write down what it is and where it goes on."""
    out = run.out
    first = not (out / run_folder.CONFIG).is_file()
    if resume and not first and resume_run(run):
        warn_if_not_reproducible(out, environment, run.config)
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        name = run_folder.ENVIRONMENT if first else run_folder.RESUMED
        write_json(out / run_folder.CONFIG, to_dict(run.config))
        # From the folder, above it: it moves with what lies around it, and holds no user's name.
        directory = os.path.relpath(Path.cwd(), out.resolve())
        above = all(part == ".." for part in Path(directory).parts)
        write_json(out / name, {**environment, "directory": directory if above else None})
        if run.init_report is not None:
            write_json(out / "init.json", run.init_report)


def _dry_run(run: TrainingRun) -> None:
    """One training epoch of one update and one evaluation step."""
    config = run.config
    batches = run.loader.epoch(0)
    first = (next(batches) for _ in range(config.optim.grad_accum_steps))
    tally = MetricAccumulator(run.accelerator, {})
    steps = run.loader.steps_per_epoch
    for update in train_epoch(step_context(run), first, tally, step=0, steps=steps):
        if not update.applied:
            raise NumericsError("the loss or gradient of the first update is not finite")
    number = max(config.run.eval_batch_size, run.accelerator.num_processes)
    few = run.splits.validation.select(slice(number))
    predict_split(run.accelerator, run.student, few, config, "dry run")
    loss = tally.compute()["loss"]
    info(f"dry run: one update (loss {loss:.4f}) and one evaluation step; nothing written")


def step_context(run: TrainingRun) -> StepContext:
    """What the training loop needs of a run's parts."""
    return StepContext(
        accelerator=run.accelerator,
        student=run.student,
        teacher=run.panel,
        optimizer=run.optimizer,
        average=run.average,
        loss=run.config.loss,
        optim=run.config.optim,
        seed=run.config.run.seed,
        cuda_graphs=uses_cuda_graphs(run.config.run.compile),
        masks=run.masks,
    )


def _train_epochs(run: TrainingRun, interruption: GracefulStop) -> None:
    """Train, save, evaluate and log, epoch by epoch, from wherever the state is.

    Saved before the evaluation: a run that is killed there evaluates again, and trains nothing
    again. Raises Stopped, after a checkpoint, where a signal asks for it.
    """
    config, state, steps = run.config, run.state, run.loader.steps_per_epoch
    while state.epoch < config.optim.epochs:
        tally = MetricAccumulator(run.accelerator, state.metric_sums)
        speed = _train_epoch(run, tally, interruption)
        started = time.monotonic()
        state.epoch += 1
        last = lr_at(state.step - 1, optim=config.optim, steps_per_epoch=steps)
        row = {"epoch": state.epoch, "step": state.step, "train": {**tally.compute(), "lr": last}}
        row |= speed
        if state.epoch % config.run.eval_every_epochs == 0 or state.epoch == config.optim.epochs:
            row["validation"] = _validate(run, interruption)
        state.metric_sums = {}
        state.seconds += time.monotonic() - started
        row["seconds"] = state.seconds
        finish_epoch(run, row)
        track(run.accelerator, row)
        log_epoch(row, config.optim.epochs, config.loss)


def _train_epoch(
    run: TrainingRun, tally: MetricAccumulator, interruption: GracefulStop
) -> dict[str, Any]:
    """Train what is left of the epoch, with a checkpoint at its end; how fast that was."""
    config, state, loader = run.config, run.state, run.loader
    epoch, steps = state.epoch, loader.steps_per_epoch
    resuming = state.step - epoch * steps
    if resuming == steps:
        return {}  # a resumed run that was evaluating
    views = epoch if run.num_view_epochs is None else epoch % run.num_view_epochs
    batches = progress(
        interruption.micro_batches(
            loader.epoch(views, done=resuming), each=config.optim.grad_accum_steps
        ),
        total=steps * config.optim.grad_accum_steps,
        done=resuming * config.optim.grad_accum_steps,
        title=f"epoch {epoch + 1}/{config.optim.epochs}",
    )
    started, before = time.monotonic(), state.seconds
    interruption.reset_timing()
    watch, ended, saved = NonFiniteMonitor(run), False, True
    for update in train_epoch(step_context(run), batches, tally, step=state.step, steps=steps):
        state.step += 1
        state.samples_seen += config.optim.batch_size
        state.seconds = before + time.monotonic() - started
        watch(state.step, update)
        fault_point("update")
        ended = state.step == (epoch + 1) * steps
        every = config.run.save_every_steps
        regular = ended or (every is not None and state.step % every == 0)
        regular |= state.step in config.run.keep_steps
        signal = interruption.pending_signal(now=ended)
        saved = bool(regular or signal)
        if saved:
            watch.flush()
            save_checkpoint(run, tally, in_hash_chain=regular)
        if signal in STOPPING:
            raise StoppedBySignal(signal)
    if not ended:  # a signal came before the next images
        if not saved:
            watch.flush()
            save_checkpoint(run, tally, in_hash_chain=False)
        raise StoppedBySignal(interruption.noted)
    trained_s, trained = state.seconds - before, (steps - resuming) * config.optim.batch_size
    return {
        "images_per_s": trained / trained_s,
        "memory_mb": peak_memory_mb(run.accelerator.device),
        "loader": _of_loader(loader, trained_s),
    }


def _of_loader(loader: TrainLoader, trained_s: float) -> dict[str, Any]:
    """Images/s of each stage (`reading`: of one worker) and the share of the time they took; both
    of the main process."""
    seconds = loader.stages.seconds()
    own = sum(took for stage, took in seconds.items() if stage != "reading")
    return {"share": own / trained_s, "images_per_s": loader.stages.rates()}


def _validate(run: TrainingRun, interruption: GracefulStop) -> dict[str, float]:
    """Top-1 by head on the validation split, of the average too where there is one, and how often
    the fused (or only) head agrees with the teacher."""
    labels = run.splits.validation.labels
    models = {"": run.student}
    if run.average is not None:
        models["average_"] = run.average.model
    found: dict[str, float] = {}
    for prefix, model in models.items():
        interruption.reset_timing()
        with interruption.interruptible():
            outputs = predict_split(
                run.accelerator,
                model,
                run.splits.validation,
                run.config,
                "evaluating",
                interruption=interruption,
            )
        heads = logits_by_head(outputs)
        heads.pop("fused_softmax", None)
        for name, logits in heads.items():
            found[f"{prefix}{name}_top1"] = topk_accuracy(logits, labels)
        if run.teacher_predictions is not None:
            fused = heads.get("fused", heads["class"]).argmax(dim=1)
            found[f"{prefix}agreement"] = agreement(fused, run.teacher_predictions)
    return found
