"""A model's answers on a whole split, in its order, whatever the number of processes."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from deit.config import Config
from deit.console import progress
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.reading import CenterSquare, Reader, ReadRequest, worker_count
from deit.datasets.views import evaluation_views
from deit.engine import predict
from deit.errors import DataError
from deit.faults import fault_point
from deit.interruption import GracefulStop
from deit.records import StudentOutput


def predict_split(
    accelerator: Accelerator,
    model: nn.Module,
    images: InMemoryImages | EncodedImages,
    config: Config,
    title: str,
    *,
    size: int | None = None,
    interruption: GracefulStop | None = None,
) -> StudentOutput:
    """A model's answers on the evaluation views of a split, on the CPU, float32.

    Raises DataError with fewer images than processes.
    title: what the progress bar says. size: side [px] of what it is shown; None: the student's.
    interruption: asked before each batch that all processes have, equally often in all of them.
    """
    number = len(images.labels)
    if number < accelerator.num_processes:
        raise DataError(f"{title}: {number} images are fewer than the processes")
    mine = torch.arange(accelerator.process_index, number, accelerator.num_processes)
    chunks = mine.split(config.run.eval_batch_size)
    views = evaluation_batches(images, chunks, config, device=accelerator.device, size=size)
    if interruption is not None:
        views = interruption.over(views)
    common = number // accelerator.num_processes // config.run.eval_batch_size

    def watched() -> Iterator[Tensor]:
        for index, part in enumerate(progress(views, total=len(chunks), title=title)):
            fault_point("evaluation")
            if interruption is not None and index < common:
                interruption.raise_if_stopped()
            yield part

    return predict(accelerator, model, watched(), number)


def evaluation_batches(
    images: InMemoryImages | EncodedImages,
    chunks: tuple[Tensor, ...],
    config: Config,
    *,
    device: torch.device,
    size: int | None = None,
) -> Iterator[Tensor]:
    """The evaluation views of the images of each chunk, float32 [images, 3, size, size] in [0, 1].

    chunks: int64, the places of images in their split. size: as in `answers_of`.
    """
    size = size or config.student.image_size
    crop = config.views.eval_crop_pct
    for part in _pixels(images, chunks, round(size / crop), device, config):
        yield evaluation_views(part, size=size, crop=crop)


def _pixels(
    images: InMemoryImages | EncodedImages,
    chunks: tuple[Tensor, ...],
    size: int,
    device: torch.device,
    config: Config,
) -> Iterator[Tensor]:
    """The images of each chunk, on the device; encoded ones are read ahead as squares of `size`."""
    if isinstance(images, InMemoryImages):
        yield from (images.pixels[chunk].to(device) for chunk in chunks)
        return
    workers = min(worker_count(config.data), len(chunks))
    wanted = [ReadRequest(0, chunk, torch.zeros_like(chunk)) for chunk in chunks]
    pin = device.type == "cuda"
    with Reader(images, (CenterSquare(size),), workers=workers, pin=pin) as reader:
        yield from (read.pixels[0].to(device, non_blocking=True) for read in reader.read(wanted))
