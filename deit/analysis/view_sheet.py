"""A sheet of training views: stored images, views of student and teacher, and labels."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from deit.config.arguments import checks_types
from deit.config.command_choices import NUM_VIEWS, check_at_least, check_epoch
from deit.config.schema import Config
from deit.config.validation import validate
from deit.core.accelerator import own_accelerate_state
from deit.core.console import info, obeys_verbose, warn
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
from deit.viz.attention_plot import TEXT_ON_ANY_BACKGROUND

_TILE = 128  # side of an image on the sheet [px]
_GAP = 8
_LINE = 16
_INK, _PAPER, _FAINT = (20, 20, 20), (255, 255, 255), (120, 120, 120)
# Text and background of a transparent sheet, with equal RGB so that antialiased edges are clean.
_INK_ON_TRANSPARENT, _TRANSPARENT = (
    (*ImageColor.getrgb(TEXT_ON_ANY_BACKGROUND), alpha) for alpha in (255, 0)
)
_MAX_LABELS = 2
_MIN_LABEL_WEIGHT = 0.005


class _Cell(NamedTuple):
    """One view: its tiles from left to right, and the lines of text below them."""

    tiles: list[Image.Image]
    lines: list[str]


def check_image_path(path: str | Path, *, name: str) -> None:
    """Raise ConfigError if the file name has no extension of a supported image format."""
    if Path(path).suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise ConfigError(f"{name} = {path}: should end in .png, .jpg or .webp")


def draw_view_sheet(
    config: Config,
    out: str | Path,
    *,
    epoch: int = 0,
    num_views: int = NUM_VIEWS,
    splits: Splits | None = None,
    transparent: bool = False,
) -> Path:
    """Write `view_sheet` into an image file, and return its path.

    out: its extension is the image format. The others, and what is raised: as for `view_sheet`.

    >>> from deit.config.recipes import find_recipe
    >>> from deit.core.console import quiet
    >>> with quiet():
    ...     path = draw_view_sheet(find_recipe("digits"), "views.png", epoch=3, num_views=4)
    >>> path.name, path.stat().st_size > 0
    ('views.png', True)
    """
    check_image_path(out, name="out")
    sheet = view_sheet(
        config, epoch=epoch, num_views=num_views, splits=splits, transparent=transparent
    )
    sheet.save(out)
    info(f"wrote {out}: {sheet.info['num_views']} views")
    return Path(out)


@checks_types
@obeys_verbose
@own_accelerate_state()
def view_sheet(
    config: Config,
    *,
    epoch: int = 0,
    num_views: int = NUM_VIEWS,
    splits: Splits | None = None,
    transparent: bool = False,
    verbose: bool = True,
) -> Image.Image:
    """Return an image of the first `num_views` views of an epoch, as a run would train on them.

    epoch: from 0. Each cell shows the stored image, the view of the student and the view of the
    teacher. Below are the label weights after mixing and the prediction of the teacher. A teacher
    that cannot be loaded is left out with a warning. splits: the data of the configuration, if
    already loaded.
    transparent: leave the background transparent and use a text color that can be read on white and
    on black. verbose: show messages and progress; warnings are always shown. Its `info` has
    num_views, the number of views on it. Raises ConfigError, DataError, CheckpointError or
    SystemFault.

    >>> from deit.config.recipes import find_recipe
    >>> sheet = view_sheet(find_recipe("digits"), epoch=3, num_views=4, verbose=False)
    >>> sheet.info["num_views"]
    4
    """
    check_epoch(epoch)
    check_at_least("num_views", num_views, 1)
    config = validate(config, live_teacher=False)
    config = with_init_normalization(config, load_init_weights(config.init))
    accelerator = build_accelerator(config.run)
    splits = splits or load_splits(config.data)
    teachers = _teachers(config, splits, accelerator)
    teacher_size = teacher_input_size([teacher.image_size for teacher in teachers])
    drawn = _with_smaller_batch(config, splits, accelerator.num_processes)
    loader = build_train_loader(drawn, splits, accelerator, teacher_size=teacher_size)
    batch = _first_views(loader.epoch(epoch), num_views)
    teacher_probs = None
    if teachers:
        ensemble = build_online_ensemble(teachers, config.teacher, splits, accelerator)
        teacher_probs = ensemble(batch).logits.softmax(dim=2).mean(dim=1).cpu()
    cells = [
        _cell(splits.train, batch, row, splits.class_names, teacher_probs)
        for row in range(len(batch.sample_ids))
    ]
    tile_names = ["image", f"student {batch.images.shape[-1]} px"]
    if teachers:
        crops = config.views.teacher_num_crops
        crop = f" (crop 1 of {crops})" if config.views.teacher_view == "crops" else ""
        side = teacher_size or batch.teacher_images.shape[-1]
        tile_names.append(f"teacher {side} px{crop}")
    title = f"epoch {epoch}, seed {config.run.seed}: {' | '.join(tile_names)}"
    sheet = _compose(cells, title, transparent=transparent)
    sheet.info["num_views"] = len(cells)
    return sheet


def _with_smaller_batch(config: Config, splits: Splits, num_processes: int) -> Config:
    """Return the configuration with a batch of all images if there are too few for its own batch.

    With one view of each image per epoch, the views are those of any batch size: pairs to be mixed
    are neighbors in the order of the epoch.
    """
    optim, views, num_images = config.optim, config.views, len(splits.train.labels)
    if -(-optim.batch_size // views.aug_repeats) <= num_images:
        return config
    divisor = num_processes * (2 if views.uses_mixing else 1)
    batch_size = num_images * views.aug_repeats // divisor * divisor
    if batch_size == 0:
        return config  # the loader reports it
    warn(
        f"optim.batch_size = {optim.batch_size}: more than the {num_images} training images allow; "
        f"the views are drawn in batches of {batch_size}, and training needs a smaller batch too"
    )
    return config.replace(optim={"batch_size": batch_size, "grad_accum_steps": 1})


def _teachers(config: Config, splits: Splits, accelerator: Accelerator) -> list[Teacher]:
    """Return the teachers; if one cannot be loaded, warn and return none."""
    if config.loss.kind == "none" or not config.teacher.source:
        return []
    try:
        for source in config.teacher.source:
            resolve_source(source)
        return build_teachers(
            config.teacher, splits.class_names, config.student.image_size, accelerator
        )
    except (DataError, CheckpointError) as error:
        warn(f"drawing without the teacher: {error}")
        return []


def _first_views(batches: Iterator[Batch], num_views: int) -> Batch:
    """Return the first views of an epoch as one batch."""
    parts: list[Batch] = []
    for batch in batches:
        parts.append(batch)
        if sum(len(part.sample_ids) for part in parts) >= num_views:
            break
    fields = {
        name: torch.cat([getattr(part, name) for part in parts])[:num_views]
        for name in ("images", "teacher_images", "targets", "sample_ids", "target_rows")
    }
    return Batch(**fields, epoch=parts[0].epoch)


def _cell(
    images: InMemoryImages | EncodedImages,
    batch: Batch,
    row: int,
    class_names: tuple[str, ...],
    teacher_probs: Tensor | None,
) -> _Cell:
    """Return the cell of one view. teacher_probs: [views, classes]."""
    sample = int(batch.sample_ids[row])
    tiles = [_tile(_stored(images, sample)), _tile(batch.images[row])]
    class_name = class_names[int(images.labels[sample])]
    label_text = _format_weights(batch.targets[row].cpu(), class_names)
    lines = [f"#{sample} {class_name}", f"label: {label_text}"]
    if teacher_probs is not None:
        tiles.append(_tile(batch.teacher_images[row]))
        lines.append(f"teacher: {_format_weights(teacher_probs[row], class_names)}")
    return _Cell(tiles, lines)


def _stored(images: InMemoryImages | EncodedImages, index: int) -> Tensor:
    if isinstance(images, InMemoryImages):
        return images.pixels[index]
    return decode_square(images.read(index), images.name(index), _TILE)


def _format_weights(weights: Tensor, class_names: tuple[str, ...]) -> str:
    """Return the largest of the weights [classes] with their classes: `0.62 cat + 0.38 dog`."""
    top_weights, labels = weights.topk(min(_MAX_LABELS, len(weights)))
    return " + ".join(
        f"{weight:.2f} {class_names[label]}"
        for weight, label in zip(top_weights.tolist(), labels.tolist())
        if weight >= _MIN_LABEL_WEIGHT
    )


def _tile(image: Tensor) -> Image.Image:
    """Return an image [3, height, width], uint8 or float in [0, 1], resized to a tile.

    Small images are enlarged without smoothing, so that their pixels are visible.
    """
    levels = image if image.dtype == torch.uint8 else (image * 255).round().to(torch.uint8)
    tile = Image.fromarray(np.ascontiguousarray(levels.cpu().permute(1, 2, 0).numpy()))
    is_small = tile.width <= _TILE // 2
    resampling = Image.Resampling.NEAREST if is_small else Image.Resampling.LANCZOS
    return tile.resize((_TILE, _TILE), resampling)


def _compose(cells: list[_Cell], title: str, *, transparent: bool) -> Image.Image:
    """Return a sheet with the cells in a roughly square grid below a title."""
    font = ImageFont.load_default(size=13)
    cell_width = len(cells[0].tiles) * (_TILE + 2) + _GAP
    cell_height = _TILE + len(cells[0].lines) * _LINE + 2 * _GAP
    columns = max(1, min(len(cells), round((len(cells) * cell_height / cell_width) ** 0.5)))
    rows = -(-len(cells) // columns)
    header = _LINE + 2 * _GAP
    mode, paper = ("RGBA", _TRANSPARENT) if transparent else ("RGB", _PAPER)
    ink, faint = (_INK_ON_TRANSPARENT,) * 2 if transparent else (_INK, _FAINT)
    sheet = Image.new(mode, (columns * cell_width + _GAP, rows * cell_height + header), paper)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), title, fill=ink, font=font)
    for index, cell in enumerate(cells):
        left = _GAP + index % columns * cell_width
        top = header + index // columns * cell_height
        for column, tile in enumerate(cell.tiles):
            sheet.paste(tile, (left + column * (_TILE + 2), top))
        for line_index, line in enumerate(cell.lines):
            draw.text(
                (left, top + _TILE + 2 + line_index * _LINE),
                _truncate(line, cell_width - _GAP, font),
                fill=ink if line_index else faint,
                font=font,
            )
    return sheet


def _truncate(line: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    """Return the line, with `...` at its end if it is wider than `width` [px]."""
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}...") > width:
        line = line[:-1]
    return f"{line}..."
