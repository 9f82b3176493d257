"""Graceful stop: records signals to stop or save; all processes obey at the same step."""

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
_EXCHANGE_INTERVAL_S = 0.25  # shortest time between two exchanges of the processes
_MAX_STEPS_BETWEEN = 10  # between two exchanges, because later steps may be much slower
_STUCK_S = 20.0  # torchrun kills 30 s after SIGTERM
_DATA_TIMEOUT_S = 1.5  # how long a stopping process waits for data, so that others can stop with it
_END = object()


class _StoppedBetweenSteps(StoppedBySignal):
    """Stopped before the first micro-batch of a step, so that no work is lost."""


class GracefulStop(AbstractContextManager):
    """Records signals while it is entered; `pending_signal` returns the one to obey.

    SIGTERM, SIGINT and SIGHUP request a stop; SIGUSR1 (SLURM's warning) requests a checkpoint. A
    second stop signal after two seconds or more ends this process at once. An earlier one counts as
    the first, because Ctrl-C reaches the processes of torchrun from the terminal and from torchrun.
    A signal that was ignored before (by nohup, or in a background job) stays ignored. If the
    launcher exits, this counts as SIGTERM: `accelerate launch` leaves its process running when it
    is terminated.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._received, self._save_requested = 0, False
        self._received_at: float | None = None  # time of the stop signal to this process itself
        self._previous_handlers: dict[int, Any] = {}
        self._group = None
        self._is_distributed = accelerator.num_processes > 1
        if self._is_distributed and accelerator.device.type != "cpu":
            # Communicating through the GPU would make every step wait for it.
            self._group = torch.distributed.new_group(backend="gloo")
        self._steps_left = self._steps_between = 1  # until the next exchange of the processes
        self._last_exchange = time.monotonic()
        self._interruptible = False
        self._waiting_since: float | None = None  # for data

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers[SAVING] = signal.signal(SAVING, self._receive)
            for signum in STOPPING:
                if signal.getsignal(signum) != signal.SIG_IGN:
                    self._previous_handlers[signum] = signal.signal(signum, self._receive)
            self._previous_handlers[signal.SIGALRM] = signal.signal(
                signal.SIGALRM, self._stop_waiting
            )
            if signum := pending_stop():  # received before, for example during an import
                self._receive(signum, None)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._received_at is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)
        self._previous_handlers.clear()
        if self._received:
            faulthandler.cancel_dump_traceback_later()
        if kind is not None and issubclass(kind, StoppedBySignal):
            clear_pending_stop()
        elif kind is None and self._received_at is not None and pending_stop():
            # Received after the last call of `pending_signal`: send it to the previous handler.
            os.kill(os.getpid(), self._received)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        """Record a signal (the signal handler)."""
        if signum == SAVING:
            self._save_requested = True
            return
        now = time.monotonic()
        if self._received_at is not None:
            if now - self._received_at < SAME_SIGNAL_S:
                return
            if is_standalone():
                exit_now("deit: second stop signal, exiting now", 128 + signum)
            if frame_before_import(frame):
                return
            raise StoppedBySignal(signum)
        self._received, self._received_at = signum, now
        set_pending_stop(signum)
        # If this process hangs until it is killed, print where.
        faulthandler.dump_traceback_later(_STUCK_S, file=sys.__stderr__)
        if self._interruptible and not self._is_distributed and not frame_before_import(frame):
            raise StoppedBySignal(signum)
        signal.setitimer(signal.ITIMER_REAL, _DATA_TIMEOUT_S, 0.1)

    def _stop_waiting(self, signum: int, frame: FrameType | None) -> None:
        """Stop if this process has waited for data all the time since the signal (handler of a
        timer). Shorter waits are not interrupted, so that a started step is finished and saved."""
        if self._waiting_since is None or self._received_at is None or frame_before_import(frame):
            return
        if time.monotonic() - max(self._waiting_since, self._received_at) >= _DATA_TIMEOUT_S:
            raise StoppedBySignal(self._received)

    @property
    def received(self) -> int:
        """The stop signal that was received; 0 for none."""
        return self._received

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Allow a stop at any line of the block, where no work would be lost.

        A single process raises StoppedBySignal when the signal arrives, or on entry if it has
        arrived. Several processes stop together at the next call of `pending_signal`.
        """
        if self.received and not self._is_distributed:
            raise StoppedBySignal(self._received)
        before, self._interruptible = self._interruptible, True
        try:
            yield
        finally:
            self._interruptible = before

    def iterate(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, and stop waiting for the next one after a stop signal.

        Raises StoppedBySignal: a single process at once; one of several after some seconds, so that
        they can stop together.
        """
        yield from self._iterate(items, per_step=1)

    def micro_batches(self, items: Iterable[Item], *, per_step: int) -> Iterator[Item]:
        """Yield the micro-batches of training as `iterate` does, `per_step` for each step.

        If a single process is stopped while it waits for the first micro-batch of a step, the
        iteration ends without an error: the run can be saved there.
        """
        try:
            yield from self._iterate(items, per_step=per_step)
        except _StoppedBetweenSteps:
            return

    def _iterate(self, items: Iterable[Item], *, per_step: int) -> Iterator[Item]:
        iterator, index = iter(items), 0
        while True:
            between_steps = index % per_step == 0
            self._waiting_since = time.monotonic()
            try:
                with self.interruptible() if between_steps else nullcontext():
                    item = next(iterator, _END)
            except StoppedBySignal as stop:
                if between_steps and not self._is_distributed:
                    raise _StoppedBetweenSteps(stop.signum) from None
                raise
            finally:
                self._waiting_since = None
            if item is _END:
                return
            yield item
            index += 1

    def pending_signal(self, *, now: bool = False) -> int:
        """Return the signal to obey now, 0 for none; the same in all processes.

        All processes must call it equally often. They exchange signals at most a few times a
        second, so a signal can be returned some steps late. now: exchange in this call.
        """
        if parent_exited():
            self._received = self._received or signal.SIGTERM
        own_signal = self._received or (SAVING if self._save_requested else 0)
        signum = self._all_reduce_signal(own_signal, now) if self._is_distributed else own_signal
        if signum == SAVING:
            self._save_requested = False
        elif signum:
            clear_pending_stop()  # the caller obeys it
        return signum

    def reset_timing(self) -> None:
        """Forget the measured time of a step, because the next ones take another time.

        All processes must call it.
        """
        self._steps_left = self._steps_between = 1
        self._last_exchange = time.monotonic()

    def raise_if_stopped(self, *, now: bool = False) -> None:
        """Raise StoppedBySignal if `pending_signal` returns a stop signal."""
        signum = self.pending_signal(now=now)
        if signum in STOPPING:
            raise StoppedBySignal(signum)

    def _all_reduce_signal(self, own_signal: int, now: bool) -> int:
        """Exchange signals if it is time to; return the one that all processes obey, else 0."""
        self._steps_left -= 1
        if self._steps_left > 0 and not now:
            return 0
        exchanged_at = time.monotonic()
        step_s = (exchanged_at - self._last_exchange) / (self._steps_between - self._steps_left)
        self._last_exchange = exchanged_at
        values = torch.tensor([_PRIORITY[own_signal], step_s], dtype=torch.float64)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self._group)
        # The values are now equal in all processes, so all exchange again after the same steps.
        steps = int(_EXCHANGE_INTERVAL_S / max(float(values[1]), 1e-6))
        self._steps_left = self._steps_between = min(max(steps, 1), _MAX_STEPS_BETWEEN)
        signum = _SIGNALS[int(values[0])]
        if signum in STOPPING:
            self._received = signum
        return signum


_SIGNALS = (0, SAVING, *STOPPING)
"""From the lowest to the highest priority, if processes received different ones."""
_PRIORITY = {signum: priority for priority, signum in enumerate(_SIGNALS)}
