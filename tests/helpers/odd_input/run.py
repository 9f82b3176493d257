"""A try run in a process of its own, as nobody, watched, and judged by how it ends."""

import contextlib
import ctypes
import io
import json
import locale
import os
import re
import resource
import signal
import struct
import sys
import threading
import time
import typing
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers.command_server import CommandServer
from tests.helpers.leftovers import remaining_processes
from tests.helpers.odd_input.tries import Try, prepare

CODES = {0, 2, 3, 4, 5, 6, 7, 129, 130, 141, 143}
"""The documented exit codes but 1, which is that of a bug."""
_BUSY_S = 10.0  # processor time, after which a command is asked to stop: it works, and is slow
# How long is waited before a verdict: so long that no busy machine is the reason.
_LONGEST_S = 600.0  # in which it should have used that, or ended: else it waits for nothing
_LEAVING_S = 300.0  # after it was asked to stop, or its process group after it
_MEMORY = 6 << 30  # bytes above what the process has mapped at the start
_LARGEST = 64 << 20  # bytes of a file


class Outcome(NamedTuple):
    """code: of the exit, or minus a signal. wrong: what it should not have done; nothing: it did
    as it should. said: on standard output and error together."""

    code: int
    seconds: float
    wrong: str
    said: str
    damage: tuple[str, ...] = ()


def run_try(one: Try, command_server: CommandServer, things_at: Path, folder: Path) -> Outcome:
    """Run a try in a folder that is made for it, and judge it."""
    damage = prepare(one, things_at, folder)
    report = folder.with_name(f"{folder.name}.report")
    question = {**one._asdict(), "report": str(report), "program": "deit"}
    _give(folder)
    command_server.run(
        cwd=folder,
        SETUP_FUNCTION="tests.helpers.odd_input.run:be_nobody",
        MAIN_FUNCTION="tests.helpers.odd_input.run:supervise",
        FORKS_QUESTION=json.dumps(question),
    )
    found = json.loads(report.read_text())
    report.unlink()
    return Outcome(damage=tuple(damage), **found)


def _give(folder: Path) -> None:
    """Let nobody work in a folder that root has made."""
    if os.geteuid():
        return
    for path in (folder, *folder.rglob("*")):
        os.chown(path, _NOBODY, _NOBODY, follow_symlinks=False)


_NOBODY = 65534


