"""The epochs of a run: train, save, evaluate and log each."""

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from deit.core.accelerator import peak_memory_mb, uses_cuda_graphs
from deit.core.console import info, progress
from deit.core.errors import ConfigError, NumericsError, StoppedBySignal
from deit.core.fault_injection import fault_point
from deit.core.metrics import agreement, topk_accuracy
from deit.core.parent_process import STOPPING
from deit.core.signals import GracefulStop
from deit.core.types import logits_by_head
from deit.datasets.loader import TrainLoader
from deit.distill.inference import predict_split
from deit.training.loop import MetricAccumulator, StepContext, train_epoch
from deit.training.lr_schedule import lr_at
from deit.training.nonfinite import NonFiniteMonitor
from deit.training.progress_log import log_epoch
from deit.training.save import finish_epoch, save_checkpoint
from deit.training.state import TrainingRun
from deit.training.trackers import track

EpochCallback = Callable[[dict[str, Any]], object]
"""Called after each epoch with a copy of its row of metrics.jsonl; the result is ignored."""


def check_callbacks(callbacks: Sequence[EpochCallback]) -> None:
    """Raise ConfigError unless these are functions in a sequence."""
    is_sequence = isinstance(callbacks, Sequence) and not isinstance(callbacks, str)
    if not is_sequence or not all(map(callable, callbacks)):
        raise ConfigError(
            f"callbacks = {callbacks!r}: should be a list of functions of a dict, such as [print]"
        )


def train_epochs(
    run: TrainingRun, interruption: GracefulStop, callbacks: Sequence[EpochCallback] = ()
) -> None:
    """Train from the epoch and step of the run's state to the last epoch.

    callbacks: called in the main process, when the epoch is saved. An error that one raises ends
    the training; it can be resumed.

    The checkpoint of an epoch is written before its evaluation: a run that is killed while it
    evaluates repeats the evaluation, not the training. Raises StoppedBySignal after a checkpoint,
    and NumericsError after too many steps in a row whose loss or gradient is not finite.
    """
    config, state, steps = run.config, run.state, run.loader.steps_per_epoch
    before = (state.step / steps, state.seconds)
    while state.epoch < config.optim.epochs:
        metrics = MetricAccumulator(run.accelerator, state.metric_sums)
        speed = _train_epoch(run, metrics, interruption)
        started = time.monotonic()
        state.epoch += 1
        lr = lr_at(state.step - 1, optim=config.optim, steps_per_epoch=steps)
        row = {"epoch": state.epoch, "step": state.step, "train": {**metrics.compute(), "lr": lr}}
        row |= speed
        if state.epoch % config.run.eval_every_epochs == 0 or state.epoch == config.optim.epochs:
            row["validation"] = _validate(run, interruption)
        state.metric_sums = {}
        state.seconds += time.monotonic() - started
        row["seconds"] = state.seconds
        finish_epoch(run, row)
        track(run.accelerator, row)
        log_epoch(row, config.optim.epochs, config.loss, before=before)
        if run.accelerator.is_main_process:
            run.in_callback = True
            for callback in callbacks:
                callback(copy.deepcopy(row))
            run.in_callback = False


def step_context(run: TrainingRun) -> StepContext:
    """Return what the training loop needs of a run.

    Example:
        >>> from itertools import islice
        >>> from deit.config.recipes import find_recipe
        >>> from deit.core.console import quiet
        >>> from deit.training.build import build_run
        >>> with quiet():
        ...     run = build_run(find_recipe("digits"))
        >>> metrics, batches = MetricAccumulator(run.accelerator, {}), run.loader.epoch(0)
        >>> batches = islice(batches, 2)
        >>> results = train_epoch(step_context(run), batches, metrics, step=0, steps=40)
        >>> [bool(result.applied) for result in results]
        [True, True]
        >>> metrics.compute()["loss"] > 0
        True
    """
    return StepContext(
        accelerator=run.accelerator,
        student=run.student,
        teacher=run.ensemble,
        optimizer=run.optimizer,
        average=run.average,
        loss=run.config.loss,
        optim=run.config.optim,
        seed=run.config.run.seed,
        cuda_graphs=uses_cuda_graphs(run.config.run.compile),
        masks=run.masks,
    )


