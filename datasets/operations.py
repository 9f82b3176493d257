"""The image operations of augmentation policies, on uint8 images, one argument for each image.

Each does to a batch what Pillow does to one picture, to the grey level where Pillow's arithmetic
is whole numbers or single precision. Only IEEE operations element by element and sums of whole
numbers are used, so the result depends neither on the device nor on who else is in the batch.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.functional import pad

from deit.config.fields import Interpolation
from deit.core.tensors import to_device_async
from deit.datasets.resizing import blur, chunked


class FillOptions(NamedTuple):
    """What a moved image is painted on.

    fill: uint8 [3], the colour of what moves in from outside.
    interpolation: how pixels between pixels are found.
    """

    fill: Tensor
    interpolation: Interpolation


# A picture at a time: each is (images uint8 [n, 3, h, w], arguments float32 [n]) -> images.
# Comparisons and selections are several times slower than arithmetic on a CPU, and so is turning
# single precision into bytes at once: hence masks by shifting signs, and 16-bit numbers on the way.


def invert(images: Tensor, arguments: Tensor) -> Tensor:
    """255 - level."""
    return ~images


def solarize(images: Tensor, arguments: Tensor) -> Tensor:
    """Levels from the argument (a threshold in 0 ... 256) upwards are inverted."""
    levels = images.to(torch.int16)
    below = (levels - _each(arguments.to(torch.int16))) >> 15  # all ones where it is, else zero
    return (levels ^ (~below & 255)).to(torch.uint8)


def solarize_add(images: Tensor, arguments: Tensor) -> Tensor:
    """The argument (in 0 ... 255) is added to levels below 128, at most 255."""
    levels = images.to(torch.int16)
    below = (levels - 128) >> 15
    added = levels + (below & _each(arguments.to(torch.int16)))
    return added.clamp_max_(255).to(torch.uint8)


def posterize(images: Tensor, arguments: Tensor) -> Tensor:
    """The argument is the number of bits kept, 1 ... 8; fewer than 1 would leave black."""
    bits = arguments.clamp(1, 8).long()
    return images & _each((256 - (1 << (8 - bits))).to(torch.uint8))


def brightness(images: Tensor, arguments: Tensor) -> Tensor:
    """Black blended with the image; the argument is the image's share (1: unchanged)."""
    return _bytes(images.float().mul_(_each(arguments)))


