"""Tries of commands with input that nobody would give on purpose, each a function of its seed.

A try is a command line made of the real grammar of its command, a folder of small things to work
on, some of them damaged, and streams and a terminal of some kind. It ends with a documented exit
code and one message, or it has found a bug: see `Try`, `try_of` and `run_try`.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import io
import json
import locale
import os
import random
import re
import resource
import shlex
import shutil
import signal
import struct
import sys
import tarfile
import threading
import time
import typing
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import yaml

from deit.cli.commands import COMMANDS
from deit.cli.grammar import FLAGS, SHARED
from deit.cli.parser import Parser
from deit.config.presets import PRESETS
from deit.config.recipes import RECIPES
from deit.config.schema import Config
from deit.config.student_section import STUDENTS
from deit.core import manifest
from deit.experiments.sweep_grid import SWEEPS
from tests.helpers.command_server import Zygote
from tests.helpers.leftovers import left

CODES = {0, 2, 3, 4, 5, 6, 7, 129, 130, 141, 143}
"""The documented exit codes but 1, which is that of a bug."""
_BUSY_S = 10.0  # processor time, after which a command is asked to stop: it works, and is slow
# How long is waited before a verdict: so long that no busy machine is the reason.
_LONGEST_S = 600.0  # in which it should have used that, or ended: else it waits for nothing
_LEAVING_S = 300.0  # after it was asked to stop, or its process group after it
_MEMORY = 6 << 30  # bytes above what the process has mapped at the start
_LARGEST = 64 << 20  # bytes of a file


# What tries work on


_DATA = "--data.root pics --data.image_size 8"
_TINY = (
    f"{_DATA} --student.image_size 8 --optim.epochs 1 --optim.warmup_epochs 0 "
    "--optim.batch_size 8 --run.linear_backend torch"
)
_STUDENT = (
    "--student.name deit_micro --student.patch_size 4 --student.embed_dim 16 --student.depth 1 "
    "--student.num_heads 2 --student.drop_path 0 --teacher.source teacher "
    "--teacher.allow_near_chance"
)
_RUN = f"folder {_TINY} {_STUDENT}"
_FILES = {
    "classes.txt": "ant\nbee\n",
    "exclude.txt": "train/ant/0.png\ntrain/bee/1.png\n",
    "recipe.py": "from deit.config.recipes import find_recipe\n\n\n"
    "def mine():\n    return find_recipe('digits')\n",
    "sweep.yaml": "recipe: folder\nset:\n  data: {root: pics, image_size: 8}\n  student: "
    "{image_size: 8, name: deit_micro, patch_size: 4, embed_dim: 16, num_heads: 2, depth: 1, "
    "drop_path: 0}\n"
    "  optim: {epochs: 1, warmup_epochs: 0, batch_size: 8}\n  run.linear_backend: torch\n"
    "  teacher: {source: teacher, allow_near_chance: true}\n"
    "grid:\n  optim.lr: [0.001, 0.002]\nseeds: [0]\n",
    "search.yaml": "recipe: folder\nset:\n  data: {root: pics, image_size: 8}\n  student: "
    "{image_size: 8, name: small_convnet, drop_path: 0}\n  loss: none\n  optim: {epochs: 1, "
    "warmup_epochs: 0, batch_size: 8}\nsearch:\n  fields:\n    optim.lr: {low: 0.001, high: 0.01, "
    "log: true}\n    optim.epochs: [1, 2]\n  trials: 2\n",
    "empty.txt": "",
    "notes.txt": "one line\nand another\n",
}
_MADE = {
    "teacher": f"train folder-teacher {_TINY} --student.name small_convnet --student.drop_path 0",
    "run": f"train {_RUN}",
    "begun": f"train {_RUN} --optim.epochs 3 --run.save_every_steps 1",
    "store": f"targets write {_RUN}",
    "swept": "sweep sweep.yaml --parallel 2",
    "ticketed": f"lottery {_RUN} --loss none --student.name vit_micro --teacher.source none "
    "--rounds 1 --controls none --rewind-epoch 0 --parallel 2",
}
"""Folders that commands make, each from those before it."""
_FAULTS = {"begun": "update:5:term"}


def make_things(zygote: Zygote, folder: Path) -> None:
    """Fill a folder with everything that tries work on: pictures, runs, a store, a sweep, files."""
    import torch  # its tensors only, in whichever process this is
    from PIL import Image

    draw = random.Random(0)
    for split, number in (("train", 8), ("val", 2), ("test", 3)):
        for label, colour in (("ant", 200), ("bee", 110), ("cat", 20)):
            place = folder / "pics" / split / label
            place.mkdir(parents=True)
            for index in range(number):
                grey = colour + draw.randint(-19, 19)
                Image.new("RGB", (10, 10), (grey, 255 - grey, 9 * index)).save(
                    place / f"{index}.png"
                )
        _write_shard(folder / "pics" / split, folder / "shards" / split / "0.tar")
    for name, text in _FILES.items():
        (folder / name).write_text(text)
    for name, words in _MADE.items():
        fault = {"DEIT_FAULT": _FAULTS[name]} if name in _FAULTS else {}
        done = zygote.run(*words.split(), "--out", name, cwd=folder, **fault)
        assert done.code == (143 if fault else 0), f"{name}: {done.err}"
    shutil.copy(folder / "run" / "best" / "model.safetensors", folder / "weights.safetensors")
    shutil.copy(folder / "run" / "config.json", folder / "config.json")
    torch.save({"model": {"head.weight": torch.zeros(3, 16)}, "epoch": 3}, folder / "weights.pth")


def _write_shard(pictures: Path, shard: Path) -> None:
    """Class folders as a tar file of images, each with its class beside it."""
    shard.parent.mkdir(parents=True)
    with tarfile.open(shard, "w") as tar:
        for place in sorted(pictures.glob("*/*.png")):
            key = f"{place.parent.name}-{place.stem}"
            label = place.parent.name.encode()
            tar.add(place, f"{key}.png")
            about = tarfile.TarInfo(f"{key}.cls")
            about.size = len(label)
            tar.addfile(about, io.BytesIO(label))


def things() -> list[str]:
    """What `make_things` makes, by name."""
    more = ["pics", "shards", "weights.safetensors", "weights.pth", "config.json"]
    return sorted([*_FILES, *_MADE, *more])


_BASES = {
    "train": (
        f"{_RUN} --out new",
        f"{_RUN} --dry-run",
        f"{_RUN} --optim.epochs 3 --run.save_every_steps 1 --out begun --resume",
        "config.json --out new",
        "run/config.json --print-config",
        "recipe.py:mine --print-config",
        f"{_RUN} --out new --data.exclude_list exclude.txt --data.classes @classes.txt",
        f"{_RUN} --out new --teacher.target_stores store",
        f"{_RUN} --out new --data.source shards --data.root shards",
        f"{_RUN} --out new --data.source reader --data.reader folder --data.storage files",
    ),
    "finetune": (
        f"--from run {_DATA} --optim.batch_size 8 --out new",
        f"folder {_TINY} --from weights.safetensors --loss none --teacher.source none --out new",
        f"folder {_TINY} --from weights.pth --dry-run",
        f"--from run {_DATA} --resolution 12 --dry-run",
        f"folder --schedule bit {_TINY} --from run --dry-run",
    ),
    "evaluate": (
        "run",
        "run --json out.json --teacher none",
        "run teacher --resolution 8,12 --plot out.png",
        "run --merge-tokens 0,1 --json out.json",
        "run --split validation --checkpoint last --teacher teacher",
    ),
    "predict": (
        "run pics/test/ant/0.png",
        "run pics/test --attention out.png --json out.json --teacher run",
        "teacher pics/test/bee pics/test/cat/1.png --top-k 2",
    ),
    "export": (
        "run --format timm --images 4",
        "run --format pt2 --images 4 --out new",
        "run --format onnx --images 4",
        "run --format transformers --images 4 --out new",
    ),
    "compare": (f"{_RUN} --out new --print-config", f"{_RUN} --arms undistilled --out new"),
    "sweep": ("sweep.yaml --dry-run", "search.yaml --dry-run", "sweep.yaml --out swept"),
    "quantize": ("run --calibration-images 4", "run --method dynamic --out new --json out.json"),
    "prune": ("run --ratio 0.5 --images 8 --dry-run", "run --ratio 0.5 --images 8 --out new"),
    "lottery": (
        f"{_MADE['ticketed'].removeprefix('lottery ')} --out ticketed",
        f"{_RUN} --rounds 1 --dry-run",
    ),
    "loss-landscape": (
        "run --measure lines --images 4 --points 3 --out new",
        "run teacher --images 4 --points 3 --grid 3 --num-eigenvalues 1 --steps 2 --probes 1 "
        "--rays 1 "
        "--out new",
        "ticketed --measure lines --images 4 --points 3 --out new",
    ),
    "variants": ("run", "run teacher --merge-tokens 1 --json out.json"),
    "report": ("run --out new", "run --out new --force", "swept --out new"),
    "check-data": (
        "pics",
        "pics --write-exclude-list out.txt --json out.json --exclude-list exclude.txt",
        "shards --source shards --json out.json",
    ),
    "show-views": (
        f"{_RUN} --num-views 2 --out out.png",
        f"{_RUN} --epoch 3 --num-views 2 --out out.png",
    ),
    "targets write": (
        f"{_RUN} --out new",
        f"{_RUN} --out new --epochs 1 --content top-2 --part 0/2",
        f"{_RUN} --out store",
    ),
    "targets verify": ("store", "store --root pics --teacher teacher --num-queries 4"),
    "profile": (f"{_RUN} --updates 1", f"{_RUN} --updates 2 --trace out.json --json out2.json"),
    "recipes": ("",),
    "": ("", "--help", "--version"),
}
"""Sound command lines of every command, over the things."""


# What may be typed


class Option(NamedTuple):
    """An option that a command takes: its kinds of values by name, and its words, if it has any."""

    name: str
    kinds: frozenset[str]
    words: tuple[str, ...]
    flag: bool = False


class _Seen(Exception):
    """Carries the parser of a command out of it."""


@functools.cache
def options_of(command: str) -> tuple[Option, ...]:
    """Every option of a command, by its own parser and the fields of a configuration."""
    if command not in _BASES or not command:
        return ()
    first, *rest = command.split()
    seen: list[Parser] = []

    def see(self: Parser, *_: object, **__: object) -> typing.NoReturn:
        seen.append(self)
        raise _Seen

    with (
        mock.patch.object(Parser, "parse_known_args", see),
        mock.patch("deit.cli.commands.train.parse_run", side_effect=_Seen),
        contextlib.suppress(_Seen),
    ):
        COMMANDS[first]([*rest, *(["teacher"] if first == "sweep" else [])], first)
    found = [_own(action) for parser in seen for action in parser._actions]
    own = [option for option in found if option is not None]
    if seen and seen[0].add_help:  # it takes no fields
        return tuple(own)
    shared = [
        Option(
            name,
            frozenset({"str"}),
            tuple(PRESETS[name].names) if name in PRESETS else (),
            name in FLAGS,
        )
        for name in SHARED
    ]
    return (*own, *shared, *_fields())


def _own(action: argparse.Action) -> Option | None:
    if not action.option_strings:
        return None
    kind = action.type.__name__ if isinstance(action.type, type) else "str"
    words = tuple(map(str, action.choices or ()))
    return Option(action.option_strings[0][2:], frozenset({kind}), words, action.nargs == 0)


@functools.cache
def _fields() -> tuple[Option, ...]:
    found = []
    for section in dataclasses.fields(Config):
        hints = typing.get_type_hints(section.type)
        for leaf in dataclasses.fields(section.type):
            kinds = frozenset(_kinds(hints[leaf.name]))
            words = tuple(str(one) for one in _words(hints[leaf.name]))
            found.append(Option(f"{section.name}.{leaf.name}", kinds, words, kinds == {"bool"}))
    return tuple(found)


def _kinds(annotation: Any) -> set[str]:
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return {"str"}
    return (
        {getattr(annotation, "__name__", "str")} if not inner else set().union(*map(_kinds, inner))
    )


def _words(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [word for part in typing.get_args(annotation) for word in _words(part)]


_NUMBERS = (
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
_TEXTS = (
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
_PLACES = (
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
_PATHLIKE = re.compile(
    r"root|source|targets|exclude_list|exclude-list|masks|reader|out|teacher|from|classes|held_out|recipe"
)
_NAMES = (*STUDENTS, *RECIPES, *SWEEPS)


def make_places(folder: Path) -> None:
    """What a path may lead to besides things: links, pipes, devices, folders of odd names."""
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
        with contextlib.suppress(OSError):  # not every disk takes every name
            (odd / name).mkdir()
    deep = folder / "deep" / "a" / "b" / "c" / "d"
    deep.mkdir(parents=True)
    for name in ("locked", "readonly"):
        (folder / name).mkdir()
    (folder / "locked").chmod(0o000)
    (folder / "readonly").chmod(0o555)


# What is damaged


def _odd_json(draw: random.Random) -> Any:
    return draw.choice(
        (
            *(None, True, False, 0, -1, 1, 3, 1.5, -0.0, 1e308, 10**30, 2**63, -(2**63), 1 << 31),
            *(
                float("nan"),
                float("inf"),
                "",
                "x",
                "none",
                "\ud800",
                "\x00",
                "a\nb",
                "../../x",
                "/",
            ),
            *([], {}, [[]], [None], {"a": 1}, [1, 2, 3], ["x"], "x" * 3000, "🐈", "\x1b[2J", "@x"),
            *("/dev/null", "fifo", "teacher", "1", "nan", {"": {}}, [{}], [0] * 70, "classes.txt"),
        )
    )


def _spoil_json(value: Any, draw: random.Random) -> Any:
    """The value, with something else at one place of it."""
    places: list[tuple[Any, Any]] = []

    def walk(one: Any) -> None:
        keys = (
            one.keys()
            if isinstance(one, dict)
            else range(len(one))
            if isinstance(one, list)
            else ()
        )
        for key in keys:
            places.append((one, key))
            walk(one[key])

    walk(value)
    if not places or draw.random() < 0.03:
        return _odd_json(draw)
    inside, key = draw.choice(places)
    how = draw.randrange(6)
    if how == 0:
        del inside[key]
    elif how == 1 and isinstance(inside, dict):
        inside[draw.choice(("x", "", "a\nb", "\ud800", "1"))] = _odd_json(draw)
    elif how == 2 and isinstance(inside, list):
        inside.append(inside[key])
    elif how == 3 and isinstance(inside[key], (int, float)) and not isinstance(inside[key], bool):
        inside[key] = draw.choice(
            (-inside[key], inside[key] + 1, inside[key] * 1000, str(inside[key]))
        )
    else:
        inside[key] = _odd_json(draw)
    return value


def _spoil_bytes(content: bytes, draw: random.Random) -> bytes:
    how, size = draw.randrange(9), len(content)
    place = draw.randrange(size + 1)
    if how == 0:
        return content[:place]
    if how == 1:
        return b""
    if how == 2:
        return bytes(draw.randrange(256) for _ in range(draw.choice((1, 10, 300))))
    if how == 3:
        return content[:place] + bytes(draw.randrange(1, 99)) + content[place:]
    if how == 4:
        return b"\xef\xbb\xbf" + content
    if how == 5:
        return content.decode("latin-1").encode("utf-16")
    if how == 6:
        return content + content
    if how == 7:
        return (
            content[:place]
            + draw.choice((b"\xff", b"\n", b"\x00", b",", b'"', b"- [" * 900))
            + content[place:]
        )
    spoiled = bytearray(content or b"x")
    for _ in range(draw.choice((1, 3, 20))):
        spoiled[draw.randrange(len(spoiled))] ^= 1 << draw.randrange(8)
    return bytes(spoiled)


def _spoil_header(content: bytes, draw: random.Random) -> bytes:
    """The bytes of a safetensors file with another header."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.dumps(_spoil_json(json.loads(content[8 : 8 + size]), draw)).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def _spoil_file(file: Path, draw: random.Random) -> str:
    """Damage a file; what was done, in a word."""
    how = draw.randrange(14)
    if how == 0:
        file.unlink()
        return "removed"
    if how in (1, 2):
        file.unlink()
        kind = draw.choice(("folder", "fifo", "link", "loop", "null", "tofolder"))
        if kind == "folder":
            file.mkdir()
        elif kind == "fifo":
            os.mkfifo(file)
        else:
            target = {"link": "nothing", "loop": file.name, "null": "/dev/null", "tofolder": "."}
            file.symlink_to(target[kind])
        return f"a {kind}"
    if how == 3:
        file.chmod(0o000)
        return "unreadable"
    content = file.read_bytes()
    if how >= 6 and file.suffix in (".json", ".jsonl", ".yaml", ".safetensors"):
        with contextlib.suppress(ValueError, struct.error, yaml.YAMLError, UnicodeError):
            if file.suffix == ".safetensors":
                file.write_bytes(_spoil_header(content, draw))
            elif file.suffix == ".yaml":
                spoiled = _spoil_json(yaml.safe_load(content), draw)
                file.write_bytes(json.dumps(spoiled).encode())  # which YAML is, too
            elif file.suffix == ".jsonl":
                lines = content.decode().splitlines()
                place = draw.randrange(len(lines) + 1)
                lines[place:place] = [json.dumps(_spoil_json(json.loads(lines[place - 1]), draw))]
                if draw.random() < 0.7 and place < len(lines) - 1:
                    del lines[place + 1]
                file.write_text("\n".join(lines) + "\n")
            else:
                file.write_text(json.dumps(_spoil_json(json.loads(content), draw), indent=1) + "\n")
            return "other content"
    file.write_bytes(_spoil_bytes(content, draw))
    return "other bytes"


