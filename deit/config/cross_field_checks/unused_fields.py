"""Fields that have no effect with the values of other fields."""

from typing import Any

from deit.core.errors import ConfigProblem


def without_effect(
    section: str, values: Any, leaves: tuple[str, ...], hint: str
) -> list[ConfigProblem]:
    """Return a problem for each of the fields that differs from its default.

    values: the section. leaves: its fields that have no effect. hint: why, for the message.
    """
    defaults = type(values)()
    return [
        ConfigProblem(f"{section}.{leaf}", getattr(values, leaf), hint)
        for leaf in leaves
        if getattr(values, leaf) != getattr(defaults, leaf)
    ]
