"""Where encoded images lie: files in folders, stretches of tar files, a timm reader."""

import os
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deit.core.errors import DataError, NotAllowedError, bytes_of, first_line, raise_transient


class StringTable:
    """Many short texts in two arrays: a million of them are copied to a worker as two blocks, and
    a forked worker that looks one up does not touch (and so copy) the memory of the others."""

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [bytes_of(text) for text in texts]
        self.ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        self.content = b"".join(encoded)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.content[start : self.ends[index]])


class FolderStore:
    """Image files below a root, by their paths relative to it."""

    def __init__(self, root: Path, paths: Iterable[str]) -> None:
        self.root = root
        self.paths = StringTable(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, position: int) -> bytes:
        """The bytes of the file. Raises DataError if it cannot be read, SystemFault where that
        may pass."""
        try:
            return (self.root / self.paths[position]).read_bytes()
        except OSError as error:
            raise _unreadable(self.name(position), error) from None

    def name(self, position: int) -> str:
        """The path of the file."""
        return str(self.root / self.paths[position])

    def key(self, position: int) -> str:
        """The path relative to the root."""
        return self.paths[position]

    def size(self, position: int) -> int:
        """Bytes of the file. Raises DataError if it is gone."""
        try:
            return (self.root / self.paths[position]).stat().st_size
        except OSError as error:
            raise _unreadable(self.name(position), error) from None


class ShardStore:
    """Members of uncompressed tar files, by shard, offset and size [bytes].

    A shard is opened for each read: beside the decoding of an image that costs nothing, and
    thousands of shards need no thousands of open files in every worker.
    """

    def __init__(
        self,
        root: Path,
        shards: Iterable[str],
        members: Iterable[str],
        ranges: Iterable[tuple[int, int, int]],
    ) -> None:
        """shards: paths relative to the root (`.`: the root is the tar itself).
        members: the name of each image in its shard. ranges: (shard index, offset, size)."""
        self.root = root
        self.shards = tuple(shards)
        self.members = StringTable(members)
        self.ranges = np.array(list(ranges), dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.members)

    def read(self, position: int) -> bytes:
        """The bytes of the member. Raises DataError if they cannot be read, SystemFault where
        that may pass."""
        shard, offset, size = self.ranges[position].tolist()
        try:
            with open(self.root / self.shards[shard], "rb", buffering=0) as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise _unreadable(self.name(position), error) from None
        if len(content) != size:
            raise DataError(f"{self.name(position)}: the shard ends before this image does")
        return content

    def name(self, position: int) -> str:
        """The path of the shard and the name in it: SHARD.tar/NAME."""
        return str(self.root / self.key(position))

    def key(self, position: int) -> str:
        """The path of the shard relative to the root, and the name in it."""
        shard = self.shards[int(self.ranges[position, 0])]
        return self.members[position] if shard == "." else f"{shard}/{self.members[position]}"

    def size(self, position: int) -> int:
        """Bytes of the member."""
        return int(self.ranges[position, 2])


class ReaderStore:
    """Rows of data sets that answer `dataset[row]` with an encoded file or a picture first.

    Positions count through the splits in their order. The data sets must open their files in each
    call or be safe to share, as Hugging Face's (memory-mapped) and torchvision's are.
    """

    def __init__(self, title: str, splits: dict[str, Any]) -> None:
        self.title = title
        self.splits = splits
        self.starts = np.cumsum([0, *(len(split) for split in splits.values())])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _find(self, position: int) -> tuple[str, int]:
        split = int(np.searchsorted(self.starts, position, side="right")) - 1
        return tuple(self.splits)[split], int(position - self.starts[split])

    def read(self, position: int) -> bytes:
        """The encoded image; a picture is encoded without loss. Raises DataError, SystemFault
        where what keeps it from being read may pass."""
        split, row = self._find(position)
        try:
            image = self.splits[split][row][0]
            if isinstance(image, Image.Image):
                return _encode(image)
            with image:
                return image.read()
        except (Exception, SystemExit) as error:  # a foreign reader raises what it likes
            raise _unreadable(self.name(position), error) from None

    def name(self, position: int) -> str:
        """Which reader, split and row."""
        return f"{self.title}: {self.key(position)}"

    def key(self, position: int) -> str:
        """Split and row, from 0."""
        split, row = self._find(position)
        return f"{split}/{row}"

    def size(self, position: int) -> int:
        """0: only reading would tell."""
        return 0


def _encode(image: Image.Image) -> bytes:
    buffer = BytesIO()
    kind = "TIFF" if image.mode == "CMYK" else "PNG"
    image.save(buffer, kind, exif=image.getexif(), compress_level=1)
    return buffer.getvalue()


def _unreadable(name: str, error: Exception) -> DataError:
    """What is wrong with the image. Raises what is wrong with the machine: the image may be sound,
    and who takes it for damaged leaves it out for ever."""
    raise_transient(error, name)
    reason = getattr(error, "strerror", None) or first_line(error)
    kind = NotAllowedError if isinstance(error, PermissionError) else DataError
    return kind(f"{name}: not readable ({reason})")
