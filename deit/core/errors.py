"""The errors a user can cause, each with the exit code a script can rely on; and functions that
recognize errors of the machine: no memory, transient I/O errors."""

import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from signal import Signals
from typing import Any, NamedTuple


class DeitError(Exception):
    """A mistake or mishap outside the code: shown as one message, without a traceback."""

    exit_code = 1


NO_VALUE = object()
"""In the place of a value: there is none to show."""


class ConfigProblem(NamedTuple):
    """One thing that is wrong with a configuration or a command line.

    field: a field (`loss.kind`), an option (`--out`), a file or a command. value: what it was
    given, or NO_VALUE. hint: what is wrong with it, and what to do. allowed: the words that a field
    takes; empty for fields that take others.
    """

    field: str
    value: Any
    hint: str
    allowed: tuple[str, ...] = ()

    def __str__(self) -> str:
        shown = "" if self.value is NO_VALUE else f" = {shortened(repr(self.value))}"
        return f"{self.field}{shown}: {self.hint}"


class ConfigError(DeitError):
    """A setting, recipe or option is wrong.

    problems: everything that is wrong. Where none are given there is one, which the message names:
    `FIELD VALUE: hint` or `FIELD = VALUE: hint`.
    """

    exit_code = 2

    def __init__(self, message: str, problems: Sequence[ConfigProblem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems) or (_problem_in(message),)


def _problem_in(message: str) -> ConfigProblem:
    subject, colon, hint = message.partition(": ")
    if not colon:
        return ConfigProblem("", NO_VALUE, message)
    field, _, value = subject.partition(" ")
    return ConfigProblem(field, value.removeprefix("= ") or NO_VALUE, hint)


class DataError(DeitError):
    """The images or the teacher do not keep the contract of the run."""

    exit_code = 3


class NotFoundError(DataError):
    """What was named is not there, or cannot be reached."""


class NotAllowedError(DataError):
    """What was named is there, and may not be read: it is not damaged."""


class CheckpointError(DeitError):
    """A checkpoint is unreadable, incomplete or made for another model."""

    exit_code = 4


class NotReadableError(CheckpointError):
    """A file of a run may not be read: it is not damaged."""

    exit_code = 5


class SystemFault(DeitError):
    """Device, precision, disk or permission cannot do what was asked."""

    exit_code = 5


class WorkerLost(SystemFault):
    """The system ended a process that reads images."""


class NumericsError(DeitError):
    """A loss or gradient is no longer finite."""

    exit_code = 6


class PeerError(DeitError):
    """Another process of the run is gone, or did not answer in time."""

    exit_code = 7


class StoppedBySignal(BaseException):
    """A signal asked to stop. Like KeyboardInterrupt no Exception: it may come at any line, and
    whoever handles mishaps there must not take it for one."""

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message or f"stopped by {Signals(number).name}")
        self.number = number
        self.exit_code = 128 + number


def first_line(error: BaseException) -> str:
    """The first line of what another library says, with the next where it ends in a colon; or the
    name of its error."""
    first, *rest = str(error).strip().split("\n")
    if first.endswith(":") and rest:
        first += f" {rest[0].strip()}"
    return first or type(error).__name__


TRANSIENT = (
    *(errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EAGAIN),
    *(errno.EBUSY, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNABORTED),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH),
)
"""Error numbers that say nothing of the file that was read, and may not come again: limits, no
memory, a disk or file server that fails or does not answer."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the processor had no memory left.

    PyTorch, CUDA and ONNX Runtime each say so in words of their own, mostly by a RuntimeError.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = ("out of memory", "allocate memory", "not enough memory", "bad_alloc")
    return not isinstance(error, OSError) and any(word in str(error) for word in words)


def compiler_failure(error: BaseException) -> str | None:
    """Why torch.compile could not compile a network, where an error says so: no C++ compiler or
    Triton, a cache folder that cannot be written, code that it cannot trace. None for any other
    error.

    By the modules that define the errors, or that raise an OSError: importing them takes seconds,
    and their base classes differ.
    """
    modules = [one.__module__ for one in type(error).__mro__]
    if isinstance(error, OSError):
        frames = traceback.walk_tb(error.__traceback__)
        modules = [frame.f_globals.get("__name__", "") for frame, _ in frames]
    if not any(one.startswith(("torch._dynamo", "torch._inductor", "triton")) for one in modules):
        return None
    reason, *rest = first_line(error), *str(error).splitlines()[1:]
    cause = next((line.strip() for line in rest if "error:" in line), None)  # a C++ compiler's
    return f"torch.compile failed ({reason if cause is None else f'{reason}: {cause}'})"


def raise_transient(error: BaseException, place: object) -> None:
    """Raise an out-of-memory error as it is, and a transient I/O error as SystemFault; return
    for any other error. Call it before an error is translated into one about a file or a setting.

    place: what was read or tried, for the message.
    """
    if is_out_of_memory(error):
        raise error
    if isinstance(error, OSError):
        words = error.strerror if error.errno in TRANSIENT else None
    else:  # libraries give the words alone
        known = map(os.strerror, TRANSIENT)
        words = next((one for one in known if one in str(error)), None)
    if words is not None:
        raise SystemFault(f"{place}: cannot be read now ({words})") from error


_CONTROL = "\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
"""Control characters, line and paragraph separators, and what turns the direction of writing."""
_SURROGATES = "\ud800-\udfff"
_UNSAFE = re.compile(f"[{_CONTROL}{_SURROGATES}]")
_CONTROLS = re.compile(f"[{_CONTROL}]")


def did_you_mean(name: str, known: Iterable[str]) -> str:
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
