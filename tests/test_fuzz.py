"""Odd input to every command ends with a documented exit code and one message."""

import shutil
import sys
from pathlib import Path
from tempfile import mkdtemp

import pytest

from tests.helpers.odd_input.options import options_of
from tests.helpers.odd_input.run import run_try
from tests.helpers.odd_input.things import make_things
from tests.helpers.odd_input.tries import try_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are watched by /proc")
QUICK = 12  # seeds of every commit; scripts/fuzz.py goes through thousands


@pytest.fixture(scope="module")
def place(command_server):
    folder = Path(mkdtemp(prefix="deit-tries-"))  # below pytest's own only its user may write
    folder.chmod(0o777)
    (folder / "things").mkdir()
    make_things(command_server, folder / "things")
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(folder)


def wrong(seed: int, command_server, place: Path) -> str:
    one = try_of(seed)
    outcome = run_try(one, command_server, place / "things", place / str(seed))
    said = f"{outcome.said}\nagain: python scripts/fuzz.py --seed {seed}"
    return outcome.wrong and f"{one.command}: {outcome.wrong}\n{said}"


@pytest.mark.parametrize("seed", range(QUICK))
def test_a_try_ends_as_documented(seed, command_server, place):
    assert not wrong(seed, command_server, place)


@pytest.mark.slow
def test_two_thousand_tries_end_as_documented(command_server, place):
    found = [said for seed in range(2000) if (said := wrong(seed, command_server, place))]
    assert not found, "\n\n".join(found)


def test_a_try_is_a_function_of_its_seed():
    assert try_of(7) == try_of(7) != try_of(8)


def test_every_option_of_a_command_is_tried_without_being_named():
    assert {"json", "test-set", "data.root"} <= {one.name for one in options_of("evaluate")}
    assert {"out", "loss", "optim.lr"} <= {one.name for one in options_of("targets write")}
