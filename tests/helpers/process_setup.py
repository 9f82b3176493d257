"""Set-up of test processes, named by SETUP_FUNCTION: a pause on purpose, or small shards."""

import os
from pathlib import Path

from deit.core import fault_injection
from deit.distill import target_format
from tests.helpers.command_server import wait_until

LEAST_ROWS = 1024
"""Rows of a small shard: a few hundred images fill several shards."""


class Gate:
    """Pause a process at its fault `slow`, until the test opens the gate.

    The process must be started with `Gate.environment`. folder: is made, and holds the state.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.environment = {"SETUP_FUNCTION": f"{__name__}:install_gate", "GATE": str(folder)}

    def wait(self) -> None:
        """Wait until the process has reached the gate."""
        wait_until((self.folder / "reached").exists)

    def open(self) -> None:
        """Let the process continue."""
        (self.folder / "open").touch()


def install_gate() -> None:
    """Make the fault `slow` of this process wait at the gate."""
    fault_injection.ACTIONS["slow"] = _wait_at_gate


def _wait_at_gate() -> None:
    folder = Path(os.environ["GATE"])
    (folder / "reached").touch()
    wait_until((folder / "open").exists)


def make_small_shards() -> None:
    """Make this process write and read target stores with small shards."""
    target_format._MIN_ROWS_PER_SHARD = LEAST_ROWS
