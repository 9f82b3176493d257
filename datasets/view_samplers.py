"""How a network looks at an image: by a view drawn for it, or always in the same way."""

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
    """A view drawn for each (epoch, sample, repeat), uint8 squares of `size`.

    Of encoded images the workers cut the boxes, as `cutter` says; then no crop is left to draw.
    """

    def __init__(
        self,
        images: InMemoryImages | EncodedImages,
        views: ViewsConfig,
        *,
        size: int,
        square: int | None,
        colours: ChannelStats,
        seed: int,
    ) -> None:
        """square: side [px] to which encoded images are decoded where no box is cut from them;
        None: size."""
        self.size = size
        self.views = views
        self.colours = colours
        self.seed = seed
        self.cutter: Decoder | None = None
        if isinstance(images, InMemoryImages):
            self.source_size = images.pixels.shape[-1]
        elif views.crop in ("random_resized", "random"):
            self.cutter = RandomCrop(views, size, seed)
            self.source_size = size
            self.views = replace(views, crop="none")
        else:
            self.source_size = square or size
            self.cutter = CenterSquare(self.source_size)

    def sample(self, epoch: int, samples: Tensor, repeats: Tensor) -> ViewParameters:
        """The views of a stretch of samples, int64 [batch]."""
        keys = Keys(self.seed, epoch, samples, repeats)
        extent = self.source_size
        return sample_views(keys, self.views, height=extent, width=extent, size=self.size)

    def apply(self, pixels: Tensor, drawn: ViewParameters) -> Tensor:
        """uint8 [batch, 3, size, size] of uint8 pixels in memory, or as the cutter left them."""
        return apply_views(pixels, drawn, self.views, size=self.size, colours=self.colours)


class FixedView:
    """The same of an image in every epoch: all of it squeezed into a square, or its centre."""

    def __init__(self, views: ViewsConfig, *, size: int) -> None:
        self.size = size
        self.whole = views.teacher_view == "resized"
        self.crop = views.eval_crop_pct
        self.interpolation = views.interpolation
        self.cutter: Decoder = (
            WholeImage(size, views.interpolation)
            if self.whole
            else CenterSquare(round(size / self.crop))
        )

    def sample(self, epoch: int, samples: Tensor, repeats: Tensor) -> None:
        """Nothing: there is only one."""

    def apply(self, pixels: Tensor, drawn: None) -> Tensor:
        """uint8 [batch, 3, size, size]."""
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
    colours: ChannelStats,
    seed: int,
) -> ViewSampler | None:
    """The teacher's own look, as views.teacher_view says; None where it sees the student's view.

    crops: the student's kind of crop and flip alone, one for each repeat, the same in every epoch.
    """
    if views.teacher_view == "same":
        return None
    if views.teacher_view in ("resized", "center"):
        return FixedView(views, size=size)
    if views.teacher_view == "crops":
        views = replace(views, auto_augment="none", color_jitter=0.0, erasing_prob=0.0)
    own = derived_seed(seed, "teacher")
    return RandomView(images, views, size=size, square=square, colours=colours, seed=own)
