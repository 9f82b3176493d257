"""The examples in docstrings run and give the values that they show.

They run in a folder with small files of the kinds that a user has: the run `checkpoints/digits`,
its teacher `checkpoints/digits-teacher`, stored targets in `checkpoints/digits-targets`, and images
in `pets/cat` and `pets/dog`.
"""

import doctest
import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deit.config.recipes import find_recipe
from deit.core.console import quiet
from deit.distill.write_targets import write_targets
from deit.training.train import train

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"deit": "deit", "models": "deit.models", "datasets": "deit.datasets"}
WITH_EXAMPLES = {
    *("deit.core", "deit.config", "deit.models", "deit.datasets", "deit.distill", "deit.training"),
    *("deit.evaluation", "deit.deploy", "deit.experiments", "deit.analysis", "deit.viz"),
    "deit.api",
}
SMALL = {"depth": 1, "embed_dim": 16, "num_heads": 2}


def modules_with_examples() -> list[str]:
    """Return the names of all modules with an example in a docstring."""
    names = []
    for folder, package in PACKAGES.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in file.read_text(encoding="utf-8"):
                parts = file.relative_to(ROOT / folder).with_suffix("").parts
                names.append(".".join((package, *parts)).removesuffix(".__init__"))
    return names


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Return a folder with small runs, stored targets and images."""
    folder = tmp_path_factory.mktemp("examples")
    half, short = {"train_fraction": 0.5}, {"epochs": 2, "warmup_epochs": 1}
    student = find_recipe("digits").replace(data=half, student=SMALL, optim=short)
    with pytest.MonkeyPatch.context() as patch, quiet():
        patch.chdir(folder)
        teacher = find_recipe("digits-teacher").replace(data=half, optim={"epochs": 3})
        train(teacher, "checkpoints/digits-teacher")
        train(student, "checkpoints/digits")
        write_targets(student, "checkpoints/digits-targets", epochs=1)
    generator = np.random.default_rng(0)
    for name, count in (("cat", 12), ("dog", 8)):
        (folder / "pets" / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (20, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pets" / name / f"{index}.png")
    return folder


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings_give_what_they_show(
    name, workspace, tmp_path, monkeypatch, fork_runs
):
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0
    assert results.failed == 0


def test_examples_exist_in_every_part_of_the_library():
    parts = {".".join(name.split(".")[:2]) for name in modules_with_examples()}
    assert parts >= WITH_EXAMPLES
