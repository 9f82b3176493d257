"""Error classes, each with its exit code; recognition of out-of-memory and transient I/O errors;
and escapes that make any text safe to print."""

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
    """An error caused by input or environment; printed as one message without a traceback.

    All errors of this package that are not bugs are of this class; `exit_code` is that of the
    command.

    >>> from deit.config.recipes import find_recipe
    >>> try:
    ...     find_recipe("digit")
    ... except DeitError as error:
    ...     print(type(error).__name__, error.exit_code)
    ConfigError 2
    """

    exit_code = 1


NO_VALUE = object()
"""Marks a `ConfigProblem` without a value."""


class ConfigProblem(NamedTuple):
    """One problem of a configuration or a command line.

    field: a field (`loss.kind`), an option (`--out`), a file or a command.
    value: the value given, or NO_VALUE.
    hint: what is wrong with it, and what to do.
    allowed: the choices of the field; empty if it has none.
    """

    field: str
    value: Any
    hint: str
    allowed: tuple[str, ...] = ()

    def __str__(self) -> str:
        value = "" if self.value is NO_VALUE else f" = {shortened(repr(self.value))}"
        return f"{self.field}{value}: {self.hint}"


class ConfigError(DeitError):
    """A setting, recipe or option is invalid.

    Also: the folder of a run, comparison, sweep or store holds something different, or a run and
    --resume is missing.

    problems: all problems found. By default there is one, parsed from the message, which then has
    the form `FIELD VALUE: hint` or `FIELD = VALUE: hint`.

    >>> problem = ConfigError("--parallel 0: should be at least 1").problems[0]
    >>> problem.field, problem.value, problem.hint
    ('--parallel', '0', 'should be at least 1')
    """

    exit_code = 2

    def __init__(self, message: str, problems: Sequence[ConfigProblem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems) or (_problem_in(message),)


def config_error(problems: Sequence[ConfigProblem]) -> ConfigError:
    """Return one error with several problems, each on a line of its message."""
    return ConfigError("\n  ".join(map(str, problems)), problems)


def _problem_in(message: str) -> ConfigProblem:
    subject, colon, hint = message.partition(": ")
    if not colon:
        return ConfigProblem("", NO_VALUE, message)
    field, _, value = subject.partition(" ")
    return ConfigProblem(field, value.removeprefix("= ") or NO_VALUE, hint)


class DataError(DeitError):
    """The images, the teacher or the stored targets do not fit the run.

    They are unreadable, have other classes or other views, or the teacher is near chance.
    """

    exit_code = 3


class NotFoundError(DataError):
    """A file, folder or address does not exist or cannot be reached."""


class NotAllowedError(DataError):
    """A file or folder exists, but its permissions forbid reading it."""


class CheckpointError(DeitError):
    """A checkpoint is unreadable, incomplete or made for another model.

    Also: the input of a measurement or compression is no run, a store of targets is damaged, or an
    exported or int8 file does not agree with its run.
    """

    exit_code = 4


class NotReadableError(CheckpointError):
    """The permissions of a file of a run forbid reading it; the file may be intact."""

    exit_code = 5


class SystemFault(DeitError):
    """The device, memory, disk or permissions do not allow the operation.

    Also: the precision is not supported, a package or compiler is missing, a file server does not
    respond, too many files are open, another run holds the folder, or the output exists (--force
    replaces it) or its folder does not.
    """

    exit_code = 5


class WorkerLost(SystemFault):
    """The operating system killed a worker process that decodes images."""


class NumericsError(DeitError):
    """A loss or gradient is not finite too many times in a row, or a teacher's output is not."""

    exit_code = 6


class PeerError(DeitError):
    """Another process of the run has exited or timed out."""

    exit_code = 7


class StoppedBySignal(KeyboardInterrupt):
    """A signal requested a stop: SIGINT (Ctrl-C, a notebook's stop button), SIGTERM or SIGHUP.

    A training that had begun has saved a checkpoint before.

    A KeyboardInterrupt, so that programs and notebooks handle it as one. No Exception: it can be
    raised at any line, and an `except Exception` there must not handle it.
    """

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message or f"stopped by {Signals(signum).name}")
        self.signum = signum
        self.exit_code = 128 + signum


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, joined with the second if it ends in a colon;
    the name of the error class if the message is empty."""
    first, *rest = str(error).strip().split("\n")
    if first.endswith(":") and rest:
        first += f" {rest[0].strip()}"
    return first or type(error).__name__


TRANSIENT = (
    *(errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EAGAIN),
    *(errno.EBUSY, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNABORTED),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH),
)
"""Error numbers that can be transient and do not mean that the file is bad: limits, no memory, a
disk or file server that fails or does not respond."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a device or the host ran out of memory.

    PyTorch, CUDA and ONNX Runtime use different messages, mostly in a RuntimeError.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    phrases = ("out of memory", "allocate memory", "not enough memory", "bad_alloc")
    return not isinstance(error, OSError) and any(phrase in str(error) for phrase in phrases)


