"""A store of targets from end to end: written by any processes, killed and resumed, refused when it
is not the run's, and trained from as if the teacher were there."""

import dataclasses
import errno
import json
import os
import random
import re
import shlex
import shutil
import signal
import time
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deit.cli import run_command
from deit.config.presets import LOSS_PRESETS, VIEW_MODES
from deit.config.recipes.handwriting import digits
from deit.config.schema import to_dict
from deit.config.student_section import StudentConfig
from deit.core.errors import CheckpointError, ConfigError, DataError, NumericsError
from deit.core.rng import permutation
from deit.core.run_folder import latest_checkpoint
from deit.distill import target_store
from deit.distill.target_checks import open_stores
from deit.distill.target_shards import ShardedTargetWriter
from deit.distill.target_store import (
    CHECKS,
    MANIFEST,
    SHARDS,
    TARGETS,
    manifest_bytes,
    open_store,
    read_manifest,
)
from deit.distill.verify_targets import verify_targets
from deit.distill.write_targets import write_targets
from deit.models.teachers import Teacher
from deit.training.train import train
from tests.helpers import target_stores
from tests.helpers.errors import raises
from tests.helpers.process_setup import LEAST_ROWS
from tests.helpers.target_stores import (
    EPOCHS,
    PLACES,
    SMALL_UNITS,
    check,
    configuration,
    content,
    copied,
    flipped,
    quick,
    with_targets,
)

pytest.importorskip("sklearn")
small_units, store, teachers = (
    target_stores.small_units,
    target_stores.store,
    target_stores.teachers,
)


VIEWS = ("pillow", "torchvision")  # named where a view is not what the teacher saw


def numbers_in(text, place=""):
    """The numbers of a text in their order, but for those in a path."""
    return re.findall(r"\b\d+(?:\.\d+)?\b", text.replace(str(place), ""))


def assert_differs(refused, field, stored, here):
    """A line about a field, with its value in the store and behind that the one here."""
    values = ".*".join(rf"(?<!\w){re.escape(value)}(?!\w)" for value in (stored, here))
    assert re.search(rf"(?m)^\W*{re.escape(field)}\b.*{values}", str(refused.value)), refused.value


def assert_names_unit(refused, unit, store):
    """A unit, with the epoch and the place that it begins at."""
    begins = divmod(unit * LEAST_ROWS, PLACES)
    assert sorted(numbers_in(str(refused.value), store)) == sorted(map(str, (unit, *begins)))


def line_about(said, path):
    """The line of an output that names a path."""
    (line,) = [line for line in said.splitlines() if str(path) in line]
    return line


def test_a_store_is_three_files(store):
    assert sorted(content(store)) == [CHECKS, MANIFEST, TARGETS]
    assert (store / TARGETS).stat().st_size == EPOCHS * PLACES
    manifest = json.loads((store / MANIFEST).read_text())
    assert manifest["complete"]
    assert 0.5 < manifest["teacher_top1"] <= 1


# ---- written by several processes, killed, gone on with


@pytest.mark.fault("D9")
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_written_apart_make_the_same_bytes(order, teachers, store, tmp_path, capsys):
    out = tmp_path / "parts"
    for done, part in enumerate(order, start=1):
        complete = write_targets(configuration(teachers[0]), out, part=(part, 3))
        assert complete is (done == 3)
        said = capsys.readouterr().out
        assert "images/s" in said  # the teacher was asked
        last = said.splitlines()[-1]
        assert str(out) in last
        told = [str(EPOCHS * PLACES)] if complete else [str(done), "3", str(3 - done)]
        assert set(told) <= set(numbers_in(last, out))
    assert content(out) == content(store)
    assert write_targets(configuration(teachers[0]), out)
    said = capsys.readouterr().out
    assert str(out) in said
    assert "images/s" not in said
    assert content(out) == content(store)


def command(teacher, out, *more):
    recipe = (
        *("digits", "--loss", "deit-hard", "--teacher.source", teacher, "--out", str(out)),
        *("--student.depth", "1", "--student.embed_dim", "16", "--student.num_heads", "2"),
        *("--optim.epochs", str(EPOCHS), "--optim.warmup_epochs", "1"),
        *("--run.eval_every_epochs", str(EPOCHS), "--teacher.memory_format", "contiguous"),
        *("--data.train_fraction", "0.25"),
    )
    return [*recipe, *more]


@pytest.fixture(scope="module")
def alone(teachers, zygote, tmp_path_factory):
    """The store that `command` writes in one process."""
    out = tmp_path_factory.mktemp("alone") / "store"
    assert zygote.run("targets", "write", *command(teachers[0], out), **SMALL_UNITS).code == 0
    assert open_store(out).layout.num_shards == 3
    return out