def be_nobody() -> None:
    """Give up what root may, so that permissions count and no try harms the machine; but reading:
    Python itself may lie where only root reads."""
    if os.geteuid():
        return
    library = ctypes.CDLL(None, use_errno=True)

    def done(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    search = 2  # CAP_DAC_READ_SEARCH
    done(library.prctl(8, 1, 0, 0, 0))  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setgid(_NOBODY)
    os.setuid(_NOBODY)
    head = struct.pack("=Ii", 0x20080522, 0)
    done(library.capset(head, struct.pack("=6I", *(3 * (1 << search,)), 0, 0, 0)))
    done(library.prctl(47, 2, search, 0, 0))  # PR_CAP_AMBIENT, raise: programs have it as well


def supervise() -> int:
    """Run a try in a process of its own, end what does not end, and report."""
    question = json.loads(os.environ.pop("FORKS_QUESTION"))
    for name in ("SETUP_FUNCTION", "MAIN_FUNCTION"):
        os.environ.pop(name)
    terminal, inside = os.openpty()
    out = os.open(f"{question['report']}.out", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    reading, broken = os.pipe()
    os.close(reading)
    kinds = {
        "null": os.open(os.devnull, os.O_RDWR),
        "file": out,
        "pty": inside,
        "broken": broken,
        "full": os.open("/dev/full", os.O_WRONLY),
    }
    streams = [None if kind == "closed" else kinds[kind] for kind in question["streams"]]
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        _size(inside, question["columns"])
        _be_tried(question, streams)
    os.close(inside)
    shown = _Drain(terminal)
    status, wrong = _watch(pid)
    stays = _end_group(pid)
    seconds = time.monotonic() - started
    said = os.pread(out, 1 << 20, 0) + shown.finish()
    os.unlink(f"{question['report']}.out")
    text = said.replace(b"\0", b"").decode("utf-8", "replace")  # so UTF-16 is read as well
    code = os.waitstatus_to_exitcode(status)
    wrong = wrong or _judge(code, text, question)
    wrong = wrong or ("left a process behind" if stays else "")
    report = {"code": code, "seconds": round(seconds, 2), "wrong": wrong, "said": text[-6000:]}
    Path(question["report"]).write_text(json.dumps(report))
    return 0


_BUG = re.compile(
    r"unexpected \w+: |Exception ignored|Exception in thread|"
    r"Fatal Python error|Segmentation fault|\w*Warning: |leaked \w+ objects"
)


def _judge(code: int, text: str, question: dict[str, Any]) -> str:
    streams, found = question["streams"], _BUG.search(text)
    if found:
        return f"says {found.group()!r}"
    if "Traceback (most recent" in text and "--debug" not in question["words"]:
        return "shows a traceback"
    if code not in CODES:
        return f"exit code {code}"
    told = "deit:error" in "".join(text.split())  # a terminal may be one column wide
    if code not in (0, 141) and streams[2] in ("file", "pty") and not told:
        return f"exit code {code} without a message" if code != 2 or "usage:" not in text else ""
    if code == 0 and told:
        return "exit code 0 after an error"
    return ""


def _size(terminal: int, columns: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    os.environ["COLUMNS"] = str(columns)


class _Drain:
    """Reads what is written to a terminal, as it comes."""

    def __init__(self, terminal: int) -> None:
        self._parts: list[bytes] = []
        self._terminal = terminal
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(self._terminal, 1 << 16):
                self._parts.append(part)

    def finish(self) -> bytes:
        """All of it, once the other end is closed."""
        self._thread.join(5)
        return b"".join(self._parts)


def _busy(pid: int) -> float:
    """The processor time [s] of a process group."""
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == pid:
                total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


def _watch(pid: int) -> tuple[int, str]:
    """Wait for the end of a try: its status, and what was wrong with how it came to it."""
    started, wait = time.monotonic(), 0.002
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status, ""
        time.sleep(wait)
        wait = min(wait * 1.3, 0.1)
        passed = time.monotonic() - started
        busy = _busy(pid) if passed > _BUSY_S else 0.0
        if busy > _BUSY_S or passed > _LONGEST_S:
            break
    idle = "" if busy > _BUSY_S else f"waits: {busy:.1f} s of work in {passed:.0f} s"
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + _LEAVING_S
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status, idle
        time.sleep(0.01)
    os.kill(pid, signal.SIGABRT)  # and says where it was
    return os.waitpid(pid, 0)[1], idle or f"did not stop within {_LEAVING_S:.0f} s of SIGTERM"


def _end_group(group: int) -> bool:
    """End what is left of a process group; whether there was something."""
    end = time.monotonic() + _LEAVING_S
    while time.monotonic() < end:
        if not remaining_processes(group, os.getpgid):
            return False
        time.sleep(0.01)
    with contextlib.suppress(OSError):
        os.killpg(group, signal.SIGKILL)
    return True


def _be_tried(question: dict[str, Any], streams: list[int | None]) -> typing.NoReturn:
    """Become the command: its streams, its locale, its limits; leave as Python leaves."""
    for number, stream in enumerate(streams):
        if stream is None:
            os.close(number)
        else:
            os.dup2(stream, number)
    words = question["words"]
    encoding, errors = question["encoding"], "strict"
    if encoding == "C":
        locale.setlocale(locale.LC_ALL, "C")
        encoding, errors = "ascii", "surrogateescape"
        words = [os.fsencode(word).decode("ascii", "surrogateescape") for word in words]
        os.environ["LC_ALL"] = "C"
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = None
        if streams[number] is not None:
            raw = io.FileIO(number, "r" if number == 0 else "w", closefd=False)
            buffer = io.BufferedReader(raw) if number == 0 else io.BufferedWriter(raw)
            stream = io.TextIOWrapper(
                buffer,
                encoding=encoding,
                errors="backslashreplace" if number == 2 else errors,
                line_buffering=number == 2 or os.isatty(number),
            )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST, _LARGEST))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ |= {"HOME": os.getcwd(), "DEIT_FAULT": "update:4:term", "CUDA_VISIBLE_DEVICES": ""}
    from deit.cli import program

    sys.argv = [question["program"], *words]
    try:
        code = program()
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    _leave(code)


def _leave(code: Any) -> typing.NoReturn:
    """As Python leaves, but for the second that it takes to tear down what it has imported."""
    import atexit

    threading._shutdown()
    atexit._run_exitfuncs()
    code = code if isinstance(code, int) else 0 if code is None else 1
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except Exception as error:
            if stream is sys.stdout:
                with contextlib.suppress(Exception):
                    print(f"Exception ignored in {stream}: {error!r}", file=sys.stderr, flush=True)
            code = 120
    os._exit(code)
