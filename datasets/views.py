"""Views: the augmented uint8 images that networks are trained on, in batches.

Each augmentation is a pair of functions: `sample_*` turns keys (seed, epoch, sample) into
parameters, `apply_*` turns images and parameters into images. Neither uses a random state. A view
is the same uint8 image for any batch size, number of processes and device.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from deit.config.field_types import ErasingFill
from deit.config.sections.views import ViewsConfig
from deit.core.rng import Keys, random_words, uniform
from deit.core.tensors import device_constant, to_device_async
from deit.datasets.operations import FillOptions, apply_operations
from deit.datasets.policies import sample_policy
from deit.datasets.resizing import chunked, resize, resize_boxes

VIEW_VERSION = 1
"""It increases with every change to the view of a given key, so that stored teacher outputs for the
old views are rejected."""

Side = int | Tensor
"""Height or width [px]: one for all images, or float64 [batch]."""


class ChannelStats(NamedTuple):
    """Mean and standard deviation of the data per channel, in [0, 1]; used as fill values."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class ViewParameters(NamedTuple):
    """The sampled parameters of the views of a batch; None for an augmentation that is not used.

    crop_boxes: int64 [batch, 4], top, left, height, width of the crop in the source [px].
    crop_offsets: int64 [batch, 2], top and left of the crop in the padded image [px].
    flipped: bool [batch].
    op_codes: int64 [batch, layers], on the CPU, the operations in the order in which they are
    applied (values of deit.datasets.operations.CODES).
    op_arguments: float32 [batch, layers], such as the angle of a rotation.
    erased_boxes: int64 [batch, 4], on the CPU: top, left, height, width [px]; height 0 for none.
    noise_seeds: int64 [batch], of the noise in the erased boxes.
    """

    crop_boxes: Tensor | None
    crop_offsets: Tensor | None
    flipped: Tensor | None
    op_codes: Tensor
    op_arguments: Tensor
    erased_boxes: Tensor | None
    noise_seeds: Tensor | None

    def select(self, indices: slice) -> "ViewParameters":
        """Return the parameters of some of the views."""
        return ViewParameters(*(None if values is None else values[indices] for values in self))


def sample_views(
    keys: Keys, views: ViewsConfig, *, height: Side, width: Side, size: int
) -> ViewParameters:
    """Sample the parameters of views of images of height x width px.

    keys: seed, epoch and the samples of the batch. size: side of the views [px], in which boxes are
    erased. The parameters of a sample do not depend on the rest of the batch:

    >>> views = ViewsConfig(crop="random_resized")
    >>> batch = sample_views(Keys(7, 0, torch.arange(4)), views, height=32, width=32, size=32)
    >>> alone = sample_views(Keys(7, 0, torch.tensor([2])), views, height=32, width=32, size=32)
    >>> batch.crop_boxes[2].tolist() == alone.crop_boxes[0].tolist()
    True
    """
    offsets = flipped = erased_boxes = noise_seeds = None
    boxes = sample_boxes(keys, views, height=height, width=width)
    if views.crop == "padded":
        offsets = sample_padded_crop(keys, views.crop_padding)
    if views.flip > 0:
        flipped = sample_flip(keys, views.flip)
    codes, arguments = sample_policy(keys, views)
    if views.erasing_prob > 0:
        erased_boxes, noise_seeds = sample_erasing(keys, views, size)
        erased_boxes = erased_boxes.cpu()
    return ViewParameters(
        boxes, offsets, flipped, codes.cpu(), arguments, erased_boxes, noise_seeds
    )


def sample_boxes(keys: Keys, views: ViewsConfig, *, height: Side, width: Side) -> Tensor | None:
    """Sample crop boxes (top, left, height, width) [px], int64 [batch, 4]; None for other crops."""
    if views.crop == "random_resized":
        return sample_resized_crop(
            keys, height, width, scale=views.crop_scale, ratio=views.crop_ratio
        )
    if views.crop == "random":
        return sample_random_crop(keys, height, width, fraction=views.crop_pct)
    return None


