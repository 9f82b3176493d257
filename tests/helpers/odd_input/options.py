"""The options of every command, and odd values for them."""

import argparse
import contextlib
import dataclasses
import functools
import os
import re
import typing
from pathlib import Path
from typing import Any, NamedTuple

from deit.cli.commands import parsers
from deit.cli.parser import Parser
from deit.config.presets import PRESETS
from deit.config.recipes import RECIPES
from deit.config.schema import Config
from deit.config.sections.student import STUDENTS
from deit.experiments.sweep_grid import SWEEPS
from tests.helpers.odd_input.inputs import BASES


class Option(NamedTuple):
    """An option of a command: the names of the types of its values, and its choices, if any."""

    name: str
    kinds: frozenset[str]
    choices: tuple[str, ...]
    flag: bool = False


@functools.cache
def options_of(command: str) -> tuple[Option, ...]:
    """Return every option of a command, from its parser and the fields of a configuration."""
    if command not in BASES or command not in _all_parsers():
        return ()
    options = _all_parsers()[command].options
    fields = {field.name: field for field in _fields()}
    return tuple(fields.get(name[2:]) or _option_of(name[2:], options[name]) for name in options)


@functools.cache
def _all_parsers() -> dict[str, Parser]:
    return parsers()


def _option_of(name: str, action: argparse.Action) -> Option:
    kind = action.type.__name__ if isinstance(action.type, type) else "str"
    presets = PRESETS[action.dest].names if action.dest in PRESETS else ()
    choices = tuple(map(str, action.choices or presets))
    return Option(name, frozenset({kind}), choices, action.nargs == 0)


@functools.cache
def _fields() -> tuple[Option, ...]:
    options = []
    for section in dataclasses.fields(Config):
        hints = typing.get_type_hints(section.type)
        for leaf in dataclasses.fields(section.type):
            kinds = frozenset(_kinds(hints[leaf.name]))
            choices = tuple(map(str, _literal_choices(hints[leaf.name])))
            options.append(Option(f"{section.name}.{leaf.name}", kinds, choices, kinds == {"bool"}))
    return tuple(options)


def field_choices() -> dict[str, tuple[str, ...]]:
    """Return the choices of each field that has some, by `section.field`."""
    return {option.name: option.choices for option in _fields() if option.choices}


def _kinds(annotation: Any) -> set[str]:
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return {"str"}
    return (
        {getattr(annotation, "__name__", "str")} if not inner else set().union(*map(_kinds, inner))
    )


def _literal_choices(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [choice for part in typing.get_args(annotation) for choice in _literal_choices(part)]


ODD_NUMBERS = (
    *("0", "1", "2", "3", "4", "7", "8", "12", "16", "-1", "-0", "+2", "1.5", "0.5", "0.1", "1e-9"),
    *(
        "nan",
        "inf",
        "-inf",
        "1e400",
        "1e308",
        "-1e308",
        "1e-400",
        "0x10",
        "1_0",
        "01",
        " 3 ",
        "3,4",
    ),
    *("2147483647", "2147483648", "4294967295", "4294967296", "9223372036854775807", "1" * 30),
    *("1" * 5000, "٣", "½", "²", "1e", "--1", "1,", ",1", "0,0", "1,1", "none", "None", "true"),
    *("65536", "1000", "100000"),
)
ODD_TEXTS = (
    *(
        "",
        " ",
        "\n",
        "\t",
        "a\nb",
        "\r",
        "\x1b[31mred\x1b[0m",
        "\x7f",
        "a b",
        "'",
        '"',
        "\\",
        "`id`",
    ),
    *("-", "--", "=", ",", ",,", "a,a", "a,,b", "@", "@missing", "@classes.txt", "@pics", "@link"),
    *(
        "@fifo",
        "@/dev/null",
        "@empty.txt",
        "@notes.txt",
        "~",
        "~nobody/x",
        "~no-such-user/x",
        "$HOME",
    ),
    *(
        "*",
        "[",
        "(",
        "?",
        "%s %d %n",
        "{x} {0} {",
        "[red]x[/]",
        "[/]",
        ":smile:",
        "none",
        "None",
        "NONE",
    ),
    *("\ufeffant", "ant\u200b", "\u202egnp", "e\u0301", "ä", "猫", "🐈", "\udcff", "a\udc80b", "İ"),
    *(
        "x" * 300,
        "x" * 5000,
        "../.." * 80,
        "a/" * 200,
        "https://example.invalid/w.pth",
        "file:///x",
    ),
    *("hf-hub:timm/none", "timm:", "timm:none", "timm:test_resnet", "x.py:f", "recipe.py:mine"),
    *(
        "recipe.py:none",
        "recipe.py",
        "recipe.py:",
        ":",
        "classes.txt:f",
        "true",
        "false",
        "0",
        "N:M",
    ),
    *(
        "2:4",
        "4:2",
        "0/1",
        "1/0",
        "top-1",
        "top-0",
        "top-9999999999999",
        "last",
        "best",
        "all",
        "run",
    ),
    *("folder", "digits", "teacher", "__class__", "__init__", "os.system", "nul", "con", "a" * 255),
)
ODD_PATHS = (
    *("missing", "missing/x", "classes.txt/x", "run/config.json", "run/best", "pics", "pics/train"),
    *(
        "pics/test/ant/0.png",
        "empty",
        "empty.txt",
        "link",
        "loop",
        "fifo",
        "null",
        "full",
        "locked",
    ),
    *(
        "readonly",
        "readonly/x",
        "/dev/null",
        "/dev/full",
        "/dev/stdout",
        "/dev/fd/0",
        "/",
        ".",
        "..",
    ),
    *("/proc/self/mem", "/proc/1/mem", "/sys/x", "/nowhere/x", "x" * 300, "x" * 5000, "odd/\udcff"),
    *("odd/\n", "odd/\x1b[2J", "odd/猫.png", "-x", "tofile", "tofolder", "self", "deep/a/b/c/d"),
    *("out.png", "out.json", "out.txt", "out", "new", "out.html", "out.PNG", "out.pdf"),
)
PATH_OPTIONS = re.compile(
    r"root|source|targets|exclude_list|exclude-list|masks|reader|out|teacher|from|classes|held_out|recipe"
)
KNOWN_NAMES = (*STUDENTS, *RECIPES, *SWEEPS)


def make_odd_paths(folder: Path) -> None:
    """Make links, pipes, devices and folders with odd names."""
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("nothing-is-here")
    (folder / "loop").symlink_to("loop")
    (folder / "self").symlink_to(".")
    (folder / "tofile").symlink_to("classes.txt")
    (folder / "tofolder").symlink_to("pics")
    (folder / "null").symlink_to("/dev/null")
    (folder / "full").symlink_to("/dev/full")
    os.mkfifo(folder / "fifo")
    odd = folder / "odd"
    odd.mkdir()
    for name in ("\udcff", "\n", "\x1b[2J", "猫.png"):
        with contextlib.suppress(OSError):  # not every file system allows every name
            (odd / name).mkdir()
    deep = folder / "deep" / "a" / "b" / "c" / "d"
    deep.mkdir(parents=True)
    for name in ("locked", "readonly"):
        (folder / name).mkdir()
    (folder / "locked").chmod(0o000)
    (folder / "readonly").chmod(0o555)
