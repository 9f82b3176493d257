"""A griffe extension: show the docstrings of this project as they are meant.

They are plain text with code in backticks. Examples are doctests, below `Example:` or at the end.
"""

import re
from typing import Any

import griffe

_POWER = re.compile(r"(?<=\w)\*\*(?=\w)")


class PlainDocstrings(griffe.Extension):
    """Change every docstring to what griffe's Google style and Markdown show correctly."""

    def on_object(self, *, obj: griffe.Object, **details: Any) -> None:
        """Change the docstring of an object, once it is loaded."""
        if obj.docstring is not None:
            obj.docstring.value = as_google_style(obj.docstring.value)


def as_google_style(text: str) -> str:
    r"""Return a docstring with its doctests in a section `Examples:`, and powers escaped.

    >>> as_google_style("Return x**2.\n\nExample:\n    >>> 1\n    1").splitlines()
    ['Return x\\*\\*2.', '', 'Examples:', '    >>> 1', '    1']
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
            paragraph = "`".join(parts)
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)
