"""Resizing in whole numbers: the same grey levels on every device and at every batch size.

A float32 holds integers up to 2**24 exactly. Filter weights are rounded to multiples of 2**-15 and
multiplied by grey levels, so that every partial sum of a matrix product is a whole number below
2**24: the order of summation, which differs between devices and batch sizes, cannot matter.
"""

import torch
from einops import rearrange
from torch import Tensor

from deit.config import Interpolation

_ONE = 2.0**15  # 255 * 2**15 * 1.3 (the absolute weights of a bicubic filter) is below 2**24
MAX_SIGMA = 2.0  # of a blur [px]; its filter is cut off at four sigmas
_REACH = int(4 * MAX_SIGMA)


def resize_boxes(images: Tensor, boxes: Tensor, size: int, interpolation: Interpolation) -> Tensor:
    """Cut a box out of each image and resize it with antialiasing, as Pillow does on the cut box.

    images: uint8 [batch, 3, height, width]. boxes: int64 [batch, 4], top, left, height, width.
    Returns uint8 [batch, 3, size, size].
    """
    height, width = images.shape[-2:]
    top, left, box_height, box_width = boxes.unbind(dim=1)
    columns = _filter(left, box_width, width, size, interpolation)
    rows = _filter(top, box_height, height, size, interpolation)
    return _resample(images, rows, columns)


def resize(images: Tensor, height: int, width: int, interpolation: Interpolation) -> Tensor:
    """Resize whole images with antialiasing, uint8 [batch, 3, height, width]."""
    old_height, old_width = images.shape[-2:]
    if (old_height, old_width) == (height, width):
        return images
    start = torch.zeros(1, dtype=torch.int64, device=images.device)
    rows = _filter(start, start + old_height, old_height, height, interpolation)
    columns = _filter(start, start + old_width, old_width, width, interpolation)
    return _resample(images, rows, columns)


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

    rows, columns: whole numbers, float32 [batch or 1, target, source].
    """
    channels = images.shape[1]
    lines = rearrange(images.float(), "b c h w -> b (c h) w")
    across = _grey_levels(torch.matmul(lines, columns.mT))
    stacked = rearrange(across, "b (c h) w -> b h (c w)", c=channels)
    down = _grey_levels(torch.matmul(rows, stacked))
    return rearrange(down, "b h (c w) -> b c h w", c=channels).contiguous().to(torch.uint8)


def _grey_levels(sums: Tensor) -> Tensor:
    """Weighted sums rounded to grey levels, half upwards."""
    return sums.add_(_ONE / 2).div_(_ONE).floor_().clamp_(0, 255)


def _filter(
    start: Tensor, length: Tensor, source: int, target: int, interpolation: Interpolation
) -> Tensor:
    """Weights [batch, target, source] that resample pixels start ... start + length to target.

    The filter is widened when the image shrinks, cut off at the ends of the box and normalised.
    """
    step = (length.float() / target)[:, None, None]
    steps = torch.arange(target, device=start.device, dtype=torch.float32)
    position = torch.arange(source, device=start.device, dtype=torch.float32) + 0.5
    begin, end = start[:, None, None], (start + length)[:, None, None]
    centre = begin + (steps[None, :, None] + 0.5) * step
    distance = (position - centre).abs() / step.clamp_min(1)
    weights = _kernel(distance, interpolation) * ((position > begin) & (position < end))
    return _whole(weights / weights.sum(dim=-1, keepdim=True))


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
    return _whole(inside / inside.sum(dim=-1, keepdim=True))


def _whole(weights: Tensor) -> Tensor:
    """The nearest multiples of 2**-15, as whole numbers in float32."""
    return torch.round(weights * _ONE).float()
