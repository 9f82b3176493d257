"""A target writer that is killed or stopped resumes to the same bytes."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from deit.core.errors import DataError
from deit.distill import target_format
from deit.distill.target_store import MANIFEST, SHARDS, TARGETS, open_store, read_manifest
from deit.distill.write_targets import write_targets
from tests.helpers.errors import raises
from tests.helpers.target_stores import (
    SMALL_SHARDS,
    configuration,
    content,
    write_arguments,
)

pytest.importorskip("sklearn")


@pytest.mark.fault("A7")
def test_killed_writers_resume_to_the_same_bytes(
    single_process_store, teachers, tmp_path, command_server
):
    """Two writers, each with a part, are killed at random moments; the last two finish."""
    killed = tmp_path / "killed"

    def write(out, *more):
        return command_server.start(
            "targets", "write", *write_arguments(teachers[0], out, *more), **SMALL_SHARDS
        )

    generator = random.Random(7)
    for attempt in range(4):
        writers = [write(killed, "--part", f"{part}/2") for part in (0, 1)]
        started = time.monotonic()
        # First at once, then later and later: while reading, computing, committing.
        while time.monotonic() - started < 20 and not (killed / SHARDS).is_dir():
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.15) * attempt)
        for writer in writers:
            writer.signal(signal.SIGKILL)
            writer.wait()
    # On a busy machine the writers can have completed the store before they were killed.
    manifest = killed / MANIFEST
    was_complete = manifest.is_file() and read_manifest(killed)["complete"]
    first, last = (write(killed, "--part", f"{part}/2").wait() for part in (0, 1))
    assert (first.code, last.code) == (0, 0)
    # A writer that ends with a complete store prints how to use it.
    advice = f"--teacher.target_stores {killed}"
    assert (advice in first.out, advice in last.out) == (was_complete, True)
    finished, expected = content(killed), content(single_process_store)
    assert {name: finished[name] for name in expected} == expected


@pytest.mark.fault("A7", "A11")
def test_sigterm_keeps_the_written_shards(single_process_store, teachers, tmp_path, command_server):
    out = tmp_path / "stopped"

    def write(fault=""):
        arguments = write_arguments(teachers[0], out)
        return command_server.run("targets", "write", *arguments, DEIT_FAULT=fault, **SMALL_SHARDS)

    done = write("targets:2:term")
    assert done.code == 143
    (line,) = done.err.splitlines()
    assert line.startswith("deit: error: ")
    assert "SIGTERM" in line
    assert len(list((out / SHARDS).glob("0*.bin"))) == 2  # with the shard in progress
    repeated = write("targets:1:term,targets:1:int")
    assert repeated.code == 143  # two signals at once count as one
    assert repeated.err == done.err
    assert write().code == 0
    assert content(out) == content(single_process_store)


class _KilledError(BaseException):
    """Stands in for the kill of a process."""


@pytest.fixture(scope="module")
def one_epoch(teachers, tmp_path_factory):
    """Return a function that writes a store of one epoch in three shards, and its content."""

    def write(out):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target_format, "_MIN_ROWS_PER_SHARD", 32)
            config = configuration(teachers[0], data={"train_fraction": 0.07})
            write_targets(config, out, epochs=1)
            assert open_store(out).record_format.num_shards == 3

    store = tmp_path_factory.mktemp("one-epoch") / "store"
    write(store)
    return write, content(store)


@pytest.mark.fault("A7")
@pytest.mark.parametrize("moment", range(12))
def test_kill_at_any_file_operation_leaves_no_partial_shard(
    moment, one_epoch, tmp_path, monkeypatch
):
    """The process is killed at one fsync or rename; the next process completes the store."""
    write, expected = one_epoch
    out, remaining = tmp_path / "store", [moment]
    replace, fsync = Path.replace, os.fsync

    def killing(operation):
        def wrapper(*arguments):
            if remaining[0] == 0:
                raise _KilledError
            remaining[0] -= 1
            return operation(*arguments)

        return wrapper

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killing(replace))
        patched.setattr(os, "fsync", killing(fsync))
        with pytest.raises(_KilledError):
            write(out)
    with raises(DataError, f"teacher.target_stores {out}"):
        open_store(out)
    write(out)
    finished = content(out)
    assert {name: finished[name] for name in expected} == expected


def test_leftovers_of_a_killed_writer_are_removed(teachers, store, tmp_path):
    out = tmp_path / "store"
    write_targets(configuration(teachers[0]), out, part=(0, 2))
    (out / f".{TARGETS}.0123").write_bytes(b"x" * 100)
    (out / ".probe-77").write_text("probe")
    write_targets(configuration(teachers[0]), out)
    assert not list(out.glob(f".{TARGETS}*"))
    assert (out / TARGETS).read_bytes() == (store / TARGETS).read_bytes()
