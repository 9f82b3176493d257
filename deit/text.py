"""Small pieces of text: the nearest name, text files that people write, counts in words."""

import codecs
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16's mark does
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def read_text(path: Path, *, errors: str = "strict") -> str:
    """The text of a file that a person wrote: UTF-8, or what its byte-order mark says.

    Editors and shells of Windows write such a mark, UTF-16 too. The locale does not matter. Every
    line ends with a newline alone. errors: what becomes of bytes that are not UTF-8, as for
    `bytes.decode`. Raises OSError, and ValueError for a file that is no text.
    """
    content = path.read_bytes()
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


def counted(numbers: Mapping[str, int], *, most: int = 8) -> str:
    """`40 .heic, 2 .csv`, the largest first; of many kinds the rest in one number."""
    ranked = sorted(numbers.items(), key=lambda one: (-one[1], one[0]))
    words = [f"{number} {name}" for name, number in ranked[:most]]
    rest = sum(number for _, number in ranked[most:])
    return ", ".join([*words, f"{rest} others"] if rest else words)
