"""The images of a split for an evaluation in a loop of your own."""

from collections.abc import Iterator
from os import PathLike

import torch
from torch import Tensor

from deit.config.arguments import checks_types
from deit.config.command_choices import SPLITS, check_at_least, check_choice
from deit.config.recipes import recipe
from deit.config.schema import Config, EvalSettings
from deit.config.sections.run import RunConfig
from deit.core.errors import ConfigError, DataError
from deit.core.tensors import as_device
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.loader import TrainLoader
from deit.datasets.splits import load_split
from deit.distill.inference import views_of_chunks
from deit.evaluation.load_run import evaluation_config


@checks_types
def evaluation_batches(
    source: TrainLoader | Config | str | PathLike,
    split: str = "validation",
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return an iterator over the images and labels of a split, as the package evaluates them.

    Images are float32 [B, 3, side, side] in [0, 1], resized and cropped by views.eval_crop_pct, and
    not augmented: students and teachers normalize them themselves. Labels are int64 [B]. Both are
    on the device, in the order of the split, and every process gets all of them.

    source: a loader, for the images that it has loaded, as a training validates; a configuration,
    the name of a recipe or a run folder, as `evaluate` reads them. split: train, validation or
    test. batch_size: default: run.eval_batch_size. device: cpu, cuda, cuda:INDEX, or auto for a GPU
    if there is one; default: the loader's, or cpu.
    Raises ConfigError, DataError if the split has no images, and SystemFault as `train`.

    Example:
        >>> from deit.core.types import logits_by_head
        >>> from deit.models.saved_student import load_student
        >>> student, _ = load_student("checkpoints/digits/best")
        >>> right = {"class": 0, "distillation": 0, "fused": 0, "fused_softmax": 0}
        >>> with torch.no_grad():
        ...     for images, labels in evaluation_batches("digits", "test"):
        ...         for head, logits in logits_by_head(student.eval()(images)).items():
        ...             right[head] += int((logits.argmax(dim=1) == labels).sum())
        >>> from deit.evaluation.evaluate import evaluate
        >>> result = evaluate("checkpoints/digits", verbose=False)
        >>> right["fused"] / 359 == result.metrics["heads"]["fused"]["top1"]
        True
    """
    check_choice("split", split, SPLITS)
    if batch_size is not None:
        check_at_least("batch_size", batch_size, 1)
    if isinstance(source, TrainLoader):
        images, settings = _of_loader(source, split)
        device = source.device if device is None else as_device(device)
    else:
        device = as_device("cpu" if device is None else device)
        config = evaluation_config(source if isinstance(source, Config) else recipe(source))
        (_, images), settings = load_split(config.data, split), config.evaluation
    if not len(images.labels):
        raise DataError(f"split = {split}: has no images")
    chunks = torch.arange(len(images.labels)).split(batch_size or settings.batch_size)
    views = views_of_chunks(images, chunks, settings, device=device)
    return ((batch, images.labels[chunk].to(device)) for batch, chunk in zip(views, chunks))


def _of_loader(
    loader: TrainLoader, split: str
) -> tuple[InMemoryImages | EncodedImages, EvalSettings]:
    if loader.splits is None:
        raise ConfigError("source: the loader has no splits; make it with TrainLoader.from_config")
    batch_size = RunConfig().eval_batch_size
    settings = EvalSettings(
        loader.sizes.student, loader.views.eval_crop_pct, batch_size, loader.num_workers
    )
    return getattr(loader.splits, split), settings
