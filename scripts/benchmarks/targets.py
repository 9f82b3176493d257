"""Measure the cost of stored targets and of writing them: the rows of `benchmark.py targets`."""

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
from deit.config.sections.student import StudentConfig
from deit.datasets.splits import load_splits
from deit.distill.build import (
    build_accelerator,
    build_online_ensemble,
    build_teachers,
    build_train_loader,
)
from deit.distill.target_format import RecordFormat
from deit.distill.target_writer import encode_batch
from deit.distill.teacher_ensemble import teacher_query
from deit.distill.write_targets import write_targets
from deit.models.registry import create_network
from scripts.benchmarks.interleaved import Case, photographs, run_cases
from scripts.benchmarks.ours import our_steps

_NUM_IMAGES = 2048  # images


def target_config(folder: Path, student: str) -> Config:
    """Return CIFAR-10's recipe on crops of scikit-learn's photographs, in class folders."""
    root = folder / "pictures"
    if not root.exists():
        for index, array in enumerate(photographs(_NUM_IMAGES, 32)):
            class_folder = root / f"class {index % 10}"
            class_folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(class_folder / f"{index:05d}.png")
    return cifar10_micro().replace(
        data={"source": "folder", "root": str(root), "test_fraction": 0.05},
        student={"name": student},
        teacher={"source": (f"{Path(__file__)}:regnet",), "allow_near_chance": True},
        optim={"epochs": 4},
        run={"device": "cpu"},
    )


def regnet() -> torch.nn.Module:
    """Return a teacher for CIFAR images with random weights, which do not affect the speed."""
    torch.manual_seed(0)
    return create_network(StudentConfig(name="regnety_002_small_stem", image_size=32), 10)


def stored_case(name: str, student: str, folder: Path) -> Case:
    """Compare training with stored hard targets with training without a teacher."""
    config = target_config(folder, student)
    store = folder / f"store-{student}"
    write_targets(config, store)
    with_store = config.replace(teacher={"source": (), "target_stores": (str(store),)})
    labels_only = dataclasses.replace(config, loss=LOSS_PRESETS["none"])
    return Case(
        name, lambda: our_steps(with_store), lambda: our_steps(labels_only), "no teacher at all"
    )


def writing_case(name: str, folder: Path) -> Case:
    """Compare writing targets with the teacher's forward pass on a fixed batch."""
    config = target_config(folder, "deit_micro")
    splits = load_splits(config.data)
    accelerator = build_accelerator(config.run)
    (teacher,) = build_teachers(
        config.teacher, splits.class_names, config.student.image_size, accelerator
    )
    loader = build_train_loader(config, splits, accelerator, teacher_size=None, all_processes=True)

    def writing() -> Iterator[int]:
        ensemble = build_online_ensemble([teacher], config.teacher, splits, accelerator)
        query = teacher_query(loader, ensemble)
        record_format = RecordFormat("hard", 10, config.optim.epochs, loader.rows_per_epoch, False)
        for shard in range(10**9):
            for epoch, first, last in record_format.epoch_ranges(shard % record_format.num_shards):
                rows = torch.arange(first, last)
                for inputs in loader.teacher_inputs(
                    epoch, rows, batch_size=config.run.eval_batch_size
                ):
                    encode_batch(record_format, inputs, query(inputs))
                    yield len(inputs.images)

    def forward_only() -> Iterator[int]:
        batch_size = config.run.eval_batch_size
        inputs = next(loader.teacher_inputs(0, torch.arange(batch_size), batch_size=batch_size))
        while True:
            teacher(inputs.images)
            yield batch_size

    return Case(name, writing, forward_only, "the teacher's forward pass")


def targets(rounds: int, seconds: float, name_part: str = "") -> list[dict[str, Any]]:
    """Measure the rows of `benchmark.py targets` whose names contain `name_part`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        cases: dict[str, Callable[[str], Case]] = {
            "training deit_micro with stored hard targets": lambda name: stored_case(
                name, "deit_micro", path
            ),
            "training deit_tiny with stored hard targets": lambda name: stored_case(
                name, "deit_tiny", path
            ),
            "writing targets of RegNetY-200MF": lambda name: writing_case(name, path),
        }
        return run_cases(cases, rounds, seconds, name_part)
