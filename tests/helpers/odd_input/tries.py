"""Tries of commands with input that nobody would give on purpose, each a function of its seed.

A try is a command line made of the real grammar of its command, a folder of small things to work
on, some of them damaged, and streams and a terminal of some kind. It ends with a documented exit
code and one message, or it has found a bug: see `Try`, `try_of` and `run_try`.
"""

import contextlib
import random
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

from tests.helpers.odd_input.damage import seal_again, spoil_file
from tests.helpers.odd_input.options import (
    _NAMES,
    _NUMBERS,
    _PATHLIKE,
    _PLACES,
    _TEXTS,
    Option,
    make_places,
    options_of,
)
from tests.helpers.odd_input.things import BASES, things

# What tries work on


# What may be typed


# What is damaged


# A try


class Try(NamedTuple):
    """words: the command line, without `deit`. damage: files of the things that are spoiled, each
    with the seed of how and whether the manifest beside it is made to fit. streams: what standard
    input, output and error are. encoding: of the streams; C: of everything, as in that locale."""

    seed: int
    words: tuple[str, ...]
    damage: tuple[tuple[str, int, bool], ...]
    streams: tuple[str, str, str]
    encoding: str
    columns: int

    @property
    def command(self) -> str:
        """The command line as a shell takes it."""
        text = shlex.join(("deit", *self.words))
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def try_of(seed: int) -> Try:
    """The try of a seed."""
    draw = random.Random(seed)
    command = draw.choice(tuple(BASES))
    words = [*command.split(), *draw.choice(BASES[command]).split()]
    start = len(command.split())
    damage: list[tuple[str, int, bool]] = []
    streams, encoding, columns = ["null", "file", "file"], "utf-8", 80
    for _ in range(draw.choice((1, 1, 1, 2, 2, 3, 4))):
        kind = draw.choices(("option", "word", "file", "around"), (5, 3, 5, 2))[0]
        if kind == "option":
            words += _typed(command, draw)
        elif kind == "word":
            _spoil_words(words, start, draw)
        elif kind == "file":
            damage.append((_damaged(words, draw), draw.randrange(1 << 30), draw.random() < 0.7))
        else:
            streams[0] = draw.choice(("null", "closed", "pty"))
            streams[1] = draw.choice(("file", "file", "pty", "pty", "closed", "broken", "full"))
            streams[2] = draw.choice(("file", "file", "file", "pty", "closed", "broken", "full"))
            encoding = draw.choice(("utf-8", "utf-8", "C", "ascii", "latin-1", "cp1252", "utf-16"))
            columns = draw.choice((20, 30, 40, 60, 80, 100, 120, 200, 1))
    if draw.random() < 0.02:
        words = [draw.choice((*_TEXTS, "trian", "--help")), *words[1:]]
    words = [word.replace("\x00", "") for word in words]
    return Try(*(seed, tuple(words), tuple(damage), tuple(streams), encoding, columns))


def _value(option: Option, draw: random.Random) -> str:
    kind = draw.random()
    pathlike = "Path" in option.kinds or _PATHLIKE.search(option.name)
    if option.words and kind < 0.5:
        several = draw.random() < 0.15
        return ",".join(draw.choice(option.words) for _ in range(2 if several else 1))
    if option.kinds & {"int", "float"} and kind < 0.75:
        return draw.choice(_NUMBERS)
    if pathlike and kind < 0.75:
        return draw.choice((*_PLACES, *things(), *things()))
    if kind < 0.8:
        return draw.choice((*_NAMES, *things()))
    return draw.choice((*_TEXTS, *_NUMBERS, *_PLACES))


def _typed(command: str, draw: random.Random) -> list[str]:
    """An option with a value, as it may be typed."""
    options = options_of(command)
    how = draw.random()
    if not options or how < 0.04:
        return draw.choice((["--no-such-option"], ["--nonsense=3"], ["-x"], ["--debug"], ["--"]))
    if how < 0.06:
        return ["--help"]
    option = draw.choice(options)
    dashes = f"--{option.name}"
    if draw.random() < 0.1:
        dashes = dashes.replace("_", "-")
    if option.flag and how < 0.8:
        return [dashes]
    if how < 0.1:
        return [dashes]
    value = _value(option, draw)
    if how < 0.15:
        return [dashes, value, dashes, _value(option, draw)]
    if how < 0.2:
        return [dashes, value, _value(option, draw)]
    return [f"{dashes}={value}"] if how < 0.6 else [dashes, value]


def _spoil_words(words: list[str], start: int, draw: random.Random) -> None:
    if len(words) <= start:
        words.append(draw.choice((*_TEXTS, *_PLACES)))
        return
    place = draw.randrange(start, len(words))
    how = draw.randrange(8)
    if how == 0:
        del words[place]
    elif how == 1:
        words.insert(place, words[place])
    elif how == 2:
        words.insert(place, draw.choice((*_TEXTS, *things())))
    elif how == 3:
        words[place] = draw.choice((*_TEXTS, *_NUMBERS))
    elif how == 4:
        other = draw.randrange(start, len(words))
        words[place], words[other] = words[other], words[place]
    else:
        values = [at for at in range(start, len(words)) if not words[at].startswith("--")]
        if values:
            at = draw.choice(values)
            kinds = _NUMBERS if re.fullmatch(r"[\d.,e-]+", words[at]) else (*_PLACES, *things())
            words[at] = draw.choice(kinds)


def _used(words: tuple[str, ...] | list[str]) -> list[str]:
    """The things that a command line names, and what those are made of."""
    named = {part for word in words for part in re.split(r"[/,=:@]", word)}
    used = [thing for thing in things() if thing in named]
    if {"run", "begun", "store", "swept", "ticketed", "config.json"} & {
        *used
    } or "sweep.yaml" in used:
        used += ["teacher", "pics"]
    if {"teacher", "search.yaml", "weights.pth", "weights.safetensors"} & {*used}:
        used += ["pics"]
    return sorted({*used, "classes.txt", "notes.txt", "empty.txt"})


def _damaged(words: list[str], draw: random.Random) -> str:
    """A thing of those that are used, mostly one that is named; which of its files, the damage
    itself draws."""
    used = _used(words)
    named = [thing for thing in used if any(thing in re.split(r"[/,=:@]", word) for word in words)]
    return draw.choice(named if named and draw.random() < 0.85 else used)


def prepare(one: Try, things_at: Path, folder: Path) -> list[str]:
    """Make the folder that a try works in; what was damaged there, in words."""
    folder.mkdir()
    for name in _used(one.words):
        thing = things_at / name
        copy = shutil.copytree if thing.is_dir() else shutil.copy
        copy(thing, folder / name)
    make_places(folder)
    said = []
    for name, seed, sealed in one.damage:
        draw = random.Random(seed)
        thing = folder / name
        files = sorted(
            path for path in thing.rglob("*") if path.is_file() and not path.is_symlink()
        )
        if thing.is_file() and not thing.is_symlink():
            files = [thing]
        if not files:
            continue
        # Of runs, what is read most: pictures are many, and a sweep has many runs.
        file = draw.choice(files)
        with contextlib.suppress(OSError):  # it was damaged before
            how = spoil_file(file, draw)
            said.append(f"{file.relative_to(folder)}: {how}")
            if sealed:
                seal_again(file.parent)
    return said


# In the process that watches over a try


# In the process of a try
