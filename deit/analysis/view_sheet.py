"""A picture of training views: the image, what student and teacher see of it, and the labels."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from deit.config.schema import Config
from deit.config.validation import validate
from deit.core.console import info, warn
from deit.core.errors import CheckpointError, ConfigError, DataError
from deit.core.types import Batch
from deit.datasets.decoding import decode_square
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.splits import Splits, load_splits
from deit.distill.build import (
    build_accelerator,
    build_online_ensemble,
    build_teachers,
    build_train_loader,
    teacher_input_size,
)
from deit.distill.student_init import load_init_weights, with_init_normalization
from deit.models.teacher_sources import resolve_source
from deit.models.teachers import Teacher
from deit.viz.attention_plot import GREY

_TILE = 128  # side of a picture on the sheet [px]
_GAP = 8
_LINE = 16
_INK, _PAPER, _FAINT = (20, 20, 20), (255, 255, 255), (120, 120, 120)
# Of a sheet without paper: letters, and what is not there, of one colour so that edges are clean.
_GREY, _CLEAR = ((*ImageColor.getrgb(GREY), alpha) for alpha in (255, 0))
_SHOWN_LABELS = 2


class _Cell(NamedTuple):
    """One view: its pictures from left to right, and the lines below them."""

    pictures: list[Image.Image]
    lines: list[str]


def check_image_path(path: Path, *, option: str) -> None:
    """Refuse a name that is no picture's before the work. Raises ConfigError."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ConfigError(f"{option} {path}: should end in .png, .jpg or .webp")


def draw_view_sheet(
    config: Config,
    out: Path,
    *,
    epoch: int = 0,
    number: int = 12,
    splits: Splits | None = None,
    clear: bool = False,
) -> None:
    """Write a sheet of the first `number` views of an epoch, as a run would train on them.

    Each shows the image as it is stored, the student's view and the teacher's, with their sizes;
    below, the label's weights after mixing and the teacher's answer. A teacher that is not there
    yet is left out with a warning. splits: of the configuration's data, where they are loaded
    already. clear: whether whatever lies below shows through instead of white paper. Raises the
    errors of deit.core.errors.
    """
    config = validate(config, live_teacher=False)
    config = with_init_normalization(config, load_init_weights(config.init))
    accelerator = build_accelerator(config.run)
    splits = splits or load_splits(config.data)
    teachers = _teachers(config, splits, accelerator)
    wanted = teacher_input_size([teacher.image_size for teacher in teachers])
    loader = build_train_loader(config, splits, accelerator, teacher_size=wanted)
    batch = _first(loader.epoch(epoch), number)
    answers = None
    if teachers:
        panel = build_online_ensemble(teachers, config.teacher, splits, accelerator)
        answers = panel(batch).logits.softmax(dim=2).mean(dim=1).cpu()
    cells = [
        _cell(splits.train, batch, row, splits.class_names, answers)
        for row in range(len(batch.sample_ids))
    ]
    seen = ["image", f"student {batch.images.shape[-1]} px"]
    if teachers:
        crops = config.views.teacher_num_crops
        one = f" (crop 1 of {crops})" if config.views.teacher_view == "crops" else ""
        seen.append(f"teacher {wanted or batch.teacher_images.shape[-1]} px{one}")
    title = f"epoch {epoch}, seed {config.run.seed}: {' | '.join(seen)}"
    _sheet(cells, title, clear=clear).save(out)
    info(f"wrote {out}: {len(cells)} views")


def _teachers(config: Config, splits: Splits, accelerator: Accelerator) -> list[Teacher]:
    """The teachers; none, with a warning, if one of them is not there yet."""
    if config.loss.kind == "none" or not config.teacher.source:
        return []
    try:
        for source in config.teacher.source:
            resolve_source(source)
        return build_teachers(
            config.teacher, splits.class_names, config.student.image_size, accelerator
        )
    except (DataError, CheckpointError) as error:
        warn(f"the teacher is left out: {error}")
        return []


def _first(batches: Iterator[Batch], number: int) -> Batch:
    """The first so many views of an epoch as one batch."""
    parts: list[Batch] = []
    for batch in batches:
        parts.append(batch)
        if sum(len(part.sample_ids) for part in parts) >= number:
            break
    together = {
        name: torch.cat([getattr(part, name) for part in parts])[:number]
        for name in ("images", "teacher_images", "targets", "sample_ids", "target_rows")
    }
    return Batch(**together, epoch=parts[0].epoch)


def _cell(
    images: InMemoryImages | EncodedImages,
    batch: Batch,
    row: int,
    class_names: tuple[str, ...],
    answers: Tensor | None,
) -> _Cell:
    sample = int(batch.sample_ids[row])
    pictures = [_picture(_stored(images, sample)), _picture(batch.images[row])]
    if answers is not None:
        pictures.append(_picture(batch.teacher_images[row]))
    own = class_names[int(images.labels[sample])]
    lines = [f"#{sample} {own}", f"label: {_labels(batch.targets[row].cpu(), class_names)}"]
    if answers is not None:
        lines.append(f"teacher: {_labels(answers[row], class_names)}")
    return _Cell(pictures, lines)


def _stored(images: InMemoryImages | EncodedImages, index: int) -> Tensor:
    if isinstance(images, InMemoryImages):
        return images.pixels[index]
    return decode_square(images.read(index), images.name(index), _TILE)


def _labels(weights: Tensor, class_names: tuple[str, ...]) -> str:
    """The heaviest labels with their weights: `0.62 cat + 0.38 dog`."""
    found, labels = weights.topk(min(_SHOWN_LABELS, len(weights)))
    return " + ".join(
        f"{weight:.2f} {class_names[label]}"
        for weight, label in zip(found.tolist(), labels.tolist())
        if weight >= 0.005
    )


def _picture(image: Tensor) -> Image.Image:
    """uint8, or float in [0, 1], [3, height, width], as a tile; whole pixels where it is small."""
    levels = image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)
    picture = Image.fromarray(np.ascontiguousarray(levels.cpu().permute(1, 2, 0).numpy()))
    small = picture.width <= _TILE // 2
    how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    return picture.resize((_TILE, _TILE), how)


def _sheet(cells: list[_Cell], title: str, *, clear: bool) -> Image.Image:
    """The cells in a grid about as wide as it is high, under a title."""
    font = ImageFont.load_default(size=13)
    across = len(cells[0].pictures) * (_TILE + 2) + _GAP
    down = _TILE + len(cells[0].lines) * _LINE + 2 * _GAP
    columns = max(1, min(len(cells), round((len(cells) * down / across) ** 0.5)))
    rows = -(-len(cells) // columns)
    header = _LINE + 2 * _GAP
    kind, paper = ("RGBA", _CLEAR) if clear else ("RGB", _PAPER)
    ink, faint = (_GREY, _GREY) if clear else (_INK, _FAINT)
    sheet = Image.new(kind, (columns * across + _GAP, rows * down + header), paper)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), title, fill=ink, font=font)
    for index, cell in enumerate(cells):
        left = _GAP + index % columns * across
        top = header + index // columns * down
        for place, picture in enumerate(cell.pictures):
            sheet.paste(picture, (left + place * (_TILE + 2), top))
        for place, line in enumerate(cell.lines):
            at = (left, top + _TILE + 2 + place * _LINE)
            draw.text(
                at, _fitted(line, across - _GAP, font), fill=ink if place else faint, font=font
            )
    return sheet


def _fitted(line: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """The line, cut off where it would run into the next cell."""
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}...") > width:
        line = line[:-1]
    return f"{line}..."
