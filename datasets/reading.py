"""Encoded images read, decoded and cropped by worker processes, each view by its own key."""

import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as transforms

from deit.config import DataConfig, Interpolation, ViewsConfig
from deit.datasets.decoding import open_image, square_of
from deit.datasets.images import Encoded
from deit.datasets.views import sample_boxes
from deit.errors import DataError, EnvironmentFault
from deit.keys import Keys
from deit.launcher import sharing


def worker_count(config: DataConfig) -> int:
    """Worker processes of one training process: as configured, else its share of the cores, 8 at
    most."""
    if config.workers is not None:
        return config.workers
    return max(1, min(8, _cores() // sharing()))


def _cores() -> int:
    """Cores this process may run on: in a container or a job often a few of many."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Wanted(NamedTuple):
    """The images of one batch: int64 [batch] each, and the epoch."""

    epoch: int
    samples: Tensor
    repeats: Tensor


class Read(NamedTuple):
    """What a worker sends back.

    pixels: uint8 [batch, 3, size, size], one for each cutter. seconds: how long one worker took.
    """

    pixels: tuple[Tensor, ...]
    seconds: float


class Squares(NamedTuple):
    """Cuts whole images: shorter side to `size`, the centre cut square."""

    size: int

    def cut(self, pictures: list[Image.Image], wanted: Wanted) -> Tensor:
        """uint8 [batch, 3, size, size]."""
        return torch.stack([square_of(picture, self.size) for picture in pictures])


class Wholes(NamedTuple):
    """Cuts nothing: all of the image, squeezed into a square."""

    size: int
    interpolation: Interpolation

    def cut(self, pictures: list[Image.Image], wanted: Wanted) -> Tensor:
        """uint8 [batch, 3, size, size]."""
        boxes = [(0, 0, picture.height, picture.width) for picture in pictures]
        return _resized(pictures, boxes, self.size, self.interpolation)


class Crops(NamedTuple):
    """Cuts the random crop of each view from the image as it is on disk."""

    views: ViewsConfig
    size: int
    seed: int

    def cut(self, pictures: list[Image.Image], wanted: Wanted) -> Tensor:
        """uint8 [batch, 3, size, size]."""
        width, height = torch.tensor([image.size for image in pictures], dtype=torch.float64).T
        keys = Keys(self.seed, wanted.epoch, wanted.samples, wanted.repeats)
        boxes = sample_boxes(keys, self.views, height=height, width=width)
        return _resized(pictures, boxes.tolist(), self.size, self.views.interpolation)


def _resized(
    pictures: list[Image.Image], boxes: list[Any], size: int, interpolation: Interpolation
) -> Tensor:
    how = transforms.InterpolationMode(interpolation)
    return torch.stack(
        [
            transforms.pil_to_tensor(transforms.resized_crop(picture, *box, [size, size], how))
            for picture, box in zip(pictures, boxes)
        ]
    )


Cutter = Squares | Wholes | Crops


class _Work(Dataset):
    """What a worker does. An unreadable image is its answer and not raised there: DataLoader would
    put a traceback of the worker before the message."""

    def __init__(self, images: Encoded, cutters: tuple[Cutter, ...]) -> None:
        self.images = images
        self.cutters = cutters

    def __getitem__(self, wanted: tuple[int, np.ndarray, np.ndarray]) -> Read | DataError:
        epoch, samples, repeats = wanted
        started = time.perf_counter()
        try:
            pictures = [
                open_image(self.images.read(index), self.images.name(index))
                for index in samples.tolist()
            ]
        except DataError as error:
            return error
        views = Wanted(epoch, torch.from_numpy(samples), torch.from_numpy(repeats))
        pixels = tuple(cutter.cut(pictures, views) for cutter in self.cutters)
        return Read(pixels, time.perf_counter() - started)


class _Schedule:
    """The batches of the coming epoch; a sampler for DataLoader, whose workers outlive an epoch.

    As arrays: a tensor would travel as shared memory, whose file stays open while it lives.
    """

    def __init__(self) -> None:
        self.batches: list[Wanted] = []

    def __iter__(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for epoch, samples, repeats in self.batches:
            yield epoch, samples.numpy(), repeats.numpy()

    def __len__(self) -> int:
        return len(self.batches)


@contextmanager
def _without_advice() -> Iterator[None]:
    """DataLoader warns of more workers than cores; the number was asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*worker processes in total")
        yield


def _leave_signals(worker: int) -> None:
    """Signals to a whole group of processes are for the training process, which ends its workers
    when it is done with them."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class Reader:
    """Reads batches ahead, in order, with a number of worker processes (0: in this one)."""

    def __init__(
        self, images: Encoded, cutters: tuple[Cutter, ...], *, workers: int, pin: bool
    ) -> None:
        self._schedule = _Schedule()
        settings: dict[str, Any] = {}
        if workers > 0:
            settings = {
                "persistent_workers": True,
                "prefetch_factor": 2,
                "worker_init_fn": _leave_signals,
            }
        with _without_advice():
            self._loader = DataLoader(
                _Work(images, cutters),
                batch_size=None,  # a sample of this dataset is a whole batch
                sampler=self._schedule,
                num_workers=workers,
                pin_memory=pin,
                # DataLoader draws a seed for its workers: from here, not torch's global state.
                generator=torch.Generator(),
                **settings,
            )

    def read(self, batches: list[Wanted]) -> Iterator[Read]:
        """The batches, in their order. Raises DataError at an unreadable image, EnvironmentFault
        where a worker was killed."""
        self._schedule.batches = batches
        with _without_advice():
            answers = iter(self._loader)
        for answer in _of_living(answers):
            if isinstance(answer, DataError):
                # Not the answer itself: its traceback would hold this frame, which holds the
                # answer, and workers that the collector of cycles ends take seconds to leave.
                raise DataError(str(answer))
            yield answer


LOST_WORKER = (
    "data.workers: the system ended a worker process; usually /dev/shm is too small (in a "
    "container: --shm-size 2g) or the memory is used up: fewer data.workers, a smaller "
    "optim.batch_size, or data.workers 0"
)


def lost_worker(error: Exception) -> bool:
    """Whether a worker process ended; torch says so wherever the main process happens to be."""
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def _of_living(answers: Iterator[Any]) -> Iterator[Any]:
    """The workers' answers; a worker that the system ended is named with the usual reasons."""
    while True:
        try:
            yield next(answers)
        except StopIteration:
            return
        except RuntimeError as error:
            if not lost_worker(error):
                raise
            raise EnvironmentFault(LOST_WORKER) from None
