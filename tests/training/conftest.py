"""Runs that several test files use, trained once per file."""

import json
from pathlib import Path

import pytest

from deit.config.finetune_schedules import at_resolution
from deit.config.recipes.handwriting import digits, digits_teacher
from deit.training.train import train
from tests.helpers import small_runs
from tests.helpers.finetune_runs import BRIEF, FEW, SMALL
from tests.helpers.trained import trained


@pytest.fixture(scope="module")
def uninterrupted_run(command_server, tmp_path_factory) -> Path:
    """Return a finished small run without a stop."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = command_server.run("train", *small_runs.SMALL, "--out", out)
    assert done.code == 0, done.err
    best = json.loads((out / "result.json").read_text())["best"]
    assert best["epoch"] == 2  # best is written twice
    return out


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Return the folder of a teacher and a student at 8 px, and the teacher fine-tuned at 16 px."""
    folder = tmp_path_factory.mktemp("runs")
    trained(digits_teacher().replace(optim={"epochs": 3}), folder / "teacher")
    source = str(folder / "teacher")
    student = digits().replace(data=FEW, student=SMALL, teacher={"source": (source,)}, optim=BRIEF)
    train(student, folder / "student")
    finetuned = at_resolution(digits_teacher(), 16).replace(data=FEW, init={"weights": source})
    train(finetuned.replace(optim={"epochs": 1, "warmup_epochs": 0}), folder / "teacher16")
    return folder
