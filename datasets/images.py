"""The images of a split: decoded in memory, or encoded until they are needed."""

from typing import NamedTuple, Protocol

from torch import Tensor


class InMemoryImages(NamedTuple):
    """Labelled images in memory.

    pixels: uint8 [number, 3, size, size].
    labels: int64 [number], an index into the class names.
    """

    pixels: Tensor
    labels: Tensor

    def name(self, index: int) -> str:
        """What a person finds an image of this split by."""
        return f"image {index}"

    def select(self, which: Tensor) -> "InMemoryImages":
        """Some of the images: bool [number], or int64 positions in any order."""
        return InMemoryImages(self.pixels[which], self.labels[which])


class ImageStore(Protocol):
    """Where encoded images lie, by position. Holds no open file, so that it may be sent to other
    processes, forked or spawned, and be read by many threads."""

    def __len__(self) -> int: ...

    def read(self, position: int) -> bytes:
        """The encoded image. Raises DataError naming it."""

    def name(self, position: int) -> str:
        """What a person finds the image by, for messages."""

    def key(self, position: int) -> str:
        """The name below data.root: the same wherever the data lie. Quarantine lists hold it."""

    def size(self, position: int) -> int:
        """Bytes of the encoded image, 0 where it is not known without reading."""


class EncodedImages(NamedTuple):
    """Labelled images that stay encoded until they are needed.

    labels: int64 [number], an index into the class names.
    rows: int64 [number], the positions of the images in the store.
    """

    labels: Tensor
    store: ImageStore
    positions: Tensor

    def select(self, which: Tensor) -> "EncodedImages":
        """Some of the images: bool [number], or int64 positions in any order."""
        return EncodedImages(self.labels[which], self.store, self.positions[which])

    def read(self, index: int) -> bytes:
        """The encoded bytes of an image of this split. Raises DataError naming it."""
        return self.store.read(int(self.positions[index]))

    def name(self, index: int) -> str:
        """What a person finds an image of this split by."""
        return self.store.name(int(self.positions[index]))
