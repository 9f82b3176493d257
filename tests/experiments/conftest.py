"""Experiments that several test files use."""

import json
from pathlib import Path

import pytest

from deit.experiments.sweep_tables import best_of
from tests.helpers.processes import Completed
from tests.helpers.sweeps import LOTTERY, row
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


@pytest.fixture
def results():
    """Return results with two fields and two values each; the last point has no finished run."""
    values = [{"loss.temperature": t, "optim.lr": lr} for t in ("1", "3") for lr in ("0.1", "0.2")]
    rows = {
        "teacher": row({}, [1.0], teacher=True),
        "a": row(values[0], [0.5, 0.7], validation=(0.6, 0.6)),
        "b": row(values[1], [0.8, 0.8], validation=(0.9, 0.5)),
        "c": row(values[2], [0.4], validation=(0.95,), failed={"1": "no\nmemory | left"}),
        "d": row(values[3], [], failed={"0": "x", "1": "x"}),
    }
    return {
        "sweep": "mine",
        "recipe": "digits",
        "study": None,
        "fields": ["loss.temperature", "optim.lr"],
        "split": "test",
        "num_samples": 10,
        "seeds": [0, 1],
        "rows": rows,
        "best": best_of(rows, 2),
        "disagreement": {},
        "search": None,
        "stopped": {},
        "command": "deit sweep mine.yaml",
        "environment": {
            "device_name": "a processor",
            "commit": "0123456789abcdef",
            "packages": {"torch": "2.15.0"},
        },
    }
