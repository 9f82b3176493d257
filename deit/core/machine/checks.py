"""The outcome of one check of `deit doctor`."""

from collections.abc import Iterable
from typing import Literal, NamedTuple


class Check(NamedTuple):
    """The outcome of one check.

    status: ok; note, something that limits what can be done; or fault, something that stops
    training. detail: what was found. hint: what to do about a note or a fault; empty for ok.
    """

    name: str
    status: Literal["ok", "note", "fault"]
    detail: str
    hint: str = ""


def ok(name: str, detail: str) -> Check:
    """Return a check without a problem."""
    return Check(name, "ok", detail)


def note(name: str, detail: str, hint: str) -> Check:
    """Return a check that found a limit."""
    return Check(name, "note", detail, hint)


def fault(name: str, detail: str, hint: str) -> Check:
    """Return a check that found what stops training."""
    return Check(name, "fault", detail, hint)


def ok_or_note(name: str, detail: str, hint: str, *, limited: bool) -> Check:
    """Return a note with a hint if something is limited, else ok."""
    return note(name, detail, hint) if limited else ok(name, detail)


def num_faults(checks: Iterable[Check]) -> int:
    """Return the number of faults."""
    return sum(check.status == "fault" for check in checks)
