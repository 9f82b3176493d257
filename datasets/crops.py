"""The part of an image that is decoded for a view: center square, whole image, random crop."""

from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as transforms

from deit.config.field_types import Interpolation
from deit.config.sections.views import ViewsConfig
from deit.core.rng import Keys
from deit.datasets.decoding import center_square
from deit.datasets.views import sample_boxes


class ReadRequest(NamedTuple):
    """The images of one batch.

    samples: int64 [batch], the index of each image in its split. repeats: int64 [batch], which of
    the views of the image (see deit.core.rng.Keys).
    """

    epoch: int
    samples: Tensor
    repeats: Tensor


class CenterSquare(NamedTuple):
    """Resize the shorter side to `size` [px] and crop the center."""

    size: int

    def decode(self, images: list[Image.Image], request: ReadRequest) -> Tensor:
        """Return uint8 [batch, 3, size, size] of RGB images."""
        return torch.stack([center_square(image, self.size) for image in images])


class WholeImage(NamedTuple):
    """Resize the whole image to a square of `size` [px], without keeping its aspect ratio."""

    size: int
    interpolation: Interpolation

    def decode(self, images: list[Image.Image], request: ReadRequest) -> Tensor:
        """Return uint8 [batch, 3, size, size] of RGB images."""
        boxes = [(0, 0, image.height, image.width) for image in images]
        return _resize(images, boxes, self.size, self.interpolation)


class RandomCrop(NamedTuple):
    """Crop the random box of each view from the full-resolution image, resized to `size` [px]."""

    views: ViewsConfig
    size: int
    seed: int

    def decode(self, images: list[Image.Image], request: ReadRequest) -> Tensor:
        """Return uint8 [batch, 3, size, size] of RGB images."""
        width, height = torch.tensor([image.size for image in images], dtype=torch.float64).T
        keys = Keys(self.seed, request.epoch, request.samples, request.repeats)
        boxes = sample_boxes(keys, self.views, height=height, width=width)
        return _resize(images, boxes.tolist(), self.size, self.views.interpolation)


def _resize(
    images: list[Image.Image], boxes: list[Any], size: int, interpolation: Interpolation
) -> Tensor:
    mode = transforms.InterpolationMode(interpolation)
    return torch.stack(
        [
            transforms.pil_to_tensor(transforms.resized_crop(image, *box, [size, size], mode))
            for image, box in zip(images, boxes)
        ]
    )


Decoder = CenterSquare | WholeImage | RandomCrop
