"""Stores of targets, and runs that are trained with them."""

import json
import re
import shutil
import zlib
from pathlib import Path

import numpy as np

from deit.config.presets import LOSS_PRESETS
from deit.config.recipes.handwriting import digits
from deit.core.run_folder import latest_checkpoint
from deit.datasets.splits import load_splits
from deit.distill.build import build_train_loader
from deit.distill.target_checks import open_stores
from deit.distill.target_store import (
    CHECKS,
    TARGETS,
    open_store,
)
from deit.training.resolve import resolve
from tests.helpers.process_setup import LEAST_ROWS

EPOCHS, PLACES = 7, 324  # with small units: three of them
SMALL_UNITS = {"SETUP_FUNCTION": "tests.helpers.process_setup:make_small_units"}
"""The environment in which a process makes them."""


def configuration(teacher, **sections):
    config = digits().replace(
        data={"train_fraction": 0.25},
        student={"depth": 1, "embed_dim": 16, "num_heads": 2},
        optim={"epochs": EPOCHS, "warmup_epochs": 1},
        run={"eval_every_epochs": EPOCHS},
        teacher={"source": (teacher,)},
        loss=LOSS_PRESETS["deit-hard"],
    )
    return config.replace(**sections)


def content(store):
    """Every file of a store and its bytes."""
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*.*")}


def copied(store, tmp_path):
    return Path(shutil.copytree(store, tmp_path / "store"))


def with_targets(config, *stores):
    return config.replace(teacher={"target_stores": tuple(map(str, stores))})


def check(config):
    """Everything a run does before its first step."""
    resolved = resolve(config)
    accelerator, teachers = resolved.accelerator, resolved.teachers
    splits = load_splits(config.data)
    teachers.load(splits.class_names, config.student.image_size, accelerator)
    loader = build_train_loader(
        config,
        splits,
        accelerator,
        teacher_size=teachers.input_size,
        for_teacher=None in teachers.stores,
    )
    ensemble = teachers.ensemble(splits, accelerator)
    teachers.check(splits, accelerator, loader, config.evaluation)
    return loader, ensemble, teachers


def flipped(path, place):
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 4
    path.write_bytes(damaged)


def quick(config, **sections):
    return config.replace(optim={"epochs": 2}, **sections)


VIEWS = ("pillow", "torchvision")  # named where a view is not what the teacher saw


def numbers_in(text, place=""):
    """The numbers of a text in their order, but for those in a path."""
    return re.findall(r"\b\d+(?:\.\d+)?\b", text.replace(str(place), ""))


def assert_differs(refused, field, stored, here):
    """A line about a field, with its value in the store and behind that the one here."""
    values = ".*".join(rf"(?<!\w){re.escape(value)}(?!\w)" for value in (stored, here))
    assert re.search(rf"(?m)^\W*{re.escape(field)}\b.*{values}", str(refused.value)), refused.value


def assert_names_shard(refused, unit, store):
    """A unit, with the epoch and the place that it begins at."""
    begins = divmod(unit * LEAST_ROWS, PLACES)
    assert sorted(numbers_in(str(refused.value), store)) == sorted(map(str, (unit, *begins)))


def line_about(said, path):
    """The line of an output that names a path."""
    (line,) = [line for line in said.splitlines() if str(path) in line]
    return line


def write_arguments(teacher, out, *more):
    recipe = (
        *("digits", "--loss", "deit-hard", "--teacher.source", teacher, "--out", str(out)),
        *("--student.depth", "1", "--student.embed_dim", "16", "--student.num_heads", "2"),
        *("--optim.epochs", str(EPOCHS), "--optim.warmup_epochs", "1"),
        *("--run.eval_every_epochs", str(EPOCHS), "--teacher.memory_format", "contiguous"),
        *("--data.train_fraction", "0.25"),
    )
    return [*recipe, *more]


def forged_copy(store, change):
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


# ---- trained from as if the teacher were there


def metric_rows(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train"] for line in lines]


def latest_weights(out):
    return (latest_checkpoint(out) / "model.safetensors").read_bytes()


def stores_with(config, *paths):
    """Open stores as teachers of a configuration."""
    stored = with_targets(config, *paths)
    return open_stores(stored.teacher, stored.loss)
