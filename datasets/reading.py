"""Encoded images read, decoded and cropped by worker processes, each view by its own key."""

import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as transforms

from deit.config import DataConfig, ViewsConfig
from deit.datasets.decoding import decode_square, open_image
from deit.datasets.images import Encoded
from deit.datasets.views import sample_resized_crop
from deit.keys import Keys


def worker_count(config: DataConfig) -> int:
    """Worker processes of one training process: as configured, else its share of the cores, 8 at
    most."""
    if config.workers is not None:
        return config.workers
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, (os.cpu_count() or 1) // processes))


class Wanted(NamedTuple):
    """The images of one batch: int64 [batch] each, and the epoch."""

    epoch: int
    samples: Tensor
    repeats: Tensor


class Read(NamedTuple):
    """What a worker sends back.

    pixels: uint8 [batch, 3, size, size]. seconds: how long one worker took for them.
    """

    pixels: Tensor
    seconds: float


class Squares(Dataset):
    """Whole images: shorter side to `size`, the centre cut square."""

    def __init__(self, images: Encoded, size: int) -> None:
        self.images = images
        self.size = size

    def __getitem__(self, wanted: Wanted) -> Read:
        started = time.perf_counter()
        squares = [
            decode_square(self.images.read(index), self.images.name(index), self.size)
            for index in wanted.samples.tolist()
        ]
        return Read(torch.stack(squares), time.perf_counter() - started)


class Crops(Dataset):
    """The random resized crop of each view, cut from the image as it is on disk."""

    def __init__(self, images: Encoded, *, views: ViewsConfig, size: int, seed: int) -> None:
        self.images = images
        self.views = views
        self.size = size
        self.seed = seed

    def __getitem__(self, wanted: Wanted) -> Read:
        started = time.perf_counter()
        whole = [
            open_image(self.images.read(index), self.images.name(index))
            for index in wanted.samples.tolist()
        ]
        width, height = torch.tensor([image.size for image in whole], dtype=torch.float64).T
        boxes = sample_resized_crop(
            Keys(self.seed, wanted.epoch, wanted.samples, wanted.repeats),
            height,
            width,
            scale=self.views.crop_scale,
            ratio=self.views.crop_ratio,
        )
        how = transforms.InterpolationMode(self.views.interpolation)
        crops = [
            transforms.pil_to_tensor(
                transforms.resized_crop(image, *box, [self.size, self.size], how)
            )
            for image, box in zip(whole, boxes.tolist())
        ]
        return Read(torch.stack(crops), time.perf_counter() - started)


class _Schedule:
    """The batches of the coming epoch; a sampler for DataLoader, whose workers outlive an epoch."""

    def __init__(self) -> None:
        self.batches: list[Wanted] = []

    def __iter__(self) -> Iterator[Wanted]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Reader:
    """Reads batches ahead, in order, with a number of worker processes (0: in this one)."""

    def __init__(self, dataset: Dataset, *, workers: int, pin: bool) -> None:
        self._schedule = _Schedule()
        settings: dict[str, Any] = {}
        if workers > 0:
            settings = {"persistent_workers": True, "prefetch_factor": 2}
        self._loader = DataLoader(
            dataset,
            batch_size=None,  # a sample of this dataset is a whole batch
            sampler=self._schedule,
            num_workers=workers,
            pin_memory=pin,
            # DataLoader draws a seed for its workers: from here, not from torch's global state.
            generator=torch.Generator(),
            **settings,
        )

    def read(self, batches: list[Wanted]) -> Iterator[Read]:
        """The batches, in their order."""
        self._schedule.batches = batches
        return iter(self._loader)
