"""The parser of a command's own options, the options that commands share, and option values that
are lists or pairs."""

import argparse
import shlex
import sys
import textwrap
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from deit.cli.common_options import COMMON, HELP_OPTIONS
from deit.config.command_choices import RETRIES
from deit.config.field_aliases import suggestion
from deit.core import run_folder
from deit.core.errors import ConfigError, did_you_mean


def parse_part(text: str) -> tuple[int, int]:
    """Return `2/8` as (2, 8): part 2, counted from 0, of 8. Raises ConfigError."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ConfigError(f"--part {text}: should be I/N with I in 0 ... N - 1, as in 0/4")
    return int(part), int(parts)


def parse_numbers(text: str | None, option: str, *, whole: bool, least: int = 1) -> tuple[Any, ...]:
    """Return `8,16` as numbers; an empty tuple for None.

    whole: integers of at least `least`; otherwise fractions in (0, 1]. Raises ConfigError for any
    other value and for duplicates.
    """
    numbers = []
    for part in (text or "").split(","):
        if not part:
            continue
        try:
            value = int(part) if whole else float(part)
        except ValueError:
            value = -1
        if not (value >= least if whole else 0 < value <= 1):  # false for NaN
            kind = f"integers of at least {least}" if whole else "fractions in (0, 1]"
            raise ConfigError(f"{option} {text}: should be {kind}, separated by commas")
        numbers.append(value)
    if len({f"{value:g}" for value in numbers}) < len(numbers):
        raise ConfigError(f"{option} {text}: contains a duplicate")
    return tuple(numbers)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Return `0,1,2` as seeds. Raises ConfigError for other values and for duplicates."""
    try:
        seeds = tuple(int(seed) for seed in text.split(","))
    except ValueError:
        seeds = (-1,)
    if min(seeds) < 0:
        raise ConfigError(f"--seeds {text}: should be integers of at least 0, separated by commas")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text}: contains a duplicate")
    return seeds


def parse_controls(text: str, known: Iterable[str]) -> tuple[str, ...]:
    """Return the given controls, in the order of `known`; none for `none`. Raises ConfigError."""
    known = tuple(known)
    given = () if text == "none" else parse_names(text)
    for name in given:
        if name not in known:
            raise ConfigError(
                f"--controls {name}: should be {', '.join(known)} or none"
                f"{did_you_mean(name, known)}"
            )
    return tuple(name for name in known if name in given)


def parse_names(text: str) -> tuple[str, ...]:
    """Return `a,b` as names, without the spaces around them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def command_of(program: str, arguments: list[str]) -> str:
    """Return a command as one line, for result files: `deit sweep heat.yaml --out heat`."""
    return f"{program} {shlex.join(arguments)}".rstrip()


class Names(str):
    """The metavar `NAME`, or `NAME,...` with many, of an option whose value shells complete with
    `names`; the option may take other values too."""

    names: tuple[str, ...]

    def __new__(cls, names: Iterable[str], *, many: bool = False) -> "Names":
        text = super().__new__(cls, "NAME,..." if many else "NAME")
        text.names = tuple(names)
        return text


class HelpFormatter(argparse.HelpFormatter):
    """argparse's formatter with the default value of each option, the paragraphs of the
    description, and one metavar per option of any number of values."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = ["\n".join(self._split_lines(part, width)) for part in text.split("\n\n")]
        return textwrap.indent("\n\n".join(lines), indent)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        default = action.default
        no_default = default in (None, "", argparse.SUPPRESS) or default is False
        if no_default or "(default" in text:
            return text
        return f"{text} (default: %(default)s)"

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "*":
            return str(action.metavar or default_metavar)
        return super()._format_args(action, default_metavar)


