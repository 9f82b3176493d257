"""Pieces of text that messages and files share: which names fit both."""

import difflib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress

_CONTROL = "\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
"""Control characters, line and paragraph separators, and what turns the direction of writing."""
_SURROGATES = "\ud800-\udfff"
_UNSAFE = re.compile(f"[{_CONTROL}{_SURROGATES}]")
_CONTROLS = re.compile(f"[{_CONTROL}]")


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {in_line(close[0])}?" if close else ""


def in_line(text: str) -> str:
    """Text for one line of a terminal or a file: control characters, line breaks among them, and
    bytes that are no UTF-8 (surrogate escapes) as backslash escapes."""
    return _UNSAFE.sub(lambda found: _escape(found[0]), text)


def printable(text: str) -> str:
    """As `in_line`, for several lines: line breaks and tabs stay."""
    return _UNSAFE.sub(lambda found: found[0] if found[0] in "\n\t" else _escape(found[0]), text)


def shortened(text: str, most: int = 200) -> str:
    """A long text with its middle left out."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def _escape(character: str) -> str:
    number = ord(character)
    if 0xDC80 <= number <= 0xDCFF:
        return f"\\x{number - 0xDC00:02x}"  # the byte that surrogateescape stands for
    return character.encode("unicode_escape", "surrogatepass").decode()


def open_streams() -> None:
    """Make standard output and error take every character and never be missing.

    What their encoding lacks is printed as a backslash escape. A stream that was closed (`>&-`)
    leads nowhere: else the next file that is opened would take its place and its text.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
            setattr(sys, name, stream)
        with suppress(AttributeError, OSError, ValueError):  # a notebook's stream, or a closed one
            stream.reconfigure(errors="backslashreplace")


def breaks_line(name: str) -> bool:
    """Whether a name holds control characters, line breaks among them."""
    return _CONTROLS.search(name) is not None


def bytes_of(name: str) -> bytes:
    """The bytes of a file's name as they are on the disk."""
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:  # not a file's: a name in an archive, which is UTF-8
        return name.encode(errors="surrogateescape")


def name_trouble(name: str) -> str | None:
    """Why a name cannot be written into every file and on every line; None where it can."""
    if breaks_line(name):
        return "holds a line break or another control character"
    if name.isascii():
        return None
    if sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
        return "is not ASCII, which this system cannot read as UTF-8 (PYTHONUTF8=1 lets it)"
    return "is not valid UTF-8" if _UNSAFE.search(name) else None


def counted(numbers: Mapping[str, int], *, most: int = 8) -> str:
    """`40 .heic, 2 .csv`, the largest first; of many kinds the rest in one number."""
    ranked = sorted(numbers.items(), key=lambda one: (-one[1], one[0]))
    words = [f"{number} {name}" for name, number in ranked[:most]]
    rest = sum(number for _, number in ranked[most:])
    return ", ".join([*words, f"{rest} others"] if rest else words)
