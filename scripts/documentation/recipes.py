"""The page of recipes: what each one trains, and every field that it sets."""

import dataclasses
from typing import Any

from deit.config.recipes import RECIPES
from deit.config.schema import Config
from scripts.documentation.markdown import code, escaped, text_table

_INTRODUCTION = """\
A recipe is a named configuration: `deit train RECIPE`. `deit recipes` prints this list. Any field
can be changed on the command line ([settings](settings.md)), and a recipe of your own is a Python
function ([Your own experiment](../tutorials/own-experiment.md)).
"""


def recipes_page() -> str:
    """Return the page as Markdown."""
    rows, details = [], []
    for name, recipe in RECIPES.items():
        config = recipe()
        summary, *more = [
            " ".join(part.split()) for part in (recipe.__doc__ or "").strip().split("\n\n")
        ]
        network = f"{config.student.name}, {config.student.image_size} px"
        rows.append(
            (f"[`{name}`](#{name})", escaped(network), str(config.optim.epochs), escaped(summary))
        )
        text = "\n\n".join(map(escaped, more))
        details.append(f"### {name}\n\n{escaped(summary)}\n\n{text}\n\n{_changed_fields(config)}\n")
    table = text_table(("recipe", "student", "epochs", "summary"), rows)
    fields = "\n".join(details).replace("\n\n\n\n", "\n\n")
    return f"# Recipes\n\n{_INTRODUCTION}\n{table}\n\n## What each recipe sets\n\n{fields}"


def _changed_fields(config: Config) -> str:
    """Return the fields of a recipe that differ from their defaults, a row for each section."""
    rows = []
    for section in dataclasses.fields(Config):
        values, default = getattr(config, section.name), section.type()
        changed = [
            code(f"{field.name}={_text_of(getattr(values, field.name))}")
            for field in dataclasses.fields(values)
            if getattr(values, field.name) != getattr(default, field.name)
        ]
        if changed:
            rows.append((code(section.name), ", ".join(changed)))
    return text_table(("section", "fields"), rows)


def _text_of(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_text_of, value)) or "none"
    if value is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
