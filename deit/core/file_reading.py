"""Reading of files: bytes, and text in the encodings that editors write."""

import codecs
import errno
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from deit.core.errors import raise_if_transient

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16: its mark starts with UTF-16's
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read its bytes.

    Raises OSError if it does not exist, must not be read, or is a pipe or a device (reading those
    may block forever); SystemFault for a transient error. Both can also be raised by reads in the
    `with` block.
    """
    try:
        if not is_plain(path):
            raise OSError(errno.EINVAL, NOT_PLAIN, str(path))
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise_if_transient(error, path)
        raise


NOT_PLAIN = "is a pipe or a device, not a file"


def is_plain(path: Path) -> bool:
    """Return whether a path is a regular file or a folder, rather than a pipe or a device.

    Raises OSError if it does not exist.
    """
    kind = path.stat().st_mode
    return stat.S_ISREG(kind) or stat.S_ISDIR(kind)


def missing_file_reason(path: Path) -> str:
    """Return why a path is not a file, for messages."""
    try:
        return "is a folder" if path.is_dir() else "no such file" if is_plain(path) else NOT_PLAIN
    except OSError:
        return "no such file"


def check_readable(path: Path) -> None:
    """Raise SystemFault if a file cannot be read because of a transient error.

    Call it when a library failed to open the file without a reason, as safetensors does.
    """
    with suppress(OSError), open_file(path):
        pass


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file. Raises as `open_file` does."""
    with open_file(path) as file:
        return file.read()


def read_text(path: Path, *, errors: str = "strict") -> str:
    """Return the text of a file: UTF-8, or the encoding of its byte-order mark.

    Editors and shells of Windows write such marks, also for UTF-16. The locale has no effect. Line
    ends become newlines.

    errors: how to handle bytes that are not UTF-8, as in `bytes.decode`.
    Raises as `open_file` does, and ValueError if the file is not text.
    """
    content = read_bytes(path)
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding, errors if encoding.startswith("utf-8") else "strict")
    except UnicodeDecodeError as error:
        raise ValueError(f"not {encoding[:6].upper()} text; save it as UTF-8") from error
    if "\0" in text:
        raise ValueError("not a text file; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path, *, errors: str = "strict") -> list[str]:
    """Return the lines of a file without surrounding white space. Raises as `read_text` does."""
    return [line.strip() for line in read_text(path, errors=errors).splitlines()]