def contrast(images: Tensor, arguments: Tensor) -> Tensor:
    """The mean grey of the image blended with it; the argument is the image's share."""
    grey = _grey(images).flatten(1)
    number = grey.shape[1]
    mean = ((2 * grey.sum(dim=1) + number) // (2 * number)).float()  # rounded, half upwards
    return _blend(_each(mean), images.float(), arguments)


def color(images: Tensor, arguments: Tensor) -> Tensor:
    """Grey blended with the image; the argument is the image's share (0: grey, 1: unchanged)."""
    return _blend(_grey(images)[:, None].float(), images.float(), arguments)


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
    smooth = wide.clone()
    # The 3x3 kernel of ones with 5 in the middle, over 13; whole numbers, never half way between.
    inner = around.add_(wide[..., 1:-1, 1:-1] * 4).div_(_thirteen(images)).add_(0.5).floor_()
    smooth[..., 1:-1, 1:-1] = inner
    return _blend(smooth, wide, arguments)


def _thirteen(images: Tensor) -> Tensor:
    # As a tensor: CUDA divides by a number by multiplying with its rounded reciprocal.
    return torch.full((1,), 13.0, device=images.device)


def gaussian_blur(images: Tensor, arguments: Tensor) -> Tensor:
    """A true Gaussian; the argument is sigma [px], at most 2."""
    return blur(images, arguments)


def auto_contrast(images: Tensor, arguments: Tensor) -> Tensor:
    """Each channel stretched so that its darkest pixel is 0 and its brightest 255."""
    lowest, highest = (found.double()[..., None] for found in images.flatten(2).aminmax(dim=2))
    # Not `255 / tensor`: torch turns that into a product with a rounded reciprocal.
    scale = torch.full_like(lowest, 255).div_(highest - lowest)
    levels = torch.arange(256, device=images.device)
    stretched = (levels * scale + -lowest * scale).clamp(0, 255).to(torch.uint8)
    return _looked_up(images, torch.where(highest > lowest, stretched, levels.to(torch.uint8)))


def equalize(images: Tensor, arguments: Tensor) -> Tensor:
    """Each channel's histogram flattened, with Pillow's whole-number steps."""
    levels = torch.arange(256, device=images.device)
    counts = _histogram(images)
    last = counts.gather(2, torch.where(counts > 0, levels, 0).amax(dim=2, keepdim=True))
    step = (counts.sum(dim=2, keepdim=True) - last) // 255
    before = counts.cumsum(dim=2) - counts
    flat = ((step // 2 + before) // step.clamp_min(1)).clamp_max(255)
    return _looked_up(images, torch.where(step > 0, flat, levels).to(torch.uint8))


def _histogram(images: Tensor) -> Tensor:
    """Pixels of each level, int64 [batch, 3, 256]."""
    number, channels = images.shape[:2]
    levels = images.flatten(2).long()
    counts = torch.zeros(number, channels, 256, dtype=torch.int64, device=images.device)
    return counts.scatter_add_(2, levels, torch.ones_like(levels))


def _looked_up(images: Tensor, tables: Tensor) -> Tensor:
    """The level that a table [batch, 3, 256] has for each pixel."""
    found = tables.gather(2, images.flatten(2).long())
    return rearrange(found, "b c (h w) -> b c h w", h=images.shape[-2])


def _grey(images: Tensor) -> Tensor:
    """ITU-R 601-2 luma in Pillow's fixed point, int32 [batch, height, width]."""
    red, green, blue = images.to(torch.int32).unbind(dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _blend(degenerate: Tensor, images: Tensor, share: Tensor) -> Tensor:
    """degenerate + share * (images - degenerate), cut to grey levels."""
    return _bytes((images - degenerate).mul_(_each(share)).add_(degenerate))


def _each(values: Tensor) -> Tensor:
    """A value for each image, [batch, 1, 1, 1]."""
    return values[:, None, None, None]


def _bytes(levels: Tensor) -> Tensor:
    """Single precision cut to grey levels, uint8."""
    return levels.clamp_(0, 255).to(torch.int16).to(torch.uint8)


# Moves: pixels come from elsewhere.


def shear_x(images: Tensor, arguments: Tensor, canvas: FillOptions) -> Tensor:
    """Row y is moved by argument * y pixels."""
    rows = torch.arange(images.shape[-2], device=images.device, dtype=torch.float64) + 0.5
    return _move_rows(images, arguments.double()[:, None] * rows, canvas)


def translate_x(images: Tensor, arguments: Tensor, canvas: FillOptions) -> Tensor:
    """Moved to the left by argument * width pixels."""
    pixels = arguments.double()[:, None] * images.shape[-1]
    return _move_rows(images, pixels.expand(-1, images.shape[-2]), canvas)


def shear_y(images: Tensor, arguments: Tensor, canvas: FillOptions) -> Tensor:
    """Column x is moved by argument * x pixels."""
    return shear_x(images.mT, arguments, canvas).mT


def translate_y(images: Tensor, arguments: Tensor, canvas: FillOptions) -> Tensor:
    """Moved upwards by argument * height pixels."""
    return translate_x(images.mT, arguments, canvas).mT


def _move_rows(images: Tensor, offsets: Tensor, canvas: FillOptions) -> Tensor:
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
    moved = taps[0][:, None, :, None] * lines[..., :width]
    for shift, weight in enumerate(taps[1:], start=1):
        moved += weight[:, None, :, None] * lines[..., shift : shift + width]
    middle = torch.arange(width, device=images.device) + 0.5 + offsets[..., None]
    return _painted(moved, (middle >= 0) & (middle < width), canvas)


def rotate(images: Tensor, arguments: Tensor, canvas: FillOptions) -> Tensor:
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
    # With the border repeated around the image, a neighbour is the same place in a shifted view.
    margin = len(row_taps) // 2
    framed = pad(images.float(), (margin,) * 4, mode="replicate")
    frame = framed.shape[-1]
    first = (top.long() + 1).clamp_(0, height) * frame + (left.long() + 1).clamp_(0, width)
    first = first.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    flat = framed.flatten(2)
    turned = torch.zeros(images.shape, dtype=torch.float32, device=images.device)
    for row, row_weight in enumerate(row_taps):
        for column, column_weight in enumerate(column_taps):
            neighbours = flat[..., row * frame + column :].gather(2, first).view(images.shape)
            turned += neighbours.mul_((row_weight * column_weight)[:, None])
    return _painted(turned, inside, canvas)


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


def _painted(moved: Tensor, inside: Tensor, canvas: FillOptions) -> Tensor:
    """Grey levels of what was found inside [batch, height, width], the fill elsewhere."""
    inside = inside[:, None].float()
    fill = to_device_async(canvas.fill, moved.device).float()[:, None, None]
    # A hair is added where single precision fell short of a whole level.
    moved = moved.add_(_HAIR).mul_(inside).add_((1 - inside) * fill)
    return _bytes(moved)


_HAIR = 2.0**-13

Operation = Callable[[Tensor, Tensor], Tensor]
Move = Callable[[Tensor, Tensor, FillOptions], Tensor]

LEVELS: dict[str, Operation] = {
    "invert": invert,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "posterize": posterize,
    "brightness": brightness,
    "contrast": contrast,
    "auto_contrast": auto_contrast,
    "equalize": equalize,
    "color": color,
    "grayscale": grayscale,
    "sharpness": sharpness,
    "gaussian_blur": gaussian_blur,
}
"""What changes the levels of pixels: (images, arguments) -> images."""

MOVES: dict[str, Move] = {
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": rotate,
}
"""What moves pixels: (images, arguments, canvas) -> images."""

CODES = {name: code for code, name in enumerate(("identity", *LEVELS, *MOVES))}
"""The number of every operation by its name; 0 leaves an image as it is."""


def apply_operations(
    images: Tensor, codes: Tensor, arguments: Tensor, canvas: FillOptions
) -> Tensor:
    """One operation on each image.

    images: uint8 [batch, 3, height, width]. codes: int64 [batch] on the CPU, numbers of CODES: the
    images of one operation are worked on together, and nothing need wait to learn which they are.
    arguments: float32 [batch]. Returns uint8 of the same shape; the images are left as they are.
    """
    if not codes.any():
        return images
    order = codes.argsort(stable=True)
    counts = torch.bincount(codes, minlength=len(CODES)).tolist()
    rows = to_device_async(order, images.device).split(counts)
    parts = []
    for name, some in zip(CODES, rows):
        if len(some) == 0:
            continue
        few, strengths = images.index_select(0, some), arguments.index_select(0, some)
        if name in LEVELS:
            few = chunked(LEVELS[name], few, strengths)
        elif name in MOVES:
            few = chunked(partial(MOVES[name], canvas=canvas), few, strengths)
        parts.append(few)
    # Back into their places: faster than writing into them.
    places = to_device_async(order.argsort(), images.device)
    return torch.cat(parts).index_select(0, places)
