"""What stored targets cost beside no teacher at all: the rows of `benchmark.py targets`."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from deit.config.presets import LOSS_PRESETS
from deit.config.recipes.cifar import cifar10_micro
from deit.config.schema import Config
from deit.config.student_section import StudentConfig
from deit.datasets.splits import load_splits
from deit.distill.build import (
    build_accelerator,
    build_online_ensemble,
    build_teachers,
    build_train_loader,
)
from deit.distill.target_checks import teacher_query
from deit.distill.target_store import RecordFormat
from deit.distill.write_targets import encode_block, write_targets
from deit.models.networks import create_network
from scripts.benchmarks.interleaved import Case, photographs, run_cases
from scripts.benchmarks.ours import ours

_NUMBER = 2048  # images


def target_config(folder: Path, student: str) -> Config:
    """CIFAR-10's shape and recipe on scikit-learn's photographs, in class folders."""
    root = folder / "pictures"
    if not root.exists():
        for index, array in enumerate(photographs(_NUMBER, 32)):
            place = root / f"class {index % 10}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(place / f"{index:05d}.png")
    return cifar10_micro().replace(
        data={"source": "folder", "root": str(root), "test_fraction": 0.05},
        student={"name": student},
        teacher={"source": (f"{Path(__file__)}:regnet",), "allow_near_chance": True},
        optim={"epochs": 4},
        run={"device": "cpu"},
    )


def regnet() -> torch.nn.Module:
    """A teacher of CIFAR's size with random weights: its answers do not matter here."""
    torch.manual_seed(0)
    return create_network(StudentConfig(name="regnety_002_small_stem", image_size=32), 10)


def stored_case(name: str, student: str, folder: Path) -> Case:
    """Training with stored hard targets beside training without any teacher."""
    config = target_config(folder, student)
    store = folder / f"store-{student}"
    write_targets(config, store)
    taught = config.replace(teacher={"source": (), "target_stores": (str(store),)})
    alone = dataclasses.replace(config, loss=LOSS_PRESETS["none"])
    return Case(name, lambda: ours(taught), lambda: ours(alone), "no teacher at all")


def writing_case(name: str, folder: Path) -> Case:
    """Writing targets beside the teacher's bare forward pass on a batch that is there already."""
    config = target_config(folder, "deit_micro")
    splits = load_splits(config.data)
    accelerator = build_accelerator(config.run)
    (teacher,) = build_teachers(
        config.teacher, splits.class_names, config.student.image_size, accelerator
    )
    loader = build_train_loader(config, splits, accelerator, teacher_size=None, all_ranks=True)

    def written() -> Iterator[int]:
        ensemble = build_online_ensemble([teacher], config.teacher, splits, accelerator)
        answer = teacher_query(loader, ensemble)
        layout = RecordFormat("hard", 10, config.optim.epochs, loader.rows_per_epoch, False)
        for unit in range(10**9):
            for epoch, first, last in layout.epoch_ranges(unit % layout.num_shards):
                places = torch.arange(first, last)
                for shown in loader.teacher_inputs(epoch, places, block=config.run.eval_batch_size):
                    encode_block(layout, shown, answer(shown))
                    yield len(shown.target_rows)

    def bare() -> Iterator[int]:
        block = config.run.eval_batch_size
        shown = next(loader.teacher_inputs(0, torch.arange(block), block=block))
        while True:
            teacher(shown.images)
            yield block

    return Case(name, written, bare, "the teacher's forward pass")


def targets(rounds: int, seconds: float, wanted: str = "") -> list[dict[str, Any]]:
    """The rows of `benchmark.py targets` whose name holds the wanted text."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        cases: dict[str, Callable[[str], Case]] = {
            "training deit_micro with stored hard targets": lambda name: stored_case(
                name, "deit_micro", place
            ),
            "training deit_tiny with stored hard targets": lambda name: stored_case(
                name, "deit_tiny", place
            ),
            "writing targets of RegNetY-200MF": lambda name: writing_case(name, place),
        }
        return run_cases(cases, rounds, seconds, wanted)
