"""The Makefile: what `make quickstart` announces, installs and runs."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from deit.config.recipes import find_recipe
from deit.datasets.splits import load_splits

ROOT = Path(__file__).parents[1]


def planned(*arguments, folder):
    """Return the lines that make would run, with an environment in `folder` that is still empty."""
    command = ["make", "-n", "-f", str(ROOT / "Makefile"), f"VENV={folder / 'env'}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def quickstart_commands(folder):
    """Return the arguments of the deit commands of `make quickstart`, by command."""
    program = f"{folder / 'env' / 'bin' / 'deit'} "
    lines = [line for line in planned("quickstart", folder=folder) if line.startswith(program)]
    return {name: rest for _, name, *rest in map(shlex.split, lines)}


def test_quickstart_says_what_it_does_before_it_installs(tmp_path):
    text = "\n".join(planned("quickstart", folder=tmp_path))
    announced, installed, trained = (
        text.index(word) for word in ("echo", " pip install ", "deit compare ")
    )
    assert announced < installed < trained
    before = text[:installed]
    assert re.search(r"once\b.*\bminutes\b", before, re.DOTALL)
    pytest.importorskip("sklearn")
    counts = [
        len(load_splits(find_recipe(name).data).train.labels)
        for name in ("digits-few-labels", "digits-few-labels-teacher")
    ]
    assert [int(count) for count in re.findall(r"\b\d{2,}\b", before)][:2] == counts


@pytest.mark.parametrize("torch", ["cpu", ""])
def test_quickstart_takes_the_cpu_build_of_torch_only_on_request(torch, tmp_path):
    (install,) = (
        line
        for line in planned("quickstart", f"TORCH={torch}", folder=tmp_path)
        if " pip install " in line
    )
    arguments = shlex.split(install)
    index = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
    assert (arguments[-4:-2] == index) == (torch == "cpu")
    assert ("--extra-index-url" in arguments) == (torch == "cpu")
    assert arguments[-2:] == ["-e", ".[digits,plot]"]


def test_quickstart_commands_are_valid_and_name_the_files_to_open(tmp_path, command_server):
    commands = quickstart_commands(tmp_path)
    assert list(commands) == ["compare", "report"]
    done = command_server.run("compare", *commands["compare"], "--dry-run", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "6 runs, 0 of them finished" in done.out
    folder = commands["compare"][commands["compare"].index("--out") + 1]
    report, page = commands["report"][0], commands["report"][2]
    assert report == folder
    text = "\n".join(planned("quickstart", folder=tmp_path))
    assert f"{page}/index.html" in text
    assert f"{folder}/runs.png" in text
