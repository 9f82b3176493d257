"""The options of commands that take a configuration, generated from its dataclasses."""

import argparse
import ast
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from deit.cli.parser import Names, Parser
from deit.config.presets import PRESETS
from deit.config.recipes import find_recipe
from deit.config.schema import Config
from deit.config.sections.student import STUDENTS

SHARED = {
    "out": "Run folder. (default: checkpoints/RECIPE in the working directory)",
    "resume": "Resume the run in --out from its latest valid checkpoint.",
    "loss": "Preset of the loss section: deit-hard, deit-soft, class-hard, class-soft, "
    "function-matching, usi, dkd or none (labels only). (default: the recipe's)",
    "augmentation": "Preset of auto_augment, color jitter, erasing, mixing and aug_repeats in the "
    "views section: deit, deit3, mix, usi or none. It does not change crop and flip. (default: the "
    "recipe's)",
    "view_mode": "Preset of the teacher's view, crop and mixing in the views section: fix/rs, "
    "fix/cc, fix/ic_ens, ind/rc, ind/ic, same/rc, same/ic or function-matching. (default: the "
    "recipe's)",
    "dry_run": "Run one training and one evaluation step; write nothing.",
    "print_config": "Print the resolved configuration as JSON and exit.",
}
"""Help of the options that every command with a configuration takes, in addition to fields."""
FLAGS = ("resume", "dry_run", "print_config")
"""Those of SHARED that take no value."""
_METAVARS = {
    "out": "DIR",
    **{name: Names(preset.names) for name, preset in PRESETS.items()},
    "data.root": "DIR",
    "data.exclude_list": "FILE|none",
    "data.classes": "NAME,...|@FILE",
    "data.unseen_classes": "NAME,...|@FILE",
    "student.name": Names(STUDENTS),
    "init.weights": "SOURCE|none",
    "init.pruning_masks": "FILE|keep|none",
    "teacher.source": "SOURCE,...",
    "teacher.architecture": Names(STUDENTS, many=True),
    "teacher.target_stores": "STORE,...",
}
"""What `--help` shows as the value of shared options and of fields whose type is text."""


class RawValue(NamedTuple):
    """The arguments given to an option, as text. The configuration's types convert them later, so
    that all invalid values of a command line are reported in one message.

    many: whether the option takes several arguments.
    """

    arguments: tuple[str, ...]
    many: bool

    @property
    def text(self) -> str:
        """The arguments, separated by commas."""
        return ",".join(self.arguments)


def plain(value: Any) -> Any:
    """Return the text of a `RawValue`, and any other value unchanged."""
    return value.text if isinstance(value, RawValue) else value


def _no_options(program: str) -> Parser:
    return Parser(prog=program, add_help=False)


@dataclass(frozen=True)
class ConfigCommand:
    """A command that takes the fields of a configuration as options.

    name: the words after `deit`. about: the description in `--help`. usage: the positional
    arguments, for `--help`.
    own_parser: returns the parser of the command's own options, for its name in messages.
    help_overrides: help of shared options that differs for this command. excluded: shared options
    that the command does not take, each with what to do instead.
    """

    name: str = ""
    about: str = ""
    usage: str = "RECIPE"
    own_parser: Callable[[str], Parser] = _no_options
    help_overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
    excluded: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def parser(
        self,
        program: str,
        *,
        recipe: str = "digits",
        base: Config | None = None,
        own_parser: Parser | None = None,
    ) -> Parser:
        """Return the parser of all options: the command's own, the shared ones, and the fields.

        program: the command's name in messages. recipe, base: where the defaults come from.
        own_parser: the parser of the command's own options, if it depends on other arguments.
        """
        parser = Parser(
            name=self.name,
            prog=program,
            usage=f"{program} {self.usage} [OPTIONS]",
            description=f"{self.about}\n\n{_about_recipe(recipe, self.usage)}",
            parents=[own_parser or self.own_parser(program)],
            first_argument=self.usage.split()[0].strip("[]"),
        )
        existing = {action.dest for action in parser._actions}
        for name, text in SHARED.items():
            if name not in existing and name not in self.excluded:
                settings: dict[str, Any] = {"action": "store_true"}
                if name not in FLAGS:
                    settings = {"nargs": "*", "metavar": _METAVARS[name]}
                text = self.help_overrides.get(name, text)
                parser.add_argument(option_of(name), help=_escaped(text), **settings)
        base = base or find_recipe(recipe)
        for section in dataclasses.fields(Config):
            _add_section(parser, section.name, getattr(base, section.name))
        return parser