def apply_views(
    pixels: Tensor,
    parameters: ViewParameters,
    views: ViewsConfig,
    *,
    size: int,
    channel_stats: ChannelStats,
) -> Tensor:
    """Return the training views of a batch, before mixing, uint8 [batch, 3, size, size].

    pixels: uint8 [batch, 3, height, width]. parameters: of `sample_views`, with the same `views`
    and `size`. channel_stats: for the fill color and erasing.

    >>> views = ViewsConfig(crop="padded")
    >>> parameters = sample_views(Keys(0, 0, torch.arange(2)), views, height=8, width=8, size=8)
    >>> pixels = torch.full((2, 3, 8, 8), 9, dtype=torch.uint8)
    >>> stats = ChannelStats((0.5,) * 3, (0.25,) * 3)
    >>> out = apply_views(pixels, parameters, views, size=8, channel_stats=stats)
    >>> tuple(out.shape), out.unique().tolist()  # the padding is black
    ((2, 3, 8, 8), [0, 9])
    """
    interpolation = views.interpolation
    if parameters.crop_boxes is not None:
        boxes, flipped = parameters.crop_boxes, parameters.flipped
        images = resize_boxes(pixels, boxes, size, interpolation, flipped)
    elif parameters.crop_offsets is not None:
        offsets, flipped = parameters.crop_offsets, parameters.flipped
        images = resize(
            apply_padded_crop(pixels, offsets, views.crop_padding, flipped),
            size,
            size,
            interpolation,
        )
    else:
        images = resize(pixels, size, size, interpolation)
        images = images if parameters.flipped is None else apply_flip(images, parameters.flipped)
    fill_options = FillOptions(fill=_fill(views, channel_stats), interpolation=views.interpolation)
    for layer in range(parameters.op_codes.shape[1]):
        codes, arguments = parameters.op_codes[:, layer], parameters.op_arguments[:, layer]
        images = apply_operations(images, codes, arguments, fill_options)
    if parameters.erased_boxes is not None and parameters.noise_seeds is not None:
        images = apply_erasing(
            images,
            parameters.erased_boxes,
            parameters.noise_seeds,
            mode=views.erasing_mode,
            channel_stats=channel_stats,
        )
    return images


def _fill(views: ViewsConfig, channel_stats: ChannelStats) -> Tensor:
    """Return the fill color: the mean color with auto_augment (as in timm), otherwise black."""
    if views.auto_augment == "none":
        return torch.zeros(3, dtype=torch.uint8)
    return _mean_color(channel_stats)


def _mean_color(channel_stats: ChannelStats) -> Tensor:
    """Return the mean color, uint8 [3], on the CPU."""
    return (torch.tensor(channel_stats.mean) * 255).round().to(torch.uint8)


def to_unit_float(images: Tensor) -> Tensor:
    """Convert uint8 to float32 in [0, 1], to the same values on every device.

    >>> to_unit_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist()
    [0.0, 1.0]
    """
    # CUDA divides by a number by multiplying with its reciprocal; a CPU does not.
    return images.float() * (1 / 255)


def evaluation_views(pixels: Tensor, *, size: int, crop_pct: float) -> Tensor:
    """Return `resize_and_center_crop` as float32 [batch, 3, size, size] in [0, 1].

    >>> pixels = torch.full((2, 3, 40, 30), 255, dtype=torch.uint8)
    >>> images = evaluation_views(pixels, size=32, crop_pct=0.875)
    >>> images.shape, images.min().item()
    (torch.Size([2, 3, 32, 32]), 1.0)
    """
    return to_unit_float(resize_and_center_crop(pixels, size=size, crop_pct=crop_pct))


def resize_and_center_crop(pixels: Tensor, *, size: int, crop_pct: float) -> Tensor:
    """Return the views used in evaluation: resize to size / crop_pct, crop the center.

    pixels: uint8 [batch, 3, height, width]. crop_pct: in (0, 1], as in timm. Return uint8 [batch,
    3, size, size].
    """
    resized_side = round(size / crop_pct)
    resized = resize(pixels, resized_side, resized_side, "bicubic")
    start = (resized_side - size) // 2
    return resized[..., start : start + size, start : start + size]


def sample_padded_crop(keys: Keys, padding: int) -> Tensor:
    """Sample top and left of the crop in the padded image, int64 [batch, 2], 0 to 2 * padding."""
    return (uniform(keys, "crop", 2) * (2 * padding + 1)).long()


def apply_padded_crop(
    images: Tensor, offsets: Tensor, padding: int, flipped: Tensor | None = None
) -> Tensor:
    """Crop each zero-padded image at its offsets [px], to its original size.

    images: uint8 [batch, 3, height, width]. offsets: int64 [batch, 2]. flipped: bool [batch], the
    results to flip horizontally.
    """
    height, width = images.shape[-2:]
    padded = pad(images, (padding, padding, padding, padding)).flatten(2)
    column = torch.arange(width, device=images.device)
    columns = column.expand(len(images), -1)
    if flipped is not None:
        columns = torch.where(flipped[:, None], width - 1 - column, column)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    indices = (rows * (width + 2 * padding))[:, :, None] + (offsets[:, 1:] + columns)[:, None]
    indices = indices.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return padded.gather(2, indices).view(images.shape)


