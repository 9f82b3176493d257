"""Resizing in whole numbers: the same grey levels on every device and at every batch size.

A float32 holds 24 binary digits. Filter weights are rounded to multiples of 2**-15 and multiplied
by grey levels, so that every partial sum of a matrix product is a multiple of 2**-15 below 2**9 and
held exactly: the order of summation, which differs between devices and batch sizes, cannot matter.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor

from deit.config.fields import Interpolation

_ONE = 2.0**15  # 255 * 1.3 (the absolute weights of a bicubic filter) is below 2**9
MAX_SIGMA = 2.0  # of a blur [px]; its filter is cut off at four sigmas
_REACH = int(4 * MAX_SIGMA)
_BANK_BYTES = 80 * 2**20  # sources of up to 64 px resized to their own size


def resize_boxes(
    images: Tensor,
    boxes: Tensor,
    size: int,
    interpolation: Interpolation,
    flipped: Tensor | None = None,
) -> Tensor:
    """Cut a box out of each image and resize it with antialiasing, as Pillow does on the cut box.

    images: uint8 [batch, 3, height, width]. boxes: int64 [batch, 4], top, left, height, width.
    flipped: bool [batch], which results are mirrored left to right; that costs nothing here.
    Returns uint8 [batch, 3, size, size].
    """
    height, width = images.shape[-2:]
    top, left, box_height, box_width = boxes.unbind(dim=1)
    rows = _filters(top, box_height, height, size, interpolation)
    columns = _filters(left, box_width, width, size, interpolation, flipped)
    return chunked(_resample, images, rows, columns)


def resize(images: Tensor, height: int, width: int, interpolation: Interpolation) -> Tensor:
    """Resize whole images with antialiasing, uint8 [batch, 3, height, width]."""
    old_height, old_width = images.shape[-2:]
    if (old_height, old_width) == (height, width):
        return images
    start = torch.zeros(1, dtype=torch.int64, device=images.device)
    rows = _filter(start, start + old_height, old_height, height, interpolation)
    columns = _filter(start, start + old_width, old_width, width, interpolation)
    number = len(images)
    return _resample(images, rows.expand(number, -1, -1), columns.expand(number, -1, -1))


def blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Blur each image by a Gaussian of its own sigma [px]; beyond the border its edge goes on.

    images: uint8 [batch, 3, height, width]. sigmas: [batch]. Returns uint8 of the same shape.
    """
    height, width = images.shape[-2:]
    rows = _gaussian(sigmas, height)
    columns = rows if height == width else _gaussian(sigmas, width)
    return _resample(images, rows, columns)


