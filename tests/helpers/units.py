"""Stores of small units: a few hundred images fill several."""

from deit import targets

LEAST_ROWS = 1024


def make_small() -> None:
    """For a process of its own, by FORKS_FIRST of tests/helpers/command_server.py."""
    targets._LEAST_ROWS = LEAST_ROWS
