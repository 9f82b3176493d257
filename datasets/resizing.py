"""Resizing in exact arithmetic: the same uint8 images on every device and at every batch size.

A float32 has 24 binary digits. Filter weights are rounded to multiples of 2**-15 and multiplied by
uint8 values, so every partial sum of a matrix product is a multiple of 2**-15 below 2**9 and
therefore exact. So the order of summation, which differs between devices and batch sizes, has no
effect.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from einops import rearrange
from torch import Tensor

from deit.config.field_types import Interpolation
from deit.core.tensors import tensor_cache

_SCALE = 2.0**15  # 255 * 1.3 (the sum of a bicubic filter's absolute weights) is below 2**9
MAX_SIGMA = 2.0  # of a blur [px]; its filter is truncated at four sigmas
_REACH = int(4 * MAX_SIGMA)
_BANK_BYTES = 80 * 2**20  # enough for sources of up to 64 px resized to their own size


def resize_boxes(
    images: Tensor,
    boxes: Tensor,
    size: int,
    interpolation: Interpolation,
    flipped: Tensor | None = None,
) -> Tensor:
    """Crop a box from each image and resize it with antialiasing, as Pillow resizes the crop.

    images: uint8 [batch, 3, height, width]. boxes: int64 [batch, 4], top, left, height, width [px].
    flipped: bool [batch], the results to flip horizontally, at no cost. Return uint8 [batch, 3,
    size, size].
    """
    height, width = images.shape[-2:]
    top, left, box_height, box_width = boxes.unbind(dim=1)
    rows = _filters(top, box_height, height, size, interpolation)
    columns = _filters(left, box_width, width, size, interpolation, flipped)
    return chunked(_resample, images, rows, columns)


def resize(images: Tensor, height: int, width: int, interpolation: Interpolation) -> Tensor:
    """Resize uint8 images [batch, 3, height, width] with antialiasing, to height x width px.

    Pixels differ from Pillow's by at most two levels. Images of this size are returned unchanged.

    >>> resize(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 4, 6, "bicubic").shape
    torch.Size([2, 3, 4, 6])
    """
    old_height, old_width = images.shape[-2:]
    if (old_height, old_width) == (height, width):
        return images
    start = torch.zeros(1, dtype=torch.int64, device=images.device)
    rows = _filter(start, start + old_height, old_height, height, interpolation)
    columns = _filter(start, start + old_width, old_width, width, interpolation)
    num_images = len(images)
    return _resample(images, rows.expand(num_images, -1, -1), columns.expand(num_images, -1, -1))


def blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Blur each image by a Gaussian of its own sigma [px]; the border is repeated.

    images: uint8 [batch, 3, height, width]. sigmas: float [batch], at most MAX_SIGMA. Return uint8
    of the same shape.
    """
    height, width = images.shape[-2:]
    rows = _gaussian(sigmas, height)
    columns = rows if height == width else _gaussian(sigmas, width)
    return _resample(images, rows, columns)


