"""Signals that ask a run to stop or to save: noted at once, obeyed by all processes together."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from deit.core.errors import StoppedBySignal
from deit.core.parent_process import (
    SAME_SIGNAL_S,
    SAVING,
    STOPPING,
    clear_pending_stop,
    exit_now,
    frame_before_import,
    is_standalone,
    parent_exited,
    pending_stop,
    set_pending_stop,
)

Item = TypeVar("Item")
_ASK_EVERY_S = 0.25  # how often processes talk about it, at most
_MOST_BETWEEN = 10  # steps: some may take much longer than those before
_STUCK_S = 20.0  # torchrun kills 30 s after SIGTERM
_PATIENCE_S = 1.5  # for data, where a process that was asked to stop should not leave alone
_END = object()


class _BetweenUpdates(StoppedBySignal):
    """Stopped where nothing of an update has begun."""


class GracefulStop(AbstractContextManager):
    """While it is entered: signals are noted, and `asked` tells what to do about them.

    SIGTERM, SIGINT and SIGHUP ask to stop; SIGUSR1, SLURM's warning, to save and go on. Another one
    that asks to stop, two seconds later or more, ends this process at once; sooner it is the same
    one again, for Ctrl-C reaches torchrun's processes from the terminal and from torchrun. A signal
    that was ignored (by nohup, in a background job) stays so. Where a launcher that started this
    process is gone, that is as good as SIGTERM: `accelerate launch` leaves its process behind when
    it is terminated.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._noted, self._save_asked = 0, False
        self._first: float | None = None  # when this process was asked to stop itself
        self._before: dict[int, Any] = {}
        self._group = None
        self._several = accelerator.num_processes > 1
        if self._several and accelerator.device.type != "cpu":
            # Talking by way of the GPU would make every step wait for it.
            self._group = torch.distributed.new_group(backend="gloo")
        self._wait = self._between = 1
        self._last = time.monotonic()
        self._open = False
        self._waiting_since: float | None = None  # for data, since when

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is threading.main_thread():
            self._before[SAVING] = signal.signal(SAVING, self._note)
            for number in STOPPING:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._late)
            if number := pending_stop():  # it came in the middle of an import, perhaps
                self._note(number, None)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._first is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if self._noted:
            faulthandler.cancel_dump_traceback_later()
        if kind is not None and issubclass(kind, StoppedBySignal):
            clear_pending_stop()
        elif kind is None and self._first is not None and pending_stop():
            # It came after the last question.
            os.kill(os.getpid(), self._noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == SAVING:
            self._save_asked = True
            return
        now = time.monotonic()
        if self._first is not None:
            if now - self._first < SAME_SIGNAL_S:
                return
            if is_standalone():
                exit_now("deit: a second signal: leaving at once", 128 + number)
            if frame_before_import(frame):
                return
            raise StoppedBySignal(number)
        self._noted, self._first = number, now
        set_pending_stop(number)
        # Where this process hangs and will be killed, say where.
        faulthandler.dump_traceback_later(_STUCK_S, file=sys.__stderr__)
        if self._open and not self._several and not frame_before_import(frame):
            raise StoppedBySignal(number)
        signal.setitimer(signal.ITIMER_REAL, _PATIENCE_S, 0.1)

    def _late(self, number: int, frame: FrameType | None) -> None:
        """Leave where this process waits for data all the time: nothing else would end that. What
        takes shorter is waited for, so that an update in its middle is finished and saved."""
        if self._waiting_since is None or self._first is None or frame_before_import(frame):
            return
        if time.monotonic() - max(self._waiting_since, self._first) >= _PATIENCE_S:
            raise StoppedBySignal(self._noted)

    @property
    def noted(self) -> int:
        """The signal that this process was asked to stop by; 0 for none."""
        return self._noted

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """While it is entered nothing is begun that would be lost: a single process obeys a signal
        in its middle. Raises Stopped. Several processes obey together, when they next ask."""
        if self.noted and not self._several:
            raise StoppedBySignal(self._noted)
        before, self._open = self._open, True
        try:
            yield
        finally:
            self._open = before

    def iterate(self, items: Iterable[Item]) -> Iterator[Item]:
        """The same items, for which no process waits that was asked to stop. Raises Stopped: in a
        single process at once; of several, which should stop together, some seconds later."""
        yield from self._over(items, each=1)

    def micro_batches(self, items: Iterable[Item], *, each: int) -> Iterator[Item]:
        """The same for the micro-batches of training, so many to an update: where one process would
        wait for the first of an update they end early instead, for all of the run so far can be
        saved there."""
        try:
            yield from self._over(items, each=each)
        except _BetweenUpdates:
            return

    def _over(self, items: Iterable[Item], *, each: int) -> Iterator[Item]:
        iterator, number = iter(items), 0
        while True:
            between = number % each == 0
            self._waiting_since = time.monotonic()
            try:
                with self.interruptible() if between else nullcontext():
                    item = next(iterator, _END)
            except StoppedBySignal as stop:
                if between and not self._several:
                    raise _BetweenUpdates(stop.signum) from None
                raise
            finally:
                self._waiting_since = None
            if item is _END:
                return
            yield item
            number += 1

    def pending_signal(self, *, now: bool = False) -> int:
        """The signal to obey now, 0 for none; the same in all processes, where all ask equally
        often. They talk at most a few times a second, so it may come some steps later.

        now: talk in any case.
        """
        if parent_exited():
            self._noted = self._noted or signal.SIGTERM
        own = self._noted or (SAVING if self._save_asked else 0)
        number = self._all_reduce_signal(own, now) if self._several else own
        if number == SAVING:
            self._save_asked = False
        elif number:
            clear_pending_stop()  # who asked obeys it
        return number

    def reset_timing(self) -> None:
        """Something of another pace begins, in all processes: what was measured counts no more."""
        self._wait = self._between = 1
        self._last = time.monotonic()

    def raise_if_stopped(self, *, now: bool = False) -> None:
        """Raises Stopped where stopping was asked for, as `asked` tells."""
        number = self.pending_signal(now=now)
        if number in STOPPING:
            raise StoppedBySignal(number)

    def _all_reduce_signal(self, own: int, now: bool) -> int:
        self._wait -= 1
        if self._wait > 0 and not now:
            return 0
        moment = time.monotonic()
        took = (moment - self._last) / (self._between - self._wait)
        self._last = moment
        said = torch.tensor([_RANK[own], took], dtype=torch.float64)
        torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX, group=self._group)
        # All have the same number here, so all wait equally many steps until they talk again.
        steps = int(_ASK_EVERY_S / max(float(said[1]), 1e-6))
        self._wait = self._between = min(max(steps, 1), _MOST_BETWEEN)
        number = _SIGNALS[int(said[0])]
        if number in STOPPING:
            self._noted = number
        return number


_SIGNALS = (0, SAVING, *STOPPING)
_RANK = {number: rank for rank, number in enumerate(_SIGNALS)}
