"""Equations of the documentation: a fence ```math in TeX becomes MathML when the site is built.

GitHub renders the same fence. A browser draws MathML itself, so no script and no font is loaded.
"""

from typing import Any

from latex2mathml.converter import convert


def format_fence(
    source: str, language: str, css_class: str, options: Any, md: Any, **details: Any
) -> str:
    """Return the HTML of an equation; the signature is that of pymdownx.superfences' formatters.

    Each line of a fence is an equation of its own.

    Example:
        >>> format_fence("x", "math", "math", {}, None)[:26]
        '<div class="math"><math xm'
    """
    lines = [convert(line, display="block") for line in source.splitlines() if line.strip()]
    return f'<div class="{css_class}">{"".join(lines)}</div>'
