"""A lottery search that the tests of loss landscapes share."""

import pytest

from tests.helpers.small_runs import WITH_AVERAGE


@pytest.fixture(scope="package")
def lottery_folder(tmp_path_factory, command_server):
    """A lottery search of two levels with a random control."""
    lottery_folder = tmp_path_factory.mktemp("landscape")
    arguments = (
        "--rounds",
        "2",
        "--prune-rate",
        "0.5",
        "--controls",
        "random",
        "--control-rounds",
        "2",
    )
    arguments = (
        "lottery",
        "digits",
        *WITH_AVERAGE,
        *arguments,
        "--loss",
        "none",
        "--out",
        "search",
    )
    done = command_server.run(*arguments, "--parallel", "2", cwd=lottery_folder)
    assert done.code == 0, done.err
    return lottery_folder
