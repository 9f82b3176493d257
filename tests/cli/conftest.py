"""Fixtures that run a command as a process in an empty folder, and short runs."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.commands import assert_refused, run_in, tree

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def bound(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return run_in(tmp_path, program, *arguments)

    return bound


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Callable[..., None]:
    """Assert that a command fails with a code and a message that contains fragments, and writes
    nothing."""

    def check(code: int, fragments: tuple[str, ...], *command: object) -> None:
        before = tree(tmp_path)
        assert_refused(run(*command), code, *fragments)
        assert tree(tmp_path) == before, "something was written"

    return check
