"""The launcher that started this process: where it is gone, this process should stop as well."""

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType

FOLLOWED = "DEIT_AT_ONCE"
"""In the environment of a run that one of our commands started: how many run beside each other."""
_NAMES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", FOLLOWED)
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


def mark_standalone() -> None:
    """Say that this process is a command, and not a program or notebook that calls one: then it may
    be ended at once."""
    global _standalone
    _standalone = True


def is_standalone() -> bool:
    """Whether this process is a command, as `mark_standalone` says."""
    return _standalone


def importing(frame: FrameType | None) -> FrameType | None:
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


def launched() -> bool:
    """Whether torchrun, accelerate launch or a command of ours started this process."""
    return any(name in os.environ for name in _NAMES)


def sharing() -> int:
    """How many processes of ours share this machine, this one among them."""
    beside = int(os.environ.get(FOLLOWED, "1"))
    return beside * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def follow() -> None:
    """Ask the system for SIGTERM when the launcher dies, where it offers that."""
    if launched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def adopt(parent: int) -> None:
    """In a process that another one of ours has made a copy of itself: that one is the launcher,
    also where it is gone by now. parent: its number."""
    global _PARENT
    _PARENT = parent
    follow()
    if gone():
        os.kill(os.getpid(), signal.SIGTERM)


def gone() -> bool:
    """Whether the launcher that was there at first is no more."""
    return launched() and os.getppid() != _PARENT


def end_with(parent: int) -> None:
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
