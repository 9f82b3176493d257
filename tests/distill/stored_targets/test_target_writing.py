"""Write a target store: its files, parts and processes, and what the writer refuses."""

import dataclasses
import errno
import json
import os
import re
import shlex
import shutil
from collections import namedtuple

import pytest

from deit.cli import run_command
from deit.config.presets import LOSS_PRESETS, VIEW_MODES
from deit.config.schema import to_dict
from deit.core.errors import ConfigError, NumericsError
from deit.core.rng import permutation
from deit.distill.target_store import CHECKS, MANIFEST, SHARDS, TARGETS
from deit.distill.write_targets import write_targets
from deit.models.teachers import Teacher
from tests.helpers.errors import raises
from tests.helpers.target_stores import (
    EPOCHS,
    ROWS_PER_EPOCH,
    SMALL_SHARDS,
    assert_differs,
    configuration,
    content,
    copied,
    numbers_in,
    write_arguments,
)

pytest.importorskip("sklearn")


def test_store_consists_of_three_files(store):
    assert sorted(content(store)) == [CHECKS, MANIFEST, TARGETS]
    assert (store / TARGETS).stat().st_size == EPOCHS * ROWS_PER_EPOCH
    manifest = json.loads((store / MANIFEST).read_text())
    assert manifest["complete"]
    assert 0.5 < manifest["teacher_top1"] <= 1


# ---- written in parts and by several processes


@pytest.mark.fault("D9")
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_store_written_in_parts_has_the_same_bytes(order, teachers, store, tmp_path, capsys):
    out = tmp_path / "parts"
    for num_done, part in enumerate(order, start=1):
        complete = write_targets(configuration(teachers[0]), out, part=(part, 3)) is not None
        assert complete is (num_done == 3)
        output = capsys.readouterr().out
        assert "images/s" in output  # the teacher was run
        last_line = output.splitlines()[-1]
        assert str(out) in last_line
        numbers = (
            [str(EPOCHS * ROWS_PER_EPOCH)] if complete else [str(num_done), "3", str(3 - num_done)]
        )
        assert set(numbers) <= set(numbers_in(last_line, out))
    assert content(out) == content(store)
    assert write_targets(configuration(teachers[0]), out).path == out.resolve()
    output = capsys.readouterr().out
    assert str(out) in output
    assert "images/s" not in output
    assert content(out) == content(store)


@pytest.mark.fault("D9")
def test_store_written_by_two_processes_has_the_same_bytes(
    single_process_store, teachers, command_server, tmp_path
):
    out = tmp_path / "store"
    repeated = command_server.run(
        "targets", "write", *write_arguments(teachers[0], single_process_store), **SMALL_SHARDS
    )
    assert repeated.code == 0
    assert "images/s" not in repeated.out  # the teacher is not run
    assert repeated.out.count(f"--teacher.target_stores {single_process_store}") == 1
    _, next_command = repeated.out.split("next: deit ")
    dry_run = command_server.run(*shlex.split(next_command), "--dry-run", **SMALL_SHARDS)
    assert dry_run.code == 0, dry_run.err
    processes = command_server.run_processes(
        "targets", "write", *write_arguments(teachers[0], out), **SMALL_SHARDS
    )
    assert [process.code for process in processes] == [0, 0], processes
    assert any("images/s" in process.out for process in processes)
    assert sum(process.out.count(f"--teacher.target_stores {out}") for process in processes) == 1
    assert content(out) == content(single_process_store)


