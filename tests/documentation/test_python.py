"""The Python code of README and of the documentation runs, with smaller students."""

import pytest

import deit
from deit.config import recipes
from tests.documentation.documents import blocks, documents

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
SMALL = {
    "data": {"train_fraction": 0.2},
    "optim": {"epochs": 2, "warmup_epochs": 1, "batch_size": 32},
    "run": {"eval_every_epochs": 1},
}
NARROW = {"student": {"depth": 1, "embed_dim": 16, "num_heads": 2}}
ANY_TEACHER = {"teacher": {"source": ("checkpoints/digits-teacher",), "allow_near_chance": True}}
IN_TEST_COMMANDS = "tutorials/own-teacher.md"  # test_commands.py runs its program
WITH_PYTHON = {
    name: text
    for name, text in documents().items()
    if blocks(text, "python") and name != IN_TEST_COMMANDS
}


@pytest.fixture
def small_recipes(monkeypatch):
    """Make the recipes of the digits small."""
    teacher, student = (recipes.RECIPES[name]() for name in ("digits-teacher", "digits"))
    small = {
        "digits-teacher": teacher.replace(**SMALL),
        "digits": student.replace(**SMALL, **NARROW, **ANY_TEACHER),
    }
    for name, config in small.items():
        monkeypatch.setitem(recipes.RECIPES, name, lambda config=config: config)


def test_readme_and_a_tutorial_have_python_code():
    assert {"README.md", "tutorials/own-experiment.md"} <= WITH_PYTHON.keys()


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_code_of_a_document_runs(name, small_recipes, fork_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name.startswith("reference/"):  # which are about runs that exist
        deit.train("digits-teacher", "checkpoints/digits-teacher", verbose=False)
        deit.train("digits", "checkpoints/digits", verbose=False)
    namespace = {"__name__": "document"}
    for index, block in enumerate(blocks(WITH_PYTHON[name], "python")):
        exec(compile(block, f"{name}, block {index}", "exec"), namespace)