@pytest.mark.fault("D9")
def test_two_processes_write_the_same_bytes(alone, teachers, zygote, tmp_path):
    together = tmp_path / "together"
    again = zygote.run("targets", "write", *command(teachers[0], alone), **SMALL_UNITS)
    assert again.code == 0
    assert "images/s" not in again.out  # the teacher is not asked
    assert again.out.count(f"--teacher.target_stores {alone}") == 1
    _, following = again.out.split("next: deit ")
    used = zygote.run(*shlex.split(following), "--dry-run", **SMALL_UNITS)
    assert used.code == 0, used.err
    done = zygote.together("targets", "write", *command(teachers[0], together), **SMALL_UNITS)
    assert [one.code for one in done] == [0, 0], done
    assert any("images/s" in one.out for one in done)
    assert sum(one.out.count(f"--teacher.target_stores {together}") for one in done) == 1
    assert content(together) == content(alone)


@pytest.mark.fault("A7")
def test_killed_anywhere_the_same_command_goes_on_to_the_same_bytes(
    alone, teachers, tmp_path, zygote
):
    """kill -9 at random moments until a writer is left to finish; two shards at once."""
    killed = tmp_path / "killed"

    def write(out, *more):
        return zygote.start("targets", "write", *command(teachers[0], out, *more), **SMALL_UNITS)

    moments = random.Random(7)
    for attempt in range(4):
        writers = [write(killed, "--part", f"{part}/2") for part in (0, 1)]
        started = time.monotonic()
        # At first from the beginning, then ever later: into reading, asking, committing.
        while time.monotonic() - started < 20 and not (killed / SHARDS).is_dir():
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.15) * attempt)
        for writer in writers:
            writer.signal(signal.SIGKILL)
            writer.wait()
    first, last = (write(killed, "--part", f"{part}/2").wait() for part in (0, 1))
    assert (first.code, last.code) == (0, 0)
    # Whoever completes the store says how it is used.
    advice = f"--teacher.target_stores {killed}"
    assert (advice in first.out, advice in last.out) == (False, True)
    finished, expected = content(killed), content(alone)
    assert {name: finished[name] for name in expected} == expected


@pytest.mark.fault("A7", "A11")
def test_sigterm_in_the_middle_keeps_what_is_written(alone, teachers, tmp_path, zygote):
    stopped = tmp_path / "stopped"

    def write(fault=""):
        words = command(teachers[0], stopped)
        return zygote.run("targets", "write", *words, DEIT_FAULT=fault, **SMALL_UNITS)

    done = write("targets:2:term")
    assert done.code == 143
    (line,) = done.err.splitlines()
    assert line.startswith("deit: error: ")
    assert "SIGTERM" in line
    assert len(list((stopped / SHARDS).glob("0*.bin"))) == 2  # the one under way too
    again = write("targets:1:term,targets:1:int")
    assert again.code == 143  # two at once are one
    assert again.err == done.err
    assert write().code == 0
    assert content(stopped) == content(alone)


class _KilledError(BaseException):
    """A stand-in for the end of a process."""


@pytest.fixture(scope="module")
def one_epoch(teachers, tmp_path_factory):
    """Writes a store of one epoch in three small units; and what it holds."""

    def write(out):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target_store, "_LEAST_ROWS", 32)
            few = configuration(teachers[0], data={"train_fraction": 0.07})
            write_targets(few, out, epochs=1)
            assert open_store(out).layout.num_shards == 3

    whole = tmp_path_factory.mktemp("one-epoch") / "store"
    write(whole)
    return write, content(whole)


@pytest.mark.fault("A7")
@pytest.mark.parametrize("moment", range(12))
def test_an_end_at_any_file_operation_leaves_no_partial_unit(
    moment, one_epoch, tmp_path, monkeypatch
):
    """The process ends at the moment-th fsync or rename; the next one finishes the store."""
    write, expected = one_epoch
    out, left = tmp_path / "store", [moment]
    replace, fsync = Path.replace, os.fsync

    def counted(do):
        def instead(*arguments):
            if left[0] == 0:
                raise _KilledError
            left[0] -= 1
            return do(*arguments)

        return instead

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", counted(replace))
        patched.setattr(os, "fsync", counted(fsync))
        with pytest.raises(_KilledError):
            write(out)
    with raises(DataError, f"teacher.target_stores {out}"):
        open_store(out)
    write(out)
    finished = content(out)
    assert {name: finished[name] for name in expected} == expected


