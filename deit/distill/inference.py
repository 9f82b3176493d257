"""A model's answers on a whole split, in its order, whatever the number of processes."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor, nn

from deit.config.schema import Config
from deit.core.console import progress
from deit.core.errors import DataError
from deit.core.fault_injection import fault_point
from deit.core.sharding import gathered_parameters
from deit.core.signals import GracefulStop
from deit.core.types import StudentOutput
from deit.datasets.decode_workers import Reader, worker_count
from deit.datasets.decoders import CenterSquare, ReadRequest
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.views import evaluation_views


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
        views = interruption.iterate(views)
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

    chunks: int64, the places of images in their split. size: as in `predict_split`.
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


@torch.no_grad()
def predict(
    accelerator: Accelerator, model: nn.Module, batches: Iterator[Tensor], number: int
) -> StudentOutput:
    """The model's answers for a whole split, in its order, on the CPU of every process.

    batches: this process's images, in [0, 1]: samples process, process + processes, ... of the
    split, so that each is answered exactly once. number: samples in the split. A model that returns
    logits instead of StudentOutput gives StudentOutput with class_logits alone."""
    # Unwrapped: DDP exchanges buffers at every forward, and processes may differ in their number.
    model = accelerator.unwrap_model(model).eval()
    parts: list[StudentOutput] = []
    with gathered_parameters(model):
        for images in batches:
            if model._compiled_call_impl is not None:
                torch.compiler.cudagraph_mark_step_begin()
            with accelerator.autocast():
                answer = model(images)
            heads = answer if isinstance(answer, StudentOutput) else StudentOutput(answer)
            # Copies: a CUDA graph's answers lie where the next ones will.
            parts.append(StudentOutput(*(None if head is None else head.clone() for head in heads)))
    if any(part.distillation_logits is not None for part in parts):
        return StudentOutput(
            *(_gathered(accelerator, list(heads), number) for heads in zip(*parts))
        )
    return StudentOutput(_gathered(accelerator, [part.class_logits for part in parts], number))


def _gathered(accelerator: Accelerator, parts: list[Tensor], number: int) -> Tensor:
    """Rows of all processes in the order of the split, float32 [number, ..., classes]."""
    rows = torch.cat(parts).float()
    processes = accelerator.num_processes
    longest = -(-number // processes)
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    everyone = accelerator.gather(padded)
    # Row r of process p is sample r * processes + p; the padding ends up behind the last sample.
    ordered = rearrange(everyone, "(process row) ... -> (row process) ...", process=processes)
    return ordered[:number].cpu()
