"""Files that are damaged: their JSON, their bytes, their headers."""

import contextlib
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import yaml

from deit.core import manifest


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


def spoil_file(file: Path, draw: random.Random) -> str:
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


def seal_again(folder: Path) -> None:
    """Make the manifest of a folder say what is there now: then damage is read, not refused."""
    if not (folder / manifest.MANIFEST).is_file():  # a pipe now, say
        return
    with contextlib.suppress(Exception):
        before = json.loads((folder / manifest.MANIFEST).read_text())
        names = [name for name in before["files"] if (folder / name).is_file()]
        manifest.write_manifest(folder, manifest.digests(folder, names), step=before["step"])
