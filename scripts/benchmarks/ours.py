"""The training steps and batches that benchmarks measure, and timm's loader."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from deit.config.schema import Config
from deit.config.sections.views import ViewsConfig
from deit.core.types import Batch
from deit.training.build import build_run
from deit.training.epochs import step_context
from deit.training.loop import MetricAccumulator, train_epoch
from deit.training.state import TrainingRun


def our_steps(config: Config, *, fixed_batch: bool = False) -> Iterator[int]:
    """Yield the number of images of each training step, made as a run makes it.

    fixed_batch: use the same batch in all steps.
    """
    run = build_run(config)
    batches = _endless(run)
    if fixed_batch:
        batch = next(batches)
        batches = (batch for _ in range(10**9))
    metrics = MetricAccumulator(run.accelerator, {})
    for _ in train_epoch(step_context(run), batches, metrics, step=0, steps=10**6):
        yield config.optim.batch_size


def our_batches(config: Config) -> Iterator[int]:
    """Yield the number of images of each batch of our loader, without training."""
    for batch in _endless(build_run(config)):
        yield len(batch.images)


def _endless(run: TrainingRun) -> Iterator[Batch]:
    for epoch in range(10**9):
        yield from run.loader.epoch(epoch % run.config.optim.epochs)


class _PillowImages(torch.utils.data.Dataset):
    """The dataset of timm's loader: Pillow images from memory or from files."""

    def __init__(self, source: np.ndarray | list[Path]) -> None:
        self.source = source
        self.transform: Callable | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        entry = self.source[index]
        image = Image.open(entry).convert("RGB") if isinstance(entry, Path) else None
        image = image or Image.fromarray(entry)
        return self.transform(image), index % 10


def timm_loader(
    source: np.ndarray | list[Path], views: ViewsConfig, side: int, *, workers: int, **options: Any
) -> Any:
    """Return timm's create_loader with the augmentation of `views`. options: passed on."""
    from timm.data import auto_augment, create_loader

    # Pillow 13 refuses to keep 0 bits, which timm requests at magnitude 10. Keep 1 bit, as we do.
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = lambda image, bits, **settings: (
        auto_augment.posterize(image, max(bits, 1), **settings)
    )
    return create_loader(
        _PillowImages(source),
        input_size=(3, side, side),
        is_training=True,
        use_prefetcher=True,
        re_prob=views.erasing_prob,
        re_mode="pixel",
        scale=views.crop_scale,
        ratio=views.crop_ratio,
        hflip=views.flip,
        color_jitter=None,
        auto_augment="rand-m9-mstd0.5-inc1" if views.auto_augment == "randaugment" else None,
        interpolation=views.interpolation,
        num_workers=workers,
        persistent_workers=workers > 0,
        **options,
    )