def compiler_failure(error: BaseException) -> str | None:
    """Return why torch.compile failed; None for an error that torch.compile did not cause.

    Typical causes: no C++ compiler or Triton, a cache folder that is not writable, code that cannot
    be traced.
    """
    # Compared by module name: importing the error classes takes seconds, and their bases differ.
    modules = [kind.__module__ for kind in type(error).__mro__]
    if isinstance(error, OSError):
        frames = traceback.walk_tb(error.__traceback__)
        modules = [frame.f_globals.get("__name__", "") for frame, _ in frames]
    if not any(name.startswith(("torch._dynamo", "torch._inductor", "triton")) for name in modules):
        return None
    reason, *rest = first_line(error), *str(error).splitlines()[1:]
    cause = next((line.strip() for line in rest if "error:" in line), None)  # a C++ compiler's
    return f"torch.compile failed ({reason if cause is None else f'{reason}: {cause}'})"


def raise_if_transient(error: BaseException, subject: object) -> None:
    """Raise an out-of-memory error as it is, and a transient I/O error as SystemFault; return
    for any other error. Call it before an error is translated into one about a file or a setting.

    subject: what was read or tried, for the message.
    """
    if is_out_of_memory(error):
        raise error
    if isinstance(error, OSError):
        reason = error.strerror if error.errno in TRANSIENT else None
    else:  # other libraries give the message without the error number
        messages = map(os.strerror, TRANSIENT)
        reason = next((message for message in messages if message in str(error)), None)
    if reason is not None:
        raise SystemFault(f"{subject}: cannot be read now ({reason})") from error


_CONTROL = "\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
"""Control characters, line and paragraph separators, and bidirectional controls."""
_SURROGATES = "\ud800-\udfff"
_UNSAFE = re.compile(f"[{_CONTROL}{_SURROGATES}]")
_CONTROLS = re.compile(f"[{_CONTROL}]")


def did_you_mean(name: str, known: Iterable[str], count: int = 1) -> str:
    """Return `; did you mean X?` for the closest known names, at most `count`, or an empty string.

    >>> did_you_mean("digit", ["digits", "cifar10"])
    '; did you mean digits?'
    >>> did_you_mean("folde", ["folder", "folder-2", "digits"], count=3)
    '; did you mean folder or folder-2?'
    """
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.6)
    listed = [single_line(match) for match in close]
    text = " or ".join([", ".join(listed[:-1]), *listed[-1:]] if len(listed) > 1 else listed)
    return f"; did you mean {text}?" if text else ""


def single_line(text: str) -> str:
    """Return text that is safe on one line of a terminal or a file.

    Control characters, line breaks and bytes that are not UTF-8 (surrogate escapes) become
    backslash escapes.
    """
    return _UNSAFE.sub(lambda match: _escape(match[0]), text)


def printable(text: str) -> str:
    """Return text as `single_line` does, but keep line breaks and tabs."""
    return _UNSAFE.sub(lambda match: match[0] if match[0] in "\n\t" else _escape(match[0]), text)


def shortened(text: str, max_length: int = 200) -> str:
    """Return the text, with its middle left out if it is longer than `max_length`."""
    half = max_length // 2
    return text if len(text) <= max_length else f"{text[:half]} ... {text[-half:]}"


def _escape(character: str) -> str:
    code_point = ord(character)
    if 0xDC80 <= code_point <= 0xDCFF:
        return f"\\x{code_point - 0xDC00:02x}"  # the byte that surrogateescape encoded
    return character.encode("unicode_escape", "surrogatepass").decode()


def open_streams() -> None:
    """Make standard output and error accept every character, even if they were closed.

    Characters that their encoding lacks are printed as backslash escapes. A closed stream (`>&-`)
    is opened on the null device: otherwise the next opened file would get its descriptor, and the
    text printed to it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
            setattr(sys, name, stream)
        with suppress(AttributeError, OSError, ValueError):  # a notebook's stream, or a closed one
            stream.reconfigure(errors="backslashreplace")


def breaks_line(name: str) -> bool:
    """Return whether a name contains line breaks or other control characters."""
    return _CONTROLS.search(name) is not None


def filename_bytes(name: str) -> bytes:
    """Return the bytes of a file name as they are on the disk."""
    try:
        return os.fsencode(name)
    except UnicodeEncodeError:  # a name in an archive, which is UTF-8
        return name.encode(errors="surrogateescape")


def name_problem(name: str) -> str | None:
    """Return why a name cannot be written to text files and logs; None if it can."""
    if breaks_line(name):
        return "contains a line break or another control character"
    if name.isascii():
        return None
    if sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
        return "is not ASCII, which this system cannot read as UTF-8 (PYTHONUTF8=1 lets it)"
    return "is not valid UTF-8" if _UNSAFE.search(name) else None


def format_counts(counts: Mapping[str, int], *, max_items: int = 8) -> str:
    """Return counts as text, the largest first; all beyond the first `max_items` are added up.

    >>> format_counts({".csv": 2, ".heic": 40})
    '40 .heic, 2 .csv'
    """
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count} {name}" for name, count in ranked[:max_items]]
    rest = sum(count for _, count in ranked[max_items:])
    return ", ".join([*parts, f"{rest} others"] if rest else parts)
