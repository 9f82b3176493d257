"""Signals while a command runs: each becomes an error of ours; a second one ends the process."""

import contextlib
import os
import signal
import threading
import time
import weakref
from types import FrameType
from typing import Any

from deit.core.errors import StoppedBySignal
from deit.core.parent_process import (
    SAME_SIGNAL_S,
    SAVING,
    SIGNALS,
    STOPPING,
    clear_pending_stop,
    exit_now,
    frame_before_import,
    is_standalone,
    set_pending_stop,
)

_REPEAT_S = 0.5


class SignalsAsErrors(contextlib.AbstractContextManager):
    """While it is entered, a signal that asks to stop is raised as Stopped: what is open is closed,
    what is unfinished removed. Another within two seconds is the same one again (torchrun hands on
    what the terminal has sent already), a later one ends the process at once, also where it is in
    the middle of a library's function.

    Python drops what a signal raises while it frees an object: then it is raised again. SIGUSR1,
    which SLURM sends as a warning and which would end the process, is for training alone. Signals
    that are ignored, by nohup for instance, stay so.

    asked: the signal that came first, 0 for none. arrived: whether Stopped was handled.
    """

    def __init__(self) -> None:
        self.asked, self.arrived = 0, False
        self._raised: weakref.ref[StoppedBySignal] | None = None
        self._before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._woken = -1  # who was woken by signals before, as an event loop is

    def __enter__(self) -> "SignalsAsErrors":
        clear_pending_stop()
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._leave)
            self._before[SAVING] = signal.signal(SAVING, signal.SIG_IGN)
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._again)
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._woken = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            # A program that calls a command, as a notebook does, is not ended with it.
            target = _end_at_second if is_standalone() else _read_to_the_end
            threading.Thread(target=target, args=(self._pipe[0],), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._pipe is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.set_wakeup_fd(self._woken)
            os.close(self._pipe[1])  # the thread ends
        for number, handler in self._before.items():
            # All that is left of a command's own process is its end, whose code is known.
            ended = is_standalone() and number in SIGNALS
            signal.signal(number, signal.SIG_IGN if ended else handler)
        clear_pending_stop()

    def _leave(self, number: int, frame: FrameType | None) -> None:
        if self.arrived:
            return
        self.asked = self.asked or number
        set_pending_stop(self.asked)
        signal.setitimer(signal.ITIMER_REAL, _REPEAT_S, _REPEAT_S)
        self._again(number, frame)

    def _again(self, number: int, frame: FrameType | None) -> None:
        if self.asked and not self.arrived and (self._raised is None or not self._raised()):
            self._obey(frame)

    def _obey(self, frame: FrameType | None) -> None:
        """Raise Stopped, but not in the middle of an import, where that may be the end of the
        process: where nothing else has begun leave at once, else ask again after a while."""
        began = frame_before_import(frame)
        if began is None:
            self._raise()
        elif is_standalone() and _nothing_begun(began):
            word = signal.Signals(self.asked).name
            text = f"deit: error: stopped by {word}"
            exit_now(text if os.environ.get("RANK", "0") == "0" else "", 128 + self.asked)

    def _raise(self) -> None:
        stop = StoppedBySignal(self.asked)
        self._raised = weakref.ref(stop)
        try:
            raise stop
        finally:
            del stop  # this frame is part of its traceback, which should not keep it


def _nothing_begun(frame: FrameType | None) -> bool:
    """Whether this frame and those around it only choose and load a command."""
    while frame is not None:
        package, *rest = frame.f_globals.get("__name__", "").split(".")
        if package == "deit" and rest[:1] not in (["cli"], ["commands"], ["__main__"]):
            return False
        frame = frame.f_back
    return True


def _read_to_the_end(pipe: int) -> None:
    """Read the numbers of signals, which nobody asks for, so that the pipe never fills."""
    with open(pipe, "rb", buffering=0) as numbers:
        while numbers.read(64):
            pass


def _end_at_second(pipe: int) -> None:
    """Read the numbers of signals as they come, in a thread of its own, and leave with the second
    one that asks to stop."""
    first = None
    with open(pipe, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] in STOPPING:
                now = time.monotonic()
                first = now if first is None else first
                if now - first >= SAME_SIGNAL_S:
                    exit_now("deit: a second signal: leaving at once", 128 + number[0])