@pytest.mark.fault("D7")
def test_a_damaged_unit_is_named_and_nothing_is_finished(teachers, tmp_path):
    out = tmp_path / "store"
    write_targets(configuration(teachers[0]), out, part=(0, 3))
    unit = next((out / SHARDS).glob("[0-9]*.bin"))
    damaged = bytearray(unit.read_bytes())
    damaged[500] ^= 1
    unit.write_bytes(damaged)
    for part in (1, 2):
        if part == 2:
            with raises(CheckpointError, unit):
                write_targets(configuration(teachers[0]), out, part=(part, 3))
        else:
            write_targets(configuration(teachers[0]), out, part=(part, 3))
    unit.unlink()
    write_targets(configuration(teachers[0]), out)
    assert open_store(out).layout.num_shards == 3


def test_a_unit_of_another_store_does_not_slip_in(teachers, tmp_path):
    for number, seed in enumerate((0, 3)):
        config = configuration(teachers[0], views={"seed": seed})
        write_targets(config, tmp_path / str(number), part=(0, 3))
    first, second = (tmp_path / str(n) / SHARDS / "000000.bin" for n in (0, 1))
    shutil.copy(first, second)
    own, other = (
        ShardedTargetWriter(tmp_path / n, read_manifest(tmp_path / n)) for n in ("0", "1")
    )
    own.read(0)  # the same bytes
    with raises(CheckpointError, second, own.digest.hex()[:12], other.digest.hex()[:12]):
        other.read(0)


