"""View samplers: the views that a network gets of an image, random or fixed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deit.config.arguments import checks_types
from deit.config.command_choices import check_at_least, check_channels, check_epoch
from deit.config.sections.views import ViewsConfig
from deit.config.validation import as_section
from deit.core.errors import ConfigError
from deit.core.rng import Keys, derived_seed
from deit.core.tensors import as_tensor, layout_advice
from deit.datasets.crops import CenterSquare, Decoder, RandomCrop, WholeImage
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.resizing import resize
from deit.datasets.views import (
    ChannelStats,
    ViewParameters,
    apply_views,
    resize_and_center_crop,
    sample_views,
)


class Sizes(NamedTuple):
    """Sides [px] of a view, of the resized views that student and teacher get, and of its source.

    source: the square that a view is made from; None if each view is cropped from the image at its
    full resolution.
    """

    view: int
    student: int
    teacher: int
    source: int | None


def view_sizes(student: int, teacher: int | None, source: int | None) -> Sizes:
    """Return the sides [px] of views: one view for both networks, as large as the larger input.

    student: side of its input. teacher: side of its input; None without a teacher or if it accepts
    any size. source: from `source_size`. A teacher with a larger input than the source gets views
    of the source's size and enlarges them itself.

    >>> view_sizes(32, 224, source=64)
    Sizes(view=64, student=32, teacher=64, source=64)
    """
    side = student if teacher is None else teacher
    if source is not None:
        side = min(side, max(source, student))
    return Sizes(view=max(student, side), student=student, teacher=side, source=source)


def source_size(
    images: InMemoryImages | EncodedImages, views: ViewsConfig, decoded_size: int | None
) -> int | None:
    """Return the side [px] of the squares that views are made from, or None (see Sizes).

    decoded_size: side to which encoded images are decoded; None: that of the view.
    """
    if isinstance(images, InMemoryImages):
        return images.pixels.shape[-1]
    return None if views.crops_a_box else decoded_size


class RandomView:
    """A random view for each (epoch, sample, repeat): uint8 squares of `size` [px].

    decoder: the part of an encoded image that a worker process decodes. Without a source, that is
    the random crop, and `views` then has no crop.
    """

    def __init__(
        self,
        views: ViewsConfig,
        *,
        size: int,
        source: int | None,
        channel_stats: ChannelStats,
        seed: int,
    ) -> None:
        """source: from `source_size`. channel_stats: of the training images."""
        self.size = size
        self.views = views
        self.channel_stats = channel_stats
        self.seed = seed
        self.source_size = source or size
        self.decoder: Decoder = CenterSquare(self.source_size)
        if source is None and views.crops_a_box:
            self.decoder = RandomCrop(views, size, seed)
            self.views = replace(views, crop="none")

    def sample(self, epoch: int, samples: Tensor, repeats: Tensor) -> ViewParameters:
        """Sample the view parameters of images. samples, repeats: int64 [batch]."""
        keys = Keys(self.seed, epoch, samples, repeats)
        side = self.source_size
        return sample_views(keys, self.views, height=side, width=side, size=self.size)

    def apply(self, pixels: Tensor, parameters: ViewParameters) -> Tensor:
        """Return views, uint8 [batch, 3, size, size].

        pixels: uint8 [batch, 3, side, side], from memory or from `decoder`.
        """
        return apply_views(
            pixels, parameters, self.views, size=self.size, channel_stats=self.channel_stats
        )


class FixedView:
    """The same view in every epoch: the whole image resized to a square, or its center."""

    def __init__(self, views: ViewsConfig, *, size: int) -> None:
        self.size = size
        self.whole = views.teacher_view == "resized"
        self.crop_pct = views.eval_crop_pct
        self.interpolation = views.interpolation
        self.decoder: Decoder = (
            WholeImage(size, views.interpolation)
            if self.whole
            else CenterSquare(round(size / self.crop_pct))
        )

    def sample(self, epoch: int, samples: Tensor, repeats: Tensor) -> None:
        """Return None: a fixed view has no parameters."""

    def apply(self, pixels: Tensor, parameters: None) -> Tensor:
        """Return views, uint8 [batch, 3, size, size]; pixels as for RandomView.apply."""
        if self.whole:
            return resize(pixels, self.size, self.size, self.interpolation)
        return resize_and_center_crop(pixels, size=self.size, crop_pct=self.crop_pct)


ViewSampler = RandomView | FixedView


def teacher_view_sampler(
    views: ViewsConfig, *, size: int, source: int | None, channel_stats: ChannelStats, seed: int
) -> ViewSampler | None:
    """Return the sampler of views.teacher_view; None if the teacher gets the student's views.

    crops: views with the student's crop and flip only, a different one for each repeat.
    """
    if views.teacher_view == "same":
        return None
    if views.teacher_view in ("resized", "center"):
        return FixedView(views, size=size)
    if views.teacher_view == "crops":
        views = replace(views, auto_augment="none", color_jitter=0.0, erasing_prob=0.0)
    teacher_seed = derived_seed(seed, "teacher")
    return RandomView(
        views, size=size, source=source, channel_stats=channel_stats, seed=teacher_seed
    )


@checks_types
def make_views(
    images: Tensor | np.ndarray,
    views: ViewsConfig | dict[str, Any] = ViewsConfig(),
    *,
    seed: int,
    epoch: int,
    sample_ids: Tensor | np.ndarray | Sequence[int],
    repeat: int = 0,
    size: int | None = None,
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
    std: tuple[float, float, float] = (0.25, 0.25, 0.25),
) -> Tensor:
    """Return augmented views of images, uint8 [batch, 3, size, size]: a pure function.

    A view depends on seed, epoch, sample id and repeat only, not on the batch or the device. It is
    the view that `TrainLoader` makes of that image in memory, before mixup and cutmix, if `mean`
    and `std` are the loader's.

    images: uint8 [batch, 3, side, side]. views: the augmentations, or a dict of fields. sample_ids:
    integers [batch], the index of each image in its data set. repeat: which of several views of an
    image in an epoch. size: side of the views [px]; default: that of the images. mean, std: of the
    data per channel, in [0, 1]: the fill color of geometric operations and the noise of erased
    boxes.
    Raises ConfigError for other types, shapes and fields.

    >>> import torch
    >>> images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    >>> views = ViewsConfig(crop="random_resized", auto_augment="randaugment", erasing_prob=0.25)
    >>> batch = make_views(images, views, seed=0, epoch=3, sample_ids=torch.arange(8))
    >>> alone = make_views(images[5:6], views, seed=0, epoch=3, sample_ids=torch.tensor([5]))
    >>> batch.shape, torch.equal(batch[5], alone[0])
    (torch.Size([8, 3, 32, 32]), True)
    """
    images, sample_ids = as_tensor("images", images), as_tensor("sample_ids", sample_ids)
    views = as_section(ViewsConfig, "views", views)
    check_epoch(epoch)
    mean, std = check_channels("mean", mean), check_channels("std", std)
    if size is not None:
        check_at_least("size", size, 1)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ConfigError(
            "images: should be uint8 [batch, 3, side, side]; got "
            f"{images.dtype} {list(images.shape)}{layout_advice(images.shape)}"
        )
    if images.shape[2] != images.shape[3] or sample_ids.shape != (len(images),):
        raise ConfigError(
            f"images: should be square, with one sample id each; got {list(images.shape)} and "
            f"{list(sample_ids.shape)} sample ids"
        )
    if sample_ids.is_floating_point() and len(sample_ids):  # an empty list gives floats
        raise ConfigError(f"sample_ids: should be integers; got {sample_ids.dtype}")
    side = images.shape[-1]
    stats, size = ChannelStats(mean, std), side if size is None else size
    sampler = RandomView(views, size=size, source=side, channel_stats=stats, seed=seed)
    sample_ids = sample_ids.to(images.device, torch.int64)
    repeats = torch.full_like(sample_ids, repeat)
    return sampler.apply(images, sampler.sample(epoch, sample_ids, repeats))
