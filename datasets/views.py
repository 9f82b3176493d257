"""Views: how an image looks to a network, per sample and in batches, in whole grey levels.

Each augmentation is a pair: `sample_*` turns keys into parameters, `apply_*` turns images and
parameters into images. Neither reads any random state, and every view is the same uint8 image
whatever the batch, the process count or the device.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from deit.config.data_section import ViewsConfig
from deit.core.rng import Keys, random_words, uniform
from deit.core.tensors import device_constant, to_device_async
from deit.datasets.operations import FillOptions, apply_operations
from deit.datasets.policies import sample_policy
from deit.datasets.resizing import chunked, resize, resize_boxes

VERSION = 1
"""Of the pixels: raised with every change that makes a view of the same key look otherwise, so that
stored answers to the old views are refused."""

Extent = int | Tensor
"""Height or width [px]: one for all images, or float64 [batch]."""


class ChannelStats(NamedTuple):
    """Mean and standard deviation of the data per channel, in [0, 1]: what fills gaps."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class ViewParameters(NamedTuple):
    """Everything that was drawn for the views of a batch; None where it takes no part.

    boxes: int64 [batch, 4], top, left, height, width of the crop in the source.
    offsets: int64 [batch, 2], top and left of the crop in the padded image.
    flipped: bool [batch].
    codes: int64 [batch, layers], on the CPU; arguments: float32 [batch, layers]: see policies.
    erased: int64 [batch, 4], on the CPU: top, left, height, width, of height 0 where nothing is.
    noise: int64 [batch], the word the noise of the erased box grows from.
    """

    boxes: Tensor | None
    offsets: Tensor | None
    flipped: Tensor | None
    codes: Tensor
    arguments: Tensor
    erased: Tensor | None
    noise: Tensor | None

    def select(self, rows: slice) -> "ViewParameters":
        """The parameters of some of the views."""
        return ViewParameters(*(None if values is None else values[rows] for values in self))


def sample_views(
    keys: Keys, views: ViewsConfig, *, height: Extent, width: Extent, size: int
) -> ViewParameters:
    """Draw the views of a batch from images of height x width pixels, to be size x size."""
    offsets = flipped = erased = noise = None
    boxes = sample_boxes(keys, views, height=height, width=width)
    if views.crop == "padded":
        offsets = sample_padded_crop(keys, views.crop_padding)
    if views.flip > 0:
        flipped = sample_flip(keys, views.flip)
    codes, arguments = sample_policy(keys, views)
    if views.erasing_prob > 0:
        erased, noise = sample_erasing(keys, views, size)
        erased = erased.cpu()
    return ViewParameters(boxes, offsets, flipped, codes.cpu(), arguments, erased, noise)


def sample_boxes(keys: Keys, views: ViewsConfig, *, height: Extent, width: Extent) -> Tensor | None:
    """The boxes (top, left, height, width) that are cut from images, int64 [batch, 4]; None where
    the crop cuts none."""
    if views.crop == "random_resized":
        return sample_resized_crop(
            keys, height, width, scale=views.crop_scale, ratio=views.crop_ratio
        )
    if views.crop == "random":
        return sample_random_crop(keys, height, width, side=views.crop_pct)
    return None


def apply_views(
    pixels: Tensor, drawn: ViewParameters, views: ViewsConfig, *, size: int, colours: ChannelStats
) -> Tensor:
    """The training views of a batch, before mixing.

    pixels: uint8 [batch, 3, height, width]. Returns uint8 [batch, 3, size, size].
    """
    how = views.interpolation
    if drawn.boxes is not None:
        images = resize_boxes(pixels, drawn.boxes, size, how, drawn.flipped)
    elif drawn.offsets is not None:
        offsets, flipped = drawn.offsets, drawn.flipped
        images = resize(
            apply_padded_crop(pixels, offsets, views.crop_padding, flipped), size, size, how
        )
    else:
        images = resize(pixels, size, size, how)
        images = images if drawn.flipped is None else apply_flip(images, drawn.flipped)
    canvas = FillOptions(fill=_fill(views, colours), interpolation=views.interpolation)
    for layer in range(drawn.codes.shape[1]):
        codes, arguments = drawn.codes[:, layer], drawn.arguments[:, layer]
        images = apply_operations(images, codes, arguments, canvas)
    if drawn.erased is not None and drawn.noise is not None:
        images = apply_erasing(images, drawn.erased, drawn.noise, views, colours)
    return images


def _fill(views: ViewsConfig, colours: ChannelStats) -> Tensor:
    """What moves in from outside: the mean colour under a policy (as timm's), else black."""
    if views.auto_augment == "none":
        return torch.zeros(3, dtype=torch.uint8)
    return _mean_levels(colours)


def _mean_levels(colours: ChannelStats) -> Tensor:
    """The mean colour, uint8 [3], on the CPU."""
    return (torch.tensor(colours.mean) * 255).round().to(torch.uint8)


