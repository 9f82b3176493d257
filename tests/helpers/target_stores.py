"""Target stores, runs that are trained with them, and damaged copies of them."""

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
from deit.distill.target_content import open_stores
from deit.distill.target_store import CHECKS, TARGETS, open_store
from deit.training.resolve import resolve
from tests.helpers.process_setup import LEAST_ROWS

EPOCHS, ROWS_PER_EPOCH = 7, 324  # three small shards
SMALL_SHARDS = {"SETUP_FUNCTION": "tests.helpers.process_setup:make_small_shards"}
"""The environment of a process that uses small shards."""


def configuration(teacher, **sections):
    """Return the configuration of a small distilled run."""
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
    """Return the bytes of every file of a store, by relative path."""
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*.*")}


def copied(store, tmp_path):
    """Copy a store, and return the copy."""
    return Path(shutil.copytree(store, tmp_path / "store"))


def with_targets(config, *stores):
    """Return the configuration with stored targets."""
    return config.replace(teacher={"target_stores": tuple(map(str, stores))})


def check(config):
    """Do all checks before the first step; return loader, teacher ensemble and teachers."""
    resolved = resolve(config)
    accelerator, teachers = resolved.accelerator, resolved.teachers
    splits = load_splits(config.data)
    teachers.load(splits.class_names, config.student.image_size, accelerator)
    loader = build_train_loader(
        config,
        splits,
        accelerator,
        teacher_size=teachers.input_size,
        with_teacher_images=None in teachers.stores,
    )
    ensemble = teachers.ensemble(splits, accelerator)
    teachers.check(splits, accelerator, loader, config.evaluation)
    return loader, ensemble, teachers


def flip_bit(path, offset):
    """Flip one bit of a file."""
    damaged = bytearray(path.read_bytes())
    damaged[offset] ^= 4
    path.write_bytes(damaged)


def quick(config, **sections):
    """Return the configuration with two epochs."""
    return config.replace(optim={"epochs": 2}, **sections)


VIEW_LIBRARIES = ("pillow", "torchvision")  # named in errors about views that differ


def numbers_in(text, path=""):
    """Return the numbers of a text in order, without those of `path`."""
    return re.findall(r"\b\d+(?:\.\d+)?\b", text.replace(str(path), ""))


def assert_differs(refused, field, stored, current):
    """Assert that a line of an error names a field, its stored value and then its current one."""
    values = ".*".join(rf"(?<!\w){re.escape(value)}(?!\w)" for value in (stored, current))
    assert re.search(rf"(?m)^\W*{re.escape(field)}\b.*{values}", str(refused.value)), refused.value


def assert_names_shard(refused, shard, store):
    """Assert that an error names a shard, and the epoch and row at which it starts."""
    start = divmod(shard * LEAST_ROWS, ROWS_PER_EPOCH)
    assert sorted(numbers_in(str(refused.value), store)) == sorted(map(str, (shard, *start)))


def line_about(output, path):
    """Return the one line of an output that names a path."""
    (line,) = [line for line in output.splitlines() if str(path) in line]
    return line


def write_arguments(teacher, out, *more):
    """Return the command line that writes a small store."""
    recipe = (
        *("digits", "--loss", "deit-hard", "--teacher.source", teacher, "--out", str(out)),
        *("--student.depth", "1", "--student.embed_dim", "16", "--student.num_heads", "2"),
        *("--optim.epochs", str(EPOCHS), "--optim.warmup_epochs", "1"),
        *("--run.eval_every_epochs", str(EPOCHS), "--teacher.memory_format", "contiguous"),
        *("--data.train_fraction", "0.25"),
    )
    return [*recipe, *more]


def forge(store, change):
    """Change the records of a store and make its checksums fit: only views can reveal it."""
    opened = open_store(store)
    layout = opened.record_format
    records = np.fromfile(store / TARGETS, layout.dtype)
    records, views = change(records.reshape(layout.epochs, -1), opened.checks.views.copy())
    records.tofile(store / TARGETS)
    size = layout.rows_per_shard * layout.dtype.itemsize
    content = records.tobytes()
    shards = [
        zlib.crc32(content[shard * size : (shard + 1) * size]) for shard in range(layout.num_shards)
    ]
    checks = opened.checks._replace(shards=np.array(shards, "<u4"), views=views)
    (store / CHECKS).write_bytes(checks.to_bytes())


def metric_rows(out):
    """Return the training metrics of each epoch."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train"] for line in lines]


def latest_weights(out):
    """Return the weights of the latest checkpoint as bytes."""
    return (latest_checkpoint(out) / "model.safetensors").read_bytes()


def stores_with(config, *paths):
    """Open stores as the teachers of a configuration."""
    stored = with_targets(config, *paths)
    return open_stores(stored.teacher, stored.loss)
