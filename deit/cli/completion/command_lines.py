"""What can follow `deit` on a command line: commands, options and their values."""

import argparse
import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from deit.cli.commands import COMMANDS, parsers
from deit.cli.common_options import HELP_OPTIONS
from deit.config.recipes import RECIPES
from deit.experiments.sweep_grid import SWEEPS


class Values(NamedTuple):
    """The values that a shell proposes for an option or an argument.

    names: fixed values. paths: whether it proposes files or folders. many: whether the value is a
    list with commas.
    """

    names: tuple[str, ...] = ()
    paths: Literal["", "file", "folder"] = ""
    many: bool = False


class Option(NamedTuple):
    """An option. values: None if it takes no value. help: a few words."""

    values: Values | None
    help: str


class CommandLine(NamedTuple):
    """What can follow a command.

    arguments: the values of its arguments; the last one also those of all further ones, if `more`.
    options: by their names, with `--`.
    """

    arguments: tuple[Values, ...]
    more: bool
    options: dict[str, Option]


TOP_OPTIONS = (*sorted(HELP_OPTIONS), "--version")
"""Options in place of a command."""
_FOLDERS = ("DIR", "STORE", "RUN", "DATA")
_FILES = ("FILE", "SOURCE", "IMAGE", "RECIPE", "SWEEP")
_NAMES = {"RECIPE": tuple(RECIPES), "SWEEP": tuple(SWEEPS)}
_HELP_LENGTH = 64  # characters


def command_lines() -> dict[str, CommandLine]:
    """Return what can follow each command, by the words that select it.

    >>> lines = command_lines()
    >>> lines["train"].options["--run.device"].values.names
    ('auto', 'cpu', 'cuda')
    >>> lines["help"].arguments[0].names[:2]
    ('train', 'finetune')
    """
    lines = {name: _command_line(parser) for name, parser in parsers().items()}
    return {**lines, "help": CommandLine((Values(tuple(COMMANDS)),), False, {})}


def summaries(lines: Mapping[str, CommandLine]) -> dict[str, str]:
    """Return a sentence for each command."""
    known = {name: command.summary for name, command in COMMANDS.items()}
    known["help"] = "Print the help of a command."
    return {name: known[name] for name in dict.fromkeys(name.split()[0] for name in lines)}


def actions_of(lines: Mapping[str, CommandLine]) -> dict[str, list[str]]:
    """Return the second words of the commands that have one: `write` and `verify` of `targets`."""
    actions: dict[str, list[str]] = {}
    for command in lines:
        name, _, action = command.partition(" ")
        if action:
            actions.setdefault(name, []).append(action)
    return actions


def shared_fields(lines: Mapping[str, CommandLine]) -> dict[str, Option]:
    """Return the options that are the same in all commands with a configuration."""
    first, *others = (line.options for line in lines.values() if _has_fields(line))
    return {
        name: option
        for name, option in first.items()
        if all(options.get(name) == option for options in others)
    }


def own_options(line: CommandLine, fields: Mapping[str, Option]) -> tuple[dict[str, Option], bool]:
    """Return the options of a command without the shared fields, and whether it has those."""
    has_fields = _has_fields(line)
    options = line.options
    if has_fields:
        options = {name: option for name, option in options.items() if name not in fields}
    return options, has_fields


def _has_fields(line: CommandLine) -> bool:
    return "--optim.lr" in line.options


def fill(template: str, replacements: Mapping[str, str]) -> str:
    """Return a template with each `@NAME@` replaced."""
    for name, text in replacements.items():
        template = template.replace(f"@{name}@", text)
    return template


def _command_line(parser: argparse.ArgumentParser) -> CommandLine:
    first = getattr(parser, "first_argument", "")
    positionals = [action for action in parser._actions if not action.option_strings]
    arguments = [_values_of(first)] if first else [_values(action) for action in positionals]
    more = any(action.nargs == "+" for action in positionals)
    options = {
        name: Option(None if action.nargs == 0 else _values(action), _summary(action.help or ""))
        for action in parser._actions
        for name in action.option_strings
    }
    options["--debug"] = Option(None, "Print the traceback of an error.")
    return CommandLine(tuple(arguments), more, options)


def _values(action: argparse.Action) -> Values:
    """Return the values of an option or argument."""
    values = _values_of(str(action.metavar or ""))
    names = tuple(map(str, action.choices or getattr(action.metavar, "names", ())))
    return values._replace(names=names or values.names)


def _values_of(metavar: str) -> Values:
    """Return the values that a metavar stands for.

    >>> _values_of("{auto,cpu}|none")
    Values(names=('auto', 'cpu', 'none'), paths='', many=False)
    >>> _values_of("STORE,...")
    Values(names=(), paths='folder', many=True)
    """
    many = metavar.endswith(",...")
    names: tuple[str, ...] = ()
    paths: Literal["", "file", "folder"] = ""
    for part in metavar.removesuffix(",...").split("|"):
        kind = part.partition(".")[0]
        if match := re.fullmatch(r"\{(.*)\}", part):
            names += tuple(match[1].split(","))
        elif part.islower():
            names += (part,)
        elif kind in _FILES:
            paths, names = "file", names + _NAMES.get(kind, ())
        elif kind in _FOLDERS:
            paths = "folder"
    return Values(names, paths, many)


def _summary(text: str) -> str:
    """Return the first sentence of a help text, shortened.

    >>> _summary("Seed of all splits; independent of run.seed. (default: 0)")
    'Seed of all splits; independent of run.seed'
    """
    text = " ".join(text.replace("%%", "%").split())
    sentence = re.split(r"\. (?=[A-Z(])|\.$| \(default", text, maxsplit=1)[0]
    if len(sentence) <= _HELP_LENGTH:
        return sentence
    return sentence[:_HELP_LENGTH].rpartition(" ")[0] + " ..."
