"""The image operations of augmentation policies, on batches of uint8 images.

Each image has its own argument. The results equal Pillow's for a single image, exactly where
Pillow computes in integers or single precision. Only elementwise IEEE operations and integer sums
are used, so the result does not depend on the device or on the other images of the batch.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.functional import pad

from deit.config.field_types import Interpolation
from deit.core.tensors import to_device_async
from deit.datasets.resizing import blur, chunked


class FillOptions(NamedTuple):
    """Options of geometric operations.

    fill: uint8 [3], the color of pixels from outside the image.
    interpolation: between pixels.
    """

    fill: Tensor
    interpolation: Interpolation


# Each operation is (images uint8 [n, 3, h, w], arguments float32 [n]) -> uint8 images.
# On a CPU, comparisons and selections are several times slower than arithmetic, and so is a direct
# conversion from float32 to uint8: hence masks by shifting signs, and int16 as intermediate type.


def invert(images: Tensor, arguments: Tensor) -> Tensor:
    """Return 255 - value."""
    return ~images


def solarize(images: Tensor, arguments: Tensor) -> Tensor:
    """Invert values from the threshold (the argument, 0 ... 256) upward."""
    levels = images.to(torch.int16)
    below = (levels - _per_image(arguments.to(torch.int16))) >> 15  # -1 (all bits set) or 0
    return (levels ^ (~below & 255)).to(torch.uint8)


def solarize_add(images: Tensor, arguments: Tensor) -> Tensor:
    """Add the argument (0 ... 255) to values below 128, and clip at 255."""
    levels = images.to(torch.int16)
    below = (levels - 128) >> 15
    added = levels + (below & _per_image(arguments.to(torch.int16)))
    return added.clamp_max_(255).to(torch.uint8)


def posterize(images: Tensor, arguments: Tensor) -> Tensor:
    """Keep the highest bits of each value; the argument is their number, 1 ... 8."""
    bits = arguments.clamp(1, 8).long()
    return images & _per_image((256 - (1 << (8 - bits))).to(torch.uint8))


def brightness(images: Tensor, arguments: Tensor) -> Tensor:
    """Blend black with the image; the argument is the factor of the image (1: unchanged)."""
    return _to_uint8(images.float().mul_(_per_image(arguments)))


def contrast(images: Tensor, arguments: Tensor) -> Tensor:
    """Blend the image's mean gray with the image; the argument is the factor of the image."""
    gray = _gray(images).flatten(1)
    num_pixels = gray.shape[1]
    mean = ((2 * gray.sum(dim=1) + num_pixels) // (2 * num_pixels)).float()  # rounded half up
    return _blend(_per_image(mean), images.float(), arguments)


def color(images: Tensor, arguments: Tensor) -> Tensor:
    """Blend gray with the image; the argument is the factor of the image (1: unchanged)."""
    return _blend(_gray(images)[:, None].float(), images.float(), arguments)


def grayscale(images: Tensor, arguments: Tensor) -> Tensor:
    """Return the luma in all three channels; the argument is not used."""
    return repeat(_gray(images).to(torch.uint8), "b h w -> b 3 h w")


def sharpness(images: Tensor, arguments: Tensor) -> Tensor:
    """Blend the smoothed image with the image; the argument is the factor of the image.

    Pixels at the border are not smoothed.
    """
    wide = images.float()
    if min(wide.shape[-2:]) < 3:
        return images
    rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = wide.clone()
    # A 3x3 kernel of ones with 5 in the center, divided by 13; multiples of 1/13 have no ties.
    inner = around.add_(wide[..., 1:-1, 1:-1] * 4).div_(_thirteen(images)).add_(0.5).floor_()
    smooth[..., 1:-1, 1:-1] = inner
    return _blend(smooth, wide, arguments)


def _thirteen(images: Tensor) -> Tensor:
    # A tensor, because CUDA divides by a Python number by multiplying with its reciprocal.
    return torch.full((1,), 13.0, device=images.device)


def gaussian_blur(images: Tensor, arguments: Tensor) -> Tensor:
    """Blur by an exact Gaussian; the argument is sigma [px], at most 2."""
    return blur(images, arguments)


def auto_contrast(images: Tensor, arguments: Tensor) -> Tensor:
    """Stretch each channel so that its darkest pixel is 0 and its brightest 255."""
    lowest, highest = (channel.double()[..., None] for channel in images.flatten(2).aminmax(dim=2))
    # Not `255 / tensor`, which torch computes as a product with a rounded reciprocal.
    scale = torch.full_like(lowest, 255).div_(highest - lowest)
    levels = torch.arange(256, device=images.device)
    stretched = (levels * scale + -lowest * scale).clamp(0, 255).to(torch.uint8)
    return _look_up(images, torch.where(highest > lowest, stretched, levels.to(torch.uint8)))


def equalize(images: Tensor, arguments: Tensor) -> Tensor:
    """Equalize each channel's histogram, with Pillow's integer steps."""
    levels = torch.arange(256, device=images.device)
    counts = _histogram(images)
    last = counts.gather(2, torch.where(counts > 0, levels, 0).amax(dim=2, keepdim=True))
    step = (counts.sum(dim=2, keepdim=True) - last) // 255
    before = counts.cumsum(dim=2) - counts
    flat = ((step // 2 + before) // step.clamp_min(1)).clamp_max(255)
    return _look_up(images, torch.where(step > 0, flat, levels).to(torch.uint8))


def _histogram(images: Tensor) -> Tensor:
    """Count the pixels of each value, int64 [batch, 3, 256]."""
    batch, channels = images.shape[:2]
    levels = images.flatten(2).long()
    counts = torch.zeros(batch, channels, 256, dtype=torch.int64, device=images.device)
    return counts.scatter_add_(2, levels, torch.ones_like(levels))


def _look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replace each pixel by its value in a table [batch, 3, 256]."""
    values = tables.gather(2, images.flatten(2).long())
    return rearrange(values, "b c (h w) -> b c h w", h=images.shape[-2])


def _gray(images: Tensor) -> Tensor:
    """Return the ITU-R 601-2 luma in Pillow's fixed point, int32 [batch, height, width]."""
    red, green, blue = images.to(torch.int32).unbind(dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Return degenerate + factor * (images - degenerate), clipped to uint8."""
    return _to_uint8((images - degenerate).mul_(_per_image(factor)).add_(degenerate))


def _per_image(values: Tensor) -> Tensor:
    """Return a value for each image, [batch, 1, 1, 1]."""
    return values[:, None, None, None]


def _to_uint8(levels: Tensor) -> Tensor:
    """Clip float32 to 0 ... 255 and truncate it to uint8."""
    return levels.clamp_(0, 255).to(torch.int16).to(torch.uint8)


# Geometric operations.


def shear_x(images: Tensor, arguments: Tensor, options: FillOptions) -> Tensor:
    """Shift row y by argument * y pixels."""
    rows = torch.arange(images.shape[-2], device=images.device, dtype=torch.float64) + 0.5
    return _shift_rows(images, arguments.double()[:, None] * rows, options)


def translate_x(images: Tensor, arguments: Tensor, options: FillOptions) -> Tensor:
    """Shift to the left by argument * width pixels."""
    pixels = arguments.double()[:, None] * images.shape[-1]
    return _shift_rows(images, pixels.expand(-1, images.shape[-2]), options)


def shear_y(images: Tensor, arguments: Tensor, options: FillOptions) -> Tensor:
    """Shift column x by argument * x pixels."""
    return shear_x(images.mT, arguments, options).mT


def translate_y(images: Tensor, arguments: Tensor, options: FillOptions) -> Tensor:
    """Shift upward by argument * height pixels."""
    return translate_x(images.mT, arguments, options).mT


def _shift_rows(images: Tensor, offsets: Tensor, options: FillOptions) -> Tensor:
    """Read each pixel `offsets` [px] to the right of its position; float64 [batch, height].

    All pixels of a row have the same fractional offset. So each row is gathered once, with a margin
    for the filter, which is then a sum of four (or two) shifted products.
    """
    width = images.shape[-1]
    whole = torch.floor(offsets)
    taps = _taps(offsets - whole, options.interpolation)
    first = -1 if options.interpolation == "bicubic" else 0
    columns = torch.arange(first, first + width + len(taps) - 1, device=images.device)
    columns = (columns + whole.long()[..., None]).clamp_(0, width - 1)
    lines = images.gather(3, columns[:, None].expand(-1, images.shape[1], -1, -1)).float()
    moved = taps[0][:, None, :, None] * lines[..., :width]
    for shift, weight in enumerate(taps[1:], start=1):
        moved += weight[:, None, :, None] * lines[..., shift : shift + width]
    middle = torch.arange(width, device=images.device) + 0.5 + offsets[..., None]
    return _fill_outside(moved, (middle >= 0) & (middle < width), options)


def rotate(images: Tensor, arguments: Tensor, options: FillOptions) -> Tensor:
    """Rotate counterclockwise about the center by the argument [degrees]."""
    height, width = images.shape[-2:]
    # Rounded to float32, because the last bit of a float64 cosine differs between devices.
    angle = torch.deg2rad(arguments.double())
    cos, sin = (f(angle).float().double()[:, None, None] for f in (torch.cos, torch.sin))
    y = torch.arange(height, device=images.device, dtype=torch.float64)[:, None] + 0.5 - height / 2
    x = torch.arange(width, device=images.device, dtype=torch.float64) + 0.5 - width / 2
    across = cos * x - sin * y + width / 2
    down = sin * x + cos * y + height / 2
    inside = (across >= 0) & (across < width) & (down >= 0) & (down < height)
    across, down = across - 0.5, down - 0.5
    left, top = torch.floor(across), torch.floor(down)
    column_taps = _taps(across - left, options.interpolation)
    row_taps = _taps(down - top, options.interpolation)
    # With a repeated border, a neighbor has the same index in a shifted view.
    margin = len(row_taps) // 2
    framed = pad(images.float(), (margin,) * 4, mode="replicate")
    frame = framed.shape[-1]
    first = (top.long() + 1).clamp_(0, height) * frame + (left.long() + 1).clamp_(0, width)
    first = first.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    flat = framed.flatten(2)
    turned = torch.zeros(images.shape, dtype=torch.float32, device=images.device)
    for row, row_weight in enumerate(row_taps):
        for column, column_weight in enumerate(column_taps):
            neighbors = flat[..., row * frame + column :].gather(2, first).view(images.shape)
            turned += neighbors.mul_((row_weight * column_weight)[:, None])
    return _fill_outside(turned, inside, options)


def _taps(fraction: Tensor, interpolation: Interpolation) -> list[Tensor]:
    """Return the float32 weights of the neighbors of a position between two pixels.

    fraction: distance from the first (bilinear) or second (bicubic) neighbor, in [0, 1). Bicubic
    is Keys' cubic with a = -1, as in Pillow's transforms.
    """
    if interpolation == "bilinear":
        return [(1 - fraction).float(), fraction.float()]
    square, cube = fraction * fraction, fraction * fraction * fraction
    before = -fraction + 2 * square - cube
    center = 1 - 2 * square + cube
    after = fraction + square - cube
    return [tap.float() for tap in (before, center, after, cube - square)]


def _fill_outside(moved: Tensor, inside: Tensor, options: FillOptions) -> Tensor:
    """Convert to uint8, with the fill color outside of the mask `inside` [batch, height, width]."""
    inside = inside[:, None].float()
    fill = to_device_async(options.fill, moved.device).float()[:, None, None]
    # Float rounding can give slightly less than an integer, which would be truncated.
    moved = moved.add_(_EPSILON).mul_(inside).add_((1 - inside) * fill)
    return _to_uint8(moved)


_EPSILON = 2.0**-13

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
"""Operations on pixel values: (images, arguments) -> images."""

MOVES: dict[str, Move] = {
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": rotate,
}
"""Geometric operations: (images, arguments, options) -> images."""

CODES = {name: code for code, name in enumerate(("identity", *LEVELS, *MOVES))}
"""The code of each operation; 0 does not change an image."""


def apply_operations(
    images: Tensor, codes: Tensor, arguments: Tensor, options: FillOptions
) -> Tensor:
    """Apply one operation to each image.

    images: uint8 [batch, 3, height, width], not changed. codes: int64 [batch], values of CODES, on
    the CPU, so that images can be grouped by operation without waiting for the device. arguments:
    float32 [batch]. Return uint8 of the same shape.

    >>> options = FillOptions(torch.zeros(3, dtype=torch.uint8), "bicubic")
    >>> images = torch.full((1, 3, 4, 4), 200, dtype=torch.uint8)
    >>> invert = torch.tensor([CODES["invert"]])
    >>> apply_operations(images, invert, torch.zeros(1), options).unique().tolist()
    [55]
    """
    if not codes.any():
        return images
    order = codes.argsort(stable=True)
    counts = torch.bincount(codes, minlength=len(CODES)).tolist()
    rows = to_device_async(order, images.device).split(counts)
    parts = []
    for name, indices in zip(CODES, rows):
        if len(indices) == 0:
            continue
        part, strengths = images.index_select(0, indices), arguments.index_select(0, indices)
        if name in LEVELS:
            part = chunked(LEVELS[name], part, strengths)
        elif name in MOVES:
            part = chunked(partial(MOVES[name], options=options), part, strengths)
        parts.append(part)
    # Gathering in the original order is faster than writing to it.
    inverse = to_device_async(order.argsort(), images.device)
    return torch.cat(parts).index_select(0, inverse)
