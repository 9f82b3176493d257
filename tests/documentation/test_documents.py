"""Links, names, tables and diagrams of the documents are up to date."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from deit.cli.commands import COMMANDS
from scripts.documentation.commands import parsers_of
from tests.documentation.documents import DOCS, ROOT, blocks, code_spans, documents, navigation

OTHER_OPTIONS = {
    *("--nproc_per_node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"),  # torchrun
    *("--multi_gpu", "--num_processes", "--mixed_precision", "--config_file"),  # accelerate
    *("--rounds", "--seconds", "--rows", "--epochs"),  # scripts of the project
    *("--signal", "--debug", "--section.field", "--version"),
    *("--no-index", "--check", "--numprocesses"),
}
"""Options of other programs, and placeholders, that documents name."""


def markdown_files() -> list[Path]:
    return [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *DOCS.rglob("*.md")]


def test_links_and_images_of_the_documents_exist():
    for document in markdown_files():
        text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.S | re.M)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_page_is_in_the_navigation():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(navigation()) == sorted(pages)


def test_documents_named_in_the_code_exist():
    for folder in ("deit", "models", "datasets", "scripts", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for name in re.findall(r"\bdocs/[\w/-]+\.(?:md|json|png|svg)\b", path.read_text()):
                is_example = path.name in ("test_lints.py", "test_documents.py")
                assert is_example or (ROOT / name).exists(), f"{path}: {name}"


def test_tests_that_documents_name_exist():
    """`test_file::test_name` in a document is a test of that name, in that file."""
    named = {
        reference
        for text in documents().values()
        for reference in re.findall(r"`(test_\w+)::(test_\w+)`", text)
    }
    assert len(named) > 40
    for file, name in named:
        (path,) = (ROOT / "tests").rglob(f"{file}.py")
        assert f"\ndef {name}(" in path.read_text(encoding="utf-8"), (file, name)


@cache
def known_options() -> set[str]:
    """Return the options of all commands."""
    return {
        option
        for name in COMMANDS
        for _, parser in parsers_of(name)
        for option in parser._option_string_actions
    }


@pytest.mark.parametrize("name", documents())
def test_options_that_a_document_names_exist(name):
    text = documents()[name]
    code = [*code_spans(text), *blocks(text, "sh")]
    options = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", "\n".join(code)))
    unknown = {option.rstrip(".") for option in options} - known_options() - OTHER_OPTIONS
    assert unknown == set()


@pytest.mark.parametrize("name", documents())
def test_commands_that_a_document_names_exist(name):
    spans = code_spans(documents()[name])
    commands = {match[1] for span in spans if (match := re.match(r"deit ([a-z-]+)\b", span))}
    assert commands - {*COMMANDS, "help"} == set()


@cache
def strings_of_the_code() -> str:
    """Return all string constants of the code, one a line; gaps of f-strings split a string."""
    constants = []
    for folder in ("deit", "models", "datasets"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    constants.append(" ".join(node.value.split()))
    return "\n".join(constants)


def quoted_messages() -> list[tuple[str, str]]:
    """Return (page, message) for each message that a table under `If it fails` quotes."""
    quoted = []
    for name, text in documents().items():
        _, _, section = text.partition("\n## If it fails\n")
        for row in re.findall(r"^\| (.+?) \|", section.split("\n## ")[0], re.MULTILINE):
            quoted += [(name, span) for span in re.findall(r"`([a-zA-Z][^`]* [^`]*)`", row)]
    return quoted


@pytest.mark.parametrize(("page", "message"), quoted_messages())
def test_messages_that_a_guide_quotes_exist(page, message):
    assert message in strings_of_the_code()


def test_guides_quote_messages():
    assert len(quoted_messages()) > 20


def test_generated_tables_match_the_result_files(command_server):
    done = command_server.run("--check", script="scripts/results.py", cwd=ROOT)
    assert done.code == 0, "run: python scripts/results.py"


def test_diagrams_match_the_script_that_draws_them(command_server):
    done = command_server.run("--check", script="scripts/diagrams.py", cwd=ROOT)
    assert done.code == 0, done.out


def test_architecture_lists_every_folder_of_the_code():
    text = (DOCS / "explanation" / "architecture.md").read_text(encoding="utf-8")
    packages = [path for path in (ROOT / "deit").iterdir() if (path / "__init__.py").is_file()]
    for folder in (*packages, ROOT / "models", ROOT / "datasets"):
        assert f"| `{folder.relative_to(ROOT)}/` |" in text, folder
