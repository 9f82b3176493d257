"""View samplers: the views that a network gets of an image, random or fixed."""

from dataclasses import replace

from torch import Tensor

from deit.config.data_section import ViewsConfig
from deit.core.rng import Keys, derived_seed
from deit.datasets.decoders import CenterSquare, Decoder, RandomCrop, WholeImage
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.resizing import resize
from deit.datasets.views import (
    ChannelStats,
    ViewParameters,
    apply_views,
    evaluation_squares,
    sample_views,
)


class RandomView:
    """A random view for each (epoch, sample, repeat): uint8 squares of `size` [px].

    Encoded images are cropped by the worker processes (`decoder`), so `views` then has no crop.
    """

    def __init__(
        self,
        images: InMemoryImages | EncodedImages,
        views: ViewsConfig,
        *,
        size: int,
        square: int | None,
        channel_stats: ChannelStats,
        seed: int,
    ) -> None:
        """square: side [px] to which encoded images are decoded without a random crop. Default:
        size. channel_stats: of the training images."""
        self.size = size
        self.views = views
        self.channel_stats = channel_stats
        self.seed = seed
        self.decoder: Decoder | None = None
        if isinstance(images, InMemoryImages):
            self.source_size = images.pixels.shape[-1]
        elif views.crop in ("random_resized", "random"):
            self.decoder = RandomCrop(views, size, seed)
            self.source_size = size
            self.views = replace(views, crop="none")
        else:
            self.source_size = square or size
            self.decoder = CenterSquare(self.source_size)

    def sample(self, epoch: int, samples: Tensor, repeats: Tensor) -> ViewParameters:
        """Sample the view parameters of images. samples, repeats: int64 [batch]."""
        keys = Keys(self.seed, epoch, samples, repeats)
        extent = self.source_size
        return sample_views(keys, self.views, height=extent, width=extent, size=self.size)

    def apply(self, pixels: Tensor, parameters: ViewParameters) -> Tensor:
        """Return views, uint8 [batch, 3, size, size].

        pixels: uint8 [batch, 3, side, side], from memory or as returned by `decoder`.
        """
        return apply_views(
            pixels, parameters, self.views, size=self.size, channel_stats=self.channel_stats
        )


class FixedView:
    """The same view in every epoch: the whole image resized to a square, or its center."""

    def __init__(self, views: ViewsConfig, *, size: int) -> None:
        self.size = size
        self.whole = views.teacher_view == "resized"
        self.crop = views.eval_crop_pct
        self.interpolation = views.interpolation
        self.decoder: Decoder = (
            WholeImage(size, views.interpolation)
            if self.whole
            else CenterSquare(round(size / self.crop))
        )

    def sample(self, epoch: int, samples: Tensor, repeats: Tensor) -> None:
        """Return None: a fixed view has no parameters."""

    def apply(self, pixels: Tensor, parameters: None) -> Tensor:
        """Return views, uint8 [batch, 3, size, size]; pixels as for RandomView.apply."""
        if self.whole:
            return resize(pixels, self.size, self.size, self.interpolation)
        return evaluation_squares(pixels, size=self.size, crop=self.crop)


ViewSampler = RandomView | FixedView


def teacher_view_sampler(
    images: InMemoryImages | EncodedImages,
    views: ViewsConfig,
    *,
    size: int,
    square: int | None,
    channel_stats: ChannelStats,
    seed: int,
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
        images, views, size=size, square=square, channel_stats=channel_stats, seed=teacher_seed
    )
