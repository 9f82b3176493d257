"""Files that are there whole or not at all; what a disk allows is proven before the work."""

import errno
import fcntl
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from deit.core.errors import SystemFault
from deit.core.fault_injection import fault_point
from deit.core.file_reading import NOT_PLAIN, is_plain

LOCK = ".lock"
ENVIRONMENT, RESUMED = "environment.json", "environment-resumed.json"
"""Where a run folder says how and where it was started, and resumed the last time."""
RUN_FILES = {
    *("config.json", ENVIRONMENT, RESUMED, "init.json", "base.json"),
    *(
        "metrics.jsonl",
        "state_hashes.jsonl",
        "nonfinite_steps.jsonl",
        "result.json",
        "summary.json",
    ),
    *(
        "model.json",
        "model.safetensors",
        "state.json",
        "manifest.json",
        "kept_units.json",
        "prune.json",
    ),
}
"""What no option may overwrite where a mark lies beside it, not even one that replaces files."""
RUN_MARKERS = ("config.json", "manifest.json", "prune.json")
"""What tells a run, a checkpoint and a pruning."""
_NEW, _OLD, REMOVED_PREFIX = ".deit-new-", ".deit-old-", ".deit-gone-"
"""What folders are called while they are written, replaced and removed."""


def check_writable(out: Path, *, option: str) -> None:
    """Prove that a file can be written, synced and renamed where `out` is or will be.

    Leaves nothing behind. option: the flag that named it. Raises SystemFault.
    """
    for one in (out, *out.absolute().parents):
        if one.is_symlink() and not one.exists():  # no folder can be made in its place
            name = "" if one == out else f"{one} "
            raise SystemFault(f"{option} {out}: {name}is a link to what is not there")
    probe = _standing(out) / f".probe-{uuid.uuid4().hex}"
    try:
        with probe.open("w", encoding="utf-8") as file:
            file.write("probe")
            os.fsync(file.fileno())
        probe.rename(probe.with_suffix(".renamed")).unlink()
    except OSError as error:
        with suppress(OSError):
            probe.unlink()
        raise SystemFault(f"{option} {out}: cannot be written ({error.strerror})") from None


def is_temporary(name: str) -> bool:
    """Whether a file of this name is there for a moment only, unless a kill leaves it behind."""
    return re.fullmatch(r"\..+\.[0-9a-f]{32}|\.probe-.*", name) is not None


def _standing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def check_space(out: Path, needed: int, *, option: str) -> None:
    """Refuse a disk with less than `needed` bytes free where `out` is or will be. Raises
    SystemFault."""
    free = shutil.disk_usage(_standing(out)).free
    if free < needed:
        raise SystemFault(
            f"{option} {out}: {format_bytes(free)} are free there, {format_bytes(needed)} are "
            "needed; make "
            "room, or give another place"
        )


