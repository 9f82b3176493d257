"""Target stores and runs that several test files share."""

import pytest

from deit.config.recipes.handwriting import digits_teacher
from deit.distill import target_format
from deit.distill.target_store import open_store
from deit.distill.write_targets import write_targets
from tests.helpers.process_setup import LEAST_ROWS
from tests.helpers.target_stores import (
    SMALL_SHARDS,
    configuration,
    write_arguments,
)
from tests.helpers.trained import trained


@pytest.fixture(autouse=True, scope="package")
def small_shards():
    """Write shards of a quarter of the rows, for a quarter of the images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target_format, "_MIN_ROWS_PER_SHARD", LEAST_ROWS)
        yield


@pytest.fixture(scope="package")
def teachers(tmp_path_factory):
    """Return the run folders of two digits teachers with different seeds."""
    folder = tmp_path_factory.mktemp("teachers")
    for seed in (0, 1):
        config = digits_teacher().replace(optim={"epochs": 3}, run={"seed": seed})
        trained(config, folder / str(seed))
    return [str(folder / str(seed)) for seed in (0, 1)]


@pytest.fixture(scope="package")
def store(teachers, tmp_path_factory):
    """Return a store of hard labels for seven epochs, written in this process."""
    out = tmp_path_factory.mktemp("stores") / "hard"
    write_targets(configuration(teachers[0]), out)
    return out


@pytest.fixture(scope="package")
def single_process_store(teachers, command_server, tmp_path_factory):
    """Return a store that the command writes in one process."""
    out = tmp_path_factory.mktemp("single-process") / "store"
    arguments = write_arguments(teachers[0], out)
    assert command_server.run("targets", "write", *arguments, **SMALL_SHARDS).code == 0
    assert open_store(out).record_format.num_shards == 3
    return out
