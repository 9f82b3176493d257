"""What benchmarks measure: a training of ours as a run builds it, and timm's loader."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from deit.config.data_section import ViewsConfig
from deit.config.schema import Config
from deit.core.types import Batch
from deit.training.build import build_run
from deit.training.epochs import step_context
from deit.training.loop import MetricAccumulator, train_epoch
from deit.training.state import TrainingRun


def ours(config: Config, *, resident: bool = False) -> Iterator[int]:
    """Updates of ours, the images of each. resident: always on the same batch."""
    run = build_run(config)
    batches = _endless(run)
    if resident:
        batch = next(batches)
        batches = (batch for _ in range(10**9))
    tally = MetricAccumulator(run.accelerator, {})
    for _ in train_epoch(step_context(run), batches, tally, step=0, steps=10**6):
        yield config.optim.batch_size


def our_batches(config: Config) -> Iterator[int]:
    """Batches of ours, the images of each; nothing is trained."""
    for batch in _endless(build_run(config)):
        yield len(batch.images)


def _endless(run: TrainingRun) -> Iterator[Batch]:
    for epoch in range(10**9):
        yield from run.loader.epoch(epoch % run.config.optim.epochs)


class _Pictures(torch.utils.data.Dataset):
    """What timm's loader reads: Pillow images from memory, or from files."""

    def __init__(self, source: np.ndarray | list[Path]) -> None:
        self.source = source
        self.transform: Callable | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        entry = self.source[index]
        picture = Image.open(entry).convert("RGB") if isinstance(entry, Path) else None
        picture = picture or Image.fromarray(entry)
        return self.transform(picture), index % 10


def timm_loader(
    source: np.ndarray | list[Path], views: ViewsConfig, side: int, *, workers: int, **more: Any
) -> Any:
    """timm's create_loader with the same augmentation. more: as it takes them."""
    from timm.data import auto_augment, create_loader

    # Pillow 13 refuses to keep 0 bits, which timm asks for at magnitude 10: at least 1, as ours.
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = lambda image, bits, **settings: (
        auto_augment.posterize(image, max(bits, 1), **settings)
    )
    return create_loader(
        _Pictures(source),
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
        **more,
    )
