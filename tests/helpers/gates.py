"""A pause on purpose that lasts until the test ends it, however busy the machine is: a process with
`Gate.environment` stops at its fault `slow`."""

import os
from pathlib import Path

from deit.core import fault_injection
from tests.helpers.command_server import until


class Gate:
    """Where a process waits. place: a folder, which is made."""

    def __init__(self, place: Path) -> None:
        place.mkdir()
        self.place = place
        self.environment = {"FORKS_FIRST": f"{__name__}:put_up", "GATE": str(place)}

    def wait(self) -> None:
        """Wait until the process is there."""
        until((self.place / "reached").exists)

    def open(self) -> None:
        """Let it go on."""
        (self.place / "open").touch()


def put_up() -> None:
    """In the process."""
    fault_injection.ACTIONS["slow"] = _stay


def _stay() -> None:
    place = Path(os.environ["GATE"])
    (place / "reached").touch()
    until((place / "open").exists)
