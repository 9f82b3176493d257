"""Citation, contributor's guide, issue templates, release checklist, changelog: up to date."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

import deit
from deit.cli.commands import COMMANDS

ROOT = Path(__file__).parents[1]
GUIDES = ("CONTRIBUTING.md", "docs/reference/releasing.md")
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def commands_of(name: str) -> list[str]:
    """Return the lines of the sh blocks of a document, without comments."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    lines = "\n".join(blocks).splitlines()
    return [command for line in lines if (command := re.split(r"\s+#\s", line)[0].strip())]


def test_citation_names_version_license_and_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)  # the keys that the format requires
    assert (citation["title"], citation["version"]) == ("deit", deit.__version__)
    assert citation["license"] == "Apache-2.0"
    assert citation["authors"] == [{"name": "The deit authors"}]
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= set(paper)
    assert (paper["type"], paper["year"]) == ("conference-paper", 2021)
    assert paper["authors"][0]["family-names"] == "Touvron"


@pytest.mark.parametrize("name", GUIDES)
def test_guides_name_files_that_exist(name):
    text = (ROOT / name).read_text()
    paths = re.findall(r"`((?:deit|models|datasets|tests|scripts|docs)/[\w/.-]*)`", text)
    paths += re.findall(r"\b((?:tests|scripts)/[\w/]+\.\w+)", text)
    paths += [word for line in commands_of(name) for word in line.split() if word.endswith(".py")]
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", GUIDES)
def test_guides_name_targets_of_make_and_commands_that_exist(name):
    text = (ROOT / name).read_text()
    for target in set(re.findall(r"^ *make ([\w-]+)|`make ([\w-]+)`", text, re.M)):
        subprocess.run(["make", "-n", *filter(None, target)], cwd=ROOT, check=True, stdout=-3)
    commands = re.findall(r"(?:`|bin/)deit ([\w-]+)", text)
    assert set(commands) <= {*COMMANDS, "--version"}


def test_contributing_names_tables_that_are_in_their_files():
    """`NAME` ... of `FILE`: the file defines the name."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.partition("## How to add")[2].partition("## Style")[0]
    named = re.findall(r"`(\w+)` of\s+`([\w/]+\.py)`", section)
    assert len(named) > 12
    for name, file in named:
        definition = rf"^(?:def |class )?{name}\b *[:=(]"
        assert re.search(definition, (ROOT / file).read_text(), re.M), (name, file)
    tables = re.findall(
        r"`(\w+)` of\s+`[\w/.]+`\s+\(`(tests/[\w/]+\.py)` runs\s+over it\)", section
    )
    assert len(tables) == 2
    for table, file in tables:
        assert re.search(rf'parametrize\("\w+", {table}\)', (ROOT / file).read_text())


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates_are_forms_with_a_required_answer(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in fields}) == len(fields)
    assert all(part["attributes"]["label"] for part in fields)
    assert any(part.get("validations", {}).get("required") for part in fields)


def test_issue_templates_cover_bugs_features_and_questions():
    assert {path.stem for path in TEMPLATES} == {"bug_report", "feature_request", "question"}


def test_changelog_begins_with_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (\S+)", text, re.M)[0] == deit.__version__
    section = re.split(r"^## ", text, flags=re.M)[1]
    assert re.findall(r"^### (\w+)", section, re.M) == ["Added", "Changed", "Fixed"]
