"""A lottery search that the tests of loss landscapes share."""

from pathlib import Path

import pytest

from tests.helpers.small_runs import WITH_AVERAGE
from tests.helpers.trained import shared_folder


@pytest.fixture(scope="package")
def lottery_folder(tmp_path_factory, command_server):
    """A lottery search of two levels with a random control."""

    def train(folder: Path) -> None:
        options = "--rounds 2 --prune-rate 0.5 --controls random --control-rounds 2 --loss none"
        arguments = ("digits", *WITH_AVERAGE, *options.split(), "--out", "search")
        done = command_server.run("lottery", *arguments, "--parallel", "2", cwd=folder)
        assert done.code == 0, done.err

    return shared_folder(tmp_path_factory, "landscape", train)