def _train_epoch(
    run: TrainingRun, metrics: MetricAccumulator, interruption: GracefulStop
) -> dict[str, Any]:
    """Train the rest of an epoch, with a checkpoint at its end; return speed and memory."""
    config, state, loader = run.config, run.state, run.loader
    epoch, steps = state.epoch, loader.steps_per_epoch
    steps_done = state.step - epoch * steps
    if steps_done == steps:
        return {}  # the run was stopped while it evaluated
    view_epoch = epoch if run.num_view_epochs is None else epoch % run.num_view_epochs
    accumulate = config.optim.grad_accum_steps
    batches = progress(
        interruption.micro_batches(
            loader.epoch(view_epoch, start_step=steps_done), per_step=accumulate
        ),
        total=steps * accumulate,
        done=steps_done * accumulate,
        title=f"epoch {epoch + 1}/{config.optim.epochs}",
    )
    started, seconds_before = time.monotonic(), state.seconds
    interruption.reset_timing()
    monitor, ended, saved = NonFiniteMonitor(run), False, True
    with closing(batches):  # also ends the progress bar while a traceback refers to it
        for result in train_epoch(
            step_context(run), batches, metrics, step=state.step, steps=steps
        ):
            state.step += 1
            state.samples_seen += config.optim.batch_size
            state.seconds = seconds_before + time.monotonic() - started
            monitor(state.step, result)
            fault_point("step")
            ended = state.step == (epoch + 1) * steps
            every = config.run.save_every_steps
            regular = ended or (every is not None and state.step % every == 0)
            regular |= state.step in config.run.keep_steps
            signal = interruption.pending_signal(now=ended)
            saved = bool(regular or signal)
            if saved:
                monitor.flush()
                save_checkpoint(run, metrics, in_hash_chain=regular)
            if signal in STOPPING:
                raise StoppedBySignal(signal)
    if not ended:  # a signal arrived while the next images were read
        if not saved:
            monitor.flush()
            save_checkpoint(run, metrics, in_hash_chain=False)
        raise StoppedBySignal(interruption.received)
    trained_s = state.seconds - seconds_before
    return {
        "images_per_s": (steps - steps_done) * config.optim.batch_size / trained_s,
        "memory_mb": peak_memory_mb(run.accelerator.device),
        "loader": _loader_speed(loader, trained_s),
    }


def _loader_speed(loader: TrainLoader, trained_s: float) -> dict[str, Any]:
    """Return images/s of each loader stage (`reading`: of one worker) and the share of the time
    that they took, in the main process."""
    seconds = loader.stages.seconds()
    in_main = sum(took for stage, took in seconds.items() if stage != "reading")
    return {"share": in_main / trained_s, "images_per_s": loader.stages.rates()}


def _validate(run: TrainingRun, interruption: GracefulStop) -> dict[str, float]:
    """Return top-1 on the validation split by head, of the EMA as well if there is one, and the
    agreement of the fused (or only) head with the teacher."""
    labels = run.splits.validation.labels
    models = {"": run.student}
    if run.average is not None:
        models["average_"] = run.average.model
    results: dict[str, float] = {}
    for prefix, model in models.items():
        interruption.reset_timing()
        with interruption.interruptible():
            outputs = predict_split(
                run.accelerator,
                model,
                run.splits.validation,
                run.config.evaluation,
                "evaluating",
                interruption=interruption,
            )
        heads = logits_by_head(outputs)
        heads.pop("fused_softmax", None)
        for name, logits in heads.items():
            results[f"{prefix}{name}_top1"] = topk_accuracy(logits, labels)
        if run.teacher_predictions is not None:
            fused = heads.get("fused", heads["class"]).argmax(dim=1)
            results[f"{prefix}agreement"] = agreement(fused, run.teacher_predictions)
    return results


def dry_step(run: TrainingRun) -> None:
    """Make one training step and one evaluation step. Raises NumericsError if the loss or a
    gradient is not finite."""
    config = run.config
    batches = run.loader.epoch(0)
    first = (next(batches) for _ in range(config.optim.grad_accum_steps))
    metrics = MetricAccumulator(run.accelerator, {})
    steps = run.loader.steps_per_epoch
    for result in train_epoch(step_context(run), first, metrics, step=0, steps=steps):
        if not result.applied:
            raise NumericsError("the loss or gradient of the first step is not finite")
    num_images = max(config.run.eval_batch_size, run.accelerator.num_processes)
    images = run.splits.validation.select(slice(num_images))
    predict_split(run.accelerator, run.student, images, config.evaluation, "dry run")
    loss = metrics.compute()["loss"]
    info(f"dry run: one training step (loss {loss:.4f}) and one evaluation step; nothing written")
