"""Reads files: their bytes, and the text that people write."""

import codecs
import errno
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from deit.core.errors import raise_transient

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16's mark does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read its bytes.

    Raises OSError where there is none, or a pipe or a device, which might be waited for without
    end, or it may not be read; SystemFault where it cannot be read now. That holds for what is
    read in the `with` block as well.
    """
    try:
        if not is_plain(path):
            raise OSError(errno.EINVAL, NOT_PLAIN, str(path))
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise_transient(error, path)
        raise


NOT_PLAIN = "is a pipe or a device, not a file"


def is_plain(path: Path) -> bool:
    """Whether there is a file or a folder: opening a pipe may wait without end, reading a device
    may never end. Raises OSError where there is nothing."""
    kind = path.stat().st_mode
    return stat.S_ISREG(kind) or stat.S_ISDIR(kind)


def no_file(path: Path) -> str:
    """What to say of a path where a file should be and none is."""
    try:
        return "is a folder" if path.is_dir() else "no such file" if is_plain(path) else NOT_PLAIN
    except OSError:
        return "no such file"


def check_readable(path: Path) -> None:
    """Raise SystemFault where a file cannot be read now. Call it where a library failed to
    open one without giving the reason, as safetensors does."""
    with suppress(OSError), open_file(path):
        pass


def read_bytes(path: Path) -> bytes:
    """The bytes of a file; raises as `open_file` does."""
    with open_file(path) as file:
        return file.read()


def read_text(path: Path, *, errors: str = "strict") -> str:
    """The text of a file that a person wrote: UTF-8, or what its byte-order mark says.

    Editors and shells of Windows write such a mark, UTF-16 too. The locale does not matter. Every
    line ends with a newline alone. errors: what becomes of bytes that are not UTF-8, as for
    `bytes.decode`. Raises as `open_file` does, and ValueError for a file that is no text.
    """
    content = read_bytes(path)
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding, errors if encoding.startswith("utf-8") else "strict")
    except UnicodeDecodeError as error:
        raise ValueError(f"no {encoding[:6].upper()} text; save it as UTF-8") from error
    if "\0" in text:
        raise ValueError("no text; save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path, *, errors: str = "strict") -> list[str]:
    """The lines of a list, one entry a line, without white space around them; raises as `read_text`
    does."""
    return [line.strip() for line in read_text(path, errors=errors).splitlines()]
