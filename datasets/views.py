"""Views: how an image looks to a network, per sample and in batches, by tensor operations.

Each augmentation is a pair: `sample_*` turns keys into parameters, `apply_*` turns images and
parameters into images. Neither reads any random state.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate, pad

from deit.config import ViewsConfig
from deit.keys import Keys, uniform


def training_views(pixels: Tensor, keys: Keys, *, views: ViewsConfig, size: int) -> Tensor:
    """The training views of a batch, before mixing.

    pixels: uint8 [batch, 3, height, width]. Returns float32 [batch, 3, size, size] in [0, 1].
    """
    images = pixels.float() / 255
    height, width = images.shape[-2:]
    if views.crop == "padded":
        offsets = sample_padded_crop(keys, views.crop_padding)
        images = apply_padded_crop(images, offsets, views.crop_padding)
    elif views.crop == "random_resized":
        boxes = sample_resized_crop(
            keys, height, width, scale=views.crop_scale, ratio=views.crop_ratio
        )
        images = apply_resized_crop(images, boxes, size)
    if views.flip > 0:
        images = apply_flip(images, sample_flip(keys, views.flip))
    if views.rotation > 0:
        images = apply_rotation(images, sample_rotation(keys, views.rotation))
    return _resize(images, size)


def evaluation_views(pixels: Tensor, *, size: int, crop: float) -> Tensor:
    """The one view of an image in evaluation: resize to size / crop, cut the centre.

    pixels: uint8 [batch, 3, height, width]. Returns float32 [batch, 3, size, size] in [0, 1].
    """
    resized = _resize(pixels.float() / 255, round(size / crop))
    start = (resized.shape[-1] - size) // 2
    return resized[..., start : start + size, start : start + size]


def _resize(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size and images.shape[-2] == size:
        return images
    resized = interpolate(images, (size, size), mode="bicubic", antialias=True)
    return resized.clamp(0, 1)  # the bicubic kernel overshoots at edges


def sample_padded_crop(keys: Keys, padding: int) -> Tensor:
    """Top and left of the crop in the padded image, int64 [batch, 2], in [0, 2 * padding]."""
    return (uniform(keys, "crop", 2) * (2 * padding + 1)).long()


def apply_padded_crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Shift each image by offsets - padding pixels; what moves in is black."""
    number, channels, height, width = images.shape
    padded = pad(images, (padding, padding, padding, padding))
    rows = offsets[:, 0, None] + torch.arange(height, device=images.device)
    columns = offsets[:, 1, None] + torch.arange(width, device=images.device)
    return padded[
        torch.arange(number, device=images.device)[:, None, None, None],
        torch.arange(channels, device=images.device)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


_CROP_ATTEMPTS = 10


def sample_resized_crop(
    keys: Keys, height: int, width: int, *, scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """Boxes (top, left, height, width) in pixels, int64 [batch, 4] (Inception-style crop).

    Area is uniform in scale, the logarithm of the aspect ratio uniform in log(ratio); the first
    of ten boxes that fits is taken, else the largest central one, as torchvision does.
    """
    draws = uniform(keys, "crop", 2 * _CROP_ATTEMPTS + 2)
    area_draw, ratio_draw = draws[:, :-2].reshape(-1, _CROP_ATTEMPTS, 2).unbind(dim=2)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * ratio_draw)
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    # The largest central box within the ratio, for a sample whose ten attempts all failed.
    whole = width / height
    central_height = round(width / ratio[0]) if whole < ratio[0] else height
    central_width = round(height * ratio[1]) if whole > ratio[1] else width
    found = fits.any(dim=1)
    box_height = torch.where(found, heights.gather(1, first).squeeze(1), central_height).long()
    box_width = torch.where(found, widths.gather(1, first).squeeze(1), central_width).long()
    top_draw = torch.where(found, draws[:, -2], 0.5)
    left_draw = torch.where(found, draws[:, -1], 0.5)
    top = (top_draw * (height - box_height + 1)).long()
    left = (left_draw * (width - box_width + 1)).long()
    return torch.stack([top, left, box_height, box_width], dim=1)


def apply_resized_crop(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut each box and resize it to size x size, bilinear with antialiasing.

    Bilinear resizing is separable: two batched products with one weight matrix per sample.
    """
    height, width = images.shape[-2:]
    top, left, box_height, box_width = boxes.unbind(dim=1)
    rows = _resize_weights(top, box_height, height, size).to(images.dtype)
    columns = _resize_weights(left, box_width, width, size).to(images.dtype)
    return torch.einsum("boh,bchw,bpw->bcop", rows, images, columns)


def _resize_weights(start: Tensor, length: Tensor, source: int, target: int) -> Tensor:
    """Weights [batch, target, source] of a triangle filter over pixels start ... start + length."""
    step = (length / target).double()[:, None, None]
    centre = start[:, None, None] + (_steps(target, start)[None, :, None] + 0.5) * step
    position = _steps(source, start)[None, None, :] + 0.5
    weights = (1 - (position - centre).abs() / step.clamp_min(1)).clamp_min(0)
    end = (start + length)[:, None, None]
    inside = (position > start[:, None, None]) & (position < end)
    weights = weights * inside
    return weights / weights.sum(dim=-1, keepdim=True)


def _steps(number: int, like: Tensor) -> Tensor:
    return torch.arange(number, device=like.device, dtype=torch.float64)


def sample_flip(keys: Keys, probability: float) -> Tensor:
    """Which samples are mirrored, bool [batch]."""
    return uniform(keys, "flip", 1).squeeze(1) < probability


def apply_flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirror the chosen images left to right."""
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)


def sample_rotation(keys: Keys, degrees: float) -> Tensor:
    """Angles [radians], counter-clockwise, float64 [batch], uniform in +-degrees."""
    return (2 * uniform(keys, "rotation", 1).squeeze(1) - 1) * math.radians(degrees)


def apply_rotation(images: Tensor, angles: Tensor) -> Tensor:
    """Rotate each image about its centre, bilinear; what moves in is black."""
    height, width = images.shape[-2:]
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
    # affine_grid works in coordinates scaled to [-1, 1]: non-square images need the side ratio.
    matrix = torch.stack(
        [
            torch.stack([cos, -sin * height / width, zero], dim=1),
            torch.stack([sin * width / height, cos, zero], dim=1),
        ],
        dim=1,
    ).to(images.dtype)
    grid = affine_grid(matrix, list(images.shape), align_corners=False)
    return grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
