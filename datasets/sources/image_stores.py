"""Stores of encoded images: files in folders, members of tar files, a timm reader."""

import os
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deit.core.errors import (
    DataError,
    NotAllowedError,
    filename_bytes,
    first_line,
    raise_if_transient,
)


class StringTable:
    """Many short strings in two arrays.

    They are sent to a worker as two blocks. In a forked worker, reading one string does not copy
    the memory pages of the others, as Python's reference counts would.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [filename_bytes(string) for string in strings]
        self.ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)
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
        """Return the bytes of the file.

        Raises DataError if it cannot be read, SystemFault if the failure can be transient.
        """
        try:
            return (self.root / self.paths[position]).read_bytes()
        except OSError as error:
            raise _unreadable(self.name(position), error) from None

    def name(self, position: int) -> str:
        """Return the path of the file."""
        return str(self.root / self.paths[position])

    def key(self, position: int) -> str:
        """Return the path relative to the root."""
        return self.paths[position]

    def size(self, position: int) -> int:
        """Return the size of the file [bytes]. Raises DataError if it does not exist."""
        try:
            return (self.root / self.paths[position]).stat().st_size
        except OSError as error:
            raise _unreadable(self.name(position), error) from None


class ShardStore:
    """Members of uncompressed tar files, by shard, offset and size [bytes].

    The shard is opened for each read: the cost is negligible compared with decoding, and workers do
    not need thousands of open files.
    """

    def __init__(
        self,
        root: Path,
        shards: Iterable[str],
        members: Iterable[str],
        ranges: Iterable[tuple[int, int, int]],
    ) -> None:
        """shards: paths relative to the root (`.`: the root is the tar file itself).
        members: the name of each image in its shard. ranges: (shard index, offset, size)."""
        self.root = root
        self.shards = tuple(shards)
        self.members = StringTable(members)
        self.ranges = np.array(list(ranges), dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.members)

    def read(self, position: int) -> bytes:
        """Return the bytes of the member.

        Raises DataError if they cannot be read, SystemFault if the failure can be transient.
        """
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
        """Return the path of the shard and the name in it: SHARD.tar/NAME."""
        return str(self.root / self.key(position))

    def key(self, position: int) -> str:
        """Return the path of the shard relative to the root, and the name in it."""
        shard = self.shards[int(self.ranges[position, 0])]
        return self.members[position] if shard == "." else f"{shard}/{self.members[position]}"

    def size(self, position: int) -> int:
        """Return the size of the member [bytes]."""
        return int(self.ranges[position, 2])


class ReaderStore:
    """Rows of datasets whose `dataset[row][0]` is an open encoded file or a PIL image.

    Positions number the rows of all splits, in order. The datasets must open their files in each
    call or be safe to share, like those of Hugging Face (memory-mapped) and torchvision.
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
        """Return the encoded image; a PIL image is encoded losslessly.

        Raises DataError if it cannot be read, SystemFault if the failure can be transient.
        """
        split, row = self._find(position)
        try:
            image = self.splits[split][row][0]
            if isinstance(image, Image.Image):
                return _encode(image)
            with image:
                return image.read()
        except (Exception, SystemExit) as error:  # third-party readers raise errors of any type
            raise _unreadable(self.name(position), error) from None

    def name(self, position: int) -> str:
        """Return reader, split and row."""
        return f"{self.title}: {self.key(position)}"

    def key(self, position: int) -> str:
        """Return split and row, from 0."""
        split, row = self._find(position)
        return f"{split}/{row}"

    def size(self, position: int) -> int:
        """Return 0: the size is unknown without reading."""
        return 0


def _encode(image: Image.Image) -> bytes:
    buffer = BytesIO()
    kind = "TIFF" if image.mode == "CMYK" else "PNG"
    image.save(buffer, kind, exif=image.getexif(), compress_level=1)
    return buffer.getvalue()


def _unreadable(name: str, error: Exception) -> DataError:
    """Return the error for an unreadable image.

    Raises SystemFault if the machine is the cause, so that an intact image is not excluded.
    """
    raise_if_transient(error, name)
    reason = getattr(error, "strerror", None) or first_line(error)
    kind = NotAllowedError if isinstance(error, PermissionError) else DataError
    return kind(f"{name}: not readable ({reason})")
