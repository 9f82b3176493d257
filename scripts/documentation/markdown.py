"""Markdown of generated pages: tables of text, and text that contains Markdown's characters."""

import re
from collections.abc import Iterable

_CODE = re.compile(r"(`[^`]*`)")
_SPECIAL = re.compile(
    r"([\\*<\[\]]|(?<![^\W_])_|_(?![^\W_]))"
)  # an underscore within a word is safe


def escaped(text: str) -> str:
    r"""Return plain text as Markdown. Code in backticks stays code.

    >>> escaped("deit_*: see `a_b*`")
    'deit\\_\\*: see `a_b*`'
    """
    parts = _CODE.split(text)
    return "".join(
        part if index % 2 else _SPECIAL.sub(r"\\\1", part) for index, part in enumerate(parts)
    )


def code(text: str) -> str:
    """Return text as inline code; nothing for an empty text."""
    return f"`{text}`" if text else ""


def text_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table of text cells, aligned left; `|` in a cell is escaped."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )
