"""The examples in docstrings run and give the values that they show."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"deit": "deit", "models": "deit.models", "datasets": "deit.datasets"}


def modules_with_examples() -> list[str]:
    """Return the names of all modules with an example in a docstring."""
    names = []
    for folder, package in PACKAGES.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in file.read_text(encoding="utf-8"):
                parts = file.relative_to(ROOT / folder).with_suffix("").parts
                names.append(".".join((package, *parts)))
    return names


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings_give_what_they_show(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0
    assert results.failed == 0


def test_examples_exist_in_every_part_of_the_library():
    packages = {name.rpartition(".")[0] for name in modules_with_examples()}
    assert packages >= {"deit.core", "deit.distill", "deit.training"}