def test_a_folder_with_other_things_or_another_store_is_refused(teachers, store, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("all of it")
    with raises(ConfigError, f"--out {tmp_path / 'full'}", "thesis.txt"):
        write_targets(configuration(teachers[0]), tmp_path / "full")
    before = content(store)
    with raises(ConfigError, f"--out {store}", "views.crop_padding"):
        write_targets(configuration(teachers[0], views={"crop_padding": 2}), store)
    assert content(store) == before


# ---- refused where it is not the run's


@pytest.mark.fault("D7")
@pytest.mark.parametrize("place", [0, 1024, 2267])
def test_one_flipped_byte_is_found(place, store, tmp_path):
    copy = copied(store, tmp_path)
    flipped(copy / TARGETS, place)
    with raises(CheckpointError, copy / TARGETS) as refused:
        verify_targets(copy, root=None, teacher="none", num_queries=16)
    assert_names_unit(refused, place // LEAST_ROWS, copy)


@pytest.mark.fault("D7")
@pytest.mark.parametrize("name", [TARGETS, CHECKS])
def test_a_file_that_was_cut_off_is_found_at_once(name, store, tmp_path):
    copy = copied(store, tmp_path)
    (copy / name).write_bytes((copy / name).read_bytes()[:-1])
    with raises(CheckpointError, name):
        open_store(copy)


FOREIGN = {
    "seed": ({"run": {"seed": 4}}, "seed", "0", "4"),
    "interpolation": (
        {"views": {"interpolation": "bilinear"}},
        *("views.interpolation", "'bicubic'", "'bilinear'"),
    ),
    "rotation": ({"views": {"rotation": 3.0}}, "views.rotation", "7.5", "3.0"),
    "mixing": ({"views": {"mixup_alpha": 0.2}}, "views.mixup_alpha", "0.8", "0.2"),
    "repeats": ({"views": {"aug_repeats": 2}}, "batch_size", "None", "32"),
    "data": ({"data": {"train_fraction": 0.5}}, "images", "324", "649"),
    "classes": ({"data": {"classes": ("0", "1", "2")}}, "classes", "", ""),
    "size": ({"student": {"image_size": 4}}, "student_size", "8", "4"),
    "teacher's view": (
        {"views": {"teacher_view": "center", **VIEW_MODES["fix/cc"].fields(
            to_dict(digits())["views"])}},
        *("views.teacher_view", "'same'", "'center'"),
    ),
}  # fmt: skip


@pytest.mark.fault("C15", "D6", "D17")
@pytest.mark.parametrize("name", FOREIGN)
def test_a_store_of_something_else_is_refused_with_what_differs(name, store, teachers):
    sections, *differing = FOREIGN[name]
    config = with_targets(configuration(teachers[0], **sections), store)
    with raises(DataError, f"teacher.target_stores {store}") as refused:
        check(config)
    assert_differs(refused, *differing)


@pytest.mark.fault("D6")
def test_another_teacher_is_refused(store, teachers):
    config = with_targets(configuration(teachers[1]), store)
    stored = read_manifest(store)["fingerprint"]["teacher"]["1"]["weights"]
    with raises(
        DataError, f"teacher.target_stores {store}", "teacher.1.weights", stored[:12]
    ) as refused:
        check(config)
    assert len(set(re.findall(r"\b[0-9a-f]{12}\b", str(refused.value)))) == 2  # and the one here


@pytest.mark.fault("D5", "D6")
def test_another_normalisation_is_refused(store, teachers):
    config = configuration(teachers[0]).replace(teacher={"mean": (0.5,) * 3, "std": (0.5,) * 3})
    with raises(DataError, f"teacher.target_stores {store}", "teacher.1.mean"):
        check(with_targets(config, store))


def forged(store, change):
    """Change a store so that its manifest and checksums still fit: what only views can show."""
    opened = open_store(store)
    layout = opened.layout
    records = np.fromfile(store / TARGETS, layout.dtype)
    records, canaries = change(records.reshape(layout.epochs, -1), opened.canaries.copy())
    records.tofile(store / TARGETS)
    size = layout.rows_per_shard * layout.dtype.itemsize
    whole = records.tobytes()
    sums = [zlib.crc32(whole[unit * size : (unit + 1) * size]) for unit in range(layout.num_shards)]
    checks = np.fromfile(store / CHECKS, "<u4")
    checks[: layout.num_shards] = sums
    checks[layout.num_shards : -2 * layout.num_shards] = canaries.ravel()
    checks.tofile(store / CHECKS)


def test_a_shifted_epoch_is_noticed(store, teachers, tmp_path):
    copy = copied(store, tmp_path)
    forged(copy, lambda records, canaries: (np.roll(records, 1, 0), np.roll(canaries, 1, 0)))
    with raises(DataError, f"teacher.target_stores {copy}", *VIEWS) as refused:
        check(with_targets(configuration(teachers[0]), copy))
    numbers = numbers_in(str(refused.value).partition("pillow")[0], copy)
    image = permutation(0, 0, PLACES)[0].item()
    assert sorted(numbers) == ["0", "0", str(image)]  # epoch and place
    with raises(DataError, f"teacher.target_stores {copy}", *VIEWS):
        verify_targets(copy, root=None, teacher="none", num_queries=64)


@pytest.mark.fault("D5")
def test_a_forged_interpolation_is_noticed_by_its_pixels(store, teachers, tmp_path):
    copy = copied(store, tmp_path)
    manifest = read_manifest(copy)
    manifest["fingerprint"]["views"]["interpolation"] = "bilinear"
    (copy / MANIFEST).write_bytes(manifest_bytes(manifest))
    config = configuration(teachers[0], views={"interpolation": "bilinear"})
    with raises(DataError, f"teacher.target_stores {copy}", *VIEWS):
        check(with_targets(config, copy))


def test_answers_that_are_not_the_teachers_are_noticed(store, teachers, tmp_path):
    copy = copied(store, tmp_path)

    def other_answers(records, canaries):
        records["label"] = (records["label"] + 1) % 10
        return records, canaries

    forged(copy, other_answers)
    with raises(
        DataError, f"teacher.target_stores {copy}", 428, open_store(copy).query["precision"]
    ):
        check(with_targets(configuration(teachers[0]), copy))


def test_answers_in_another_order_are_noticed(store, teachers, tmp_path):
    copy = copied(store, tmp_path)
    forged(copy, lambda records, canaries: (np.roll(records, 2, 1), canaries))
    with raises(
        DataError, f"teacher.target_stores {copy}", 428, open_store(copy).query["precision"]
    ):
        check(with_targets(configuration(teachers[0]), copy))


def test_what_is_wrong_within_an_epoch_is_noticed_while_it_is_trained(store, teachers):
    """A loader whose views came out otherwise than when they were checked."""
    loader, _, _ = check(with_targets(configuration(teachers[0]), store))
    for _ in loader.epoch(2):
        pass
    loader.student_look.seed += 1
    with raises(DataError, f"teacher.target_stores {store}", "epoch 3", *VIEWS):
        for _ in loader.epoch(3):
            pass


@pytest.mark.fault("D7")
def test_an_incomplete_store_is_refused_with_how_much_is_missing(teachers, tmp_path):
    write_targets(configuration(teachers[0]), tmp_path / "part", part=(1, 3))
    config = with_targets(configuration(teachers[0]), tmp_path / "part")
    with raises(DataError, f"teacher.target_stores {tmp_path / 'part'}") as refused:
        open_stores(config)
    assert numbers_in(str(refused.value), tmp_path) == ["1", "3"]
    with raises(DataError, f"teacher.target_stores {tmp_path / 'none'}", MANIFEST):
        open_stores(with_targets(config, tmp_path / "none"))


def test_a_store_that_verifies_says_so(store, capsys):
    verify_targets(store, root=None, teacher=None, num_queries=128)
    sums, views, answers = capsys.readouterr().out.splitlines()
    assert (numbers_in(sums), "hard" in sums) == (["3", "2268"], True)
    assert numbers_in(views) == ["4", str(EPOCHS)]
    # 3 spots of 32 answers, and the last canary stands 4 places before the end.
    assert numbers_in(answers) == ["100.0", "100"]


# ---- trained from as if the teacher were there


def last_rows(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train"] for line in lines]


def weights(out):
    return (latest_checkpoint(out) / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def online(teachers, tmp_path_factory):
    """A run that asks its teacher."""
    out = tmp_path_factory.mktemp("online") / "run"
    train(quick(configuration(teachers[0])), out)
    return out


@pytest.mark.parametrize("source", ["with its teacher", "without"])
def test_hard_targets_train_to_the_same_bits_as_the_teacher_itself(
    source, online, store, teachers, tmp_path, capsys
):
    stored = with_targets(quick(configuration(teachers[0])), store)
    if source == "without":
        stored = stored.replace(teacher={"source": ()})
    capsys.readouterr()
    train(stored, tmp_path / "stored")
    said = capsys.readouterr().out
    line = line_about(said, store)
    assert "hard" in line
    assert numbers_in(line, store)[0] == str(EPOCHS)
    assert ("100.0 %" in line) is (source == "with its teacher")  # of the answers asked anew
    assert weights(tmp_path / "stored") == weights(online)
    ours, theirs = last_rows(tmp_path / "stored"), last_rows(online)
    assert ours == theirs


@pytest.mark.fault("D17")
@pytest.mark.parametrize("mode", VIEW_MODES)
def test_every_mode_trains_from_a_store_as_online(mode, teachers, tmp_path):
    few = {"train_fraction": 0.1}
    base = configuration(teachers[0], loss=LOSS_PRESETS["function-matching"], data=few)
    views = {**VIEW_MODES[mode].fields(to_dict(base)["views"]), "crop_scale": (0.5, 1.0)}
    if mode == "fix/ic_ens":
        views["teacher_num_crops"] = 5
    config = quick(base, views=views)
    write_targets(config, tmp_path / "store")
    train(with_targets(config, tmp_path / "store"), tmp_path / "stored")
    stored = last_rows(tmp_path / "stored")
    layout = open_store(tmp_path / "store").layout
    assert layout.content == "full"
    assert layout.epochs == (1 if mode.startswith("fix/") else 2)
    if mode != "fix/ic_ens":
        train(config, tmp_path / "online")
        for ours, theirs in zip(stored, last_rows(tmp_path / "online"), strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-3)
            assert ours["teacher_top1"] == theirs["teacher_top1"]


def test_fewer_stored_epochs_come_round_again_and_the_run_says_so(
    store, teachers, tmp_path, capsys
):
    config = with_targets(configuration(teachers[0], optim={"epochs": 9}), store)
    *_, faculty = check(config)
    assert faculty.num_stored_epochs == EPOCHS
    said = map(numbers_in, capsys.readouterr().out.splitlines())
    assert {"9", str(EPOCHS)} in map(set, said)
    train(config, tmp_path / "cycled")
    rows = last_rows(tmp_path / "cycled")
    assert rows[7]["teacher_top1"] == rows[0]["teacher_top1"]
    assert rows[8]["teacher_top1"] == rows[1]["teacher_top1"]


def test_a_seed_of_the_views_lets_other_seeds_share_a_store(store, teachers, tmp_path):
    config = with_targets(configuration(teachers[0], run={"seed": 4}, views={"seed": 0}), store)
    train(quick(config), tmp_path / "run")
    assert last_rows(tmp_path / "run")


def test_hard_records_refuse_what_they_cannot_give(store, teachers):
    config = with_targets(configuration(teachers[0], loss=LOSS_PRESETS["deit-soft"]), store)
    with raises(
        ConfigError, f"teacher.target_stores {store}", "loss.kind", "'soft'", "--content full"
    ):
        open_stores(config)
    both = configuration(teachers[0]).replace(
        teacher={"source": tuple(teachers), "target_stores": (str(store), str(store))},
    )
    with raises(ConfigError, f"teacher.target_stores {store}", "teacher.combine", "--content full"):
        open_stores(both)


def test_top_k_refuses_a_temperature(teachers, tmp_path):
    config = configuration(teachers[0], loss=LOSS_PRESETS["deit-soft"])
    plain = config.replace(loss={"temperature": 1.0})
    write_targets(plain, tmp_path / "top", epochs=1, content="top-3")
    where = f"teacher.target_stores {tmp_path / 'top'}"
    with raises(ConfigError, where, "loss.temperature", "--content full"):
        open_stores(with_targets(config, tmp_path / "top"))
    assert open_stores(with_targets(plain, tmp_path / "top"))


def test_a_store_of_a_mean_of_probabilities_refuses_another_temperature(teachers, tmp_path):
    config = configuration(teachers[0], loss=LOSS_PRESETS["deit-soft"]).replace(
        teacher={"source": tuple(teachers)},
    )
    temperature = f"{config.loss.temperature:g}"
    with raises(ConfigError, f"loss.temperature = {temperature}", "--teacher.combine logits"):
        write_targets(config, tmp_path / "mean", epochs=1)
    write_targets(config.replace(loss={"temperature": 1.0}), tmp_path / "mean", epochs=1)
    alone = config.replace(teacher={"source": (), "target_stores": (str(tmp_path / "mean"),)})
    where = f"teacher.target_stores {tmp_path / 'mean'}"
    with raises(ConfigError, where, f"loss.temperature {temperature}", "--teacher.combine logits"):
        open_stores(alone)
    assert check(alone.replace(loss={"temperature": 1.0}, optim={"epochs": 1, "warmup_epochs": 0}))


@pytest.mark.parametrize("combine", ["probabilities", "logits", "tokens"])
def test_an_ensemble_from_stores_is_the_ensemble_online(combine, teachers, tmp_path):
    soft = dataclasses.replace(LOSS_PRESETS["deit-soft"], temperature=2.0)
    config = quick(configuration(teachers[0], loss=soft)).replace(
        student={"num_distillation_tokens": 2 if combine == "tokens" else 1},
        teacher={"source": tuple(teachers), "weights": (0.7, 0.3), "combine": combine},
    )
    stores = []
    for number, teacher in enumerate(teachers):
        alone = config.replace(
            teacher={"source": (teacher,), "weights": (), "combine": "probabilities"},
            student={"num_distillation_tokens": 1},
        )
        write_targets(alone, tmp_path / str(number))
        stores.append(tmp_path / str(number))
    train(config, tmp_path / "online")
    train(with_targets(config, *stores), tmp_path / "stored")
    train(with_targets(config, stores[0], "none"), tmp_path / "half")
    expected = last_rows(tmp_path / "online")
    for name in ("stored", "half"):
        for ours, theirs in zip(last_rows(tmp_path / name), expected, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-3)
    if combine == "tokens":
        assert {"loss_teacher_1", "loss_teacher_2"} <= expected[0].keys()


def test_one_store_of_what_several_say_together_is_the_ensemble_online(teachers, tmp_path, capsys):
    config = quick(configuration(teachers[0], loss=LOSS_PRESETS["deit-soft"])).replace(
        teacher={"source": tuple(teachers), "weights": (2.0, 1.0), "combine": "logits"},
    )
    write_targets(config, tmp_path / "together")
    train(config, tmp_path / "online")
    capsys.readouterr()
    train(with_targets(config, tmp_path / "together"), tmp_path / "stored")
    said = capsys.readouterr().out
    assert re.search(r"100\.0 %\D*\b\d{3}\b", line_about(said, tmp_path / "together"))
    assert re.search(r"(?m)^teachers\b.*\b143\b", said)
    for ours, theirs in zip(last_rows(tmp_path / "stored"), last_rows(tmp_path / "online")):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-3)
    other = config.replace(teacher={"weights": (1.0, 1.0)})
    with raises(DataError, f"teacher.target_stores {tmp_path / 'together'}") as refused:
        check(with_targets(other, tmp_path / "together"))
    assert_differs(refused, "weights", "[0.666666667, 0.333333333]", "[0.5, 0.5]")
    turned = config.replace(teacher={"source": tuple(reversed(teachers))})
    with raises(DataError, "teacher.1.weights", "teacher.2.weights"):
        check(with_targets(turned, tmp_path / "together"))


def test_probabilities_that_are_not_the_teachers_are_noticed(teachers, tmp_path):
    """Its labels are right, what it holds of the other classes is not."""
    config = quick(configuration(teachers[0], loss=LOSS_PRESETS["deit-soft"]))
    for records in ("full", "top-3"):
        store = tmp_path / records
        plain = config.replace(loss={"temperature": 1.0})
        write_targets(plain, store, content=records)
        assert check(with_targets(plain, store))

        def flatter(records, canaries):
            records["scores"] = np.float16(0.5) * records["scores"]
            return records, canaries

        forged(store, flatter)
        with raises(
            DataError, f"teacher.target_stores {store}", open_store(store).query["precision"]
        ):
            check(with_targets(plain, store))


@pytest.mark.fault("D7")
@pytest.mark.parametrize("place", [3, 2250])
def test_training_reads_the_checksums_before_its_first_step(place, store, teachers, tmp_path):
    copy = copied(store, tmp_path)
    flipped(copy / TARGETS, place)
    config = configuration(teachers[0]).replace(teacher={"source": ()})
    with raises(CheckpointError, copy / TARGETS) as refused:
        train(with_targets(config, copy), tmp_path / "run")
    assert_names_unit(refused, place // LEAST_ROWS, copy)
    assert not (tmp_path / "run").exists()


def test_the_same_weights_in_another_network_are_another_teacher():
    """Strides have no weights."""
    from deit.models.networks import create_network
    from deit.models.teachers import LoadedNetwork

    def identity(name):
        torch.manual_seed(0)
        network = create_network(StudentConfig(name=name, image_size=32), 10)
        return Teacher(LoadedNetwork(network, name, 32, (0.0,) * 3, (1.0,) * 3, None)).fingerprint()

    one, two = identity("regnety_002_small_stem"), identity("timm:regnety_002")
    assert one["weights"] == two["weights"]
    assert one["layers"] != two["layers"]
    assert identity("timm:regnety_002") == two


def test_a_teacher_is_the_same_to_libraries_that_print_it_otherwise(monkeypatch):
    """Another version of PyTorch shows more of a layer, another one of timm has one more that does
    nothing."""
    from deit.models.teachers import LoadedNetwork

    def identity(network):
        return Teacher(LoadedNetwork(network, "", 32, (0.0,) * 3, (1.0,) * 3, None)).fingerprint()

    def network(**settings):
        torch.manual_seed(0)
        return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 3, 3, **settings), act=nn.GELU()))

    before = identity(network())
    assert identity(network(padding=1)) != before
    other = network()
    other.act = nn.GELU(approximate="tanh")
    assert identity(other) != before
    monkeypatch.setattr(nn.Conv2d, "extra_repr", lambda self: "words of a later version")
    later = network()
    later.drop = nn.Dropout(0.1)
    assert identity(later) == before


def test_parts_that_were_asked_otherwise_do_not_mix(teachers, tmp_path):
    """Blocks of another size, like another precision, may change the last bits of an answer."""
    write_targets(configuration(teachers[0]), tmp_path / "s", part=(0, 3))
    other = configuration(teachers[0], run={"eval_batch_size": 64})
    with raises(ConfigError, f"--out {tmp_path / 's'}") as refused:
        write_targets(other, tmp_path / "s", part=(1, 3))
    assert_differs(refused, "asked.block", "256", "64")


@pytest.mark.fault("D9")
def test_of_two_writers_of_different_things_the_first_has_the_folder(
    teachers, tmp_path, monkeypatch
):
    """The second comes between the first's look at the folder and its manifest."""
    from deit.distill import target_shards

    put_first, other = target_shards.write_once, []

    def slow(path, content):
        if not other:
            other.append(True)
            write_targets(configuration(teachers[0], run={"seed": 1}), tmp_path / "s", part=(0, 3))
        return put_first(path, content)

    monkeypatch.setattr(target_shards, "write_once", slow)
    with raises(ConfigError, f"--out {tmp_path / 's'}") as refused:
        write_targets(configuration(teachers[0]), tmp_path / "s")
    assert_differs(refused, "fingerprint.seed", "1", "0")
    assert json.loads((tmp_path / "s" / MANIFEST).read_text())["fingerprint"]["seed"] == 1


def test_a_way_round_through_a_missing_folder_overwrites_nothing(teachers, store, tmp_path):
    copy = copied(store, tmp_path)
    before = content(copy)
    with raises(ConfigError, f"--out {copy}") as refused:
        write_targets(configuration(teachers[0], run={"seed": 5}), tmp_path / "no" / ".." / "store")
    assert_differs(refused, "fingerprint.seed", "0", "5")
    assert content(copy) == before


def test_what_a_killed_writer_left_is_cleared_away(teachers, store, tmp_path):
    out = tmp_path / "store"
    write_targets(configuration(teachers[0]), out, part=(0, 2))
    (out / f".{TARGETS}.0123").write_bytes(b"x" * 100)
    (out / ".probe-77").write_text("probe")
    write_targets(configuration(teachers[0]), out)
    assert not list(out.glob(f".{TARGETS}*"))
    assert (out / TARGETS).read_bytes() == (store / TARGETS).read_bytes()


def _turned(records):
    """One answer of 2,268 is another: too few for the answers asked anew to notice."""
    records["label"][4, 200] = 9 - records["label"][4, 200]
    return records


def test_a_resumed_run_wants_the_store_it_started_with(teachers, store, tmp_path):
    copy = copied(store, tmp_path)
    config = with_targets(configuration(teachers[0], optim={"epochs": 2}), copy)
    train(config, tmp_path / "run")
    forged(
        copy, lambda records, canaries: (np.where(records == records, records, records), canaries)
    )
    train(config, tmp_path / "run", resume=True)  # the same answers: complete already
    forged(copy, lambda records, canaries: (_turned(records), canaries))
    with raises(DataError, tmp_path / "run", "teacher.target_stores"):
        train(config, tmp_path / "run", resume=True)


def test_a_store_speaks_for_a_teacher_that_cannot_be_reached(store, capsys, monkeypatch):
    """A timm name without network: its weights are not here, but its answers are."""

    def unreachable(name, **settings):
        raise OSError(f"no hub for {name}")

    monkeypatch.setattr("deit.models.teacher_sources.timm.create_model", unreachable)
    config = configuration("resnet18", optim={"epochs": 1, "warmup_epochs": 0})
    assert check(with_targets(config, store))
    said = capsys.readouterr()
    assert "resnet18" in said.err
    assert "%" not in line_about(said.out, store)  # no answer of it is asked anew


@pytest.mark.fault("D4")
def test_an_answer_that_is_not_finite_is_not_written(teachers, tmp_path, monkeypatch):
    answer = Teacher.forward

    def broken(self, images):
        logits = answer(self, images)
        if len(logits) == 256:  # a whole block of training views
            logits[3] = float("nan")
        return logits

    monkeypatch.setattr(Teacher, "forward", broken)
    with raises(NumericsError, "--run.precision fp32") as stopped:
        write_targets(configuration(teachers[0]), tmp_path / "store")
    assert numbers_in(str(stopped.value)) == [str(permutation(0, 0, PLACES)[3].item())]
    assert not list((tmp_path / "store" / SHARDS).glob("[0-9]*.bin"))


def test_what_cannot_be_written_is_refused(teachers, tmp_path):
    config = configuration(teachers[0])
    with raises(ConfigError, "loss.kind", "'none'"):
        write_targets(dataclasses.replace(config, loss=LOSS_PRESETS["none"]), tmp_path / "s")
    several = config.replace(
        teacher={"source": tuple(teachers), "combine": "tokens"},
        student={"num_distillation_tokens": 2},
    )
    with raises(
        ConfigError, "teacher.combine", "'tokens'", "--teacher-index 1", "--teacher-index 2"
    ):
        write_targets(several, tmp_path / "s")
    with raises(ConfigError, "--content top-10") as refused:
        write_targets(config, tmp_path / "s", content="top-10")
    assert numbers_in(str(refused.value)) == ["10", "10"]  # answers, of as many classes
    views = VIEW_MODES["fix/cc"].fields(to_dict(config)["views"])
    with raises(ConfigError, "--epochs 4", "views.teacher_view center"):
        write_targets(config.replace(views=views), tmp_path / "s", epochs=4)
    assert not (tmp_path / "s").exists()


def test_memory_of_a_reader_does_not_grow_with_the_store(store, teachers):
    """One epoch is mapped at a time, whatever the number of epochs."""
    _, panel, _ = check(with_targets(configuration(teachers[0]), store))
    (reader,) = panel.teachers
    whole = (store / TARGETS).read_bytes()
    for epoch in (0, 6, 2):
        records = reader.records(epoch)
        assert isinstance(records, np.memmap)
        assert records.tobytes() == whole[epoch * PLACES : (epoch + 1) * PLACES]


def test_a_disk_without_room_for_the_store_is_refused_before_anything_is_asked(
    teachers, tmp_path, zygote, monkeypatch
):
    import shutil as system
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 100, 100)
    monkeypatch.setattr(system, "disk_usage", lambda place: usage)
    assert run_command("targets", ["write", *command(teachers[0], tmp_path / "s")], "deit") == 5
    assert not (tmp_path / "s").exists()
    monkeypatch.undo()
    done = zygote.run(
        *("targets", "write", *command(teachers[0], tmp_path / "s")),
        DEIT_FAULT="targets:2:full",
        **SMALL_UNITS,
    )
    assert done.code == 5
    assert str(tmp_path / "s" / SHARDS) in done.err
    assert os.strerror(errno.ENOSPC) in done.err
    assert re.search(r"\d [kMGT]B\b", done.err)  # how much room there is
