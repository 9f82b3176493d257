"""Experiments that several test files use."""

import json
from pathlib import Path

import pytest

from tests.helpers.processes import Completed
from tests.helpers.sweeps import LOTTERY
from tests.helpers.trained import shared_folder


@pytest.fixture(scope="module")
def finished_lottery(tmp_path_factory, command_server):
    """Return the folder and command of a lottery with two levels, two seeds and all controls."""

    def train(folder: Path) -> None:
        done = command_server.run(
            *LOTTERY, "--seeds", "0,1", "--parallel", "2", "--out", "out", cwd=folder
        )
        assert done.code == 0, done.err
        (folder / "command.json").write_text(json.dumps(done._asdict()))

    workdir = shared_folder(tmp_path_factory, "tickets", train)
    return workdir, Completed(**json.loads((workdir / "command.json").read_text()))