def format_bytes(number: float) -> str:
    """Bytes as a person reads them: `12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            break
        number, unit = number / 1000, "TB"
    return f"{number:.3g} {unit}"


def check_file(path: Path | None, *, option: str, replace: bool) -> None:
    """Refuse, before the long work, a file that could not be written or (unless it may be replaced)
    is there already. Raises SystemFault."""
    if path is None:
        return
    if path.is_dir():
        raise SystemFault(f"{option} {path}: is a folder, not a file")
    if path.exists() and not path.is_file():  # a device or a pipe would be replaced by a file
        raise SystemFault(f"{option} {path}: is a device or a pipe, not a file; give another")
    if path.exists() and not replace:
        raise SystemFault(f"{option} {path}: exists already; --force replaces it")
    if path.name in RUN_FILES and any(path.with_name(mark).exists() for mark in RUN_MARKERS):
        raise SystemFault(f"{option} {path}: is a run's own file; give another")
    if not path.absolute().parent.is_dir():
        raise SystemFault(f"{option} {path}: no folder {path.absolute().parent}")
    check_writable(path.absolute().parent, option=option)


def replace_dir(target: Path, write: Callable[[Path], None], *, bytes_needed: int = 0) -> None:
    """Fill a new folder by `write` and put it in the place of `target`.

    The files are synced before the rename, and the old folder is removed only after it, so that
    at every moment a complete one exists. What a kill leaves behind, `clean_leftovers` clears.
    needs: about how many bytes that takes, for the message. Raises SystemFault if the disk
    refuses.
    """
    _put(
        target,
        write,
        target.with_name(f"{_NEW}{target.name}"),
        replace=True,
        bytes_needed=bytes_needed,
    )


def atomic_write_dir(target: Path, write: Callable[[Path], None], *, replace: bool) -> None:
    """The same where other commands may write the folder at the same time: each fills its own, and
    unless it may `replace` what is there, the first one stays. Raises SystemFault."""
    new = target.with_name(f"{_NEW}{target.name}.{os.getpid()}")
    _put(target, write, new, replace=replace, bytes_needed=0)


def _put(
    target: Path, write: Callable[[Path], None], new: Path, *, replace: bool, bytes_needed: int
) -> None:
    old = target.with_name(f"{_OLD}{target.name}")
    try:
        if new.exists():
            shutil.rmtree(new)
        new.mkdir()
        write(new)
        for file in new.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        sync_folder(new)
        fault_point("rename")
        if replace and target.exists():
            target.rename(old)
        new.rename(target)
        fault_point("renamed")
        sync_folder(target.parent)
        if old.exists():
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(new, ignore_errors=True)
        if not replace and target.exists():
            raise SystemFault(
                f"{target}: another command made it meanwhile; --force replaces it"
            ) from None
        if old.exists() and not target.exists():
            old.rename(target)
        raise SystemFault(
            f"{target}: could not be saved ({describe_os_error(error, target, bytes_needed)}); "
            "what was there is intact"
        ) from None
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def clean_leftovers(folder: Path) -> None:
    """Clear what kills left in a folder that nobody else works in: what was being written or
    removed goes, an old folder whose place is empty goes back there."""
    for unfinished in (*folder.glob(f"{_NEW}*"), *folder.glob(f"{REMOVED_PREFIX}*")):
        shutil.rmtree(unfinished, ignore_errors=True)
    for file in folder.iterdir():
        if is_temporary(file.name) and file.is_file():
            file.unlink(missing_ok=True)
    for old in folder.glob(f"{_OLD}?*"):
        target = old.with_name(old.name.removeprefix(_OLD))
        if not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def describe_os_error(error: Exception, place: Path, bytes_needed: int = 0) -> str:
    """What a failed write says, with the room that is left where that is the reason."""
    reason = str(getattr(error, "strerror", None) or error)
    full = getattr(error, "errno", None) in _FULL or "No space left" in reason
    if not full:
        return reason
    needed = f", about {format_bytes(bytes_needed)} are needed" if bytes_needed else ""
    return f"{reason}; {format_bytes(shutil.disk_usage(_standing(place)).free)} are free{needed}"


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file to the disk under another name and rename it: it is there whole or not at all.

    Raises FileNotFoundError where its folder is gone, SystemFault where the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            sync(file)
        temporary.replace(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SystemFault(
            f"{path}: could not be written ({describe_os_error(error, path)})"
        ) from None
    sync_folder(path.parent)


def write_once(path: Path, content: bytes) -> bool:
    """Write a file as `atomic_write` does, unless there is one; whether there was none.

    Of several processes one is the first, also where a disk has no hard links, as exFAT, SMB and
    mounts of object stores: there the others may find the file empty for a moment, and a kill in
    it leaves it so. Raises SystemFault where the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            sync(file)
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # no hard links here, which has many error numbers
            _replace_none(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise SystemFault(
            f"{path}: could not be written ({describe_os_error(error, path)})"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def _replace_none(temporary: Path, path: Path) -> None:
    """Rename a file to a path that is free. Raises FileExistsError where it is not."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        temporary.replace(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def open_to_append(path: Path, mode: str, **settings: Any) -> Any:
    """Open a file to write at its end. mode, settings: as `open` takes them. Raises OSError, also
    for a pipe or a device, which might be waited for without end."""
    try:
        plain = is_plain(path)
    except FileNotFoundError:
        plain = True
    if not plain:
        raise OSError(errno.EINVAL, NOT_PLAIN, str(path))
    return path.open(mode, **settings)


def sync(file: BinaryIO) -> None:
    """Bring what was written to the disk itself."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring new names to the disk itself, where it can do that: SMB and some others refuse to open
    a folder, or to sync it, and bring names there in their own time. Raises OSError where a disk
    that can do it fails."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in (errno.EIO, *_FULL):
            raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON as `atomic_write` does. Raises SystemFault, also where the folder is gone."""
    try:
        atomic_write(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())
    except FileNotFoundError as error:
        raise SystemFault(
            f"{path}: could not be written ({describe_os_error(error, path)})"
        ) from None


@contextmanager
def lock_dir(folder: Path, *, option: str) -> Iterator[Callable[[], None]]:
    """Keep other processes from working in a folder. Raises SystemFault where one does.

    Gives a function that raises SystemFault where the folder is no longer the one that is
    held, because it was moved away, or removed and made anew.

    A POSIX lock: it ends with its process, however that ends, and forked workers do not inherit it
    (they would hold a lock of flock's for some seconds longer than a killed parent).
    """
    try:
        file = open_to_append(folder / LOCK, "a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise SystemFault(f"{option} {folder}: cannot be locked ({error.strerror})") from None
    try:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise SystemFault(
                    f"{option} {folder}: cannot be locked ({error.strerror})"
                ) from None
            file.seek(0)
            raise SystemFault(
                f"{option} {folder}: another run works in it ({file.read().strip() or 'unknown'}); "
                "wait for its end, or give another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        held = os.fstat(file.fileno())

        def check() -> None:
            try:
                same = os.path.samestat(held, (folder / LOCK).stat())
            except OSError:
                same = False
            if not same:
                raise SystemFault(
                    f"{option} {folder}: was moved, removed or replaced while this run worked in "
                    "it; nothing more is written there"
                )

        yield check
    finally:
        file.close()