def test_out_with_other_files_or_another_store_is_refused(teachers, store, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("all of it")
    with raises(ConfigError, f"out = {tmp_path / 'full'}", "thesis.txt"):
        write_targets(configuration(teachers[0]), tmp_path / "full")
    before = content(store)
    with raises(ConfigError, f"out = {store}", "views.crop_padding"):
        write_targets(configuration(teachers[0], views={"crop_padding": 2}), store)
    assert content(store) == before


def test_parts_with_another_eval_batch_size_are_refused(teachers, tmp_path):
    """Another block size, like another precision, can change the last bits of an output."""
    write_targets(configuration(teachers[0]), tmp_path / "s", part=(0, 3))
    config = configuration(teachers[0], run={"eval_batch_size": 64})
    with raises(ConfigError, f"out = {tmp_path / 's'}") as refused:
        write_targets(config, tmp_path / "s", part=(1, 3))
    assert_differs(refused, "inference.batch_size", "256", "64")


@pytest.mark.fault("D9")
def test_concurrent_writer_with_another_config_is_refused(teachers, tmp_path, monkeypatch):
    """The other writer starts after the first has looked at the folder, and writes first."""
    from deit.distill import target_shards

    write_once, started = target_shards.write_once, []

    def write_after_another(path, content):
        if not started:
            started.append(True)
            write_targets(configuration(teachers[0], run={"seed": 1}), tmp_path / "s", part=(0, 3))
        return write_once(path, content)

    monkeypatch.setattr(target_shards, "write_once", write_after_another)
    with raises(ConfigError, f"out = {tmp_path / 's'}") as refused:
        write_targets(configuration(teachers[0]), tmp_path / "s")
    assert_differs(refused, "fingerprint.seed", "1", "0")
    assert json.loads((tmp_path / "s" / MANIFEST).read_text())["fingerprint"]["seed"] == 1


def test_out_with_dots_through_a_missing_folder_overwrites_nothing(teachers, store, tmp_path):
    copy = copied(store, tmp_path)
    before = content(copy)
    with raises(ConfigError, f"out = {copy}") as refused:
        write_targets(configuration(teachers[0], run={"seed": 5}), tmp_path / "no" / ".." / "store")
    assert_differs(refused, "fingerprint.seed", "0", "5")
    assert content(copy) == before


@pytest.mark.fault("D4")
def test_nonfinite_teacher_outputs_are_not_written(teachers, tmp_path, monkeypatch):
    original = Teacher.forward

    def forward_with_nan(self, images):
        logits = original(self, images)
        if len(logits) == 256:  # a whole block of training views
            logits[3] = float("nan")
        return logits

    monkeypatch.setattr(Teacher, "forward", forward_with_nan)
    with raises(NumericsError, "--run.precision fp32") as stopped:
        write_targets(configuration(teachers[0]), tmp_path / "store")
    assert numbers_in(str(stopped.value)) == [str(permutation(0, 0, ROWS_PER_EPOCH)[3].item())]
    assert not (tmp_path / "store").exists()


def test_write_targets_with_invalid_options_is_refused(teachers, tmp_path):
    config = configuration(teachers[0])
    with raises(ConfigError, "loss.kind", "'none'"):
        write_targets(dataclasses.replace(config, loss=LOSS_PRESETS["none"]), tmp_path / "s")
    ensemble = config.replace(
        teacher={"source": tuple(teachers), "combine": "tokens"},
        student={"num_distillation_tokens": 2},
    )
    with raises(ConfigError, "teacher.combine", "'tokens'", "teacher_index 1", "teacher_index 2"):
        write_targets(ensemble, tmp_path / "s")
    with raises(ConfigError, "content = top-10") as refused:
        write_targets(config, tmp_path / "s", content="top-10")
    # The K of top-K, and the number of classes.
    assert numbers_in(str(refused.value)) == ["10", "10"]
    views = VIEW_MODES["fix/cc"].fields(to_dict(config)["views"])
    with raises(ConfigError, "epochs = 4", "views.teacher_view center"):
        write_targets(config.replace(views=views), tmp_path / "s", epochs=4)
    assert not (tmp_path / "s").exists()


def test_write_targets_full_disk_is_refused_before_inference(
    teachers, tmp_path, command_server, monkeypatch
):
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 100, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    arguments = ["write", *write_arguments(teachers[0], tmp_path / "s")]
    assert run_command("targets", arguments, "deit") == 5
    assert not (tmp_path / "s").exists()
    monkeypatch.undo()
    fault = {"DEIT_FAULT": "targets:2:full", **SMALL_SHARDS}
    done = command_server.run("targets", *arguments, **fault)
    assert done.code == 5
    assert str(tmp_path / "s" / SHARDS) in done.err
    assert os.strerror(errno.ENOSPC) in done.err
    assert re.search(r"\d [kMGT]B\b", done.err)  # the free space
