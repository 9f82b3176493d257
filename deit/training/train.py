"""Train a student from a configuration to a finished run folder."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deit.config.schema import Config
from deit.config.validation import validate
from deit.core.accelerator import environment_info, own_accelerate_state
from deit.core.console import info
from deit.core.filesystem import check_space, write_json
from deit.core.rng import unchanged_generators
from deit.core.signals import GracefulStop
from deit.training.begin import (
    RunStart,
    begin_or_resume,
    check_start,
    lock_run,
    only_training,
    open_folder,
)
from deit.training.build import build, check_run_teachers
from deit.training.epochs import EpochCallback, check_callbacks, dry_step, train_epochs
from deit.training.memory import check_memory, find_micro_batch
from deit.training.progress_log import log_setup
from deit.training.resolve import resolve
from deit.training.resume import check_best, check_resumable, check_same_run
from deit.training.save import required_bytes, write_result
from deit.training.state import TrainingRun
from deit.training.summary import SUMMARY, print_summary, summary_of
from deit.training.trackers import tracked
from deit.training.translate_errors import translate_errors


@only_training()
@unchanged_generators()
@own_accelerate_state()
def train(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    callbacks: Sequence[EpochCallback] = (),
    command: str = "",
) -> dict[str, Any]:
    """Train the student of a configuration and write a run folder.

    resume: continue the run in the folder from its latest valid checkpoint. dry_run: make one
    training and one evaluation step and write nothing. callbacks: called after each epoch, see
    `train_epochs`. command: recorded in environment.json.

    Returns the content of result.json; of a dry run, the state after its step.
    Raises the errors of deit.core.errors; what can be checked is checked before the first step.

    Example:
        >>> from deit.config.recipes import find_recipe
        >>> from deit.core.console import quiet
        >>> config = find_recipe("digits").replace(optim={"epochs": 1, "warmup_epochs": 0},
        ...                                        data={"train_fraction": 0.2})
        >>> with quiet():
        ...     result = train(config, "runs/short")
        >>> result["epochs"], result["step"]  # 8 batches of 32 of the 259 images
        (1, 8)
        >>> sorted(file.name for file in Path("runs/short/best").glob("model*"))
        ['model.json', 'model.safetensors']
    """
    config, out = validate(config), Path(out)
    check_callbacks(callbacks)
    start = check_start(config, out, resume=resume, dry_run=dry_run)
    with ExitStack() as stack:
        # A run to resume is locked first, because building takes a while.
        to_resume = start.has_checkpoint and start.result is None and not dry_run
        check_lock = lock_run(stack, out) if to_resume else None
        resolved = resolve(config, resume_from=out if start.has_checkpoint else None)
        run = build(resolved, out)
        stack.callback(run.loader.close)
        run.check_lock = check_lock
        environment = environment_info(run.accelerator, command)
        environment["teachers"] = run.teachers.class_orders
        log_setup(run, environment)
        if start.result is not None and not dry_run:
            return _check_finished(run, start.result)
        _check_before_training(run, start, dry_run=dry_run)
        if dry_run:
            dry_step(run)
            return asdict(run.state)
        open_folder(run, stack, start)
        interruption = stack.enter_context(GracefulStop(run.accelerator))
        stack.enter_context(translate_errors(run, lambda: interruption.received))
        begin_or_resume(run, environment, resume=resume)
        with tracked(run.accelerator, run.config, out):
            train_epochs(run, interruption, callbacks)
        result = _finish(run)
        interruption.raise_if_stopped(now=True)  # so that the caller starts nothing more
    return result


def _check_finished(run: TrainingRun, result: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a finished run. Raises if its data, teachers or best weights changed."""
    check_same_run(run, result)
    check_best(run)
    info(f"{run.out}: already complete after {result['epochs']} epochs")
    return result


def _check_before_training(run: TrainingRun, start: RunStart, *, dry_run: bool) -> None:
    """Check disk, memory and teachers; find a micro-batch that fits if run.auto_micro_batch.

    A dry run needs no disk; it checks whether the run can be resumed, which `begin_or_resume` does
    otherwise.
    """
    if not dry_run:
        check_space(run.out, required_bytes(run), name="out")
    elif start.resume:
        check_resumable(run, start.result)
    check_memory(run, run.teachers.live)
    check_run_teachers(run)
    if run.config.run.auto_micro_batch:
        find_micro_batch(run)


def _finish(run: TrainingRun) -> dict[str, Any]:
    """Write result and summary; return the result."""
    result = write_result(run)
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        summary = summary_of(run.config, run.out, result)
        write_json(run.out / SUMMARY, summary)
        print_summary(summary)
    return result