class _Help(argparse.Action):
    """`--help` prints the most used options, `--help-all` all of them."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        all_options = option_string == "--help-all" or parser.common is None
        # Unlike argparse's, this raises if standard output cannot be written.
        print(parser.format_help() if all_options else parser.format_common_help(), end="")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """argparse for the commands: errors are ConfigError, and options cannot be abbreviated.

    name: the command in COMMON, whose most used options `--help` shows; without it, or if it is not
    there, `--help` shows all options. first_argument: the metavar of an argument that is not
    parsed here, but removed before.
    """

    def __init__(
        self,
        *,
        name: str = "",
        add_help: bool = True,
        parents: Sequence[argparse.ArgumentParser] = (),
        first_argument: str = "",
        **settings: Any,
    ) -> None:
        help_parser = argparse.ArgumentParser(add_help=False)
        if add_help:
            text = "Print the most used options, or all options, and exit."
            names = sorted(HELP_OPTIONS, key=len)
            help_parser.add_argument(
                *names, action=_Help, nargs=0, dest=argparse.SUPPRESS, help=text
            )
        self.common, self.first_argument = COMMON.get(name), first_argument
        super().__init__(
            add_help=False,
            parents=[help_parser, *parents],
            allow_abbrev=False,
            formatter_class=HelpFormatter,
            **settings,
        )

    @property
    def options(self) -> dict[str, argparse.Action]:
        """The options by their first name, without those that print a help text."""
        return {
            action.option_strings[0]: action
            for action in self._actions
            if action.option_strings and not isinstance(action, _Help)
        }

    def format_common_help(self) -> str:
        """Return the text of `--help`: the most used options and examples."""
        assert self.common is not None
        options = self.options
        positionals = [action for action in self._actions if not action.option_strings]
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        for title, actions in (
            ("arguments", positionals),
            ("most used options", [options[f"--{name}"] for name in self.common.options]),
        ):
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        program = f"python {self.prog}" if self.prog.endswith(".py") else self.prog
        examples = "".join(f"  {program} {text}\n" for text in self.common.examples)
        end = f"--help-all lists all {len(options)} options.\n"
        return f"{formatter.format_help()}\nexamples:\n{examples}\n{end}"

    def add_run(self, *, many: bool = False, text: str | None = None) -> None:
        """Add RUN as `run`; with `many`, one or more of them as `runs`."""
        if many:
            text = text or "Run folders."
            self.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=text)
        else:
            self.add_argument("run", type=Path, metavar="RUN", help=text or "Run folder.")

    def add_checkpoint(self, *, default: str = "best") -> None:
        """Add --checkpoint as `checkpoint`."""
        self.add_argument(
            "--checkpoint",
            choices=run_folder.NAMES,
            default=default,
            help="Checkpoint of the run to load.",
        )

    def add_data_root(self, *, since: str = "training") -> None:
        """Add --data.root as `root`. since: what the folder has moved after, for the help."""
        self.add_argument(
            "--data.root",
            dest="root",
            metavar="DIR",
            help=f"Folder of the images, if it has moved since {since}.",
        )

    def add_json(self) -> None:
        """Add --json as `json`."""
        self.add_argument(
            "--json", type=Path, metavar="FILE", help="Also write the results to this JSON file."
        )

    def add_force(self, *outputs: str) -> None:
        """Add --force as `force`. outputs: the options and folders that it lets be overwritten."""
        self.add_argument(
            "--force",
            action="store_true",
            help=f"Overwrite existing output ({', '.join(outputs)}).",
        )

    def add_parallel(self) -> None:
        """Add --parallel as `parallel`."""
        self.add_argument(
            "--parallel",
            type=int,
            default=1,
            metavar="N",
            help="Number of runs to train in parallel, for students too small to use the whole "
            "machine.",
        )

    def add_multi_run_options(self, *, seeds: str = "0") -> None:
        """Add --seeds, --parallel and --retries, for commands that train many runs."""
        self.add_argument(
            "--seeds",
            default=seeds,
            metavar="N,...",
            help="Seeds to train with; several give mean and sample standard deviation (n - 1).",
        )
        self.add_parallel()
        self.add_argument(
            "--retries",
            type=int,
            default=RETRIES,
            metavar="N",
            help="Number of retries of a run after a transient failure (killed, out of memory, "
            "disk full).",
        )

    def suggestion(self, option: str) -> str:
        """Return `; did you mean --X?` for an unknown option, or an empty text."""
        known = [name[2:] for name in self._option_string_actions if name.startswith("--")]
        return suggestion(option.partition("=")[0][2:], known, prefix="--")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments. Raises ConfigError, with the closest option for an unknown one."""
        self._check_options(args)
        return super().parse_args(args, namespace)

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments, with options between the positional ones. Raises ConfigError."""
        self._check_options(args)
        return super().parse_intermixed_args(args, namespace)

    def _check_options(self, arguments: Iterable[str]) -> None:
        """Raise ConfigError for an unknown option, before argparse reports what is missing."""
        for argument in arguments:
            if argument == "--":
                break
            name = self._with_known_spelling(argument).partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                self.error(f"unknown option {argument}{self.suggestion(argument)}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, with hyphens and underscores in options exchangeable."""
        arguments = list(map(self._with_known_spelling, sys.argv[1:] if args is None else args))
        for argument in arguments:
            name, _, value = argument.partition("=")
            if value == "--" and name in self._option_string_actions:
                self.error(f"{name} takes no --")  # argparse would return an empty list
        return super().parse_known_args(arguments, namespace)

    def _with_known_spelling(self, argument: str) -> str:
        """Return an argument with its option spelled as it was added to this parser."""
        name, equals, value = argument.partition("=")
        hyphens, underscores = name[2:].replace("_", "-"), name[2:].replace("-", "_")
        for option in (name, f"--{hyphens}", f"--{underscores}"):
            if argument.startswith("--") and option in self._option_string_actions:
                return f"{option}{equals}{value}"
        return argument

    def error(self, message: str) -> typing.NoReturn:
        """Raise ConfigError instead of exiting."""
        raise ConfigError(f"{message}; see {self.prog} --help")
