"""Predictions for images in any form, as `deit.Run` and `deit predict` make them."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from os import PathLike, fspath
from os.path import isdir
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from deit.config.input_paths import unreadable_error
from deit.core.console import info
from deit.core.errors import ConfigError, DataError, first_line
from deit.core.file_reading import missing_file_reason, read_bytes
from deit.core.types import logits_by_head
from deit.datasets.decoding import EXTENSIONS, center_square, open_image, to_upright_rgb
from deit.datasets.sources.listing import SkippedFiles, find_images, open_folder
from deit.datasets.views import evaluation_views
from deit.models.metadata import ModelInfo
from deit.models.student import Student

ImageInput = Tensor | Image.Image | str | PathLike | Iterable
"""An image or several: a tensor [3, H, W] or [B, 3, H, W], uint8 or float in [0, 1]; a Pillow
image; the path of an image file or of a folder of them; or a sequence of these."""


class Prediction(NamedTuple):
    """The most likely classes of an image.

    class_name, probability: of the most likely one. top: the most likely classes with their
    probabilities, the first of all first. file: None for images that are no file.
    """

    class_name: str
    probability: float
    top: tuple[tuple[str, float], ...]
    file: str | None = None


def to_predictions(
    logits: Tensor, class_names: tuple[str, ...], names: list[str | None], *, top_k: int
) -> list[Prediction]:
    """Return the predictions of logits [B, C]. names: of the files, one per image."""
    shares, classes = logits.float().softmax(dim=1).topk(min(top_k, len(class_names)), dim=1)
    predictions = []
    for name, row, labels in zip(names, shares.tolist(), classes.tolist(), strict=True):
        top = tuple((class_names[label], share) for label, share in zip(labels, row))
        predictions.append(Prediction(*top[0], top, name))
    return predictions


@torch.no_grad()
def image_logits(
    heads_of: Callable[[Tensor], dict[str, Tensor]],
    images: ImageInput,
    model_info: ModelInfo,
    *,
    batch_size: int,
    unreadable: dict[str, str] | None = None,
) -> tuple[dict[str, Tensor], list[str | None]]:
    """Return the logits [images, C] by head, and the file of each image.

    heads_of: returns the logits of a batch. The other arguments are those of `image_batches`.
    Without images there are no heads.
    """
    parts: list[dict[str, Tensor]] = []
    files: list[str | None] = []
    batches = image_batches(images, model_info, batch_size=batch_size, unreadable=unreadable)
    for views, names in batches:
        parts.append(heads_of(views))
        files += names
    heads = parts[0] if parts else ()
    return {name: torch.cat([part[name] for part in parts]) for name in heads}, files


@torch.no_grad()
def student_heads(student: Student, views: Tensor) -> dict[str, Tensor]:
    """Return the logits of each head, float32 [B, C] on the CPU. views: of `image_batches`."""
    heads = logits_by_head(student(views.to(student.mean.device)))
    return {name: logits.cpu() for name, logits in heads.items()}


def find_files(paths: Iterable[Path], unreadable: dict[str, str]) -> list[Path]:
    """Return the image files; folders are listed in the order and by the rules of `folder` data.

    unreadable: takes each path without an image, and why.
    """
    files: list[Path] = []
    skipped = SkippedFiles()

    def on_problem(problem: str) -> None:
        name, _, reason = problem.partition(": ")
        unreadable[name] = reason

    for path in paths:
        if path.is_dir():
            names = find_images(open_folder(path), skipped, on_problem)
            files += [path / name for name in names]
            if not names:
                formats = ", ".join(sorted(EXTENSIONS))
                unreadable.setdefault(str(path), f"has no images ({formats})")
        elif path.is_file():
            files.append(path)
        else:
            unreadable[str(path)] = (
                "no such file" if not path.exists() else missing_file_reason(path)
            )
    for note in skipped.notes():
        info(note)
    return files


def image_batches(
    images: ImageInput,
    model_info: ModelInfo,
    *,
    batch_size: int,
    unreadable: dict[str, str] | None = None,
) -> Iterator[tuple[Tensor, list[str | None]]]:
    """Yield images as a network's input, float32 [B, 3, side, side] in [0, 1], with their files.

    Only one batch is decoded at a time. Images of another size are resized and cropped as in an
    evaluation. unreadable: takes each file that cannot be read, and why; None: it raises DataError.
    Raises ConfigError for other types.
    """
    if isinstance(images, Tensor):
        batch = images[None] if images.ndim == 3 else images
        _check_shape(batch)
        for part in batch.split(batch_size):
            yield _from_tensor(part, model_info), [None] * len(part)
        return
    if isinstance(images, str | PathLike | Image.Image):
        images = [images]
    if not isinstance(images, Iterable):
        raise _unknown(images)
    items = _with_files_of_folders(images, unreadable)
    while chunk := list(islice(items, batch_size)):
        loaded = []
        for image in chunk:
            try:
                loaded.append(_load(image, model_info))
            except DataError as error:
                if unreadable is None:
                    raise
                name = fspath(image)
                unreadable[name] = str(error).removeprefix(f"{name}: ")
        if loaded:
            views, names = zip(*loaded)
            yield torch.cat(views), list(names)


def _with_files_of_folders(
    images: Iterable[Any], unreadable: dict[str, str] | None
) -> Iterator[Any]:
    """Yield images, and the files in a folder instead of the folder."""
    for image in images:
        if not isinstance(image, str | PathLike) or not isdir(image):
            yield image
            continue
        problems: dict[str, str] = {} if unreadable is None else unreadable
        files = find_files([Path(image)], problems)
        if unreadable is None and problems:
            raise unreadable_error(problems, len(files))
        yield from files


def _load(image: Any, model_info: ModelInfo) -> tuple[Tensor, str | None]:
    """Return an image as a batch of one, and its file."""
    if isinstance(image, Tensor):
        _check_shape(image[None])
        return _from_tensor(image[None], model_info), None
    if isinstance(image, Image.Image):
        return _from_pillow(to_upright_rgb(image), model_info), None
    if isinstance(image, str | PathLike):
        return _from_pillow(_open(fspath(image)), model_info), fspath(image)
    raise _unknown(image)


def _check_shape(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        given = f"{images.dtype} {list(images.shape)}"
        raise ConfigError(f"images: should be square, [batch, 3, side, side]; got {given}")


def _from_tensor(images: Tensor, model_info: ModelInfo) -> Tensor:
    side, given = model_info.student.image_size, f"{images.dtype} {list(images.shape)}"
    if images.dtype == torch.uint8:
        return evaluation_views(images, size=side, crop_pct=model_info.evaluation_crop)
    if not images.is_floating_point() or images.shape[-1] != side:
        raise ConfigError(
            f"images: should be uint8, or float in [0, 1] of the network's input size {side} px; "
            f"got {given}"
        )
    if len(images) and not 0 <= float(images.min()) <= float(images.max()) <= 1:
        raise ConfigError(
            f"images: float images should be in [0, 1], not normalized; got "
            f"{float(images.min()):.3g} ... {float(images.max()):.3g}"
        )
    return images.float()


def _from_pillow(image: Image.Image, model_info: ModelInfo) -> Tensor:
    side, crop = model_info.student.image_size, model_info.evaluation_crop
    pixels = center_square(image, round(side / crop))[None]
    return evaluation_views(pixels, size=side, crop_pct=crop)


def _open(name: str) -> Image.Image:
    try:
        return open_image(read_bytes(Path(name)), name)
    except OSError as error:
        raise DataError(f"{name}: {error.strerror or first_line(error)}") from None


def _unknown(value: Any) -> ConfigError:
    return ConfigError(
        f"images: should be tensors, Pillow images or paths; got {type(value).__name__}"
    )
