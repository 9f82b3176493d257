"""The options of a run's command line, from the configuration's dataclasses; their --help."""

import argparse
import ast
import dataclasses
import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from deit.cli.parser import Parser
from deit.config.schema import Config

SHARED = {
    "out": "Run folder. (default: checkpoints/RECIPE in the working directory)",
    "resume": "Resume the run in --out from its latest valid checkpoint.",
    "loss": "Preset of the loss section: deit-hard, deit-soft, class-hard, class-soft, "
    "function-matching, usi, dkd or none (labels only). (default: the recipe's)",
    "augmentation": "Preset of auto_augment, color jitter, erasing, mixing and aug_repeats of the "
    "views: deit, deit3, mix, usi or none; crop and flip stay the recipe's. (default: the "
    "recipe's)",
    "view_mode": "Preset of the teacher's view, crop and mixing: fix/rs, fix/cc, fix/ic_ens, "
    "ind/rc, ind/ic, same/rc, same/ic or function-matching. (default: the recipe's)",
    "dry_run": "One training and one evaluation step; nothing is written.",
    "print_config": "Print the resolved configuration as JSON and exit.",
}
"""Options of every command that takes a configuration, beside its fields, with their help."""
FLAGS = ("resume", "dry_run", "print_config")
"""The shared options that take no value."""


class RawValue(NamedTuple):
    """The words given to an option; the configuration's types convert them, so that all invalid
    values of a command line are reported in one message."""

    words: tuple[str, ...]
    many: bool

    @property
    def text(self) -> str:
        """The words, separated by commas."""
        return ",".join(self.words)


def plain(value: Any) -> Any:
    """Return the text of a `RawValue`, and any other value unchanged."""
    return value.text if isinstance(value, RawValue) else value


def parse_options(
    arguments: list[str],
    base: Config,
    *,
    usage: str,
    about: str,
    command_parser: argparse.ArgumentParser | None = None,
    help_overrides: Mapping[str, str] | None = None,
    excluded: Collection[str] = (),
) -> tuple[Any, list[str]]:
    """Parse the shared options and the fields of a configuration.

    command_parser: the parser of the command's own options, which has read them already; `--help`
    lists them first. help_overrides: help of shared options that differ for this command.
    excluded: shared options that the command does not take.
    Returns an object with each shared option, None or False where it was not given, and `config`,
    which is `base` with a `RawValue` or bool in the place of each given field; and the words that
    belong to no option. `--help` prints and raises SystemExit(0).
    """
    parser = Parser(
        prog=usage.split(" ", 2)[0],
        usage=f"{usage} [OPTIONS]",
        description=about,
        parents=[] if command_parser is None else [command_parser],
        formatter_class=_Formatter,
    )
    taken = {action.dest for action in parser._actions}
    for name, text in SHARED.items():
        if name not in taken and name not in excluded:
            takes: dict[str, Any] = {"nargs": "*", "metavar": "VALUE"}
            takes = {"action": "store_true"} if name in FLAGS else takes
            shown = (help_overrides or {}).get(name, text)
            parser.add_argument(option_of(name), help=_escaped(shown), **takes)
    for section in dataclasses.fields(Config):
        _add_section(parser, section.name, getattr(base, section.name))
    found, unknown = parser.parse_known_args(arguments)
    shared = {name: getattr(found, name, None) for name in SHARED}
    values = {
        name: RawValue(tuple(value), False) if isinstance(value, list) else value
        for name, value in shared.items()
    }
    values |= {name: bool(values.get(name)) for name in FLAGS}
    return types.SimpleNamespace(**values, config=_with_given(base, found)), unknown


def option_of(name: str) -> str:
    """Return the option of a Python name: `--dry-run` for `dry_run`."""
    return "--" + name.replace("_", "-")


def _add_section(parser: argparse.ArgumentParser, section: str, base: Any) -> None:
    """Add an option for each field of a section, in a group of their own."""
    summary = inspect.cleandoc(type(base).__doc__ or "").split("\n\n")[0]
    group = parser.add_argument_group(f"{section} options", " ".join(summary.split()))
    for leaf in dataclasses.fields(base):
        name, value = f"{section}.{leaf.name}", getattr(base, leaf.name)
        text = _escaped(_helps_of(type(base))[leaf.name])
        if value not in (None, ()) or "Default" not in text:
            text += f" (default: {_escaped(_shown(value))})"
        if leaf.type is bool:
            off = f"--{section}.no_{leaf.name}"
            group.add_argument(f"--{name}", off, action=_Switch, help=text, nargs=0)
        else:
            metavar = _metavar(leaf.type)
            group.add_argument(
                f"--{name}", nargs="*", default=None, metavar=metavar, help=text, dest=name
            )


class _Switch(argparse.Action):
    """`--section.field` sets True, `--section.no_field` sets False."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


class _Formatter(argparse.HelpFormatter):
    """argparse's, with the paragraphs of the description kept, and one metavar per option."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = ["\n".join(self._split_lines(part, width)) for part in text.split("\n\n")]
        return textwrap.indent("\n\n".join(lines), indent)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        told = action.default in (None, "", False, argparse.SUPPRESS) or "(default" in text
        return text if told else f"{text} (default: %(default)s)"

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "*":
            return str(action.metavar or default_metavar)
        return super()._format_args(action, default_metavar)


def _with_given(base: Config, found: argparse.Namespace) -> Config:
    """Return `base` with the given options, as words, in the place of its fields."""
    sections = {}
    for section in dataclasses.fields(Config):
        before, given = getattr(base, section.name), {}
        for leaf in dataclasses.fields(before):
            value = getattr(found, f"{section.name}.{leaf.name}", None)
            if value is not None:
                many = _is_tuple(leaf.type)
                given[leaf.name] = (
                    RawValue(tuple(value), many) if isinstance(value, list) else value
                )
        sections[section.name] = dataclasses.replace(before, **given)
    return Config(**sections)


def _is_tuple(kind: Any) -> bool:
    inner = typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind
    return typing.get_origin(inner) is tuple


@functools.cache
def _helps_of(section: type) -> dict[str, str]:
    """Return the docstring below each field of a section, as one paragraph."""
    (body,) = ast.parse(inspect.cleandoc(inspect.getsource(section))).body
    assert isinstance(body, ast.ClassDef)
    helps, name = {}, ""
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            helps[name] = " ".join(str(node.value.value).split())
    return helps


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
        return ",".join(map(_shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    return text.replace("%", "%%")
