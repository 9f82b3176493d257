"""Begin a run, or resume it: check its folder, lock it, restore the state, record what it is."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from deit.config.input_paths import with_missing_images
from deit.config.schema import Config, to_dict
from deit.core import run_folder
from deit.core.console import is_main_process
from deit.core.errors import SystemFault
from deit.core.filesystem import check_writable, clean_leftovers, lock_dir, write_json
from deit.training.resume import resume_run, warn_if_not_reproducible
from deit.training.state import TrainingRun
from deit.training.trackers import check_trackers


class RunStart(NamedTuple):
    """How a call of `train` finds its folder.

    resume: whether a run in the folder is to be resumed. has_checkpoint: whether there is a
    checkpoint to resume from. result: the content of result.json; None if the run is not finished.
    """

    resume: bool
    has_checkpoint: bool
    result: dict[str, Any] | None


def check_start(config: Config, out: Path, *, resume: bool, dry_run: bool) -> RunStart:
    """Check trackers and folder before anything is built. Raises the errors of deit.core.errors."""
    check_trackers(config.run.trackers)
    if resume or not dry_run:
        with with_missing_images(config.data):
            run_folder.check_run_dir(out, resume=resume)
    result = run_folder.read_result(out) if resume else None
    if not dry_run and result is None:
        check_writable(out, name="out")
    return RunStart(resume, resume and bool(run_folder.list_checkpoints(out)), result)


_training = threading.Lock()


@contextmanager
def only_training() -> Iterator[None]:
    """Raise SystemFault if this process trains already, in another thread or below a callback.

    Trainings share torch's global generator and its settings, so that both runs would differ from
    those of their configurations.
    """
    if not _training.acquire(blocking=False):
        raise SystemFault(
            "another training runs in this process (in a thread, or it has called this callback); "
            "both would draw from the same random numbers: wait until it ends, or use another "
            "process"
        )
    try:
        yield
    finally:
        _training.release()


def lock_run(stack: ExitStack, out: Path) -> Callable[[], None] | None:
    """Lock a folder until the stack closes, in the main process; return the check of the lock."""
    return stack.enter_context(lock_dir(out, name="out")) if is_main_process() else None


def open_folder(run: TrainingRun, stack: ExitStack, start: RunStart) -> None:
    """Create the folder of a run and lock it, unless a resumed run has locked it already."""
    # All processes have checked the folder before one of them writes to it.
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        run_folder.create_run_dir(run.out)
        if run.check_lock is None:
            run.check_lock = lock_run(stack, run.out)
            run_folder.check_run_dir(run.out, resume=start.resume)  # another run can be faster
        clean_leftovers(run.out)
    run.accelerator.wait_for_everyone()


def begin_or_resume(run: TrainingRun, environment: dict[str, Any], *, resume: bool) -> None:
    """Restore the latest checkpoint, if there is one, and write config.json and environment.json.

    environment: from `environment_info`; that of a resumed run goes to its own file.
    """
    out = run.out
    is_new = not (out / run_folder.CONFIG).is_file()
    if resume and not is_new and resume_run(run):
        warn_if_not_reproducible(out, environment, run.config)
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        name = run_folder.ENVIRONMENT if is_new else run_folder.RESUMED
        write_json(out / run_folder.CONFIG, to_dict(run.config))
        # Relative and upwards only: it stays valid when the folder moves with its surroundings,
        # and holds no user's name.
        directory = os.path.relpath(Path.cwd(), out.resolve())
        is_above = all(part == ".." for part in Path(directory).parts)
        write_json(out / name, {**environment, "directory": directory if is_above else None})
        if run.init_report is not None:
            write_json(out / "init.json", run.init_report)
