"""Compare our loader with timm's: the rows of `benchmark.py data`."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deit.config.sections.optim import OptimConfig
from deit.config.sections.student import StudentConfig
from deit.config.sections.views import ViewsConfig
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.loader import TrainLoader
from deit.datasets.sources.image_stores import FolderStore
from deit.datasets.views import ChannelStats
from deit.models.saved_student import ModelInfo, student_from_info
from scripts.benchmarks.interleaved import Case, photographs, run_cases
from scripts.benchmarks.ours import timm_loader

BATCH = 128
CHANNEL_STATS = ChannelStats((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CROP_AND_FLIP = ViewsConfig(crop="random_resized", flip=0.5)
RANDAUGMENT = ViewsConfig(crop="random_resized", flip=0.5, auto_augment="randaugment")
DEIT = ViewsConfig(crop="random_resized", flip=0.5, auto_augment="randaugment", erasing_prob=0.25)
_FILES_BATCH = 32
_PREFETCH = 2  # batches that a worker prepares ahead, on both sides
_NUM_IMAGES = 2048  # images in memory


def our_loader(
    images: InMemoryImages | EncodedImages, views: ViewsConfig, side: int, workers: int
) -> Any:
    """Return our loader as a run builds it."""
    return TrainLoader(
        images,
        10,
        views=views,
        optim=OptimConfig(batch_size=_FILES_BATCH if workers else BATCH),
        student_size=side,
        channel_stats=CHANNEL_STATS,
        seed=0,
        num_workers=workers,
    )


def our_batches(
    images: InMemoryImages | EncodedImages, views: ViewsConfig, side: int, workers: int = 0
) -> Iterator[int]:
    """Yield the sizes of batches of our loader, normalized as our networks do it."""
    loader = our_loader(images, views, side, workers)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in CHANNEL_STATS)
    for epoch in range(10**9):
        for batch in loader.epoch(epoch):
            yield len((batch.images - mean) / std)


def timm_batches(
    source: np.ndarray | list[Path], views: ViewsConfig, side: int, workers: int = 0
) -> Iterator[int]:
    """Yield the sizes of batches of timm's create_loader with the same augmentation."""
    loader = timm_loader(
        source,
        views,
        side,
        workers=workers,
        batch_size=_FILES_BATCH if workers else BATCH,
        mean=CHANNEL_STATS.mean,
        std=CHANNEL_STATS.std,
        pin_memory=False,
        device=torch.device("cpu"),
    )
    while True:
        for images, _ in loader:
            yield len(images)


def memory_case(name: str, views: ViewsConfig, side: int, source: int) -> Case:
    """Compare loaders of images in memory, with one thread each."""
    arrays = photographs(_NUM_IMAGES, source)
    labels = torch.arange(_NUM_IMAGES) % 10
    images = InMemoryImages(torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous(), labels)
    return Case(
        name,
        lambda: our_batches(images, views, side),
        lambda: timm_batches(arrays, views, side),
        "timm create_loader",
    )


def file_case(name: str, views: ViewsConfig, side: int, folder: Path) -> Case:
    """Compare loaders of JPEG files of 400 px, with one worker process each."""
    paths = []
    for index, array in enumerate(photographs(3 * BATCH, 400)):
        paths.append(folder / f"{index}.jpg")
        Image.fromarray(array).save(paths[-1], quality=90)
    store = FolderStore(folder, tuple(path.name for path in paths))
    images = EncodedImages(torch.arange(len(paths)) % 10, store, torch.arange(len(paths)))
    return Case(
        name,
        lambda: our_batches(images, views, side, workers=1),
        lambda: timm_batches(paths, views, side, workers=1),
        "timm create_loader",
        ahead=_PREFETCH + 1,
    )


def step_case(name: str, network: str, patch: int, side: int) -> Case:
    """Compare training steps on batches of our loader with steps on a fixed batch."""
    array = photographs(_NUM_IMAGES, side)
    images = InMemoryImages(
        torch.from_numpy(array).permute(0, 3, 1, 2).contiguous(), torch.arange(_NUM_IMAGES) % 10
    )
    classes = tuple(str(label) for label in range(10))
    config = StudentConfig(name=network, image_size=side, patch_size=patch)
    student = student_from_info(ModelInfo(config, classes, *CHANNEL_STATS, 1.0))
    optimizer = torch.optim.AdamW(student.parameters())

    def step(inputs: Tensor, targets: Tensor) -> int:
        outputs = student(inputs)
        loss = torch.nn.functional.cross_entropy(outputs.class_logits, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return len(inputs)

    def with_loader() -> Iterator[int]:
        loader = our_loader(images, DEIT, side, 0)
        for epoch in range(10**9):
            for batch in loader.epoch(epoch):
                yield step(batch.images, batch.targets)

    def with_fixed_batch() -> Iterator[int]:
        batch = next(our_loader(images, DEIT, side, 0).epoch(0))
        while True:
            yield step(batch.images, batch.targets)

    return Case(name, with_loader, with_fixed_batch, "no loader at all")


def data(rounds: int, seconds: float, name_part: str = "") -> list[dict[str, Any]]:
    """Measure the rows of `benchmark.py data` whose names contain `name_part`."""
    with tempfile.TemporaryDirectory() as folder:
        all_views, micro, tiny = "crop, flip, RandAugment, erasing", "deit_micro", "deit_tiny"
        jpeg = "224 px from JPEG files of 400 px, 1 worker"
        step = "32 px: training step of"
        cases: dict[str, Callable[[str], Case]] = {
            "32 px in memory: crop, flip": lambda name: memory_case(name, CROP_AND_FLIP, 32, 32),
            "32 px in memory: crop, flip, RandAugment": lambda name: memory_case(
                name, RANDAUGMENT, 32, 32
            ),
            f"32 px in memory: {all_views}": lambda name: memory_case(name, DEIT, 32, 32),
            f"64 px in memory: {all_views}": lambda name: memory_case(name, DEIT, 64, 64),
            f"{jpeg}: {all_views}": lambda name: file_case(name, DEIT, 224, Path(folder)),
            f"{step} {micro}, full views": lambda name: step_case(name, micro, 4, 32),
            f"{step} {tiny}, full views": lambda name: step_case(name, tiny, 4, 32),
        }
        return run_cases(cases, rounds, seconds, name_part)
