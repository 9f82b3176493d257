"""The grammar of a run's command line: options of a command, shared ones, every field; --help."""

import argparse
import dataclasses
import functools
import types
import typing
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from deit.config import Config

SHARED = {
    "out": "Run folder. None: checkpoints/RECIPE below the working directory.",
    "resume": "Go on with the run in the folder, from its newest sound checkpoint.",
    "objective": "A whole loss section by name: deit-hard, deit-soft, class-hard, class-soft, "
    "function-matching, usi, dkd or none (labels alone). Not given: the recipe's own.",
    "augmentation": "Policy, jitter, erasing, mixing and repeats of the views by name: deit, "
    "deit3, mix, usi or none (none of them); crop and flip stay the recipe's. Not given: the "
    "recipe's own.",
    "teaching": "What the teacher sees beside the student, with crop and mixing, by name: fix/rs, "
    "fix/cc, fix/ic_ens, ind/rc, ind/ic, same/rc, same/ic or function-matching. Not given: the "
    "recipe's own.",
    "dry_run": "One training and one evaluation step; nothing is written.",
    "print_config": "Print the resolved configuration as JSON and stop.",
}
"""What the command line of every run may say besides its fields, and what that does."""
FLAGS = ("resume", "dry_run", "print_config")
"""The shared options that take no value."""


class Typed(NamedTuple):
    """The words typed after a flag; the configuration's types convert them, so that every wrong
    value of a command line is reported in one message."""

    words: tuple[str, ...]
    many: bool

    @property
    def text(self) -> str:
        """The words with commas between them."""
        return ",".join(self.words)


def plain(value: Any) -> Any:
    """The text of a typed value; any other as it is."""
    return value.text if isinstance(value, Typed) else value


_RUN_REGISTRY = ConstructorRegistry()


@_RUN_REGISTRY.primitive_rule
def _as_typed(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    if dataclasses.is_dataclass(info.type) or info.type is bool:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=_metavar(info.type),
        instance_from_str=lambda arguments: Typed(
            tuple(arguments), typing.get_origin(info.type) is tuple
        ),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [_shown(value)],
    )


@_RUN_REGISTRY.struct_rule
def _as_section(info: StructTypeInfo) -> StructConstructorSpec | None:
    """As of any dataclass, but for the help: tyro breaks its lines where the source does."""
    if info.type not in {section.type for section in dataclasses.fields(Config)}:
        return None
    return StructConstructorSpec(
        instantiate=info.type,
        fields=tuple(
            StructFieldSpec(
                name=leaf.name,
                type=leaf.type,
                default=getattr(info.default, leaf.name),
                helptext=lambda name=leaf.name: _helps_of(info.type)[name],
            )
            for leaf in dataclasses.fields(info.type)
        ),
    )


@functools.cache
def _helps_of(section: type) -> dict[str, str]:
    """What a section's source says below each field, as one paragraph."""
    import docstring_parser  # only --help needs it

    params = docstring_parser.parse_from_object(section).params
    return {param.arg_name: " ".join((param.description or "").split()) for param in params}


def _metavar(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if origin in (types.UnionType, typing.Union):
        return "|".join("none" if part is type(None) else _metavar(part) for part in inner)
    if origin is Annotated:
        return _metavar(inner[0])
    if origin is tuple:
        return "A,B,..." if inner[-1] is Ellipsis else ",".join(_metavar(part) for part in inner)
    return {int: "INT", float: "FLOAT"}.get(kind, "TEXT")


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(map(_shown, value)) or "(none)"
    return f"{value:g}" if isinstance(value, float) else str(value)


def read(
    arguments: list[str],
    base: Config,
    *,
    usage: str,
    about: str,
    own: argparse.ArgumentParser | None = None,
    told: Mapping[str, str] | None = None,
    without: Collection[str] = (),
) -> tuple[Any, list[str]]:
    """The options that were typed over a configuration, and the words that are none.

    own: the parser that has read the command's own options already; `--help` tells them first.
    told: what shared options do here, where that is something else. without: those that the
    command has no use for.
    Returns an object with each shared option, None or False where it was not typed, and `config`.
    `--help` prints and raises SystemExit(0).
    """
    fields = [_own(action) for action in own._actions] if own is not None else []
    taken = {name for name, *_ in fields}
    for name, text in SHARED.items():
        if name not in taken and name not in without:
            shown = (told or {}).get(name, text)
            fields.append(_flag(name, shown) if name in FLAGS else _text(name, shown))
    section = Annotated[Config, tyro.conf.arg(name="")]
    fields.append(("config", section, dataclasses.field(default_factory=lambda: base)))
    found, unknown = tyro.cli(
        dataclasses.make_dataclass("Options", fields),
        prog=usage,
        description=about,
        args=arguments,
        return_unknown_args=True,
        use_underscores=True,
        registry=_RUN_REGISTRY,
    )
    usual = {name: False if name in FLAGS else None for name in SHARED}
    return types.SimpleNamespace(**{**usual, **vars(found)}), unknown


_Field = tuple[str, Any, Any]


def _flag(name: str, text: str) -> _Field:
    shown = tyro.conf.arg(name=name, help=text)
    kind = Annotated[bool, tyro.conf.FlagCreatePairsOff, shown]
    return name, kind, dataclasses.field(default=False)


def _text(name: str, text: str) -> _Field:
    kind = Annotated[str | None, tyro.conf.arg(name=name, help=text)]
    return name, kind, dataclasses.field(default=None)


def _own(action: argparse.Action) -> _Field:
    """An option of the command itself, for `--help` alone: its own parser has read it."""
    name = action.option_strings[0].removeprefix("--")
    if action.nargs == 0:
        return name, *_flag(name, action.help or "")[1:]
    choices = "{" + ",".join(map(str, action.choices or ())) + "}"
    shown = tyro.conf.arg(
        name=name,
        help=action.help,
        metavar=action.metavar or (choices if action.choices else name.upper()),
        help_behavior_hint="" if action.default in (None, "") else f"(default: {action.default})",
    )
    return action.dest, Annotated[str | None, shown], dataclasses.field(default=None)
