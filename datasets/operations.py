"""The image operations of augmentation policies, on uint8 images, one argument for each image.

Each does to a batch what Pillow does to one picture, to the grey level where Pillow's arithmetic
is whole numbers or single precision. Only IEEE operations element by element and sums of whole
numbers are used, so the result depends neither on the device nor on who else is in the batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from deit.config import Interpolation
from deit.datasets.resizing import blur


class Canvas(NamedTuple):
    """What a moved image is painted on.

    fill: uint8 [3], the colour of what moves in from outside.
    interpolation: how pixels between pixels are found.
    """

    fill: Tensor
    interpolation: Interpolation


# Tables: the new grey level depends on the old one alone, [batch, 3, 256] for each image.


def _levels(images: Tensor) -> Tensor:
    return torch.arange(256, device=images.device)


def _same_for_channels(table: Tensor) -> Tensor:
    return repeat(table, "b level -> b 3 level")


def invert(images: Tensor, arguments: Tensor) -> Tensor:
    """255 - level."""
    return _same_for_channels((255 - _levels(images)).expand(len(images), -1))


def solarize(images: Tensor, arguments: Tensor) -> Tensor:
    """Levels from the argument (a threshold in 0 ... 256) upwards are inverted."""
    levels = _levels(images)
    return _same_for_channels(torch.where(levels < arguments[:, None], levels, 255 - levels))


def solarize_add(images: Tensor, arguments: Tensor) -> Tensor:
    """The argument (in 0 ... 255) is added to levels below 128, at most 255."""
    levels = _levels(images)
    added = (levels + arguments[:, None].long()).clamp_max(255)
    return _same_for_channels(torch.where(levels < 128, added, levels))


def posterize(images: Tensor, arguments: Tensor) -> Tensor:
    """The argument is the number of bits kept, 1 ... 8; fewer than 1 would leave black."""
    bits = arguments.clamp(1, 8).long()
    return _same_for_channels(_levels(images) & (256 - (1 << (8 - bits)))[:, None])


def brightness(images: Tensor, arguments: Tensor) -> Tensor:
    """Black blended with the image; the argument is the image's share (1: unchanged)."""
    levels = _levels(images).float()
    return _same_for_channels(_blend(torch.zeros_like(levels), levels, arguments[:, None]))


def contrast(images: Tensor, arguments: Tensor) -> Tensor:
    """The mean grey of the image blended with it; the argument is the image's share."""
    grey = _grey(images)
    number = grey[0].numel()
    mean = torch.floor(grey.flatten(1).sum(dim=1).double() / number + 0.5).float()
    levels = _levels(images).float()
    return _same_for_channels(_blend(mean[:, None], levels, arguments[:, None]))


def auto_contrast(images: Tensor, arguments: Tensor) -> Tensor:
    """Each channel stretched so that its darkest pixel is 0 and its brightest 255."""
    lowest, highest = (found.double()[..., None] for found in images.flatten(2).aminmax(dim=2))
    # Not `255 / tensor`: torch turns that into a product with a rounded reciprocal.
    scale = torch.full_like(lowest, 255).div_(highest - lowest)
    levels = _levels(images)
    stretched = (levels * scale + -lowest * scale).clamp(0, 255).long()
    return torch.where(highest > lowest, stretched, levels)


