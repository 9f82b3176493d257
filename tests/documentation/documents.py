"""The documents of the project: which pages there are, and the commands that they show."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import yaml

from deit.cli.commands import COMMANDS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PROGRAMS = ("python", "make", "deit", "torchrun", "accelerate", "pip", "source", "sbatch")


def navigation() -> list[str]:
    """Return the pages of the site in the order of the navigation, relative to docs/."""

    def pages(entry: object) -> Iterator[str]:
        for value in entry.values() if isinstance(entry, dict) else entry:
            yield from [value] if isinstance(value, str) else pages(value)

    class Loader(yaml.SafeLoader):
        """Reads mkdocs.yml without its tags for Python objects and variables."""

    Loader.add_multi_constructor("", lambda loader, suffix, node: None)
    return list(pages(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]))


def text_of(page: str) -> str:
    """Return a page of docs/ as Markdown."""
    return (DOCS / page).read_text(encoding="utf-8")


def documents() -> dict[str, str]:
    """Return the text of README.md and of every page but the log, by name."""
    pages = {name: text_of(name) for name in navigation() if name != "log.md"}
    return {"README.md": (ROOT / "README.md").read_text(encoding="utf-8"), **pages}


def documents_with_commands() -> dict[str, str]:
    """Return README.md, the tutorials and the guides, in the order in which they are read."""
    return {
        name: text
        for name, text in documents().items()
        if name in ("README.md", "index.md") or name.startswith(("tutorials/", "guides/"))
    }


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Return the command lines of all sh blocks, each once, in the order of the documents."""
    lines = []
    for text in documents_with_commands().values():
        for block in blocks(text, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                command = " ".join(line.split("  #")[0].split())
                if command:
                    lines.append(command)
    return list(dict.fromkeys(lines))


def as_deit_command(line: str) -> tuple[str, list[str]] | None:
    """Return (name, arguments) of a command line of deit, or None for other programs."""
    program, *arguments = shlex.split(line)
    if program == "python" and arguments[0].endswith("_deit.py"):
        return arguments[0].removesuffix("_deit.py"), arguments[1:]
    if program == "deit" and arguments[0] in COMMANDS:
        return arguments[0], arguments[1:]
    return None


def code_spans(text: str) -> list[str]:
    """Return the inline code of a page, without that of code blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
