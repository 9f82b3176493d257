"""The manifest of a folder: size and SHA-256 of each file, verified before a file is used."""

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

from deit.core.errors import CheckpointError, NotReadableError, SystemFault, raise_if_transient
from deit.core.file_reading import open_file, read_bytes, read_text
from deit.core.hardware import thread_pool
from deit.core.json_io import load_json_as, parse_strict_json

MANIFEST = "manifest.json"
FORMAT_VERSION = 3
_RETRIES, _RETRY_PAUSE_S = 5, 0.02
_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")  # a file in the folder itself, not a hidden one


@dataclass(frozen=True)
class FileDigest:
    """A file's size [bytes] and SHA-256."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    step: optimizer steps before the folder was written.
    sha256: of the manifest without this field.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    format_version: int
    step: int
    files: dict[str, FileDigest]
    sha256: str


def digests(folder: Path, names: Iterable[str]) -> dict[str, FileDigest]:
    """Return size and digest of files in a folder, sorted by name."""
    names = sorted(names)
    with thread_pool(4) as pool:  # hashing releases the GIL
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
    """Write the manifest of a folder, as its last file. It is synced by the code that renames the
    folder."""
    content = {"format_version": FORMAT_VERSION, "step": step}
    content["files"] = {name: asdict(digest) for name, digest in files.items()}
    content["sha256"] = hashlib.sha256(_text(content)).hexdigest()
    (folder / MANIFEST).write_bytes(_text(content))


def _text(content: dict) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def unlisted_files(folder: Path) -> set[str]:
    """Return the names in a folder that its manifest does not list."""
    known = load_json_as(folder / MANIFEST, Manifest).files.keys()
    return {path.name for path in folder.iterdir()} - known - {MANIFEST}


def verify_dir(folder: Path) -> Manifest:
    """Verify every byte of a folder against its manifest. Return the manifest.

    Verifies again if another process replaces the folder meanwhile.
    Raises CheckpointError naming the file that is missing, truncated, changed or unreadable, and
    SystemFault for a transient error.
    """
    for _ in range(_RETRIES):
        before = _inode(folder)
        try:
            return _verify_once(folder)
        except CheckpointError as error:
            failure = error
        except SystemFault as error:
            # An unreadable block of a disk (EIO) is damage; other such errors are transient.
            is_damage = getattr(error.__cause__, "errno", None) == errno.EIO
            failure = CheckpointError(str(error)) if is_damage else error
        if _inode(folder) == before:
            break
        time.sleep(_RETRY_PAUSE_S)
    raise failure


def _inode(folder: Path) -> int | None:
    return folder.stat().st_ino if folder.is_dir() else None


def _lstat(path: Path) -> os.stat_result | None:
    """Return the status of a path without following links; None if it does not exist.

    From Python 3.14 on, `Path.is_file` returns False also if the disk fails.
    """
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise_if_transient(error, path)
        raise NotReadableError(f"{path}: cannot be read ({error.strerror})") from None


def check_format_version(folder: Path) -> None:
    """Raise CheckpointError if the checkpoints of a run folder have another format version.

    Unreadable manifests are ignored here: loading their checkpoint reports them.
    """
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            version = parse_strict_json(read_text(path))["format_version"]
            if type(version) is int and version != FORMAT_VERSION:
                raise CheckpointError(
                    f"{folder}: was written by another release of deit, in format version "
                    f"{version}; this one reads {FORMAT_VERSION}"
                )


def _verify_once(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if _lstat(path) is None:
        raise CheckpointError(f"{folder}: no {MANIFEST}, so it was not finished")
    manifest = load_json_as(path, Manifest)
    if manifest.format_version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {manifest.format_version}, this release reads {FORMAT_VERSION}"
        )
    content = asdict(manifest)
    recorded = content.pop("sha256")
    computed = hashlib.sha256(_text(content)).hexdigest()
    if recorded != computed or read_bytes(path) != _text(content | {"sha256": computed}):
        raise CheckpointError(f"{path}: damaged (its own digest, sha256, differs)")
    for name, expected in manifest.files.items():
        file = folder / name
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"{path}: {name!r} is not a valid file name of a checkpoint")
        status = _lstat(file)
        if status is not None and stat.S_ISLNK(status.st_mode):
            raise CheckpointError(
                f"{file}: is a link (to {os.path.realpath(file)}); put the file itself there"
            )
        if status is None or not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file}: missing")
        if status.st_size != expected.bytes:
            raise CheckpointError(f"{file}: {status.st_size} bytes, {expected.bytes} were written")
    for name, digest in digests(folder, manifest.files).items():
        if digest != manifest.files[name]:
            raise CheckpointError(f"{folder / name}: damaged (its digest differs)")
    return manifest