def _resample(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resample horizontally, then vertically, rounding to integers after each pass.

    rows, columns: filter weights, multiples of 2**-15, float32 [batch, target, source].
    """
    channels = images.shape[1]
    half = torch.full((1, 1, 1), 0.5, device=images.device)  # for rounding by the following floor
    lines = rearrange(images, "b c h w -> b h c w").float().flatten(1, 2)
    with _full_precision(images.device.type):
        across = torch.baddbmm(half, lines, columns.mT).clamp_(0, 255).floor_()
        stacked = rearrange(across, "b (h c) w -> b h (c w)", c=channels)
        down = torch.baddbmm(half, rows, stacked).clamp_(0, 255)
    levels = down.to(torch.int16).to(torch.uint8)  # faster in two steps
    return rearrange(levels, "b h (c w) -> b c h w", c=channels).contiguous()


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Compute matrix products in full float32, even if the run allows bf16 or TF32."""
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
    """Return the filter weights of a batch of boxes, from a bank of all boxes if that is small."""
    if source * (source + 1) // 2 * source * target * 4 * 2 > _BANK_BYTES:
        weights = _filter(start, length, source, target, interpolation)
        if flipped is None:
            return weights
        return torch.where(flipped[:, None, None], weights.flip(1), weights)
    bank = _bank(source, target, interpolation, start.device)
    # Ordered by length: `source` boxes of length 1, source - 1 boxes of length 2, ...
    before = (length - 1) * (2 * source - length + 2) // 2
    entry = before + start
    if flipped is not None:
        entry = entry + flipped * (len(bank) // 2)
    return bank.index_select(0, entry)


@tensor_cache(maxsize=2)
def _bank(source: int, target: int, interpolation: Interpolation, device: torch.device) -> Tensor:
    """Return the filters of all boxes within `source` pixels, float32 [boxes, target, source].

    They are ordered by length and start; then all of them follow flipped, in total source *
    (source + 1).
    """
    lengths = torch.arange(1, source + 1, device=device)
    length = lengths.repeat_interleave(source + 1 - lengths)
    start = torch.cat([torch.arange(source + 1 - n, device=device) for n in range(1, source + 1)])
    weights = _filter(start, length, source, target, interpolation)
    return torch.cat([weights, weights.flip(1)])


def _filter(
    start: Tensor, length: Tensor, source: int, target: int, interpolation: Interpolation
) -> Tensor:
    """Return weights [batch, target, source] that resample pixels start ... start + length.

    The filter is widened for downscaling, truncated at the ends of the box and normalized.
    """
    # In float64, and dividing by a tensor (a GPU divides by a Python number by multiplying with
    # its reciprocal): values that differ in the last bit round to the same multiple of 2**-15.
    sides = torch.full_like(length, target, dtype=torch.float64)
    step = (length / sides)[:, None, None]
    steps = torch.arange(target, device=start.device, dtype=torch.float64)
    position = torch.arange(source, device=start.device, dtype=torch.float64) + 0.5
    begin, end = start[:, None, None], (start + length)[:, None, None]
    center = begin + (steps[None, :, None] + 0.5) * step
    distance = (position - center).abs() / step.clamp_min(1)
    weights = _kernel(distance, interpolation) * ((position > begin) & (position < end))
    return _round_weights(weights / weights.sum(dim=-1, keepdim=True))


def _kernel(distance: Tensor, interpolation: Interpolation) -> Tensor:
    """Return the triangle filter, or Keys' cubic with a = -0.5, at a distance from its center."""
    if interpolation == "bilinear":
        return (1 - distance).clamp_min(0)
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def _gaussian(sigmas: Tensor, extent: int) -> Tensor:
    """Return weights [batch, extent, extent] of a Gaussian truncated at four sigmas."""
    position = torch.arange(extent, device=sigmas.device, dtype=torch.float64)
    taps = torch.arange(-_REACH, extent + _REACH, device=sigmas.device, dtype=torch.float64)
    distance = (taps - position[:, None]) / sigmas.double()[:, None, None]
    weights = torch.exp(-0.5 * distance * distance) * (distance.abs() <= 4)
    # Pixels beyond the border have its value: add their weights to that of the border.
    inside = weights[..., _REACH:-_REACH].clone()
    inside[..., 0] += weights[..., :_REACH].sum(dim=-1)
    inside[..., -1] += weights[..., -_REACH:].sum(dim=-1)
    return _round_weights(inside / inside.sum(dim=-1, keepdim=True))


def _round_weights(weights: Tensor) -> Tensor:
    """Round to multiples of 2**-15, float32; a small offset makes ties independent of rounding."""
    return (torch.round(weights * _SCALE + 2.0**-20) * (1 / _SCALE)).float()


_BYTES = 2**18  # of uint8; as float32 they are 1 MiB


def chunked(work: Callable[..., Tensor], images: Tensor, *others: Tensor) -> Tensor:
    """Return work(images, *others); on a CPU computed in chunks of a size that fits the cache.

    images: uint8 [batch, ...]. others: tensors [batch, ...]. `work` must process each image
    independently.
    """
    num_images = max(_BYTES // max(images[:1].numel(), 1), 1)
    if images.is_cuda or len(images) <= num_images:
        return work(images, *others)
    parts = zip(*(values.split(num_images) for values in (images, *others)))
    return torch.cat([work(*part) for part in parts])
