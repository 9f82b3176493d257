"""The registry of recipes, by their names on the command line."""

from collections.abc import Callable

from deit.config.schema import Config

RECIPES: dict[str, Callable[[], Config]] = {}
"""All recipes: functions without arguments that return a configuration."""


def recipe(function: Callable[[], Config]) -> Callable[[], Config]:
    """Register a recipe under the name of its function, with hyphens instead of underscores."""
    RECIPES[function.__name__.replace("_", "-")] = function
    return function
