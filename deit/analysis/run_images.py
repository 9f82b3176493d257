"""Images of a run for its report: attention maps, training views, hardest images."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from deit.analysis.view_sheet import draw_view_sheet
from deit.config.presets import LOSS_PRESETS
from deit.config.schema import Config
from deit.config.sections.init import InitConfig
from deit.config.sections.teacher import TeacherConfig
from deit.core.errors import ConfigError
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.sources.registry import LISTINGS
from deit.datasets.splits import load_split, load_splits
from deit.distill.inference import views_of_chunks
from deit.evaluation.cache import CachedEvaluation
from deit.evaluation.load_run import evaluation_config, resolve_run, student_at_resolution
from deit.models.attention_rollout import check_attention, rollout
from deit.models.saved_student import ModelInfo
from deit.viz.attention_plot import draw_attention

_CPU = torch.device("cpu")
_NUM_ATTENTION_ROWS = 4
_NUM_HARDEST = 12
_NUM_VIEWS = 12
_MAX_THUMBNAIL_SIDE = 160  # [px]


class HardImage(NamedTuple):
    """A misclassified image: its thumbnail, and lines with the label and the predictions."""

    thumbnail: Path
    lines: tuple[str, ...]


class RunImages(NamedTuple):
    """The image files of a run; attention is None for a network without attention."""

    attention: Path | None
    views: Path | None
    hardest: list[HardImage]


def draw_run(
    run: Path, evaluation: CachedEvaluation, folder: Path, prefix: str, *, root: str | None = None
) -> RunImages:
    """Draw the images of a finished run into a folder.

    prefix: of the file names. root: the current folder of the dataset, if it was moved. Raises
    ConfigError, DataError, CheckpointError or SystemFault; DataError if the dataset is missing.
    """
    config, saved = resolve_run(run, "best")
    if root is not None:
        config = config.replace(data={"root": root})
    if config.data.source in LISTINGS:  # only a few images are needed: do not decode all of them
        config = config.replace(data={"storage": "files"})
    student, model_info = student_at_resolution(saved, None)
    splits = load_splits(config.data)
    images = splits.test
    if isinstance(images, InMemoryImages):  # stored at the size for views, not for evaluation
        _, images = load_split(evaluation_config(config).data, "test")
    hardest = hardest_images(evaluation, _NUM_HARDEST)
    selected = hardest[: _NUM_ATTENTION_ROWS // 2]
    selected += _correct_images(evaluation, _NUM_ATTENTION_ROWS - len(selected))
    attention = None
    try:
        check_attention(student.network)
    except ConfigError:
        pass  # a ConvNet
    else:
        attention = folder / f"{prefix}-attention.png"
        views = next(
            views_of_chunks(
                images, (torch.tensor(selected),), evaluation_config(config).evaluation, device=_CPU
            )
        )
        attention_maps = rollout(student.network.eval(), (views - student.mean) / student.std)
        class_names = model_info.class_names
        draw_attention(
            [view.permute(1, 2, 0).numpy() for view in views],
            [token_maps.numpy() for token_maps in attention_maps.maps],
            attention_maps.names,
            [_format_predictions(evaluation, index) for index in selected],
            [f"truth: {class_names[evaluation.labels[index]]}" for index in selected],
            attention,
            transparent=True,
        )
    hard_images = [
        HardImage(
            _save_thumbnail(images, index, folder / f"{prefix}-hard-{rank}.png", config),
            _caption_lines(evaluation, index),
        )
        for rank, index in enumerate(hardest)
    ]
    sheet = folder / f"{prefix}-views.png"
    view_config = _config_for_views(config, model_info)
    draw_view_sheet(view_config, sheet, num_views=_NUM_VIEWS, splits=splits, transparent=True)
    return RunImages(attention and _smaller_format(attention), _smaller_format(sheet), hard_images)


def hardest_images(evaluation: CachedEvaluation, max_images: int) -> list[int]:
    """Return the indices of the hardest misclassified images of the test split, hardest first.

    Images that the teacher classifies correctly come first; among them, and among the others, the
    most confident wrong prediction comes first.
    """
    final = evaluation.predictions.get("fused", evaluation.predictions["class"])
    confidence = evaluation.confidence.get("fused", evaluation.confidence["class"])
    teacher = evaluation.predictions.get("teacher", final)
    labels = evaluation.labels
    errors = [index for index, label in enumerate(labels) if final[index] != label]
    errors.sort(key=lambda index: (teacher[index] != labels[index], -confidence[index]))
    return errors[:max_images]


def _correct_images(evaluation: CachedEvaluation, max_images: int) -> list[int]:
    """Return the index of the first correctly classified image of each of the first classes."""
    final = evaluation.predictions.get("fused", evaluation.predictions["class"])
    first_of_class: dict[int, int] = {}
    for index, label in enumerate(evaluation.labels):
        if final[index] == label:
            first_of_class.setdefault(label, index)
    return [first_of_class[label] for label in sorted(first_of_class)][:max_images]


def _format_predictions(evaluation: CachedEvaluation, index: int) -> dict[str, str]:
    """Return class and confidence of the predictions for an image, by head and `teacher`."""
    names = evaluation.metrics["class_names"]
    return {
        head: f"{names[predictions[index]]} ({100 * evaluation.confidence[head][index]:.0f} %)"
        for head, predictions in evaluation.predictions.items()
        if head != "fused_softmax"
    }


def _caption_lines(evaluation: CachedEvaluation, index: int) -> tuple[str, ...]:
    names = evaluation.metrics["class_names"]
    predictions = _format_predictions(evaluation, index)
    final = predictions.get("fused", predictions["class"])
    lines = (f"truth: {names[evaluation.labels[index]]}", f"student: {final}")
    return (*lines, f"teacher: {predictions['teacher']}") if "teacher" in predictions else lines


def _save_thumbnail(
    images: InMemoryImages | EncodedImages, index: int, path: Path, config: Config
) -> Path:
    side = min(config.student.image_size, _MAX_THUMBNAIL_SIDE)
    view = next(
        views_of_chunks(
            images, (torch.tensor([index]),), evaluation_config(config).evaluation, device=_CPU
        )
    )[0]
    levels = (view * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    thumbnail = Image.fromarray(np.ascontiguousarray(levels))
    if thumbnail.width > side:
        thumbnail = thumbnail.resize((side, side), Image.Resampling.LANCZOS)
    thumbnail.save(path)
    return path


def _config_for_views(config: Config, model_info: ModelInfo) -> Config:
    """Return a configuration that draws the views of the run from its saved files only.

    The initial weights may have been deleted, so their normalization comes from the saved model.
    A teacher that is user code is dropped, because no code is executed from the files of a run.
    """
    config = config.replace(views={"mean": model_info.mean, "std": model_info.std})
    config = replace(config.replace(optim={"trainable": "all"}), init=InitConfig())
    if not config.teacher.code_sources:
        return config
    return config.replace(teacher=TeacherConfig(), loss=LOSS_PRESETS["none"])


def _smaller_format(path: Path) -> Path:
    """Convert an image to WebP if that is smaller (photographs are); return the smaller file."""
    webp = path.with_suffix(".webp")
    with Image.open(path) as image:
        image.convert("RGBA").save(webp, quality=82)
    if webp.stat().st_size < path.stat().st_size:
        return webp
    webp.unlink()
    return path