def equalize(images: Tensor, arguments: Tensor) -> Tensor:
    """Each channel's histogram flattened, with Pillow's whole-number steps."""
    counts = _histogram(images)
    last = counts.gather(2, _last_level(counts))
    step = (counts.sum(dim=2, keepdim=True) - last) // 255
    before = counts.cumsum(dim=2) - counts
    flat = ((step // 2 + before) // step.clamp_min(1)).clamp_max(255)
    return torch.where(step > 0, flat, _levels(images))


def _histogram(images: Tensor) -> Tensor:
    """Pixels of each level, int64 [batch, 3, 256]."""
    number, channels = images.shape[:2]
    levels = images.flatten(2).long()
    counts = torch.zeros(number, channels, 256, dtype=torch.int64, device=images.device)
    return counts.scatter_add_(2, levels, torch.ones_like(levels))


def _last_level(counts: Tensor) -> Tensor:
    """The highest level that occurs, int64 [batch, 3, 1]."""
    levels = torch.arange(256, device=counts.device)
    return torch.where(counts > 0, levels, 0).amax(dim=2, keepdim=True)


# Images: the result is the image.


def color(images: Tensor, arguments: Tensor) -> Tensor:
    """Grey blended with the image; the argument is the image's share (0: grey, 1: unchanged)."""
    grey = _grey(images)[:, None].float()
    return _blend(grey, images.float(), arguments[:, None, None, None]).to(torch.uint8)


def grayscale(images: Tensor, arguments: Tensor) -> Tensor:
    """The luma in all three channels."""
    return repeat(_grey(images).to(torch.uint8), "b h w -> b 3 h w")


def sharpness(images: Tensor, arguments: Tensor) -> Tensor:
    """The smoothed image blended with it; the argument is the image's share. The border is left."""
    wide = images.float()
    if min(wide.shape[-2:]) < 3:
        return images
    rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    inner = wide[..., 1:-1, 1:-1]
    smooth = wide.clone()
    # The 3x3 kernel of ones with 5 in the middle, over 13; whole numbers, never half way between.
    smooth[..., 1:-1, 1:-1] = torch.floor((around + 4 * inner) / 13 + 0.5)
    return _blend(smooth, wide, arguments[:, None, None, None]).to(torch.uint8)


def gaussian_blur(images: Tensor, arguments: Tensor) -> Tensor:
    """A true Gaussian; the argument is sigma [px], at most 2."""
    return blur(images, arguments)


def _grey(images: Tensor) -> Tensor:
    """ITU-R 601-2 luma in Pillow's fixed point, int32 [batch, height, width]."""
    red, green, blue = images.to(torch.int32).unbind(dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _blend(degenerate: Tensor, images: Tensor, share: Tensor) -> Tensor:
    """degenerate + share * (images - degenerate), cut to grey levels; float32 whole numbers."""
    return (degenerate + share * (images - degenerate)).clamp_(0, 255).floor_()


# Moves: pixels come from elsewhere.


def shear_x(images: Tensor, arguments: Tensor, canvas: Canvas) -> Tensor:
    """Row y is moved by argument * y pixels."""
    rows = torch.arange(images.shape[-2], device=images.device, dtype=torch.float64) + 0.5
    return _move_rows(images, arguments.double()[:, None] * rows, canvas)


def translate_x(images: Tensor, arguments: Tensor, canvas: Canvas) -> Tensor:
    """Moved to the left by argument * width pixels."""
    pixels = arguments.double()[:, None] * images.shape[-1]
    return _move_rows(images, pixels.expand(-1, images.shape[-2]), canvas)


def shear_y(images: Tensor, arguments: Tensor, canvas: Canvas) -> Tensor:
    """Column x is moved by argument * x pixels."""
    return shear_x(images.mT, arguments, canvas).mT


def translate_y(images: Tensor, arguments: Tensor, canvas: Canvas) -> Tensor:
    """Moved upwards by argument * height pixels."""
    return translate_x(images.mT, arguments, canvas).mT


def _move_rows(images: Tensor, offsets: Tensor, canvas: Canvas) -> Tensor:
    """Each pixel is read offsets [px] to the right of its place; float64 [batch, height].

    All pixels of a row lie between their neighbours by the same fraction, so a row is gathered
    once, with a margin for the filter, and its filter is four (or two) shifted products.
    """
    width = images.shape[-1]
    whole = torch.floor(offsets)
    taps = _taps(offsets - whole, canvas.interpolation)
    first = -1 if canvas.interpolation == "bicubic" else 0
    place = torch.arange(first, first + width + len(taps) - 1, device=images.device)
    place = (place + whole.long()[..., None]).clamp_(0, width - 1)
    lines = images.gather(3, place[:, None].expand(-1, images.shape[1], -1, -1)).float()
    moved = sum(
        weight[:, None, :, None] * lines[..., shift : shift + width]
        for shift, weight in enumerate(taps)
    )
    middle = torch.arange(width, device=images.device) + 0.5 + offsets[..., None]
    return _painted(moved, ((middle >= 0) & (middle < width))[:, None], canvas)


def rotate(images: Tensor, arguments: Tensor, canvas: Canvas) -> Tensor:
    """Turned counter-clockwise about the centre by the argument [degrees]."""
    height, width = images.shape[-2:]
    # As 24-bit numbers: a cosine's last bit differs between devices.
    angle = torch.deg2rad(arguments.double())
    cos, sin = (f(angle).float().double()[:, None, None] for f in (torch.cos, torch.sin))
    y = torch.arange(height, device=images.device, dtype=torch.float64)[:, None] + 0.5 - height / 2
    x = torch.arange(width, device=images.device, dtype=torch.float64) + 0.5 - width / 2
    across = cos * x - sin * y + width / 2
    down = sin * x + cos * y + height / 2
    inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
    across, down = across - 0.5, down - 0.5
    left, top = torch.floor(across), torch.floor(down)
    column_taps = _taps(across - left, canvas.interpolation)
    row_taps = _taps(down - top, canvas.interpolation)
    first = -1 if canvas.interpolation == "bicubic" else 0
    flat = images.flatten(2)
    turned = torch.zeros(images.shape, dtype=torch.float32, device=images.device)
    for row, row_weight in enumerate(row_taps, start=first):
        from_row = (top.long() + row).clamp_(0, height - 1) * width
        for column, column_weight in enumerate(column_taps, start=first):
            place = from_row + (left.long() + column).clamp_(0, width - 1)
            place = repeat(place, "b h w -> b c (h w)", c=images.shape[1])
            pixels = flat.gather(2, place).view(images.shape).float()
            turned += (row_weight * column_weight)[:, None] * pixels
    return _painted(turned, inside[:, None], canvas)


def _taps(fraction: Tensor, interpolation: Interpolation) -> list[Tensor]:
    """Weights of the neighbours of a place `fraction` behind the second (bicubic: Keys' cubic with
    a = -1, as Pillow moves pixels) or first (bilinear) of them, float32."""
    if interpolation == "bilinear":
        return [(1 - fraction).float(), fraction.float()]
    square, cube = fraction * fraction, fraction * fraction * fraction
    before = -fraction + 2 * square - cube
    here = 1 - 2 * square + cube
    behind = fraction + square - cube
    return [tap.float() for tap in (before, here, behind, cube - square)]


def _painted(moved: Tensor, inside: Tensor, canvas: Canvas) -> Tensor:
    """Grey levels of what was found inside; a hair is added where arithmetic fell short of one."""
    fill = canvas.fill.to(moved.device).float()[:, None, None]
    return torch.where(inside, (moved + _HAIR).clamp_(0, 255).floor_(), fill).to(torch.uint8)


_HAIR = 2.0**-13

Table = Callable[[Tensor, Tensor], Tensor]
Move = Callable[[Tensor, Tensor, Canvas], Tensor]

TABLES: dict[str, Table] = {
    "invert": invert,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "posterize": posterize,
    "brightness": brightness,
    "contrast": contrast,
    "auto_contrast": auto_contrast,
    "equalize": equalize,
}
"""(images uint8 [n, 3, h, w], arguments float32 [n]) -> new levels [n, 3, 256]."""

PICTURES: dict[str, Table] = {
    "color": color,
    "grayscale": grayscale,
    "sharpness": sharpness,
    "gaussian_blur": gaussian_blur,
}
"""(images, arguments) -> images."""

MOVES: dict[str, Move] = {
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": rotate,
}
"""(images, arguments, canvas) -> images."""

CODES = {name: code for code, name in enumerate(("identity", *TABLES, *PICTURES, *MOVES))}
"""The number of every operation by its name; 0 leaves an image as it is."""


def apply_operations(images: Tensor, codes: Tensor, arguments: Tensor, canvas: Canvas) -> Tensor:
    """One operation on each image.

    images: uint8 [batch, 3, height, width]. codes: int64 [batch] on the CPU, numbers of CODES: the
    images of one operation are worked on together, and nothing need wait to learn which they are.
    arguments: float32 [batch]. Returns uint8 of the same shape; the images are left as they are.
    """
    if not codes.any():
        return images
    result = images.clone()
    table_rows, tables = [], []
    for name, code in CODES.items():
        rows = (codes == code).nonzero().squeeze(1)
        if code == 0 or len(rows) == 0:
            continue
        rows = rows.to(images.device, non_blocking=True)
        some, few = images[rows], arguments[rows]
        if name in TABLES:
            table_rows.append(rows)
            tables.append(TABLES[name](some, few).to(torch.uint8))
        elif name in PICTURES:
            result[rows] = PICTURES[name](some, few)
        else:
            result[rows] = MOVES[name](some, few, canvas)
    if tables:
        rows = torch.cat(table_rows)
        result[rows] = _looked_up(images[rows], torch.cat(tables))
    return result


def _looked_up(images: Tensor, tables: Tensor) -> Tensor:
    """The level that a table [batch, 3, 256] has for each pixel."""
    found = tables.gather(2, images.flatten(2).long())
    return rearrange(found, "b c (h w) -> b c h w", h=images.shape[-2])
