"""What a folder holds, by size and digest: damage is found before anything of it is used."""

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ConfigDict

from deit.core.errors import CheckpointError, NotReadableError, SystemFault, raise_transient
from deit.core.file_reading import open_file, read_bytes, read_text
from deit.core.hardware import threads
from deit.core.json_io import load_json_as, parse_strict_json

MANIFEST = "manifest.json"
FORMAT_VERSION = 3
_RETRIES, _MOMENT_S = 5, 0.02
_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")  # of a file right here: no path, nothing hidden


@dataclass(frozen=True)
class FileDigest:
    """A file's size [bytes] and SHA-256."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """step: updates before the folder was written. sha256: of all the rest of the manifest."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    format_version: int
    step: int
    files: dict[str, FileDigest]
    sha256: str


def digests(folder: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Size and digest of files in a folder, by name in order."""
    names = sorted(names)
    with threads(4) as pool:  # hashing leaves the interpreter to others
        return dict(zip(names, pool.map(_digest, (folder / name for name in names))))


def _digest(path: Path) -> FileDigest:
    try:
        with open_file(path) as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return FileDigest(file.tell(), sha256)
    except PermissionError as error:
        raise NotReadableError(f"{path}: cannot be read ({error.strerror})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


def write_manifest(folder: Path, files: dict[str, FileDigest], *, step: int) -> None:
    """Write the manifest of a folder, its last file. Syncing is left to who renames the folder."""
    content = {"format_version": FORMAT_VERSION, "step": step}
    content["files"] = {name: asdict(one) for name, one in files.items()}
    content["sha256"] = hashlib.sha256(_text(content)).hexdigest()
    (folder / MANIFEST).write_bytes(_text(content))


def _text(content: dict) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def unlisted_files(folder: Path) -> set[str]:
    """Names in a folder that its manifest does not know."""
    known = load_json_as(folder / MANIFEST, Manifest).files.keys()
    return {path.name for path in folder.iterdir()} - known - {MANIFEST}


def verify_dir(folder: Path) -> Manifest:
    """Hold a folder against its manifest, every byte of it.

    A folder that is replaced by another meanwhile is looked at again.
    Raises CheckpointError that says what is missing, cut off or changed, or may not be read;
    SystemFault where it cannot be read now.
    """
    for _ in range(_RETRIES):
        before = _identity(folder)
        try:
            return _checked(folder)
        except CheckpointError as error:
            damage = error
        except SystemFault as error:
            # A block that a disk cannot read stays so, whatever else fails comes back.
            lost = getattr(error.__cause__, "errno", None) == errno.EIO
            damage = CheckpointError(str(error)) if lost else error
        if _identity(folder) == before:
            break
        time.sleep(_MOMENT_S)
    raise damage


def _identity(folder: Path) -> int | None:
    return folder.stat().st_ino if folder.is_dir() else None


def _stat(path: Path) -> os.stat_result | None:
    """What a path is, a link as such; None where there is nothing. (`is_file` takes a disk that
    fails for a file that is missing, from Python 3.14 on.)"""
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise_transient(error, path)
        raise NotReadableError(f"{path}: cannot be read ({error.strerror})") from None


def check_format_version(folder: Path) -> None:
    """Refuse a run whose checkpoints are of another format version, in one line.

    folder: of the run. A manifest that cannot be read is left to whoever reads its checkpoint.
    Raises CheckpointError.
    """
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = parse_strict_json(read_text(path))["format_version"]
            if type(found) is int and found != FORMAT_VERSION:
                raise CheckpointError(
                    f"{folder}: was written by another release of deit, in format version {found}; "
                    f"this one reads {FORMAT_VERSION}"
                )


def _checked(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if _stat(path) is None:
        raise CheckpointError(f"{folder}: no {MANIFEST}, so it was not finished")
    manifest = load_json_as(path, Manifest)
    if manifest.format_version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {manifest.format_version}, this release reads {FORMAT_VERSION}"
        )
    content = asdict(manifest)
    said = content.pop("sha256")
    own = hashlib.sha256(_text(content)).hexdigest()
    if said != own or read_bytes(path) != _text(content | {"sha256": own}):
        raise CheckpointError(f"{path}: damaged (its own digest, sha256, differs)")
    for name, expected in manifest.files.items():
        file = folder / name
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"{path}: {name!r} is no name of a file of ours")
        there = _stat(file)
        if there is not None and stat.S_ISLNK(there.st_mode):
            raise CheckpointError(
                f"{file}: is a link (to {os.path.realpath(file)}), and may lead anywhere"
            )
        if there is None or not stat.S_ISREG(there.st_mode):
            raise CheckpointError(f"{file}: missing")
        if there.st_size != expected.bytes:
            raise CheckpointError(f"{file}: {there.st_size} bytes, {expected.bytes} were written")
    for name, found in digests(folder, manifest.files).items():
        if found != manifest.files[name]:
            raise CheckpointError(f"{folder / name}: damaged (its digest differs)")
    return manifest
