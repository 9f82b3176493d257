"""Set-up of test processes, named by SETUP_FUNCTION: a pause on purpose, or small shards."""

import os
from pathlib import Path

from deit.core import fault_injection
from deit.distill import target_store
from tests.helpers.command_server import wait_until

LEAST_ROWS = 1024
"""Of a small unit: a few hundred images fill several."""


class Gate:
    """Where a process with `Gate.environment` waits, at its fault `slow`, until the test lets it go
    on, however busy the machine is. place: a folder, which is made."""

    def __init__(self, place: Path) -> None:
        place.mkdir()
        self.place = place
        self.environment = {"SETUP_FUNCTION": f"{__name__}:install_gate", "GATE": str(place)}

    def wait(self) -> None:
        """Wait until the process is there."""
        wait_until((self.place / "reached").exists)

    def open(self) -> None:
        """Let it go on."""
        (self.place / "open").touch()


def install_gate() -> None:
    """In the process."""
    fault_injection.ACTIONS["slow"] = _stay


def _stay() -> None:
    place = Path(os.environ["GATE"])
    (place / "reached").touch()
    wait_until((place / "open").exists)


def make_small_units() -> None:
    """In the process."""
    target_store._MIN_ROWS = LEAST_ROWS
