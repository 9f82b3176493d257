"""Experiments that several test files use; trained once per file."""

import pytest

from tests.helpers.sweeps import LOTTERY


@pytest.fixture(scope="module")
def finished_lottery(tmp_path_factory, command_server):
    """Return the folder and command of a lottery with two levels, two seeds and all controls."""
    workdir = tmp_path_factory.mktemp("tickets")
    done = command_server.run(
        *LOTTERY, "--seeds", "0,1", "--parallel", "2", "--out", "out", cwd=workdir
    )
    assert done.code == 0, done.err
    return workdir, done
