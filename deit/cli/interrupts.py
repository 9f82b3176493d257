"""Stop signals while a command runs: the first one raises StoppedBySignal, a second one exits at
once."""

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
    """Raise StoppedBySignal for stop signals within the context, so that open files are closed and
    unfinished ones removed.

    The same signal within SAME_SIGNAL_S seconds counts as one, because torchrun forwards what the
    terminal has already sent. A later one exits at once, even inside a library call.

    Python drops an exception that a signal handler raises while an object is freed; then it is
    raised again after _REPEAT_S seconds. SIGUSR1, SLURM's warning, is ignored: only training
    handles it, and by default it would end the process. Signals that were ignored before, by nohup
    for example, stay ignored.

    first_signal: the first stop signal, 0 if there was none. handled: whether StoppedBySignal or
    another end of the command was handled; later signals change nothing.
    """

    def __init__(self) -> None:
        self.first_signal, self.handled = 0, False
        self._raised: weakref.ref[StoppedBySignal] | None = None
        self._handlers_before: dict[int, Any] = {}
        self._pipe: tuple[int, int] | None = None
        self._wakeup_fd_before = -1  # an event loop may have set one

    def __enter__(self) -> "SignalsAsErrors":
        clear_pending_stop()
        if threading.current_thread() is threading.main_thread():
            before = self._handlers_before
            for signum in STOPPING:
                if signal.getsignal(signum) != signal.SIG_IGN:
                    before[signum] = signal.signal(signum, self._handle_stop)
            before[SAVING] = signal.signal(SAVING, signal.SIG_IGN)
            before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._retry)
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup_fd_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            # A program that calls a command, such as a notebook, must not exit with it.
            target = _exit_at_second if is_standalone() else _drain
            threading.Thread(target=target, args=(self._pipe[0],), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._pipe is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.set_wakeup_fd(self._wakeup_fd_before)
            os.close(self._pipe[1])  # ends the thread
        for signum, handler in self._handlers_before.items():
            # A process of a command only has to exit now, and its exit code is known.
            ignore = is_standalone() and signum in SIGNALS
            signal.signal(signum, signal.SIG_IGN if ignore else handler)
        clear_pending_stop()

    def _handle_stop(self, signum: int, frame: FrameType | None) -> None:
        if self.handled:
            return
        self.first_signal = self.first_signal or signum
        set_pending_stop(self.first_signal)
        signal.setitimer(signal.ITIMER_REAL, _REPEAT_S, _REPEAT_S)
        self._retry(signum, frame)

    def _retry(self, signum: int, frame: FrameType | None) -> None:
        pending = self.first_signal and not self.handled
        if pending and (self._raised is None or not self._raised()):
            self._stop(frame)

    def _stop(self, frame: FrameType | None) -> None:
        """Raise StoppedBySignal, unless an import is running: an exception there may abort the
        process. Then exit at once if no work has started, otherwise wait for the next alarm."""
        import_frame = frame_before_import(frame)
        if import_frame is None:
            self._raise()
        elif is_standalone() and _only_loads_command(import_frame):
            name = signal.Signals(self.first_signal).name
            text = f"deit: error: stopped by {name}"
            is_main = os.environ.get("RANK", "0") == "0"
            exit_now(text if is_main else "", 128 + self.first_signal)

    def _raise(self) -> None:
        stop = StoppedBySignal(self.first_signal)
        self._raised = weakref.ref(stop)
        try:
            raise stop
        finally:
            del stop  # its traceback holds this frame, which would keep it alive


def _only_loads_command(frame: FrameType | None) -> bool:
    """Return whether this frame and its callers only select and import a command."""
    while frame is not None:
        package, *rest = frame.f_globals.get("__name__", "").split(".")
        if package == "deit" and rest[:1] not in (["cli"], ["commands"], ["__main__"]):
            return False
        frame = frame.f_back
    return True


def _drain(pipe: int) -> None:
    """Read and ignore the signal numbers, so that the pipe never fills."""
    with open(pipe, "rb", buffering=0) as signals:
        while signals.read(64):
            pass


def _exit_at_second(pipe: int) -> None:
    """Read the signal numbers and exit the process at the second stop signal."""
    first = None
    with open(pipe, "rb", buffering=0) as signals:
        while byte := signals.read(1):
            if byte[0] in STOPPING:
                now = time.monotonic()
                first = now if first is None else first
                if now - first >= SAME_SIGNAL_S:
                    exit_now("deit: second stop signal, exiting now", 128 + byte[0])
