"""`deit doctor`: what this machine and this installation can do, and a self-test."""

from collections.abc import Callable, Iterable, Iterator

from deit.core.errors import first_line
from deit.core.machine.checks import Check, fault
from deit.core.machine.environment import environment_checks
from deit.core.machine.packages import package_checks
from deit.core.machine.resources import resource_checks

Announce = Callable[[str], None]
"""Called with what starts now, before something that takes seconds."""


def doctor() -> list[Check]:
    """Check packages, devices, memory, disks and environment, and test a small training.

    Writes to a temporary folder only, and uses no network. Takes seconds, most of them to import
    torch. Raises nothing: what fails is a check with the status `fault`.

    Example:
        >>> checks = doctor()
        >>> [check.status for check in checks if check.name in ("torch", "training step")]
        ['ok', 'ok']
    """
    return list(run_checks())


def run_checks(announce: Announce = lambda text: None) -> Iterator[Check]:
    """Yield each check as soon as it is known. announce: called before slow ones."""
    for name, group in (
        ("packages", package_checks),
        ("environment", environment_checks),
        ("resources", resource_checks),
    ):
        yield from _guarded(name, group)
    announce("importing torch")
    try:
        from deit.api import self_test
    except Exception as error:
        yield fault(
            "import",
            f"{type(error).__name__}: {first_line(error)}",
            "install the packages above again: pip install --force-reinstall torch torchvision",
        )
        return
    yield from _guarded("device", self_test.device_checks)
    announce("one training step")
    yield from _guarded("training step", lambda: [self_test.step_check()])
    yield from _guarded("precision", lambda: [self_test.precision_check()])
    announce("a small run in a temporary folder")
    yield from _guarded("run folder", lambda: [self_test.run_check()])


def _guarded(name: str, checks: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """Yield the checks of a function; an error in it is a fault."""
    try:
        yield from checks()
    except Exception as error:
        yield fault(
            name,
            f"{type(error).__name__}: {first_line(error)}",
            "report it with the output of deit doctor --json",
        )
