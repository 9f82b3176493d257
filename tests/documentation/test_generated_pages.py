"""Pages of docs/reference/ that are generated from the code are up to date and complete."""

import dataclasses
import doctest
import importlib
import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

import deit
from deit.cli.commands import COMMANDS
from deit.cli.common_options import HELP_OPTIONS
from deit.config.field_types import Count, OptionalCount, Range
from deit.config.recipes import RECIPES
from deit.config.schema import Config
from deit.core import errors
from scripts.documentation.commands import parsers_of
from scripts.documentation.markdown import escaped, text_table
from scripts.documentation.settings import values_of

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"


def test_generated_pages_are_up_to_date(command_server):
    done = command_server.run("generate", "--check", script="scripts/docs.py", cwd=ROOT)
    assert done.code == 0, done.out


def test_settings_page_has_every_field_once():
    page = (REFERENCE / "settings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+\.\w+)` \|", page, re.MULTILINE)
    fields = [
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(Config)
        for field in dataclasses.fields(section.type)
    ]
    assert rows == fields


def test_recipes_page_has_every_recipe():
    page = (REFERENCE / "recipes.md").read_text(encoding="utf-8")
    assert re.findall(r"^### (.+)$", page, re.MULTILINE) == list(RECIPES)


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_page_has_every_option_of_a_command(name):
    page = (REFERENCE / "commands.md").read_text(encoding="utf-8")
    section = page.split(f"### deit {name}\n")[1].split("\n### ")[0]
    sections = tuple(f"--{section.name}." for section in dataclasses.fields(Config))
    parsers = list(parsers_of(name))
    assert parsers
    for _, parser in parsers:
        for action in parser._actions:
            for option in set(action.option_strings) - HELP_OPTIONS:
                is_setting = option.startswith(sections) and "every [setting]" in section
                assert is_setting or f"`{option}" in section or f" {option}" in section, option


def test_exit_codes_page_has_every_error_class():
    page = (REFERENCE / "exit-codes.md").read_text(encoding="utf-8")
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, errors.DeitError):
            row = f"| {kind.exit_code} | `{name}` |"
            assert (row in page) == (kind is not errors.DeitError), name


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (Count, "integer, at least 1"),
        (OptionalCount, "integer, at least 1 or `none`"),
        (Annotated[float, Field(gt=0, le=1)], "number, greater than 0, at most 1"),
        (Annotated[int, Field(ge=0, lt=2**63)], "integer, at least 0, less than 2^63"),
        (Range, "2 numbers, greater than 0"),
        (Literal["a", "b"], "`a`, `b`"),
        (tuple[str, ...], "list (text)"),
        (bool, "switch"),
    ],
)
def test_values_of_describes_types_and_limits(annotation, text):
    assert values_of(annotation) == text


@pytest.mark.parametrize("name", ["docstrings", "equations", "markdown", "settings"])
def test_examples_in_docstrings_give_what_they_show(name):
    pytest.importorskip({"docstrings": "griffe", "equations": "latex2mathml"}.get(name, "deit"))
    results = doctest.testmod(importlib.import_module(f"scripts.documentation.{name}"))
    assert (results.attempted > 0, results.failed) == (True, 0)


def test_escaped_text_is_shown_as_it_is():
    assert escaped("a*b <c> [px] d_e _f `g*`") == r"a\*b \<c> \[px\] d_e \_f `g*`"
    assert text_table(["a"], [["x|y"]]) == "| a |\n| --- |\n| x\\|y |"


def test_api_page_has_every_public_name():
    page = (REFERENCE / "api.md").read_text(encoding="utf-8")
    names = re.findall(r"^::: [\w.]+\.(\w+)$", page, re.MULTILINE)
    assert sorted(names) == sorted({*deit.__all__} - {"__version__", "errors"})
    purposes = re.findall(r"^\| `deit\.(\w+)` \| \S.{9,} \|$", page, re.MULTILINE)
    assert purposes == names
