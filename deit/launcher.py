"""The launcher that started this process: where it is gone, this process should stop as well."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.process import BaseProcess

FOLLOWED = "DEIT_AT_ONCE"
"""In the environment of a run that one of our commands started: how many run beside each other."""
_NAMES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", FOLLOWED)
_PARENT = os.getppid()  # as early as may be: a launcher may die while torch is still imported
_PR_SET_PDEATHSIG = 1
SAME_SIGNAL_S = 2.0
"""Within so many seconds another signal is the same one again: torchrun hands on to its processes
what the terminal has sent them already."""


def launched() -> bool:
    """Whether torchrun, accelerate launch or a command of ours started this process."""
    return any(name in os.environ for name in _NAMES)


def sharing() -> int:
    """How many processes of ours share this machine, this one among them."""
    beside = int(os.environ.get(FOLLOWED, "1"))
    return beside * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def follow() -> None:
    """Have SIGTERM sent to this process when the launcher dies, where that can be arranged."""
    if not launched():
        return
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    elif sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _follow(parent: BaseProcess) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def gone() -> bool:
    """Whether the launcher that was there at first is no more."""
    if (parent := multiprocessing.parent_process()) is not None:
        return launched() and not parent.is_alive()
    return launched() and os.getppid() != _PARENT
