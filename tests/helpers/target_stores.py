"""Stores of targets, and runs that are trained with them."""

import shutil
from pathlib import Path

import pytest

from deit.config.presets import LOSS_PRESETS
from deit.config.recipes.handwriting import digits, digits_teacher
from deit.datasets.splits import load_splits
from deit.distill import target_store
from deit.distill.build import build_accelerator
from deit.distill.run_teachers import RunTeachers
from deit.distill.write_targets import write_targets
from tests.helpers.process_setup import LEAST_ROWS
from tests.helpers.trained import trained

EPOCHS, PLACES = 7, 324  # with small units: three of them
SMALL_UNITS = {"FORKS_FIRST": "tests.helpers.process_setup:make_small_units"}
"""The environment in which a process makes them."""


@pytest.fixture(autouse=True, scope="module")
def small_units():
    """Units of a quarter of the rows, for a quarter of the images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target_store, "_LEAST_ROWS", LEAST_ROWS)
        yield


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two teachers of digits, of two seeds."""
    place = tmp_path_factory.mktemp("teachers")
    for seed in (0, 1):
        config = digits_teacher().replace(optim={"epochs": 3}, run={"seed": seed})
        trained(config, place / str(seed))
    return [str(place / str(seed)) for seed in (0, 1)]


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


@pytest.fixture(scope="module")
def store(teachers, tmp_path_factory):
    """A hard store of seven epochs, written by one process."""
    out = tmp_path_factory.mktemp("stores") / "hard"
    write_targets(configuration(teachers[0]), out)
    return out


def content(store):
    """Every file of a store and its bytes."""
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*.*")}


def copied(store, tmp_path):
    return Path(shutil.copytree(store, tmp_path / "store"))


def with_targets(config, *stores):
    return config.replace(teacher={"target_stores": tuple(map(str, stores))})


def check(config):
    """Everything a run does before its first step."""
    faculty = RunTeachers(config)
    accelerator = build_accelerator(config.run)
    splits = load_splits(config.data)
    loader, panel = faculty.load(splits, accelerator)
    faculty.check(splits, accelerator, loader)
    return loader, panel, faculty


def flipped(path, place):
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 4
    path.write_bytes(damaged)


def quick(config, **sections):
    return config.replace(optim={"epochs": 2}, **sections)