def _about_recipe(recipe: str, usage: str) -> str:
    """Return the paragraph of --help about RECIPE and the defaults of fields."""
    defaults = f"Defaults of fields are those of {recipe!r}."
    if "RECIPE" in usage:
        kinds = "a name listed by `deit recipes`, FILE.py:FUNCTION, or the config.json of a run"
        return f"RECIPE: {kinds}. {defaults}"
    return defaults if recipe.endswith(".json") else f"{defaults} Give {usage} to see its own."


def parse_options(arguments: list[str], parser: Parser, base: Config) -> tuple[Any, list[str]]:
    """Parse the shared options and the fields of a configuration.

    parser: of a `ConfigCommand`. The command's own options are already removed from `arguments`.

    Returns an object and the unknown arguments. The object has an attribute for each shared option,
    None or False if it was not given, and `config`: a copy of `base` that holds a `RawValue` or
    bool for each given field. `--help` prints and raises SystemExit(0).
    """
    namespace, unknown = parser.parse_known_args(arguments)
    shared = {name: getattr(namespace, name, None) for name in SHARED}
    values = {
        name: RawValue(tuple(value), False) if isinstance(value, list) else value
        for name, value in shared.items()
    }
    values |= {name: bool(values.get(name)) for name in FLAGS}
    return types.SimpleNamespace(**values, config=_with_given(base, namespace)), unknown


def option_of(name: str) -> str:
    """Return the option for a Python name: `--dry-run` for `dry_run`."""
    return "--" + name.replace("_", "-")


def _add_section(parser: argparse.ArgumentParser, section: str, base: Any) -> None:
    """Add a group with an option for each field of a section."""
    summary = inspect.cleandoc(type(base).__doc__ or "").split("\n\n")[0]
    group = parser.add_argument_group(f"{section} options", " ".join(summary.split()))
    for field in dataclasses.fields(base):
        name, value = f"{section}.{field.name}", getattr(base, field.name)
        metavar = _METAVARS.get(name) or _metavar(field.type)
        text = field_helps(type(base))[field.name]
        text = _escaped(_with_default(text, value, takes_none=metavar.endswith("|none")))
        if field.type is bool:
            off = f"--{section}.no_{field.name}"
            group.add_argument(f"--{name}", off, action=_Switch, help=text, nargs=0)
        else:
            group.add_argument(
                f"--{name}", nargs="*", default=None, metavar=metavar, help=text, dest=name
            )


def _with_default(text: str, value: Any, *, takes_none: bool) -> str:
    """Return the help of a field with its default, stated once.

    text: its docstring, which can end in `Default: ...`, the meaning of None or (). value: the
    default of the recipe. takes_none: whether `none` is a value of the option.
    """
    text, _, meaning = text.partition(" Default: ")
    if not meaning:
        return f"{text} (default: {_format_value(value)})"
    if value in (None, ()):
        return f"{text} (default: {meaning.removesuffix('.')})"
    none = f" none: {meaning}" if takes_none else ""
    return f"{text}{none} (default: {_format_value(value)})"


class _Switch(argparse.Action):
    """`--section.field` sets True, `--section.no_field` sets False."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, option_string == self.option_strings[0])


def _with_given(base: Config, namespace: argparse.Namespace) -> Config:
    """Return `base` with a `RawValue` or bool for each field given on the command line."""
    sections = {}
    for section in dataclasses.fields(Config):
        values, given = getattr(base, section.name), {}
        for field in dataclasses.fields(values):
            value = getattr(namespace, f"{section.name}.{field.name}", None)
            if isinstance(value, list):
                value = RawValue(tuple(value), _is_tuple(field.type))
            if value is not None:
                given[field.name] = value
        sections[section.name] = dataclasses.replace(values, **given)
    return Config(**sections)


def _is_tuple(annotation: Any) -> bool:
    is_annotated = typing.get_origin(annotation) is Annotated
    inner = typing.get_args(annotation)[0] if is_annotated else annotation
    return typing.get_origin(inner) is tuple


@functools.cache
def field_helps(section: type) -> dict[str, str]:
    """Return the docstring below each field of a section, as one line of text."""
    (body,) = ast.parse(inspect.cleandoc(inspect.getsource(section))).body
    assert isinstance(body, ast.ClassDef)
    helps, name = {}, ""
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            helps[name] = " ".join(str(node.value.value).split())
    return helps


def _metavar(annotation: Any) -> str:
    """Return how `--help` shows the values of a type: `INT`, `{a,b}`, `FLOAT,FLOAT`."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if origin in (types.UnionType, typing.Union):
        return "|".join("none" if part is type(None) else _metavar(part) for part in inner)
    if origin is Annotated:
        return _metavar(inner[0])
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return f"{_metavar(inner[0])},..."
        return ",".join(map(_metavar, inner))
    return {int: "INT", float: "FLOAT"}.get(annotation, "TEXT")


def _format_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(map(_format_value, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    return text.replace("%", "%%")
