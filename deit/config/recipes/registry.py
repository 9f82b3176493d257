"""The recipes by their names on the command line."""

from collections.abc import Callable

from deit.config.schema import Config

RECIPES: dict[str, Callable[[], Config]] = {}
"""Every recipe: a function without arguments that returns a configuration."""


def recipe(function: Callable[[], Config]) -> Callable[[], Config]:
    """Register a recipe as the name of its function, with hyphens for underscores."""
    RECIPES[function.__name__.replace("_", "-")] = function
    return function