def _seal_again(folder: Path) -> None:
    """Make the manifest of a folder say what is there now: then damage is read, not refused."""
    if not (folder / manifest.MANIFEST).is_file():  # a pipe now, say
        return
    with contextlib.suppress(Exception):
        before = json.loads((folder / manifest.MANIFEST).read_text())
        names = [name for name in before["files"] if (folder / name).is_file()]
        manifest.write_manifest(folder, manifest.digests(folder, names), step=before["step"])


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
    command = draw.choice(tuple(_BASES))
    words = [*command.split(), *draw.choice(_BASES[command]).split()]
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
            how = _spoil_file(file, draw)
            said.append(f"{file.relative_to(folder)}: {how}")
            if sealed:
                _seal_again(file.parent)
    return said


class Outcome(NamedTuple):
    """code: of the exit, or minus a signal. wrong: what it should not have done; nothing: it did
    as it should. said: on standard output and error together."""

    code: int
    seconds: float
    wrong: str
    said: str
    damage: tuple[str, ...] = ()


def run_try(one: Try, zygote: Zygote, things_at: Path, folder: Path) -> Outcome:
    """Run a try in a folder that is made for it, and judge it."""
    damage = prepare(one, things_at, folder)
    report = folder.with_name(f"{folder.name}.report")
    question = {**one._asdict(), "report": str(report), "program": "deit"}
    _give(folder)
    zygote.run(
        cwd=folder,
        FORKS_FIRST="tests.helpers.odd_input:_be_nobody",
        FORKS_MAIN="tests.helpers.odd_input:_supervise",
        FORKS_QUESTION=json.dumps(question),
    )
    found = json.loads(report.read_text())
    report.unlink()
    return Outcome(damage=tuple(damage), **found)


