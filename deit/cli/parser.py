"""Options that are no field of a configuration: their parser, and values of several parts."""

import argparse
import shlex
import sys
import typing
from typing import Any

from deit.core.errors import ConfigError, did_you_mean


def parse_part(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8): part 2, counted from 0, of 8. Raises ConfigError."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ConfigError(f"--part {text}: should be I/N with I in 0 ... N - 1, as in 0/4")
    return int(part), int(parts)


def check_content(text: str | None) -> str | None:
    """hard, full or top-K. Raises ConfigError."""
    kept = (text or "").removeprefix("top-")
    if text in (None, "hard", "full") or (kept != text and kept.isdecimal() and int(kept) > 0):
        return text
    raise ConfigError(f"--content {text}: should be hard, full or top-K, as in top-10")


def parse_numbers(text: str | None, option: str, *, whole: bool, least: int = 1) -> tuple[Any, ...]:
    """`8,16` as numbers: counts from `least`, or shares in (0, 1]. Raises ConfigError."""
    found = []
    for word in (text or "").split(","):
        if not word:
            continue
        try:
            value = int(word) if whole else float(word)
        except ValueError:
            value = -1
        if not (value >= least if whole else 0 < value <= 1):  # nor a NaN
            kind = f"whole numbers from {least}" if whole else "shares in (0, 1]"
            raise ConfigError(f"{option} {text}: should be {kind}, with commas")
        found.append(value)
    if len({f"{value:g}" for value in found}) < len(found):
        raise ConfigError(f"{option} {text}: names one of them twice")
    return tuple(found)


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` as seeds, each once. Raises ConfigError."""
    try:
        seeds = tuple(int(seed) for seed in text.split(","))
    except ValueError:
        seeds = (-1,)
    if min(seeds) < 0:
        raise ConfigError(f"--seeds {text}: should be whole numbers from 0, with commas")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text}: names one of them twice")
    return seeds


def parse_controls(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The named ones of the known controls, in their own order. Raises ConfigError."""
    named = [] if text == "none" else [name.strip() for name in text.split(",") if name.strip()]
    for name in named:
        if name not in known:
            raise ConfigError(
                f"--controls {name}: should be of {', '.join(known)}, or "
                f"none{did_you_mean(name, known)}"
            )
    return tuple(name for name in known if name in named)


def command_of(program: str, arguments: list[str]) -> str:
    """Return a command as one line for the record: `deit sweep heat.yaml --out heat`."""
    return f"{program} {shlex.join(arguments)}".rstrip()


class Parser(argparse.ArgumentParser):
    """argparse for the options of commands: errors become ours, nothing is guessed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def add_multi_run_options(self, *, seeds: str = "0", retries: bool = True) -> None:
        """The options of every command that trains many runs."""
        self.add_argument(
            "--seeds",
            default=seeds,
            metavar="A,B,...",
            help="Seeds to train with; several give mean and standard deviation.",
        )
        self.add_argument(
            "--parallel",
            type=int,
            default=1,
            metavar="N",
            help="Number of runs to train in parallel, for students too small to use the whole "
            "machine.",
        )
        if retries:
            self.add_argument(
                "--retries",
                type=int,
                default=1,
                metavar="N",
                help="Number of retries of a run after a transient failure (killed, out of memory, "
                "disk full).",
            )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; hyphens and underscores within options are the same."""
        words = list(map(self._spelled, sys.argv[1:] if args is None else args))
        for word in words:
            name, _, value = word.partition("=")
            if value == "--" and name in self._option_string_actions:
                self.error(f"{name} takes no --")  # argparse would make an empty list of it
        return super().parse_known_args(words, namespace)

    def _spelled(self, word: str) -> str:
        """Return a word with its option as this parser spells it."""
        name, equals, value = word.partition("=")
        for ours in (name, "--" + name[2:].replace("_", "-"), "--" + name[2:].replace("-", "_")):
            if word.startswith("--") and ours in self._option_string_actions:
                return f"{ours}{equals}{value}"
        return word

    def print_help(self, file: Any = None) -> None:
        """Print the help; unlike argparse, report a standard output that cannot be written."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")