def sample_random_crop(keys: Keys, height: Side, width: Side, *, fraction: float) -> Tensor:
    """Sample square boxes (top, left, side, side) [px], int64 [batch, 4], uniform in the image.

    fraction: side of the square, as a fraction of the image's shorter side. To resize to S and
    crop s, as in Beyer et al. 2022 (160 and 128), use s / S.
    """
    top_draw, left_draw = uniform(keys, "crop", 2).unbind(dim=1)
    height, width = _per_image(keys, height), _per_image(keys, width)
    side = (torch.minimum(height, width) * fraction).round().clamp_min(1)
    top = (top_draw * (height - side + 1)).long()
    left = (left_draw * (width - side + 1)).long()
    return torch.stack([top, left, side.long(), side.long()], dim=1)


_ATTEMPTS = 10  # boxes that are sampled per image, as in torchvision and timm


def sample_resized_crop(
    keys: Keys,
    height: Side,
    width: Side,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Tensor:
    """Sample boxes (top, left, height, width) [px], int64 [batch, 4] (Inception-style crop).

    As torchvision's RandomResizedCrop: the area is uniform in `scale` (a fraction of the image),
    the logarithm of the aspect ratio uniform in log(ratio). The first of ten boxes that fits is
    used, or the largest central box within `ratio` if none fits.
    """
    draws = uniform(keys, "crop", 2 * _ATTEMPTS + 2)
    box_draws, top_draw, left_draw = draws[:, :-2], draws[:, -2], draws[:, -1]
    height, width = _per_image(keys, height), _per_image(keys, width)
    heights, widths = _box_sides(box_draws, height, width, scale, ratio)
    fits = (widths >= 1) & (widths <= width[:, None])
    fits &= (heights >= 1) & (heights <= height[:, None])
    first = fits.int().argmax(dim=1, keepdim=True)
    # The largest central box within the ratio, for samples without a fitting box.
    aspect = width / height
    min_ratio = torch.full_like(width, ratio[0])  # a tensor: see to_unit_float
    central_height = torch.where(aspect < ratio[0], (width / min_ratio).round(), height)
    central_width = torch.where(aspect > ratio[1], (height * ratio[1]).round(), width)
    fits_any = fits.any(dim=1)
    box_height = torch.where(fits_any, heights.gather(1, first).squeeze(1), central_height)
    box_width = torch.where(fits_any, widths.gather(1, first).squeeze(1), central_width)
    top = (torch.where(fits_any, top_draw, 0.5) * (height - box_height + 1)).long()
    left = (torch.where(fits_any, left_draw, 0.5) * (width - box_width + 1)).long()
    return torch.stack([top, left, box_height.long(), box_width.long()], dim=1)


def _per_image(keys: Keys, side: Side) -> Tensor:
    """Return the height or width of each image, float64 [batch]."""
    device = keys.samples.device
    return torch.as_tensor(side, dtype=torch.float64, device=device).expand(len(keys.samples))


def _box_sides(
    draws: Tensor,
    height: Tensor,
    width: Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Return heights and widths of all attempts, whole numbers as float64 [batch, attempts].

    draws: uniform in [0, 1), [batch, 2 * attempts]: area and aspect ratio of each attempt.
    """
    area_draw, ratio_draw = draws.reshape(len(draws), -1, 2).unbind(dim=2)
    area = (height * width)[:, None] * (scale[0] + (scale[1] - scale[0]) * area_draw)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * ratio_draw)
    return (area / aspect).sqrt().round(), (area * aspect).sqrt().round()


def sample_flip(keys: Keys, probability: float) -> Tensor:
    """Sample which images are flipped horizontally, bool [batch]. probability: in [0, 1]."""
    return uniform(keys, "flip", 1).squeeze(1) < probability


def apply_flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Flip the selected images [batch, 3, height, width] horizontally. flipped: bool [batch]."""
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)


def sample_erasing(keys: Keys, views: ViewsConfig, size: int) -> tuple[Tensor, Tensor]:
    """Sample boxes to erase and seeds of their noise (random erasing, Zhong et al. 2017).

    Return boxes (top, left, height, width) [px], int64 [batch, 4], of height 0 if nothing is
    erased, and int64 [batch]. As in timm, the first of ten boxes smaller than the image in both
    dimensions is used.
    """
    draws = uniform(keys, "erasing", 2 * _ATTEMPTS + 3)
    erase_draw, top_draw, left_draw = draws[:, 0], draws[:, 1], draws[:, 2]
    side = _per_image(keys, size)
    heights, widths = _box_sides(draws[:, 3:], side, side, views.erasing_scale, views.erasing_ratio)
    fits = (heights >= 1) & (widths >= 1) & (heights < size) & (widths < size)
    first = fits.int().argmax(dim=1, keepdim=True)
    is_erased = (erase_draw < views.erasing_prob) & fits.any(dim=1)
    box_height = torch.where(is_erased, heights.gather(1, first).squeeze(1), 0.0)
    box_width = torch.where(is_erased, widths.gather(1, first).squeeze(1), 0.0)
    top = (top_draw * (size - box_height + 1)).long()
    left = (left_draw * (size - box_width + 1)).long()
    boxes = torch.stack([top, left, box_height.long(), box_width.long()], dim=1)
    return boxes, random_words(keys, "erasing/noise", 1).squeeze(1)


def apply_erasing(
    images: Tensor,
    boxes: Tensor,
    seeds: Tensor,
    *,
    mode: ErasingFill,
    channel_stats: ChannelStats,
) -> Tensor:
    """Fill each box with noise of the data's mean and standard deviation, or with the mean color.

    images: uint8 [batch, 3, height, width]. boxes, seeds: of `sample_erasing`, the boxes on the
    CPU. timm erases after normalization, with N(0, 1). Here values are clipped to 0 and 255, so
    that a teacher with another normalization gets the same image.
    """
    indices = (boxes[:, 2] > 0).nonzero().squeeze(1)  # of the images with a box
    if len(indices) == 0:
        return images
    boxes = to_device_async(boxes[indices], images.device)
    indices = to_device_async(indices, images.device)
    mean = _mean_color(channel_stats)[:, None, None]

    def erase(images: Tensor, boxes: Tensor, seeds: Tensor) -> Tensor:
        if mode == "noise":
            fill = _noise(seeds, images.shape, channel_stats)
        else:
            fill = to_device_async(mean, images.device)
        mask = box_bitmask(boxes, *images.shape[-2:])[:, None]
        # Select bits of `fill` within the box, of the image elsewhere.
        return images ^ ((images ^ fill) & mask)

    return images.index_copy(0, indices, chunked(erase, images[indices], boxes, seeds[indices]))


def box_bitmask(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return 255 (all bits set) for pixels within boxes (top, left, height, width), otherwise 0.

    boxes: int64 [batch, 4] [px]. Return uint8 [batch, height, width].
    """
    top, left, box_height, box_width = boxes[:, :, None].unbind(dim=1)
    rows = torch.arange(height, device=boxes.device)
    columns = torch.arange(width, device=boxes.device)
    rows = (rows >= top) & (rows < top + box_height)
    columns = (columns >= left) & (columns < left + box_width)
    return (rows.to(torch.uint8) * 255)[:, :, None] & (columns.to(torch.uint8) * 255)[:, None]


def _noise(seeds: Tensor, shape: torch.Size, channel_stats: ChannelStats) -> Tensor:
    """Return noise mean + std * z, uint8, where z is a sum of four bytes of a hash.

    A sum of four uniform numbers is close to normal, without tails beyond 3.4 standard deviations.
    The hash of (seed, pixel index), Mueller's 32-bit mixing function, takes a tenth of the time of
    Philox.
    """
    num_pixels = shape[1:].numel()
    index = torch.arange(num_pixels, device=seeds.device) * 0x9E3779B9
    # 32-bit products wrap around; masking after each shift removes the sign extension.
    word = seeds.to(torch.int32)[:, None] + index.to(torch.int32)
    for _ in range(2):
        word ^= (word >> 16) & 0xFFFF
        word *= 0x45D9F3B
    word ^= (word >> 16) & 0xFFFF
    pairs = (word & 0x00FF00FF) + ((word >> 8) & 0x00FF00FF)
    total = (pairs & 0xFFFF) + (pairs >> 16)
    z = (total - 510).float().view(shape).mul_(1 / math.sqrt(4 * (256**2 - 1) / 12))
    mean, std = (device_constant(tuple(c), z.device)[:, None, None] * 255 for c in channel_stats)
    values = z.mul_(std).add_(mean + 0.5).clamp_(0, 255)  # + 0.5: the conversion rounds down
    return values.to(torch.int16).to(torch.uint8)
