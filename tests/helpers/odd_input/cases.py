"""Fuzz cases: commands with odd input, each a function of its seed.

A case is a command line from the real options of a command, a folder of small inputs, some of them
damaged, and the kinds of its streams and terminal. A case that does not end with a documented exit
code and one message has found a bug. See `FuzzCase`, `make_case` and `run.run_case`.
"""

import contextlib
import random
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

from tests.helpers.odd_input.damage import damage_file, rewrite_manifest
from tests.helpers.odd_input.inputs import BASES, input_names
from tests.helpers.odd_input.options import (
    KNOWN_NAMES,
    ODD_NUMBERS,
    ODD_PATHS,
    ODD_TEXTS,
    PATH_OPTIONS,
    Option,
    make_odd_paths,
    options_of,
)


class FuzzCase(NamedTuple):
    """A command with its inputs and streams.

    arguments: the command line, without `deit`. damage: the inputs to damage, each with the seed of
    the damage and whether the manifest next to the file is written again. streams: the kinds of
    standard input, output and error. encoding: of the streams; "C": of everything, as in the locale
    C.
    """

    seed: int
    arguments: tuple[str, ...]
    damage: tuple[tuple[str, int, bool], ...]
    streams: tuple[str, str, str]
    encoding: str
    columns: int

    @property
    def command(self) -> str:
        """Return the command line for a shell."""
        text = shlex.join(("deit", *self.arguments))
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def make_case(seed: int) -> FuzzCase:
    """Return the case of a seed."""
    draw = random.Random(seed)
    command = draw.choice(tuple(BASES))
    arguments = [*command.split(), *draw.choice(BASES[command]).split()]
    start = len(command.split())
    damage: list[tuple[str, int, bool]] = []
    streams, encoding, columns = ["null", "file", "file"], "utf-8", 80
    for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 4))):
        kind = draw.choices(("option", "word", "file", "around"), (5, 3, 5, 2))[0]
        if kind == "option":
            arguments += _random_option(command, draw)
        elif kind == "word":
            _damage_arguments(arguments, start, draw)
        elif kind == "file":
            name = _choose_damaged(arguments, draw)
            damage.append((name, draw.randrange(1 << 30), draw.random() < 0.7))
        else:
            streams[0] = draw.choice(("null", "closed", "pty"))
            streams[1] = draw.choice(("file", "file", "pty", "pty", "closed", "broken", "full"))
            streams[2] = draw.choice(("file", "file", "file", "pty", "closed", "broken", "full"))
            encoding = draw.choice(("utf-8", "utf-8", "C", "ascii", "latin-1", "cp1252", "utf-16"))
            columns = draw.choice((20, 30, 40, 60, 80, 100, 120, 200, 1))
    if draw.random() < 0.02:
        arguments = [draw.choice((*ODD_TEXTS, "trian", "--help")), *arguments[1:]]
    arguments = [argument.replace("\x00", "") for argument in arguments]
    return FuzzCase(*(seed, tuple(arguments), tuple(damage), tuple(streams), encoding, columns))


def _random_value(option: Option, draw: random.Random) -> str:
    kind = draw.random()
    pathlike = "Path" in option.kinds or PATH_OPTIONS.search(option.name)
    if option.choices and kind < 0.5:
        is_list = draw.random() < 0.15
        return ",".join(draw.choice(option.choices) for _ in range(2 if is_list else 1))
    if option.kinds & {"int", "float"} and kind < 0.75:
        return draw.choice(ODD_NUMBERS)
    if pathlike and kind < 0.75:
        return draw.choice((*ODD_PATHS, *input_names(), *input_names()))
    if kind < 0.8:
        return draw.choice((*KNOWN_NAMES, *input_names()))
    return draw.choice((*ODD_TEXTS, *ODD_NUMBERS, *ODD_PATHS))


def _random_option(command: str, draw: random.Random) -> list[str]:
    """Return an option with a value, in one of the forms that a user may type."""
    options = options_of(command)
    form = draw.random()
    if not options or form < 0.04:
        return draw.choice((["--no-such-option"], ["--nonsense=3"], ["-x"], ["--debug"], ["--"]))
    if form < 0.06:
        return ["--help"]
    option = draw.choice(options)
    dashes = f"--{option.name}"
    if draw.random() < 0.1:
        dashes = dashes.replace("_", "-")
    if option.flag and form < 0.8:
        return [dashes]
    if form < 0.1:
        return [dashes]
    value = _random_value(option, draw)
    if form < 0.15:
        return [dashes, value, dashes, _random_value(option, draw)]
    if form < 0.2:
        return [dashes, value, _random_value(option, draw)]
    return [f"{dashes}={value}"] if form < 0.6 else [dashes, value]


def _damage_arguments(arguments: list[str], start: int, draw: random.Random) -> None:
    if len(arguments) <= start:
        arguments.append(draw.choice((*ODD_TEXTS, *ODD_PATHS)))
        return
    index = draw.randrange(start, len(arguments))
    action = draw.randrange(8)
    if action == 0:
        del arguments[index]
    elif action == 1:
        arguments.insert(index, arguments[index])
    elif action == 2:
        arguments.insert(index, draw.choice((*ODD_TEXTS, *input_names())))
    elif action == 3:
        arguments[index] = draw.choice((*ODD_TEXTS, *ODD_NUMBERS))
    elif action == 4:
        other = draw.randrange(start, len(arguments))
        arguments[index], arguments[other] = arguments[other], arguments[index]
    else:
        indices = [i for i in range(start, len(arguments)) if not arguments[i].startswith("--")]
        if indices:
            index = draw.choice(indices)
            is_number = re.fullmatch(r"[\d.,e-]+", arguments[index])
            arguments[index] = draw.choice(
                ODD_NUMBERS if is_number else (*ODD_PATHS, *input_names())
            )


def _used_inputs(arguments: tuple[str, ...] | list[str]) -> list[str]:
    """Return the inputs that a command line names, and those that they depend on."""
    named = {part for argument in arguments for part in re.split(r"[/,=:@]", argument)}
    used = [name for name in input_names() if name in named]
    trained = {"run", "begun", "store", "swept", "ticketed", "config.json", "sweep.yaml"}
    if trained & {*used}:
        used += ["teacher", "pics"]
    if {"teacher", "search.yaml", "weights.pth", "weights.safetensors"} & {*used}:
        used += ["pics"]
    return sorted({*used, "classes.txt", "notes.txt", "empty.txt"})


def _choose_damaged(arguments: list[str], draw: random.Random) -> str:
    """Choose an input to damage, mostly one that the command line names."""
    used = _used_inputs(arguments)
    parts = {part for argument in arguments for part in re.split(r"[/,=:@]", argument)}
    named = [name for name in used if name in parts]
    return draw.choice(named if named and draw.random() < 0.85 else used)


def prepare(case: FuzzCase, inputs_at: Path, folder: Path) -> list[str]:
    """Make the folder of a case; return descriptions of the damage."""
    folder.mkdir()
    for name in _used_inputs(case.arguments):
        path = inputs_at / name
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, folder / name)
    make_odd_paths(folder)
    descriptions = []
    for name, seed, fits_manifest in case.damage:
        draw = random.Random(seed)
        path = folder / name
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.is_symlink())
        if path.is_file() and not path.is_symlink():
            files = [path]
        if not files:
            continue
        file = draw.choice(files)
        with contextlib.suppress(OSError):  # it is damaged already
            description = damage_file(file, draw)
            descriptions.append(f"{file.relative_to(folder)}: {description}")
            if fits_manifest:
                rewrite_manifest(file.parent)
    return descriptions
