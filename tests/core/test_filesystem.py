"""Atomic writes of files and folders by several commands, and files that are never replaced."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from deit.core import manifest, run_folder, run_log
from deit.core.errors import SystemFault
from deit.core.filesystem import (
    atomic_write,
    atomic_write_dir,
    check_file,
    check_writable,
    lock_dir,
    sync_folder,
    write_once,
)
from deit.deploy import prune_options
from deit.models.metadata import BASE
from tests.helpers.errors import raises


def writer(text: str, meanwhile: Path | None = None):
    """Return a function that writes a file while another command creates the folder."""

    def write(folder: Path) -> None:
        (folder / "model.onnx").write_text(text)
        if meanwhile is not None:
            atomic_write_dir(meanwhile, writer("other"), replace=False)

    return write


def test_atomic_write_dir_keeps_the_first_of_two(tmp_path, monkeypatch):
    process_ids = iter((1, 2))  # of the two processes
    monkeypatch.setattr("deit.core.filesystem.os.getpid", lambda: next(process_ids))
    with raises(SystemFault, "--force"):
        atomic_write_dir(tmp_path / "out", writer("own", tmp_path / "out"), replace=False)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "out", tmp_path / "out" / "model.onnx"]
    assert (tmp_path / "out" / "model.onnx").read_text() == "other"


def test_atomic_write_dir_with_replace(tmp_path):
    for text in ("first", "second"):
        atomic_write_dir(tmp_path / "out", writer(text), replace=True)
        assert (tmp_path / "out" / "model.onnx").read_text() == text
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "out", tmp_path / "out" / "model.onnx"]


@pytest.mark.parametrize("error_number", [errno.EINVAL, errno.EACCES, errno.EBADF, errno.ENOTSUP])
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_disk_that_cannot_sync_folders_is_accepted(call, error_number, tmp_path, monkeypatch):
    """SMB and some FUSE file systems cannot sync folders; files are written all the same."""
    closed, real, close = [], getattr(os, call), os.close

    def refusing(what, *arguments):
        about = os.stat(what) if isinstance(what, int) or os.path.exists(what) else None
        if about is not None and stat.S_ISDIR(about.st_mode):
            raise OSError(error_number, "refused")
        return real(what, *arguments)

    monkeypatch.setattr(os, call, refusing)
    monkeypatch.setattr(os, "close", lambda handle: (closed.append(handle), close(handle)))
    atomic_write(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert len(closed) == (call == "fsync")
    atomic_write_dir(tmp_path / "out", writer("text"), replace=True)
    assert (tmp_path / "out" / "model.onnx").read_text() == "text"


@pytest.mark.parametrize("error_number", [errno.EIO, errno.ENOSPC])
def test_disk_that_fails_to_sync_folders_raises(error_number, tmp_path, monkeypatch):
    def failing(handle):
        raise OSError(error_number, "failed")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="failed") as raised:
        sync_folder(tmp_path)
    assert raised.value.errno == error_number


@pytest.mark.parametrize(
    "error_number", [None, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES]
)
def test_write_once_keeps_the_first_on_any_disk(error_number, tmp_path, monkeypatch):
    """exFAT, SMB and mounted object stores have no hard links."""

    def refusing(*paths):
        raise OSError(error_number, "refused")

    if error_number is not None:
        monkeypatch.setattr(os, "link", refusing)
    assert write_once(tmp_path / "file", b"first")
    assert not write_once(tmp_path / "file", b"second")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"first"
    with raises(SystemFault, tmp_path / "missing" / "file", os.strerror(errno.ENOENT)):
        write_once(tmp_path / "missing" / "file", b"first")


def test_failed_write_once_leaves_no_file(tmp_path, monkeypatch):
    def refusing(*paths):
        raise OSError(errno.EPERM, "refused")

    def full(*paths):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", refusing)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with raises(SystemFault, tmp_path / "file", os.strerror(errno.ENOSPC)):
            write_once(tmp_path / "file", b"first")
    assert list(tmp_path.iterdir()) == []
    assert write_once(tmp_path / "file", b"first")


def test_run_files_are_those_that_runs_write(tmp_path):
    names = {run_folder.CONFIG, run_folder.ENVIRONMENT, run_folder.RESUMED, run_folder.RESULT}
    names |= {run_folder.STATE, run_log.METRICS, run_log.HASH_CHAIN, run_log.NONFINITE_LOG, BASE}
    names |= {manifest.MANIFEST, prune_options.MANIFEST, prune_options.SELECTION}
    marks = {run_folder.CONFIG, manifest.MANIFEST, prune_options.MANIFEST}
    for run_file in names:
        folder = tmp_path / run_file
        folder.mkdir()
        (folder / run_file).touch()
        for name in names:
            if run_file in marks:
                with raises(SystemFault, f"json_file = {folder / name}"):
                    check_file(folder / name, name="json_file", replace=True)
            else:
                check_file(folder / name, name="json_file", replace=True)


@pytest.mark.parametrize("mark", ["config.json", "manifest.json", "prune.json"])
@pytest.mark.parametrize("name", ["config.json", "result.json", "metrics.jsonl", "manifest.json"])
def test_run_files_are_never_replaced(tmp_path, mark, name):
    (tmp_path / mark).touch()
    with raises(SystemFault, "json_file = ", name):
        check_file(tmp_path / name, name="json_file", replace=True)
    check_file(tmp_path / "numbers.json", name="json_file", replace=True)
    (tmp_path / "elsewhere").mkdir()
    check_file(tmp_path / "elsewhere" / name, name="json_file", replace=False)


def test_device_or_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with raises(SystemFault, f"json_file = {path}"):
            check_file(path, name="json_file", replace=True)


@pytest.mark.parametrize("name", ["link", "link/below"])
def test_broken_link_raises(name, tmp_path):
    """No folder can be created at its path."""
    (tmp_path / "link").symlink_to("nothing")
    with raises(SystemFault, "out = "):
        check_writable(tmp_path / name, name="out")
    (tmp_path / "nothing").mkdir()
    check_writable(tmp_path / name, name="out")


LOCKED_ELSEWHERE = """
import sys; from pathlib import Path
from deit.core.errors import SystemFault
from deit.core.filesystem import lock_dir
try:
    with lock_dir(Path(sys.argv[1]), name="out"): print("free")
except SystemFault as error: print(error)
"""


def lock_in_another_process(folder: Path) -> str:
    """Return `free`, or the message, if another process locks a folder."""
    command = [sys.executable, "-c", LOCKED_ELSEWHERE, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_lock_dir_excludes_its_own_process_and_others(tmp_path):
    folder, link = tmp_path / "100 %s", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    with lock_dir(folder, name="out") as check:
        for path in (folder, link):
            with raises(SystemFault, f"out = {path}: in use by another run (in this process)"):
                lock_dir(path, name="out").__enter__()
        # The refused attempts have not released the lock.
        assert f"in use by another run (process {os.getpid()} on" in lock_in_another_process(folder)
        check()
        with lock_dir(tmp_path, name="out"):
            pass
    assert lock_in_another_process(folder) == "free"
    with lock_dir(folder, name="out"):
        pass
