"""Fields that have no effect beside others."""

from typing import Any

from deit.core.errors import ConfigProblem


def without_effect(
    section: str, values: Any, leaves: tuple[str, ...], advice: str
) -> list[ConfigProblem]:
    """A problem for each field that was changed although it cannot take effect."""
    defaults = type(values)()
    return [
        ConfigProblem(f"{section}.{leaf}", getattr(values, leaf), advice)
        for leaf in leaves
        if getattr(values, leaf) != getattr(defaults, leaf)
    ]
