"""Damage files at random: their JSON, their bytes, their headers."""

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


def _damage_json(value: Any, draw: random.Random) -> Any:
    """Return the value with one entry replaced, removed or added."""
    entries: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = (
            node.keys()
            if isinstance(node, dict)
            else range(len(node))
            if isinstance(node, list)
            else ()
        )
        for key in keys:
            entries.append((node, key))
            walk(node[key])

    walk(value)
    if not entries or draw.random() < 0.03:
        return _odd_json(draw)
    inside, key = draw.choice(entries)
    kind = draw.randrange(6)
    if kind == 0:
        del inside[key]
    elif kind == 1 and isinstance(inside, dict):
        inside[draw.choice(("x", "", "a\nb", "\ud800", "1"))] = _odd_json(draw)
    elif kind == 2 and isinstance(inside, list):
        inside.append(inside[key])
    elif kind == 3 and isinstance(inside[key], (int, float)) and not isinstance(inside[key], bool):
        inside[key] = draw.choice(
            (-inside[key], inside[key] + 1, inside[key] * 1000, str(inside[key]))
        )
    else:
        inside[key] = _odd_json(draw)
    return value


def _damage_bytes(content: bytes, draw: random.Random) -> bytes:
    kind, size = draw.randrange(9), len(content)
    offset = draw.randrange(size + 1)
    if kind == 0:
        return content[:offset]
    if kind == 1:
        return b""
    if kind == 2:
        return bytes(draw.randrange(256) for _ in range(draw.choice((1, 10, 300))))
    if kind == 3:
        return content[:offset] + bytes(draw.randrange(1, 99)) + content[offset:]
    if kind == 4:
        return b"\xef\xbb\xbf" + content
    if kind == 5:
        return content.decode("latin-1").encode("utf-16")
    if kind == 6:
        return content + content
    if kind == 7:
        return (
            content[:offset]
            + draw.choice((b"\xff", b"\n", b"\x00", b",", b'"', b"- [" * 900))
            + content[offset:]
        )
    damaged = bytearray(content or b"x")
    for _ in range(draw.choice((1, 3, 20))):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def _damage_header(content: bytes, draw: random.Random) -> bytes:
    """Return the bytes of a safetensors file with a damaged header."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.dumps(_damage_json(json.loads(content[8 : 8 + size]), draw)).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def damage_file(file: Path, draw: random.Random) -> str:
    """Damage a file; return a description of the damage."""
    action = draw.randrange(14)
    if action == 0:
        file.unlink()
        return "removed"
    if action in (1, 2):
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
    if action == 3:
        file.chmod(0o000)
        return "unreadable"
    content = file.read_bytes()
    if action >= 6 and file.suffix in (".json", ".jsonl", ".yaml", ".safetensors"):
        with contextlib.suppress(ValueError, struct.error, yaml.YAMLError, UnicodeError):
            if file.suffix == ".safetensors":
                file.write_bytes(_damage_header(content, draw))
            elif file.suffix == ".yaml":
                damaged = _damage_json(yaml.safe_load(content), draw)
                file.write_bytes(json.dumps(damaged).encode())  # JSON is valid YAML
            elif file.suffix == ".jsonl":
                lines = content.decode().splitlines()
                index = draw.randrange(len(lines) + 1)
                lines[index:index] = [json.dumps(_damage_json(json.loads(lines[index - 1]), draw))]
                if draw.random() < 0.7 and index < len(lines) - 1:
                    del lines[index + 1]
                file.write_text("\n".join(lines) + "\n")
            else:
                file.write_text(
                    json.dumps(_damage_json(json.loads(content), draw), indent=1) + "\n"
                )
            return "other content"
    file.write_bytes(_damage_bytes(content, draw))
    return "other bytes"


def rewrite_manifest(folder: Path) -> None:
    """Write the manifest of a folder again, so that commands read the damaged files."""
    if not (folder / manifest.MANIFEST).is_file():  # for example now a pipe
        return
    with contextlib.suppress(Exception):
        before = json.loads((folder / manifest.MANIFEST).read_text())
        names = [name for name in before["files"] if (folder / name).is_file()]
        manifest.write_manifest(folder, manifest.digests(folder, names), step=before["step"])
