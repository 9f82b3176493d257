"""Our loader beside timm's: the rows of `benchmark.py data`."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deit.config.data_section import ViewsConfig
from deit.config.schema import OptimConfig
from deit.config.student_section import StudentConfig
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.loader import Sizes, TrainLoader
from deit.datasets.stores import FolderStore
from deit.datasets.views import ChannelStats
from deit.models.saved import ModelInfo, build_student
from scripts.benchmarks.interleaved import Case, photographs, run_cases
from scripts.benchmarks.ours import timm_loader

BATCH = 128
COLOURS = ChannelStats((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CROP_AND_FLIP = ViewsConfig(crop="random_resized", flip=0.5)
RANDAUGMENT = ViewsConfig(crop="random_resized", flip=0.5, auto_augment="randaugment")
DEIT = ViewsConfig(crop="random_resized", flip=0.5, auto_augment="randaugment", erasing_prob=0.25)
_FILES_BATCH = 32
_PREFETCH = 2  # batches a worker is ahead, on both sides
_NUMBER = 2048  # images in memory


def our_loader(
    images: InMemoryImages | EncodedImages, views: ViewsConfig, side: int, workers: int
) -> Any:
    """Our loader as a run would build it."""
    return TrainLoader(
        images,
        10,
        views=views,
        optim=OptimConfig(batch_size=_FILES_BATCH if workers else BATCH),
        sizes=Sizes(side, side, side),
        channel_stats=COLOURS,
        seed=0,
        workers=workers,
    )


def ours(
    images: InMemoryImages | EncodedImages, views: ViewsConfig, side: int, workers: int = 0
) -> Iterator[int]:
    """Our loader and the normalisation a network of ours does, batch after batch."""
    loader = our_loader(images, views, side, workers)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in COLOURS)
    for epoch in range(10**9):
        for batch in loader.epoch(epoch):
            yield len((batch.images - mean) / std)


def timms(
    source: np.ndarray | list[Path], views: ViewsConfig, side: int, workers: int = 0
) -> Iterator[int]:
    """timm's create_loader with the same augmentation and its fast collation, batch after batch."""
    loader = timm_loader(
        source,
        views,
        side,
        workers=workers,
        batch_size=_FILES_BATCH if workers else BATCH,
        mean=COLOURS.mean,
        std=COLOURS.std,
        pin_memory=False,
        device=torch.device("cpu"),
    )
    while True:
        for images, _ in loader:
            yield len(images)


def memory_case(name: str, views: ViewsConfig, side: int, source: int) -> Case:
    """Images in memory, one thread each."""
    arrays = photographs(_NUMBER, source)
    labels = torch.arange(_NUMBER) % 10
    images = InMemoryImages(torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous(), labels)
    return Case(
        name,
        lambda: ours(images, views, side),
        lambda: timms(arrays, views, side),
        "timm create_loader",
    )


def file_case(name: str, views: ViewsConfig, side: int, folder: Path) -> Case:
    """JPEG files of 400 px, one worker process each."""
    paths = []
    for index, array in enumerate(photographs(3 * BATCH, 400)):
        paths.append(folder / f"{index}.jpg")
        Image.fromarray(array).save(paths[-1], quality=90)
    store = FolderStore(folder, tuple(path.name for path in paths))
    images = EncodedImages(torch.arange(len(paths)) % 10, store, torch.arange(len(paths)))
    return Case(
        name,
        lambda: ours(images, views, side, workers=1),
        lambda: timms(paths, views, side, workers=1),
        "timm create_loader",
        ahead=_PREFETCH + 1,
    )


def step_case(name: str, network: str, patch: int, side: int) -> Case:
    """A training step fed by our loader, beside the same step on a batch that is there already."""
    array = photographs(_NUMBER, side)
    images = InMemoryImages(
        torch.from_numpy(array).permute(0, 3, 1, 2).contiguous(), torch.arange(_NUMBER) % 10
    )
    classes = tuple(str(label) for label in range(10))
    config = StudentConfig(name=network, image_size=side, patch_size=patch)
    student = build_student(ModelInfo(config, classes, *COLOURS, 1.0))
    optimizer = torch.optim.AdamW(student.parameters())

    def step(pictures: Tensor, targets: Tensor) -> int:
        outputs = student(pictures)
        loss = torch.nn.functional.cross_entropy(outputs.class_logits, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return len(pictures)

    def fed() -> Iterator[int]:
        loader = our_loader(images, DEIT, side, 0)
        for epoch in range(10**9):
            for batch in loader.epoch(epoch):
                yield step(batch.images, batch.targets)

    def ready() -> Iterator[int]:
        batch = next(our_loader(images, DEIT, side, 0).epoch(0))
        while True:
            yield step(batch.images, batch.targets)

    return Case(name, fed, ready, "no loader at all")


def data(rounds: int, seconds: float, wanted: str = "") -> list[dict[str, Any]]:
    """The rows of `benchmark.py data` whose name holds the wanted text."""
    with tempfile.TemporaryDirectory() as folder:
        full, micro, tiny = "crop, flip, RandAugment, erasing", "deit_micro", "deit_tiny"
        jpeg = "224 px from JPEG files of 400 px, 1 worker"
        step = "32 px: training step of"
        cases: dict[str, Callable[[str], Case]] = {
            "32 px in memory: crop, flip": lambda name: memory_case(name, CROP_AND_FLIP, 32, 32),
            "32 px in memory: crop, flip, RandAugment": lambda name: memory_case(
                name, RANDAUGMENT, 32, 32
            ),
            f"32 px in memory: {full}": lambda name: memory_case(name, DEIT, 32, 32),
            f"64 px in memory: {full}": lambda name: memory_case(name, DEIT, 64, 64),
            f"{jpeg}: {full}": lambda name: file_case(name, DEIT, 224, Path(folder)),
            f"{step} {micro}, full views": lambda name: step_case(name, micro, 4, 32),
            f"{step} {tiny}, full views": lambda name: step_case(name, tiny, 4, 32),
        }
        return run_cases(cases, rounds, seconds, wanted)
