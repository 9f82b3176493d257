"""A model's outputs on a whole split, in its order, for any number of processes."""

from collections.abc import Iterator
from contextlib import closing

import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor, nn

from deit.config.schema import EvalSettings
from deit.core.console import progress
from deit.core.errors import DataError
from deit.core.fault_injection import fault_point
from deit.core.sharding import gathered_parameters
from deit.core.signals import GracefulStop
from deit.core.types import StudentOutput
from deit.datasets.crops import CenterSquare, ReadRequest
from deit.datasets.decode_workers import Reader, resolve_num_workers
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.views import evaluation_views


def predict_split(
    accelerator: Accelerator,
    model: nn.Module,
    images: InMemoryImages | EncodedImages,
    settings: EvalSettings,
    title: str,
    *,
    size: int | None = None,
    interruption: GracefulStop | None = None,
) -> StudentOutput:
    """Return a model's logits for the evaluation views of a split, float32 [N, ..., C] on the CPU.

    title: of the progress bar. size: side of the model's images [px]; default: the student's.
    interruption: checked before each batch that all processes have, equally often in each.
    Raises DataError if there are fewer images than processes.

    Example:
        >>> from deit.config.recipes import find_recipe
        >>> from deit.core.console import quiet
        >>> from deit.datasets.splits import load_splits
        >>> from deit.models.saved_student import load_student
        >>> config, (student, _) = find_recipe("digits"), load_student("checkpoints/digits/best")
        >>> test = load_splits(config.data).test
        >>> with quiet():
        ...     output = predict_split(Accelerator(cpu=True), student, test, config.evaluation, "")
        >>> output.class_logits.shape == (len(test.labels), 10)
        True
    """
    num_images = len(images.labels)
    if num_images < accelerator.num_processes:
        raise DataError(f"{title}: {num_images} images are fewer than the processes")
    indices = torch.arange(accelerator.process_index, num_images, accelerator.num_processes)
    chunks = indices.split(settings.batch_size)
    views = views_of_chunks(images, chunks, settings, device=accelerator.device, size=size)
    if interruption is not None:
        views = interruption.iterate(views)
    num_common = num_images // accelerator.num_processes // settings.batch_size

    def with_progress() -> Iterator[Tensor]:
        for index, batch in enumerate(progress(views, total=len(chunks), title=title)):
            fault_point("evaluation")
            if interruption is not None and index < num_common:
                interruption.raise_if_stopped()
            yield batch

    with closing(with_progress()) as batches:  # a traceback would keep its progress bar
        return predict(accelerator, model, batches, num_images)


def views_of_chunks(
    images: InMemoryImages | EncodedImages,
    chunks: tuple[Tensor, ...],
    settings: EvalSettings,
    *,
    device: torch.device,
    size: int | None = None,
) -> Iterator[Tensor]:
    """Yield the evaluation views of each chunk, float32 [B, 3, size, size] in [0, 1].

    chunks: int64 [B], indices of images in their split. size: side of the views [px]; default: the
    student's.
    """
    size = size or settings.image_size
    resized = round(size / settings.crop_pct)
    for pixels in _pixels(images, chunks, resized, device, settings.num_workers):
        yield evaluation_views(pixels, size=size, crop_pct=settings.crop_pct)


def _pixels(
    images: InMemoryImages | EncodedImages,
    chunks: tuple[Tensor, ...],
    size: int,
    device: torch.device,
    num_workers: int | None,
) -> Iterator[Tensor]:
    """Yield the images of each chunk on the device; files are decoded ahead as `size` squares."""
    if isinstance(images, InMemoryImages):
        yield from (images.pixels[chunk].to(device) for chunk in chunks)
        return
    workers = min(resolve_num_workers(num_workers), len(chunks))
    requests = [ReadRequest(0, chunk, torch.zeros_like(chunk)) for chunk in chunks]
    pin = device.type == "cuda"
    with Reader(images, (CenterSquare(size),), num_workers=workers, pin=pin) as reader:
        for result in reader.read(requests):
            yield result.pixels[0].to(device, non_blocking=True)


@torch.no_grad()
def predict(
    accelerator: Accelerator, model: nn.Module, batches: Iterator[Tensor], num_images: int
) -> StudentOutput:
    """Return a model's logits for a whole split, in its order, on the CPU of every process.

    batches: this process's images in [0, 1]: images rank, rank + processes, ... of the split.
    num_images: of the split. A model that returns one tensor gives StudentOutput with class_logits
    only.
    """
    # Unwrapped: DDP exchanges buffers at every forward, and processes may differ in their number.
    model = accelerator.unwrap_model(model).eval()
    parts: list[StudentOutput] = []
    with gathered_parameters(model):
        for images in batches:
            if model._compiled_call_impl is not None:
                torch.compiler.cudagraph_mark_step_begin()
            with accelerator.autocast():
                output = model(images)
            heads = output if isinstance(output, StudentOutput) else StudentOutput(output)
            # Copied, because a CUDA graph writes its next outputs into the same memory.
            parts.append(StudentOutput(*(None if head is None else head.clone() for head in heads)))
    if any(part.distillation_logits is not None for part in parts):
        return StudentOutput(
            *(_gathered(accelerator, list(heads), num_images) for heads in zip(*parts))
        )
    return StudentOutput(_gathered(accelerator, [part.class_logits for part in parts], num_images))


def _gathered(accelerator: Accelerator, parts: list[Tensor], num_images: int) -> Tensor:
    """Return the rows of all processes in the order of the split, float32 [N, ..., C]."""
    rows = torch.cat(parts).float()
    processes = accelerator.num_processes
    longest = -(-num_images // processes)
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered = accelerator.gather(padded)
    # Row r of process p is image r * processes + p; the padding ends up behind the last image.
    ordered = rearrange(gathered, "(process row) ... -> (row process) ...", process=processes)
    return ordered[:num_images].cpu()
