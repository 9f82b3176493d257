"""What is decoded of an image for a view: a center square, the whole image, or random crops."""

from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as transforms

from deit.config.data_section import ViewsConfig
from deit.config.fields import Interpolation
from deit.core.rng import Keys
from deit.datasets.decoding import square_of
from deit.datasets.views import sample_boxes


class ReadRequest(NamedTuple):
    """The images of one batch: int64 [batch] each, and the epoch."""

    epoch: int
    samples: Tensor
    repeats: Tensor


class CenterSquare(NamedTuple):
    """Cuts whole images: shorter side to `size`, the centre cut square."""

    size: int

    def cut(self, pictures: list[Image.Image], wanted: ReadRequest) -> Tensor:
        """uint8 [batch, 3, size, size]."""
        return torch.stack([square_of(picture, self.size) for picture in pictures])


class WholeImage(NamedTuple):
    """Cuts nothing: all of the image, squeezed into a square."""

    size: int
    interpolation: Interpolation

    def cut(self, pictures: list[Image.Image], wanted: ReadRequest) -> Tensor:
        """uint8 [batch, 3, size, size]."""
        boxes = [(0, 0, picture.height, picture.width) for picture in pictures]
        return _resized(pictures, boxes, self.size, self.interpolation)


class RandomCrop(NamedTuple):
    """Cuts the random crop of each view from the image as it is on disk."""

    views: ViewsConfig
    size: int
    seed: int

    def cut(self, pictures: list[Image.Image], wanted: ReadRequest) -> Tensor:
        """uint8 [batch, 3, size, size]."""
        width, height = torch.tensor([image.size for image in pictures], dtype=torch.float64).T
        keys = Keys(self.seed, wanted.epoch, wanted.samples, wanted.repeats)
        boxes = sample_boxes(keys, self.views, height=height, width=width)
        return _resized(pictures, boxes.tolist(), self.size, self.views.interpolation)


def _resized(
    pictures: list[Image.Image], boxes: list[Any], size: int, interpolation: Interpolation
) -> Tensor:
    how = transforms.InterpolationMode(interpolation)
    return torch.stack(
        [
            transforms.pil_to_tensor(transforms.resized_crop(picture, *box, [size, size], how))
            for picture, box in zip(pictures, boxes)
        ]
    )


Decoder = CenterSquare | WholeImage | RandomCrop
