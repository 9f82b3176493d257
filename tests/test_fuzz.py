"""Odd input to every command ends with a documented exit code and one message."""

import shutil
import sys
from pathlib import Path
from tempfile import mkdtemp

import pytest

from tests.helpers.odd_input.cases import make_case
from tests.helpers.odd_input.inputs import make_inputs
from tests.helpers.odd_input.options import options_of
from tests.helpers.odd_input.run import run_case

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are supervised by /proc")
QUICK = 12  # seeds of every test run; scripts/fuzz.py runs thousands


@pytest.fixture(scope="module")
def fuzz_folder(command_server):
    folder = Path(mkdtemp(prefix="deit-tries-"))  # in pytest's folders only its user may write
    folder.chmod(0o777)
    (folder / "inputs").mkdir()
    make_inputs(command_server, folder / "inputs")
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(folder)


def problem_of(seed: int, command_server, folder: Path) -> str:
    """Return a description of the undocumented behavior of a case, or "" if there is none."""
    case = make_case(seed)
    outcome = run_case(case, command_server, folder / "inputs", folder / str(seed))
    again = f"again: python scripts/fuzz.py --seed {seed}"
    return outcome.problem and f"{case.command}: {outcome.problem}\n{outcome.output}\n{again}"


@pytest.mark.parametrize("seed", range(QUICK))
def test_fuzz_case_ends_as_documented(seed, command_server, fuzz_folder):
    assert not problem_of(seed, command_server, fuzz_folder)


@pytest.mark.slow
def test_two_thousand_fuzz_cases_end_as_documented(command_server, fuzz_folder):
    problems = [problem_of(seed, command_server, fuzz_folder) for seed in range(2000)]
    problems = [problem for problem in problems if problem]
    assert not problems, "\n\n".join(problems)


def test_fuzz_case_is_a_function_of_its_seed():
    assert make_case(7) == make_case(7) != make_case(8)


def test_options_of_a_command_include_its_fields():
    assert {"json", "test-set", "data.root"} <= {option.name for option in options_of("evaluate")}
    assert {"out", "loss", "optim.lr"} <= {option.name for option in options_of("targets write")}