def to_unit_float(images: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]: level / 255, the same number on every device."""
    # A product: CUDA divides by a number by multiplying with its reciprocal, a CPU does not.
    return images.float() * (1 / 255)


def evaluation_views(pixels: Tensor, *, size: int, crop: float) -> Tensor:
    """`evaluation_squares` as float32 [batch, 3, size, size] in [0, 1]."""
    return to_unit_float(evaluation_squares(pixels, size=size, crop=crop))


def evaluation_squares(pixels: Tensor, *, size: int, crop: float) -> Tensor:
    """The one view of an image in evaluation: resize to size / crop, cut the centre.

    pixels: uint8 [batch, 3, height, width]. Returns uint8 [batch, 3, size, size].
    """
    whole = round(size / crop)
    resized = resize(pixels, whole, whole, "bicubic")
    start = (whole - size) // 2
    return resized[..., start : start + size, start : start + size]


def sample_padded_crop(keys: Keys, padding: int) -> Tensor:
    """Top and left of the crop in the padded image, int64 [batch, 2], in [0, 2 * padding]."""
    return (uniform(keys, "crop", 2) * (2 * padding + 1)).long()


def apply_padded_crop(
    images: Tensor, offsets: Tensor, padding: int, flipped: Tensor | None = None
) -> Tensor:
    """Shift each image by offsets - padding pixels; what moves in is black.

    flipped: bool [batch], which results are mirrored left to right.
    """
    height, width = images.shape[-2:]
    padded = pad(images, (padding, padding, padding, padding)).flatten(2)
    column = torch.arange(width, device=images.device)
    columns = column.expand(len(images), -1)
    if flipped is not None:
        columns = torch.where(flipped[:, None], width - 1 - column, column)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    place = (rows * (width + 2 * padding))[:, :, None] + (offsets[:, 1:] + columns)[:, None]
    place = place.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return padded.gather(2, place).view(images.shape)


def sample_random_crop(keys: Keys, height: Extent, width: Extent, *, side: float) -> Tensor:
    """Squares (top, left, side, side) in pixels, int64 [batch, 4], anywhere in the image.

    side: of the square, as a share of the image's shorter one. Resizing to S and cutting s
    anywhere, as in Beyer et al. 2022 (160 and 128), is a side of s / S.
    """
    draws = uniform(keys, "crop", 2)
    height, width = _extents(keys, height), _extents(keys, width)
    extent = (torch.minimum(height, width) * side).round().clamp_min(1)
    top = (draws[:, 0] * (height - extent + 1)).long()
    left = (draws[:, 1] * (width - extent + 1)).long()
    return torch.stack([top, left, extent.long(), extent.long()], dim=1)


_ATTEMPTS = 10


def sample_resized_crop(
    keys: Keys,
    height: Extent,
    width: Extent,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Tensor:
    """Boxes (top, left, height, width) in pixels, int64 [batch, 4] (Inception-style crop).

    Area is uniform in scale, the logarithm of the aspect ratio uniform in log(ratio); the first
    of ten boxes that fits is taken, else the largest central one, as torchvision does.
    """
    draws = uniform(keys, "crop", 2 * _ATTEMPTS + 2)
    height, width = _extents(keys, height), _extents(keys, width)
    heights, widths = _box_sides(draws[:, :-2], height, width, scale, ratio)
    fits = (widths >= 1) & (widths <= width[:, None])
    fits &= (heights >= 1) & (heights <= height[:, None])
    first = fits.int().argmax(dim=1, keepdim=True)
    # The largest central box within the ratio, for a sample whose ten attempts all failed.
    whole = width / height
    central_height = torch.where(
        whole < ratio[0], (width / torch.full_like(width, ratio[0])).round(), height
    )
    central_width = torch.where(whole > ratio[1], (height * ratio[1]).round(), width)
    found = fits.any(dim=1)
    box_height = torch.where(found, heights.gather(1, first).squeeze(1), central_height)
    box_width = torch.where(found, widths.gather(1, first).squeeze(1), central_width)
    top = (torch.where(found, draws[:, -2], 0.5) * (height - box_height + 1)).long()
    left = (torch.where(found, draws[:, -1], 0.5) * (width - box_width + 1)).long()
    return torch.stack([top, left, box_height.long(), box_width.long()], dim=1)


def _extents(keys: Keys, extent: Extent) -> Tensor:
    """One extent for each image, float64 [batch]."""
    device = keys.samples.device
    return torch.as_tensor(extent, dtype=torch.float64, device=device).expand(len(keys.samples))


def _box_sides(
    draws: Tensor,
    height: Tensor,
    width: Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Heights and widths of the attempts, whole float64 [batch, attempts], from two draws each."""
    area_draw, ratio_draw = draws.reshape(len(draws), -1, 2).unbind(dim=2)
    area = (height * width)[:, None] * (scale[0] + (scale[1] - scale[0]) * area_draw)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * ratio_draw)
    return (area / aspect).sqrt().round(), (area * aspect).sqrt().round()


