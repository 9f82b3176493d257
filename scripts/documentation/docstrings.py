"""A griffe extension: show the docstrings of this project as they are meant.

They are plain text with code in backticks. Parameters are described in sentences, `name: what it
is.` Examples are doctests, below `Example:` or at the end.
"""

import re
from collections.abc import Collection
from typing import Any

import griffe

_POWER = re.compile(r"(?<=\w)\*\*(?=\w)")
_NAMES = re.compile(r"(?:(?<=^)|(?<=[.;)] ))(\w+(?:, \w+)*): ")
_NEXT = re.compile(r"(?<=\. )(?=(?:Raises?|Returns?|Sources?:?) )")


class PlainDocstrings(griffe.Extension):
    """Change every docstring to what griffe's Google style and Markdown show correctly."""

    def on_object(self, *, obj: griffe.Object, **details: Any) -> None:
        """Change the docstring of an object, once it is loaded."""
        if obj.docstring is None:
            return
        names: set[str] = set()
        if isinstance(obj, griffe.Function):
            names = {parameter.name for parameter in obj.parameters}
        elif isinstance(obj, griffe.Class):
            names = {*obj.members}
            if isinstance(init := obj.members.get("__init__"), griffe.Function):
                names |= {parameter.name for parameter in init.parameters}
        obj.docstring.value = as_google_style(obj.docstring.value, names)


def as_google_style(text: str, names: Collection[str] = ()) -> str:
    r"""Return a docstring with its doctests in a section `Examples:`, and its parameters in a list.

    names: the parameters.

    >>> as_google_style("Return x**2.\n\nExample:\n    >>> 1\n    1").splitlines()
    ['Return x\\*\\*2.', '', 'Examples:', '    >>> 1', '    1']
    >>> print(as_google_style("x, y: sides\n[px]. z: depth. Raises ValueError.", ["x", "y", "z"]))
    - **x**, **y**: sides [px].
    - **z**: depth.
    <BLANKLINE>
    Raises ValueError.
    """
    paragraphs = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("Example:\n"):
            paragraph = paragraph.replace("Example:", "Examples:", 1)
        elif paragraph.startswith(">>> "):
            paragraph = "Examples:\n" + "\n".join(f"    {line}" for line in paragraph.split("\n"))
        elif ">>> " not in paragraph:
            parts = paragraph.split("`")
            parts[::2] = [_POWER.sub(r"\*\*", part) for part in parts[::2]]
            paragraph = _with_list("`".join(parts), names)
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def _with_list(paragraph: str, names: Collection[str]) -> str:
    """Return a paragraph with its descriptions of parameters as a list."""
    line = " ".join(paragraph.split())
    starts = [m for m in _NAMES.finditer(line) if {*m[1].split(", ")} <= {*names}]
    if not starts:
        return paragraph
    items, rest = [], ""
    for match, following in zip(starts, [*starts[1:], None]):
        text = line[match.end() : None if following is None else following.start()].strip()
        text, *more = _NEXT.split(text, maxsplit=1)
        rest = " ".join([rest, *more]).strip()
        items.append(f"- {', '.join(f'**{name}**' for name in match[1].split(', '))}: {text}")
    before = line[: starts[0].start()].strip()
    return "\n\n".join(filter(None, [before, "\n".join(item.strip() for item in items), rest]))
