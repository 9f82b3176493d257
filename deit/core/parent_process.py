"""The launcher that started this process, and the signals by which both are stopped."""

import ctypes
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from functools import cache
from types import FrameType

PARALLEL_RUNS_ENV = "DEIT_PARALLEL_RUNS"
"""Environment variable of runs that `deit sweep` started: how many run in parallel."""
_LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", PARALLEL_RUNS_ENV)
_ACCELERATE_VARIABLE = "ACCELERATE_MIXED_PRECISION"
_PARENT = os.getppid()  # read early: a launcher may exit while torch is being imported
_PR_SET_PDEATHSIG = 1
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAVING = signal.SIGUSR1
SIGNALS = (*STOPPING, SAVING)
"""Signals that stop a command, and SIGUSR1 (SLURM's warning), at which a run saves."""
SAME_SIGNAL_S = 2.0
"""A second signal within this time counts as the first one: torchrun forwards to its processes a
signal that the terminal has already sent them."""


_standalone = False
_pending_stop = 0


def mark_standalone() -> None:
    """Mark this process as a command, which may exit at any time.

    Otherwise it is a program or notebook that calls a command.
    """
    global _standalone
    _standalone = True


def is_standalone() -> bool:
    """Return whether `mark_standalone` was called in this process."""
    return _standalone


def set_pending_stop(signum: int) -> None:
    """Record a stop signal until `clear_pending_stop`; the first one is kept.

    The handler that obeys it can be another than the one that received it.
    """
    global _pending_stop
    _pending_stop = _pending_stop or signum


def pending_stop() -> int:
    """Return the stop signal that has not been obeyed yet; 0 if there is none."""
    return _pending_stop


def clear_pending_stop() -> None:
    """Mark the pending stop signal as obeyed."""
    global _pending_stop
    _pending_stop = 0


def exit_now(text: str, code: int) -> None:
    """Exit without cleaning up, after printing a line to standard error if that cannot block.

    Standard error may be closed, on a full disk, or a pipe without a reader.
    """
    with suppress(OSError, ValueError):
        if text and select.select([], [2], [], 0)[1]:
            os.write(2, f"{text}\n".encode())
    os._exit(code)


def frame_before_import(frame: FrameType | None) -> FrameType | None:
    """Return the frame whose import statement is being executed; None outside of an import.

    A signal handler must not raise during an import: C++ libraries call Python while they are
    initialized, and an exception there can end the process by SIGABRT.
    """
    importing_frame = None
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            importing_frame = frame.f_back
        frame = frame.f_back
    return importing_frame


def has_launcher() -> bool:
    """Return whether torchrun, accelerate launch or a command of deit started this process."""
    return any(name in os.environ for name in _LAUNCHER_VARIABLES) or (
        _ACCELERATE_VARIABLE in os.environ and _started_by_accelerate()
    )


@cache
def _started_by_accelerate() -> bool:
    # The variable does not prove it: users also export Accelerate's variables in a shell.
    import psutil

    try:
        return any("accelerate" in argument for argument in psutil.Process(_PARENT).cmdline())
    except psutil.Error:
        return False


def processes_on_host() -> int:
    """Return how many training processes share this machine, including this one."""
    num_runs = int(os.environ.get(PARALLEL_RUNS_ENV, "1"))
    return num_runs * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def exit_with_parent() -> None:
    """Make the system send SIGTERM to this process when its launcher exits (Linux only)."""
    if has_launcher() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def parent_exited() -> bool:
    """Return whether the launcher that started this process has exited."""
    return has_launcher() and os.getppid() != _PARENT


def kill_with_parent(parent: int) -> None:
    """Make this process end as soon as its parent exits. parent: the parent's process id."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it exited before the call
            os._exit(1)
    else:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