def _give(folder: Path) -> None:
    """Let nobody work in a folder that root has made."""
    if os.geteuid():
        return
    for path in (folder, *folder.rglob("*")):
        os.chown(path, _NOBODY, _NOBODY, follow_symlinks=False)


_NOBODY = 65534


def _be_nobody() -> None:
    """Give up what root may, so that permissions count and no try harms the machine; but reading:
    Python itself may lie where only root reads."""
    if os.geteuid():
        return
    library = ctypes.CDLL(None, use_errno=True)

    def done(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    search = 2  # CAP_DAC_READ_SEARCH
    done(library.prctl(8, 1, 0, 0, 0))  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setgid(_NOBODY)
    os.setuid(_NOBODY)
    head = struct.pack("=Ii", 0x20080522, 0)
    done(library.capset(head, struct.pack("=6I", *(3 * (1 << search,)), 0, 0, 0)))
    done(library.prctl(47, 2, search, 0, 0))  # PR_CAP_AMBIENT, raise: programs have it as well


# In the process that watches over a try


def _supervise() -> int:
    """Run a try in a process of its own, end what does not end, and report."""
    question = json.loads(os.environ.pop("FORKS_QUESTION"))
    for name in ("FORKS_FIRST", "FORKS_MAIN"):
        os.environ.pop(name)
    terminal, inside = os.openpty()
    out = os.open(f"{question['report']}.out", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    reading, broken = os.pipe()
    os.close(reading)
    kinds = {
        "null": os.open(os.devnull, os.O_RDWR),
        "file": out,
        "pty": inside,
        "broken": broken,
        "full": os.open("/dev/full", os.O_WRONLY),
    }
    streams = [None if kind == "closed" else kinds[kind] for kind in question["streams"]]
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        _size(inside, question["columns"])
        _be_tried(question, streams)
    os.close(inside)
    shown = _Drain(terminal)
    status, wrong = _watch(pid)
    stays = _end_group(pid)
    seconds = time.monotonic() - started
    said = os.pread(out, 1 << 20, 0) + shown.finish()
    os.unlink(f"{question['report']}.out")
    text = said.replace(b"\0", b"").decode("utf-8", "replace")  # so UTF-16 is read as well
    code = os.waitstatus_to_exitcode(status)
    wrong = wrong or _judge(code, text, question)
    wrong = wrong or ("left a process behind" if stays else "")
    report = {"code": code, "seconds": round(seconds, 2), "wrong": wrong, "said": text[-6000:]}
    Path(question["report"]).write_text(json.dumps(report))
    return 0


_BUG = re.compile(
    r"unexpected \w+: |Exception ignored|Exception in thread|"
    r"Fatal Python error|Segmentation fault|\w*Warning: |leaked \w+ objects"
)


def _judge(code: int, text: str, question: dict[str, Any]) -> str:
    streams, found = question["streams"], _BUG.search(text)
    if found:
        return f"says {found.group()!r}"
    if "Traceback (most recent" in text and "--debug" not in question["words"]:
        return "shows a traceback"
    if code not in CODES:
        return f"exit code {code}"
    told = "deit:error" in "".join(text.split())  # a terminal may be one column wide
    if code not in (0, 141) and streams[2] in ("file", "pty") and not told:
        return f"exit code {code} without a message" if code != 2 or "usage:" not in text else ""
    if code == 0 and told:
        return "exit code 0 after an error"
    return ""


def _size(terminal: int, columns: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    os.environ["COLUMNS"] = str(columns)


class _Drain:
    """Reads what is written to a terminal, as it comes."""

    def __init__(self, terminal: int) -> None:
        self._parts: list[bytes] = []
        self._terminal = terminal
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(self._terminal, 1 << 16):
                self._parts.append(part)

    def finish(self) -> bytes:
        """All of it, once the other end is closed."""
        self._thread.join(5)
        return b"".join(self._parts)


def _busy(pid: int) -> float:
    """The processor time [s] of a process group."""
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == pid:
                total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


def _watch(pid: int) -> tuple[int, str]:
    """Wait for the end of a try: its status, and what was wrong with how it came to it."""
    started, wait = time.monotonic(), 0.002
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status, ""
        time.sleep(wait)
        wait = min(wait * 1.3, 0.1)
        passed = time.monotonic() - started
        busy = _busy(pid) if passed > _BUSY_S else 0.0
        if busy > _BUSY_S or passed > _LONGEST_S:
            break
    idle = "" if busy > _BUSY_S else f"waits: {busy:.1f} s of work in {passed:.0f} s"
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + _LEAVING_S
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status, idle
        time.sleep(0.01)
    os.kill(pid, signal.SIGABRT)  # and says where it was
    return os.waitpid(pid, 0)[1], idle or f"did not stop within {_LEAVING_S:.0f} s of SIGTERM"


def _end_group(group: int) -> bool:
    """End what is left of a process group; whether there was something."""
    end = time.monotonic() + _LEAVING_S
    while time.monotonic() < end:
        if not left(group, os.getpgid):
            return False
        time.sleep(0.01)
    with contextlib.suppress(OSError):
        os.killpg(group, signal.SIGKILL)
    return True


# In the process of a try


def _be_tried(question: dict[str, Any], streams: list[int | None]) -> typing.NoReturn:
    """Become the command: its streams, its locale, its limits; leave as Python leaves."""
    for number, stream in enumerate(streams):
        if stream is None:
            os.close(number)
        else:
            os.dup2(stream, number)
    words = question["words"]
    encoding, errors = question["encoding"], "strict"
    if encoding == "C":
        locale.setlocale(locale.LC_ALL, "C")
        encoding, errors = "ascii", "surrogateescape"
        words = [os.fsencode(word).decode("ascii", "surrogateescape") for word in words]
        os.environ["LC_ALL"] = "C"
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = None
        if streams[number] is not None:
            raw = io.FileIO(number, "r" if number == 0 else "w", closefd=False)
            buffer = io.BufferedReader(raw) if number == 0 else io.BufferedWriter(raw)
            stream = io.TextIOWrapper(
                buffer,
                encoding=encoding,
                errors="backslashreplace" if number == 2 else errors,
                line_buffering=number == 2 or os.isatty(number),
            )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST, _LARGEST))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ |= {"HOME": os.getcwd(), "DEIT_FAULT": "update:4:term", "CUDA_VISIBLE_DEVICES": ""}
    from deit.cli import program

    sys.argv = [question["program"], *words]
    try:
        code = program()
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    _leave(code)


def _leave(code: Any) -> typing.NoReturn:
    """As Python leaves, but for the second that it takes to tear down what it has imported."""
    import atexit

    threading._shutdown()
    atexit._run_exitfuncs()
    code = code if isinstance(code, int) else 0 if code is None else 1
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except Exception as error:
            if stream is sys.stdout:
                with contextlib.suppress(Exception):
                    print(f"Exception ignored in {stream}: {error!r}", file=sys.stderr, flush=True)
            code = 120
    os._exit(code)
