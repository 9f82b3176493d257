"""Stores of small units: a few hundred images fill several."""

from deit.distill import target_store

LEAST_ROWS = 1024


def make_small() -> None:
    """For a process of its own, by FORKS_FIRST of tests/helpers/command_server.py."""
    target_store._LEAST_ROWS = LEAST_ROWS
