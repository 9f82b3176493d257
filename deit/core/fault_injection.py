"""Fault injection for tests: DEIT_FAULT=point[@process]:nth:action; off without the variable."""

import errno
import os
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from deit.core.errors import ConfigError

POINTS = {
    "step": "after a step of the optimizer",
    "loss": "at the loss of a micro-batch (action nan)",
    "fit": "before a micro-batch size is tried (run.auto_micro_batch)",
    "evaluation": "before a batch of an evaluation",
    "teacher": "before the teachers run on a batch of views for a store",
    "targets": "before a shard of stored targets is written",
    "model": "after a checkpoint's weights are written",
    "optimizer": "after a checkpoint's optimizer state is written",
    "average": "after a checkpoint's weight average is written",
    "state": "after a checkpoint's state is written",
    "manifest": "after a checkpoint's manifest is written",
    "rename": "before a finished folder is renamed into place",
    "renamed": "after that rename, before it is synced to disk",
    "rotate": "after an old checkpoint is renamed for removal",
    "metrics": "after a row of metrics.jsonl is written",
    "state_hashes": "after a row of state_hashes.jsonl is written",
    "nonfinite_steps": "after a row of nonfinite_steps.jsonl is written",
    "finish": "before a run is marked as finished",
}
"""Where a fault can be injected, and when that point is reached."""


def _signal(name: str) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), getattr(signal, name))


def _full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _memory() -> None:
    import torch

    raise torch.OutOfMemoryError("injected fault: out of memory")


ACTIONS: dict[str, Callable[[], None]] = {
    "kill": _signal("SIGKILL"),
    "term": _signal("SIGTERM"),
    "int": _signal("SIGINT"),
    "hup": _signal("SIGHUP"),
    "usr1": _signal("SIGUSR1"),
    "full": _full,
    "memory": _memory,
    "slow": lambda: time.sleep(3),
    "hang": lambda: time.sleep(3600),
    "nan": lambda: None,
}
"""The faults: a signal to this process, a full disk, no memory, a pause of 3 s or an hour, or a NaN
(see `inject_nan`)."""


class _Fault(NamedTuple):
    """One fault. process: its rank, None for all. nth: 1 is the first time that the point is
    reached, 0 is every time."""

    point: str
    process: int | None
    nth: int
    action: str


_faults: list[_Fault] = []
_times_reached: dict[str, int] = {}


def install_faults(text: str | None) -> None:
    """Install the faults of a comma-separated list, and remove earlier ones. Raises ConfigError."""
    _faults.clear()
    _times_reached.clear()
    for fault in (text or "").split(","):
        if fault:
            _faults.append(_parse(fault))


def _parse(text: str) -> _Fault:
    where, _, rest = text.partition(":")
    nth, _, action = rest.partition(":")
    point, _, process = where.partition("@")
    if point not in POINTS or action not in ACTIONS or not nth.isdecimal():
        raise ConfigError(
            f"DEIT_FAULT={text}: should be POINT[@PROCESS]:NTH:ACTION, with a point of "
            f"{', '.join(POINTS)} and an action of {', '.join(ACTIONS)}"
        )
    if process and not process.isdecimal():
        raise ConfigError(f"DEIT_FAULT={text}: {process!r} is not a process number")
    return _Fault(point, int(process) if process else None, int(nth), action)


def fault_point(point: str) -> None:
    """Trigger the faults installed at this point."""
    if _faults:
        _trigger(point)


def inject_nan(point: str, value: Any) -> Any:
    """Return a number or tensor unchanged, or all NaN if such a fault is due at this point."""
    if not _faults or "nan" not in _trigger(point):
        return value
    return value * float("nan")


def _trigger(point: str) -> list[str]:
    """Count the visit, run the actions that are due, and return them."""
    _times_reached[point] = _times_reached.get(point, 0) + 1
    rank = int(os.environ.get("RANK", "0"))
    due = [
        fault.action
        for fault in _faults
        if fault.point == point
        and fault.process in (None, rank)
        and fault.nth in (0, _times_reached[point])
    ]
    for action in due:
        ACTIONS[action]()
    return due
