"""The page of settings: every field of a configuration, from the dataclasses."""

import dataclasses
import inspect
import re
import types
import typing
from typing import Annotated, Any, Literal

from pydantic.fields import FieldInfo

from deit.cli.grammar import field_helps
from deit.config.presets import AUGMENTATIONS, LOSS_PRESETS, VIEW_MODES
from deit.config.schema import RESUMABLE_FIELDS, Config
from deit.config.sections.loss import LossConfig
from scripts.documentation.markdown import code, escaped, text_table

_INTRODUCTION = """\
A configuration has eight sections. Every field is an option of the commands that take a recipe, for
example `--optim.lr 5e-4`, a key of a [sweep file](../guides/sweeps.md), and an argument of
`Config.replace(optim={"lr": 5e-4})`. The defaults below are those of an empty configuration; a
recipe sets its own ([recipes](recipes.md)). `deit train RECIPE --help-all` lists the fields with
the defaults of that recipe. Lists are separated by commas; `none` removes an optional value.
"""
_UNIT = re.compile(r" \[(px|s|epochs|degrees)\]")


def settings_page() -> str:
    """Return the page as Markdown."""
    parts = [f"# Settings\n\n{_INTRODUCTION}"]
    for section in dataclasses.fields(Config):
        parts.append(_section(section.name, section.type))
    parts.append(_presets())
    fields = "\n".join(f"- {code(name)}" for name in RESUMABLE_FIELDS)
    parts.append(
        "## Settings that a resumed run can change\n\nThey decide where and how a run computes, "
        "not what. `data.exclude_list`, `teacher.source` and `teacher.target_stores` can name "
        f"other paths of the same content.\n\n{fields}\n"
    )
    return "\n".join(parts)


def _section(name: str, section: Any) -> str:
    """Return the heading, the summary and the table of one section."""
    helps, rows = field_helps(section), []
    for field in dataclasses.fields(section):
        help_text = helps[field.name]
        units = _UNIT.findall(help_text)
        text, _, meaning = _UNIT.sub("", help_text).partition(" Default: ")
        rows.append(
            (
                code(f"{name}.{field.name}"),
                values_of(field.type) + (f" [{units[0]}]" if units else ""),
                escaped(meaning.removesuffix("."))
                if meaning and field.default in (None, ())
                else code(_default(field.default)),
                escaped(text),
            )
        )
    summary = inspect.cleandoc(section.__doc__ or "")
    table = text_table(("setting", "values", "default", "meaning"), rows)
    return f"## {name}\n\n{escaped(summary)}\n\n{table}\n"


def _default(value: Any) -> str:
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return ",".join(map(_default, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def values_of(annotation: Any, bounds: tuple[Any, ...] = ()) -> str:
    """Return what a field of this type accepts, as Markdown.

    bounds: constraints of an enclosing annotation.

    >>> from deit.config.field_types import Count
    >>> values_of(Count)
    'integer, at least 1'
    """
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return values_of(inner[0], (*bounds, *_constraints(inner[1:])))
    if origin is Literal:
        return ", ".join(code(str(choice)) for choice in inner)
    if origin in (types.UnionType, typing.Union):
        kinds = [values_of(part, bounds) for part in inner if part is not type(None)]
        return " or ".join([*kinds, "`none`"] if type(None) in inner else kinds)
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return f"list ({values_of(inner[0])})"
        return values_of(inner[0]).replace("number", f"{len(inner)} numbers", 1)
    kind = {int: "integer", float: "number", bool: "switch", str: "text"}[annotation]
    return ", ".join([kind, *_described(bounds)])


def _constraints(metadata: tuple[Any, ...]) -> list[Any]:
    """Return the limits among the metadata of an annotation."""
    limits = []
    for item in metadata:
        limits += item.metadata if isinstance(item, FieldInfo) else [item]
    return limits


def _described(bounds: tuple[Any, ...]) -> list[str]:
    """Return limits in words, in the order lower, upper."""
    phrases = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
    return [
        f"{phrase} {_limit(getattr(bound, name))}"
        for name, phrase in phrases.items()
        for bound in bounds
        if hasattr(bound, name)
    ]


def _limit(value: float) -> str:
    if isinstance(value, int) and value > 1000 and value & (value - 1) == 0:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}"


def _presets() -> str:
    """Return the section about presets: each name with the fields that it sets."""
    losses = [
        (code(name), _fields("loss", _loss_fields(preset))) for name, preset in LOSS_PRESETS.items()
    ]
    augmentations = [
        (code(name), _fields("views", fields)) for name, fields in AUGMENTATIONS.items()
    ]
    modes = [
        (code(name), mode.teacher_view, mode.crop, f"{mode.mixup:g}")
        for name, mode in VIEW_MODES.items()
    ]
    columns = ("name", "views.teacher_view", "crop of the student", "views.mixup_alpha")
    return (
        "## Presets\n\nAn option that sets several fields by one name. Fields given with it refine "
        "it.\n\n"
        "### --loss\n\nReplaces the section `loss`; fields that are not listed get their "
        f"defaults. See [Losses](../explanation/losses.md).\n\n"
        f"{text_table(('name', 'fields'), losses)}\n\n"
        "### --augmentation\n\nSets fields of `views`. Crop, flip and rotation stay as the recipe "
        f"sets them.\n\n{text_table(('name', 'fields'), augmentations)}\n\n"
        "### --view-mode\n\nSets the teacher's view, the crop and the mixing in `views`. See "
        "[Views of student and teacher](../guides/views.md).\n\n"
        f"{text_table(columns, modes)}\n"
    )


def _loss_fields(loss: LossConfig) -> dict[str, Any]:
    """Return what defines a loss, also where it is the default, and what differs from defaults."""
    names = ("kind",) if loss.kind == "none" else ("kind", "head", "distillation_weight")
    return {name: getattr(loss, name) for name in names} | _changed(loss)


def _changed(section: Any) -> dict[str, Any]:
    """Return the fields of a section that differ from their defaults."""
    return {
        field.name: getattr(section, field.name)
        for field in dataclasses.fields(section)
        if getattr(section, field.name) != field.default
    }


def _fields(section: str, values: dict[str, Any]) -> str:
    return ", ".join(code(f"{section}.{name}={_default(value)}") for name, value in values.items())