def sample_flip(keys: Keys, probability: float) -> Tensor:
    """Which samples are mirrored, bool [batch]."""
    return uniform(keys, "flip", 1).squeeze(1) < probability


def apply_flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Mirror the chosen images left to right."""
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)


def sample_erasing(keys: Keys, views: ViewsConfig, size: int) -> tuple[Tensor, Tensor]:
    """Boxes (top, left, height, width), int64 [batch, 4], of height 0 where nothing is erased, and
    a random word for each image, int64 [batch] (Zhong et al. 2017).

    The first of ten boxes that is smaller than the image either way is taken, as timm does.
    """
    draws = uniform(keys, "erasing", 2 * _ATTEMPTS + 3)
    extent = _extents(keys, size)
    heights, widths = _box_sides(
        draws[:, 3:], extent, extent, views.erasing_scale, views.erasing_ratio
    )
    fits = (heights >= 1) & (widths >= 1) & (heights < size) & (widths < size)
    first = fits.int().argmax(dim=1, keepdim=True)
    erased = (draws[:, 0] < views.erasing_prob) & fits.any(dim=1)
    box_height = torch.where(erased, heights.gather(1, first).squeeze(1), 0.0)
    box_width = torch.where(erased, widths.gather(1, first).squeeze(1), 0.0)
    top = (draws[:, 1] * (size - box_height + 1)).long()
    left = (draws[:, 2] * (size - box_width + 1)).long()
    boxes = torch.stack([top, left, box_height.long(), box_width.long()], dim=1)
    return boxes, random_words(keys, "erasing/noise", 1).squeeze(1)


def apply_erasing(
    images: Tensor, boxes: Tensor, noise: Tensor, views: ViewsConfig, colours: ChannelStats
) -> Tensor:
    """Fill each box with noise of the data's mean and deviation, or with the mean colour.

    images: uint8 [batch, 3, height, width]. boxes: as sampled, on the CPU. timm erases after
    normalising, with N(0, 1); here the grey levels are cut at 0 and 255, so that the teacher, who
    may normalise otherwise, sees the same.
    """
    rows = (boxes[:, 2] > 0).nonzero().squeeze(1)
    if len(rows) == 0:
        return images
    boxes, rows = to_device_async(boxes[rows], images.device), to_device_async(rows, images.device)
    mean = _mean_levels(colours)[:, None, None]

    def erase(some: Tensor, boxes: Tensor, seeds: Tensor) -> Tensor:
        noisy = views.erasing_mode == "noise"
        filled = _noise(seeds, some.shape, colours) if noisy else to_device_async(mean, some.device)
        inside = inside_boxes(boxes, *some.shape[-2:])[:, None]
        # Bits of the filling within the box, of the image elsewhere.
        return some ^ ((some ^ filled) & inside)

    return images.index_copy(0, rows, chunked(erase, images[rows], boxes, noise[rows]))


def inside_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """255 for the pixels within boxes (top, left, height, width), else 0; uint8 [batch, height,
    width]."""
    top, left, box_height, box_width = boxes[:, :, None].unbind(dim=1)
    rows = torch.arange(height, device=boxes.device)
    columns = torch.arange(width, device=boxes.device)
    rows = (rows >= top) & (rows < top + box_height)
    columns = (columns >= left) & (columns < left + box_width)
    return (rows.to(torch.uint8) * 255)[:, :, None] & (columns.to(torch.uint8) * 255)[:, None]


def _noise(seeds: Tensor, shape: torch.Size, colours: ChannelStats) -> Tensor:
    """Grey levels mean + std * z, uint8, z a sum of four bytes of a hash of (seed, place).

    A sum of four uniform numbers is close to normal (no tail beyond 3.4 deviations); the hash
    (Mueller's mixing function of 32 bits) is a tenth of the work of Philox.
    """
    number = shape[1:].numel()
    place = torch.arange(number, device=seeds.device) * 0x9E3779B9
    # 32-bit products wrap around; the sign is made an ordinary bit by masking after each shift.
    word = seeds.to(torch.int32)[:, None] + place.to(torch.int32)
    for _ in range(2):
        word ^= (word >> 16) & 0xFFFF
        word *= 0x45D9F3B
    word ^= (word >> 16) & 0xFFFF
    pairs = (word & 0x00FF00FF) + ((word >> 8) & 0x00FF00FF)
    total = (pairs & 0xFFFF) + (pairs >> 16)
    z = (total - 510).float().view(shape).mul_(1 / math.sqrt(4 * (256**2 - 1) / 12))
    mean, std = (device_constant(tuple(c), z.device)[:, None, None] * 255 for c in colours)
    levels = z.mul_(std).add_(mean + 0.5).clamp_(0, 255)
    return levels.to(torch.int16).to(torch.uint8)
