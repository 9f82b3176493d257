"""Atomic writes of files and folders, locks on folders, and checks of output paths."""

import errno
import fcntl
import json
import os
import platform
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from safetensors import SafetensorError

from deit.core.errors import SystemFault
from deit.core.fault_injection import fault_point
from deit.core.file_reading import NOT_PLAIN, is_plain

LOCK = ".lock"
ENVIRONMENT, RESUMED = "environment.json", "environment-resumed.json"
"""Records in a run folder: environment and working directory of the first and the last start."""
RUN_FILES = {
    *("config.json", ENVIRONMENT, RESUMED, "init.json", "base.json"),
    *("metrics.jsonl", "state_hashes.jsonl", "nonfinite_steps.jsonl"),
    *("result.json", "summary.json", "model.json", "model.safetensors", "state.json"),
    *("manifest.json", "kept_units.json", "prune.json"),
}
"""Files that no command may overwrite in a folder with one of RUN_MARKERS, not even by force."""
RUN_MARKERS = ("config.json", "manifest.json", "prune.json")
"""Files that mark a folder as a run, a checkpoint or a pruning."""
_NEW, _OLD, REMOVED_PREFIX = ".deit-new-", ".deit-old-", ".deit-gone-"
"""Prefixes of folders while they are written, replaced and removed."""


