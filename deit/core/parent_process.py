"""The launcher that started this process: where it is gone, this process should stop as well."""

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

PARALLEL_RUNS_ENV = "DEIT_AT_ONCE"
"""In the environment of a run that one of our commands started: how many run beside each other."""
_NAMES = ("TORCHELASTIC_RUN_ID", PARALLEL_RUNS_ENV)
_OF_ACCELERATE = "ACCELERATE_MIXED_PRECISION"
_PARENT = os.getppid()  # as early as may be: a launcher may die while torch is still imported
_PR_SET_PDEATHSIG = 1
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAVING = signal.SIGUSR1
SIGNALS = (*STOPPING, SAVING)
"""What asks a command to stop, and a run to save: SLURM's warning."""
SAME_SIGNAL_S = 2.0
"""Within so many seconds another signal is the same one again: torchrun hands on to its processes
what the terminal has sent them already."""


_standalone = False
_unobeyed = 0


def mark_standalone() -> None:
    """Say that this process is a command, and not a program or notebook that calls one: then it may
    be ended at once."""
    global _standalone
    _standalone = True


def is_standalone() -> bool:
    """Whether this process is a command, as `mark_standalone` says."""
    return _standalone


def set_pending_stop(number: int) -> None:
    """Record a stop signal until `clear_pending_stop`: another handler than the one that received
    it may have to obey it."""
    global _unobeyed
    _unobeyed = _unobeyed or number


def pending_stop() -> int:
    """The signal that asked to stop and was not obeyed yet; 0 for none."""
    return _unobeyed


def clear_pending_stop() -> None:
    """Say that the signal that asked to stop is obeyed."""
    global _unobeyed
    _unobeyed = 0


def exit_now(text: str, code: int) -> None:
    """End this process in its middle, with a last line on standard error if that takes one: it may
    be closed, its disk full, or a pipe that nobody reads."""
    with suppress(OSError, ValueError):
        if text and select.select([], [2], [], 0)[1]:
            os.write(2, f"{text}\n".encode())
    os._exit(code)


def frame_before_import(frame: FrameType | None) -> FrameType | None:
    """The frame that began the import in whose middle the program is; None where it is in none.

    An exception there may end the process by SIGABRT: parts of libraries written in C++ call Python
    where no exception may leave them, while they are set up.
    """
    found = None
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            found = frame.f_back
        frame = frame.f_back
    return found


def has_launcher() -> bool:
    """Whether torchrun, accelerate launch or a command of ours started this process."""
    return any(name in os.environ for name in _NAMES) or (
        _OF_ACCELERATE in os.environ and _started_by_accelerate()
    )


@cache
def _started_by_accelerate() -> bool:
    """Users export Accelerate's variables, too: then their shell is no launcher."""
    import psutil

    try:
        return any("accelerate" in word for word in psutil.Process(_PARENT).cmdline())
    except psutil.Error:
        return False


def processes_on_host() -> int:
    """How many processes of ours share this machine, this one among them."""
    beside = int(os.environ.get(PARALLEL_RUNS_ENV, "1"))
    return beside * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def exit_with_parent() -> None:
    """Ask the system for SIGTERM when the launcher dies, where it offers that."""
    if has_launcher() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def parent_exited() -> bool:
    """Whether the launcher that was there at first is no more."""
    return has_launcher() and os.getppid() != _PARENT


def kill_with_parent(parent: int) -> None:
    """Have this process killed as soon as the one that started it is gone. parent: its number."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before
            os._exit(1)
    else:
        threading.Thread(target=_leave_after, args=(parent,), daemon=True).start()


def _leave_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
