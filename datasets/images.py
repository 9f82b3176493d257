"""The images of a split: decoded in memory, or encoded until they are used."""

from typing import NamedTuple, Protocol

from torch import Tensor


class InMemoryImages(NamedTuple):
    """Labeled images in memory.

    pixels: uint8 [images, 3, size, size], RGB.
    labels: int64 [images], an index into the class names.
    """

    pixels: Tensor
    labels: Tensor

    def name(self, index: int) -> str:
        """Return the name of an image of this split, for messages."""
        return f"image {index}"

    def select(self, rows: Tensor) -> "InMemoryImages":
        """Return a part of the images. rows: a bool mask [images], or int64 indices."""
        return InMemoryImages(self.pixels[rows], self.labels[rows])


class ImageStore(Protocol):
    """Reads encoded images by position.

    It keeps no file open, so it can be sent to other processes and used by several threads.
    """

    def __len__(self) -> int: ...

    def read(self, position: int) -> bytes:
        """Return the encoded image. Raises DataError with its name if it cannot be read."""

    def name(self, position: int) -> str:
        """Return the path or name of the image, for messages."""

    def key(self, position: int) -> str:
        """Return the name relative to data.root, as used in exclude lists."""

    def size(self, position: int) -> int:
        """Return the size of the encoded image [bytes]; 0 if it is unknown without reading."""


class EncodedImages(NamedTuple):
    """Labeled images that stay encoded until they are used.

    labels: int64 [images], an index into the class names.
    positions: int64 [images], of the images in the store.
    """

    labels: Tensor
    store: ImageStore
    positions: Tensor

    def select(self, rows: Tensor) -> "EncodedImages":
        """Return a part of the images. rows: a bool mask [images], or int64 indices."""
        return EncodedImages(self.labels[rows], self.store, self.positions[rows])

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of an image of this split.

        Raises DataError with its name if it cannot be read.
        """
        return self.store.read(int(self.positions[index]))

    def name(self, index: int) -> str:
        """Return the path or name of an image of this split, for messages."""
        return self.store.name(int(self.positions[index]))