def to_paths(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """Return one path or several as a list."""
    is_one = isinstance(paths, str | os.PathLike)
    return [Path(paths)] if is_one else [Path(path) for path in paths]


def check_writable(out: Path, *, name: str) -> None:
    """Check that a file can be written, synced and renamed at `out`, which may not exist yet.

    Leaves no file behind. name: of the parameter, for messages. Raises SystemFault.
    """
    for path in (out, *out.absolute().parents):
        if path.is_symlink() and not path.exists():  # no folder can be created at its path
            link = "" if path == out else f"{path} "
            raise SystemFault(f"{name} = {out}: {link}is a broken link")
    probe = _nearest_existing(out) / f".probe-{uuid.uuid4().hex}"
    try:
        with probe.open("w", encoding="utf-8") as file:
            file.write("probe")
            os.fsync(file.fileno())
        probe.rename(probe.with_suffix(".renamed")).unlink()
    except OSError as error:
        with suppress(OSError):
            probe.unlink()
        raise SystemFault(f"{name} = {out}: cannot be written ({error.strerror})") from None


def is_temporary(name: str) -> bool:
    """Return whether a name is that of a temporary file, which only a killed process leaves."""
    return re.fullmatch(r"\..+\.[0-9a-f]{32}|\.probe-.*", name) is not None


def _nearest_existing(path: Path) -> Path:
    """Return the path itself or its nearest existing parent."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def check_space(out: Path, needed: int, *, name: str) -> None:
    """Raise SystemFault if the disk of `out` has less than `needed` bytes free."""
    free = shutil.disk_usage(_nearest_existing(out)).free
    if free < needed:
        raise SystemFault(
            f"{name} = {out}: {format_bytes(free)} are free there, {format_bytes(needed)} are "
            "needed; free some space, or give another path"
        )


def format_bytes(num_bytes: float) -> str:
    """Return bytes with a decimal unit.

    >>> format_bytes(12_345_678)
    '12.3 MB'
    """
    value = num_bytes
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, "TB"
    return f"{value:.3g} {unit}"


def check_file(path: Path | None, *, name: str, replace: bool) -> None:
    """Check before long work that an output file can be written.

    Raises SystemFault if it cannot, or if it exists and `replace` is false.
    """
    if path is None:
        return
    if path.is_dir():
        raise SystemFault(f"{name} = {path}: is a folder, not a file")
    if path.exists() and not path.is_file():  # a device or a pipe would be replaced by a file
        raise SystemFault(f"{name} = {path}: is a device or a pipe, not a file; give another")
    if path.exists() and not replace:
        raise SystemFault(
            f"{name} = {path}: exists already; use force=True (--force) to replace it"
        )
    if path.name in RUN_FILES and any(path.with_name(mark).exists() for mark in RUN_MARKERS):
        raise SystemFault(f"{name} = {path}: is a file of a run; give another")
    if not path.absolute().parent.is_dir():
        raise SystemFault(f"{name} = {path}: no folder {path.absolute().parent}")
    check_writable(path.absolute().parent, name=name)


def replace_dir(target: Path, write: Callable[[Path], None], *, bytes_needed: int = 0) -> None:
    """Write a folder next to `target` by calling `write`, then replace `target` with it.

    The files are synced before the rename, and the old folder is removed after it, so that a
    complete folder exists at any time. `clean_leftovers` removes what a killed process leaves.

    bytes_needed: approximate size, for the message if the disk is full.
    Raises SystemFault if writing fails.
    """
    new = target.with_name(f"{_NEW}{target.name}")
    _write_dir(target, write, new, replace=True, bytes_needed=bytes_needed)


def atomic_write_dir(target: Path, write: Callable[[Path], None], *, replace: bool) -> None:
    """Write a folder as `replace_dir` does, if other commands may write it at the same time.

    Each process writes its own temporary folder. Without `replace` the first one to finish wins.
    Raises SystemFault if writing fails, or if `target` exists and `replace` is false.
    """
    new = target.with_name(f"{_NEW}{target.name}.{os.getpid()}")
    _write_dir(target, write, new, replace=replace, bytes_needed=0)


def _write_dir(
    target: Path, write: Callable[[Path], None], new: Path, *, replace: bool, bytes_needed: int
) -> None:
    """Write the folder `new` and rename it to `target`."""
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
                f"{target}: another command has created it; use force=True (--force) to replace it"
            ) from None
        if old.exists() and not target.exists():
            old.rename(target)
        raise SystemFault(
            f"{target}: could not be saved ({describe_os_error(error, target, bytes_needed)}); "
            "the previous content is intact"
        ) from None
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def clean_leftovers(folder: Path) -> None:
    """Remove what killed processes left in a folder, which no other process may use now.

    Removes unfinished folders and files. Restores an old folder if its replacement is missing.
    """
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


def describe_os_error(error: Exception, path: Path, bytes_needed: int = 0) -> str:
    """Return why a write to `path` failed; for a full disk also the free space."""
    reason = str(getattr(error, "strerror", None) or error)
    full = getattr(error, "errno", None) in _FULL or "No space left" in reason
    if not full:
        return reason
    needed = f", about {format_bytes(bytes_needed)} are needed" if bytes_needed else ""
    free = shutil.disk_usage(_nearest_existing(path)).free
    return f"{reason}; {format_bytes(free)} are free{needed}"


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it and rename it, so that it is never incomplete.

    Raises FileNotFoundError if its folder does not exist, SystemFault if writing fails.
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
    """Write a file as `atomic_write` does, unless it exists. Return whether this call wrote it.

    If several processes call it at once, exactly one writes the file. That also holds on disks
    without hard links (exFAT, SMB, mounted object stores), but there the file is empty for a
    moment, and stays empty if the process is killed in that moment.
    Raises SystemFault if writing fails.
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
        except OSError:  # no hard links: the error number depends on the disk
            _rename_to_new(temporary, path)
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


def _rename_to_new(temporary: Path, path: Path) -> None:
    """Rename a file to a path that does not exist. Raises FileExistsError if it does."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        temporary.replace(path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def open_to_append(path: Path, mode: str, **settings: Any) -> Any:
    """Open a file to append to it. mode, settings: as for `open`.

    Raises OSError, also for a pipe or a device, which could block forever.
    """
    try:
        plain = is_plain(path)
    except FileNotFoundError:
        plain = True
    if not plain:
        raise OSError(errno.EINVAL, NOT_PLAIN, str(path))
    return path.open(mode, **settings)


def sync(file: BinaryIO) -> None:
    """Flush a file and wait until the disk has its content."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names of a folder's files.

    SMB and some other file systems cannot open or sync a folder; their errors are ignored.
    Raises OSError for an I/O error or a full disk.
    """
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
    """Write JSON as `atomic_write` does. Raises SystemFault, also if the folder does not exist."""
    try:
        atomic_write(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())
    except FileNotFoundError as error:
        raise SystemFault(
            f"{path}: could not be written ({describe_os_error(error, path)})"
        ) from None


@contextmanager
def lock_dir(folder: Path, *, name: str) -> Iterator[Callable[[], None]]:
    """Lock a folder. Raises SystemFault if it is locked, by this process or another.

    Yields a function that raises SystemFault if the folder has since been moved, or removed and
    created again.

    A POSIX lock (fcntl): it ends with its process, and forked workers do not inherit it. With
    flock, workers would hold the lock for some seconds after their parent is killed. It does not
    exclude its own process, such as another thread of a notebook; `_own_locks` does.
    """
    path = folder / LOCK
    with _opening_lock:
        file = _locked_file(path, name)
        locked = os.fstat(file.fileno())
        _own_locks.add(key := _lock_key(locked))

    def check() -> None:
        try:
            same = os.path.samestat(locked, path.stat())
        except OSError:
            same = False
        if not same:
            raise SystemFault(
                f"{name} = {folder}: was moved, removed or replaced during this run; nothing more "
                "is written there"
            )

    try:
        yield check
    finally:
        with _opening_lock:
            file.close()
            _own_locks.remove(key)


_opening_lock = threading.Lock()
_own_locks: set[tuple[int, ...]] = set()
"""The lock files that this process holds (`_lock_key`). Forked workers do not hold them."""


def _lock_key(file: os.stat_result) -> tuple[int, ...]:
    return os.getpid(), file.st_dev, file.st_ino


def _locked_file(path: Path, name: str) -> TextIO:
    """Open a lock file, lock it and write this process into it. Raises SystemFault."""
    try:
        # Checked before it is opened: closing a second handle would release the lock of the first.
        if path.exists() and _lock_key(path.stat()) in _own_locks:
            raise _in_use(path, name, "in this process")
        file = open_to_append(path, "a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise _not_lockable(path, name, error) from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
    except OSError as error:
        with file:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise _not_lockable(path, name, error) from None
            file.seek(0)
            raise _in_use(path, name, file.read().strip() or "unknown") from None
    return file


def _in_use(path: Path, name: str, owner: str) -> SystemFault:
    return SystemFault(
        f"{name} = {path.parent}: in use by another run ({owner}); wait until it ends, or give "
        "another folder"
    )


def _not_lockable(path: Path, name: str, error: OSError) -> SystemFault:
    return SystemFault(f"{name} = {path.parent}: cannot be locked ({error.strerror})")
