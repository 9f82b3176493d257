"""Runs, images, teachers and stores that are missing are reported before torch is imported."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest

from deit.config.input_paths import check_source
from deit.config.recipes import find_recipe
from deit.core.errors import NotFoundError
from tests.helpers.processes import ROOT

PROGRAM = """
import contextlib, io, json, sys
blocked = ("torch", "torchvision", "timm", "accelerate", "transformers", "sklearn")
sys.modules.update(dict.fromkeys(blocked))  # importing one of them raises ImportError
from deit.cli import run_command
results = []
for name, *arguments in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        code = run_command(name, arguments, f"deit {name}")
    results.append((code, errors.getvalue()))
print(json.dumps(results))
"""


class Case(NamedTuple):
    arguments: str
    code: int
    fragment: str


FOLDER = "data.root gone: no such folder; expected gone/CLASS/IMAGE, or gone/train/CLASS/IMAGE"
MOVED = "data.root gone: no such file or folder"
RUN = "gone: no such run folder"
CASES = [
    Case("evaluate gone", 4, RUN),
    Case("evaluate run gone", 4, RUN),
    Case("evaluate run/best --data.root gone", 3, MOVED),
    Case("evaluate empty", 4, "empty: not a run folder (no config.json)"),
    Case("predict gone photo.png", 4, RUN),
    Case("predict run gone.png", 3, "gone.png: no such file"),
    Case("predict run gone.png gone", 3, "2 of 2 images could not be read:"),
    Case("report gone", 4, RUN),
    Case("report run --data.root gone", 3, MOVED),
    Case("loss-landscape run gone", 4, RUN),
    Case("loss-landscape run --data.root gone", 3, MOVED),
    Case("export gone --format timm", 4, RUN),
    Case("export run --format timm --data.root gone", 3, MOVED),
    Case("quantize gone", 4, RUN),
    Case("quantize run --data.root gone", 3, MOVED),
    Case("prune gone", 4, RUN),
    Case("variants gone", 4, RUN),
    Case("variants run gone", 4, RUN),
    Case("variants run --data.root gone", 3, MOVED),
    Case("check-data gone", 3, FOLDER),
    Case("check-data gone --source shards", 3, "expected gone/*.tar, or gone/train/*.tar"),
    Case("show-views folder --data.root gone", 3, FOLDER),
    Case("train folder --data.root gone --loss none --teacher.source none", 3, FOLDER),
    Case("train folder-teacher --data.root gone --dry-run", 3, FOLDER),
    Case("train cifar10-teacher --data.root gone", 3, "(no folder gone/cifar-10-batches-py)"),
    Case("train mnist-teacher --data.root gone", 3, "--data.download"),
    Case("train digits", 3, "teacher.source checkpoints/digits-teacher: no such file or folder"),
    Case("train digits --teacher.source net.py:net", 3, "teacher.source net.py:net: "),
    Case("train digits --teacher.target_stores gone", 3, "teacher.target_stores gone: "),
    Case("finetune folder --from gone/run --data.root photos", 4, "--from gone/run: no such file"),
    Case("finetune --from gone/run", 4, "--from gone/run: no such file or folder"),
    Case("profile folder --data.root gone --teacher.source none --loss none", 3, FOLDER),
    Case("compare folder --data.root gone", 3, FOLDER),
    Case("lottery folder-teacher --data.root gone", 3, FOLDER),
    Case("targets write folder --out store --data.root gone", 3, FOLDER),
    Case("targets verify gone", 3, "teacher.target_stores gone: is not a target store"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with something that looks like a run, and an empty folder."""
    folder = tmp_path_factory.mktemp("paths")
    (folder / "empty").mkdir()
    (folder / "run" / "best").mkdir(parents=True)
    (folder / "run" / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        input=json.dumps([case.arguments.split() for case in CASES]),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", CASES, ids=[case.arguments for case in CASES])
def test_missing_path_is_reported_without_torch(case, results, folder):
    code, message = results[case]
    assert message.startswith("deit: error: ")
    assert case.fragment in message
    assert code == case.code, message
    assert {path.name for path in folder.iterdir()} == {"empty", "run"}


def test_images_and_teacher_that_are_missing_are_in_one_message(folder, results):
    _, message = results[CASES[-2]]
    assert "teacher.source checkpoints/folder-teacher: " in message
    assert FOLDER in message


@pytest.mark.parametrize(
    "source",
    [
        "resnet18",
        "regnety_160.deit_in1k",
        "hf-hub:timm/resnet18",
        "run",
        "empty",
        "run/config.json",
    ],
)
def test_names_of_models_and_existing_paths_are_left_to_the_loader(source, folder, monkeypatch):
    monkeypatch.chdir(folder)
    check_source(source)


@pytest.mark.parametrize("source", ["a/b", "~/gone/x", "https://x.invalid/w.pth", "gone.py:net"])
def test_message_about_a_missing_teacher_is_that_of_the_loader(source, folder, monkeypatch):
    from deit.models.teacher_sources import resolve_source

    monkeypatch.chdir(folder)
    with pytest.raises(NotFoundError) as early:
        check_source(source)
    with pytest.raises(NotFoundError) as late:
        resolve_source(source)
    assert str(early.value) == str(late.value)


def test_recipe_whose_teacher_is_missing_needs_it():
    """The cases above rely on it."""
    assert find_recipe("folder").teacher.source == ("checkpoints/folder-teacher",)
