"""Experiments that several files of tests look at: trained once for each file."""

import pytest

from tests.helpers.sweeps import LOTTERY


@pytest.fixture(scope="module")
def searched(tmp_path_factory, command_server):
    """A folder with a lottery of two levels and two seeds, every control; the command that ran."""
    place = tmp_path_factory.mktemp("tickets")
    done = command_server.run(
        *LOTTERY, "--seeds", "0,1", "--parallel", "2", "--out", "out", cwd=place
    )
    assert done.code == 0, done.err
    return place, done