def _resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """First along the rows of pixels, then along the columns, rounding to grey levels twice.

    rows, columns: multiples of 2**-15, float32 [batch, target, source].
    """
    channels = images.shape[1]
    half = torch.full((1, 1, 1), 0.5, device=images.device)  # rounds, with the floor that follows
    lines = rearrange(images, "b c h w -> b h c w").float().flatten(1, 2)
    with _full_precision(images.device.type):
        across = torch.baddbmm(half, lines, columns.mT).clamp_(0, 255).floor_()
        stacked = rearrange(across, "b (h c) w -> b h (c w)", c=channels)
        down = torch.baddbmm(half, rows, stacked).clamp_(0, 255)
    levels = down.to(torch.int16).to(torch.uint8)  # faster in two steps
    return rearrange(levels, "b h (c w) -> b c h w", c=channels).contiguous()


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Products of 24 bits, whatever the run allows its networks (bf16, TF32)."""
    allowed = torch.get_float32_matmul_precision()
    if allowed != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if allowed != "highest":
            torch.set_float32_matmul_precision(allowed)


def _filters(
    start: Tensor,
    length: Tensor,
    source: int,
    target: int,
    interpolation: Interpolation,
    flipped: Tensor | None = None,
) -> Tensor:
    """Weights of a batch of boxes, from a bank of all possible ones where that is small."""
    if source * (source + 1) // 2 * source * target * 4 * 2 > _BANK_BYTES:
        weights = _filter(start, length, source, target, interpolation)
        if flipped is None:
            return weights
        return torch.where(flipped[:, None, None], weights.flip(1), weights)
    bank = _bank(source, target, interpolation, start.device)
    # Boxes ordered by length: source boxes of length 1, source - 1 of length 2, ...
    before = (length - 1) * (2 * source - length + 2) // 2
    entry = before + start
    if flipped is not None:
        entry = entry + flipped * (len(bank) // 2)
    return bank.index_select(0, entry)


@lru_cache(maxsize=2)
def _bank(source: int, target: int, interpolation: Interpolation, device: torch.device) -> Tensor:
    """The filters of every box within `source` pixels, ordered by length and start, then all of
    them mirrored: float32 [source * (source + 1), target, source]."""
    lengths = torch.arange(1, source + 1, device=device)
    length = lengths.repeat_interleave(source + 1 - lengths)
    start = torch.cat([torch.arange(source + 1 - n, device=device) for n in range(1, source + 1)])
    weights = _filter(start, length, source, target, interpolation)
    return torch.cat([weights, weights.flip(1)])


def _filter(
    start: Tensor, length: Tensor, source: int, target: int, interpolation: Interpolation
) -> Tensor:
    """Weights [batch, target, source] that resample pixels start ... start + length to target.

    The filter is widened when the image shrinks, cut off at the ends of the box and normalised.
    """
    # In double precision, and dividing by a tensor (a GPU divides by a number by multiplying with
    # its reciprocal): what differs in the last bit is the same multiple of 2**-15.
    sides = torch.full_like(length, target, dtype=torch.float64)
    step = (length / sides)[:, None, None]
    steps = torch.arange(target, device=start.device, dtype=torch.float64)
    position = torch.arange(source, device=start.device, dtype=torch.float64) + 0.5
    begin, end = start[:, None, None], (start + length)[:, None, None]
    centre = begin + (steps[None, :, None] + 0.5) * step
    distance = (position - centre).abs() / step.clamp_min(1)
    weights = _kernel(distance, interpolation) * ((position > begin) & (position < end))
    return _rounded(weights / weights.sum(dim=-1, keepdim=True))


def _kernel(distance: Tensor, interpolation: Interpolation) -> Tensor:
    """The triangle, or Keys' cubic with a = -0.5, at a distance from its centre."""
    if interpolation == "bilinear":
        return (1 - distance).clamp_min(0)
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def _gaussian(sigmas: Tensor, extent: int) -> Tensor:
    """Weights [batch, extent, extent] of a Gaussian cut off at four sigmas."""
    place = torch.arange(extent, device=sigmas.device, dtype=torch.float64)
    taps = torch.arange(-_REACH, extent + _REACH, device=sigmas.device, dtype=torch.float64)
    distance = (taps - place[:, None]) / sigmas.double()[:, None, None]
    weights = torch.exp(-0.5 * distance * distance) * (distance.abs() <= 4)
    # Beyond a border lies the value at the border: those weights are added up there.
    inside = weights[..., _REACH:-_REACH].clone()
    inside[..., 0] += weights[..., :_REACH].sum(dim=-1)
    inside[..., -1] += weights[..., -_REACH:].sum(dim=-1)
    return _rounded(inside / inside.sum(dim=-1, keepdim=True))


def _rounded(weights: Tensor) -> Tensor:
    """The nearest multiples of 2**-15, float32; a hair more, so that halves do not hang on the last
    bit."""
    return (torch.round(weights * _ONE + 2.0**-20) * (1 / _ONE)).float()


_BYTES = 2**18  # of uint8; the same in single precision is a megabyte


def chunked(work: Callable[..., Tensor], images: Tensor, *others: Tensor) -> Tensor:
    """work(images, *others) on a GPU; on a processor the same, put together from pieces.

    images: uint8 [batch, ...]. others: [batch, ...] each. work must treat each image alone.
    """
    number = max(_BYTES // max(images[:1].numel(), 1), 1)
    if images.is_cuda or len(images) <= number:
        return work(images, *others)
    parts = zip(*(values.split(number) for values in (images, *others)))
    return torch.cat([work(*part) for part in parts])
