"""Run a fuzz case as an unprivileged user in a process of its own, and check how it ends."""

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
from tests.helpers.odd_input.cases import FuzzCase, prepare

CODES = {0, 2, 3, 4, 5, 6, 7, 129, 130, 141, 143}
"""The documented exit codes except 1, which reports a bug."""
_BUSY_S = 10.0  # processor time after which a command is stopped: it works, but slowly
# Time limits that a busy machine does not reach either.
_LONGEST_S = 600.0  # a command that has not ended or used _BUSY_S after this time hangs
_LEAVING_S = 300.0  # to end after SIGTERM, and for its process group to end after it
_MEMORY = 6 << 30  # bytes above what the process has mapped at the start
_LARGEST = 64 << 20  # bytes of a file


class Outcome(NamedTuple):
    """The end of a case.

    code: the exit code, or minus a signal. problem: the undocumented behavior, or "". output:
    standard output and standard error together. damage: the damaged files.
    """

    code: int
    seconds: float
    problem: str
    output: str
    damage: tuple[str, ...] = ()


def run_case(
    case: FuzzCase, command_server: CommandServer, inputs_at: Path, folder: Path
) -> Outcome:
    """Run a case in a new folder, and check its end."""
    damage = prepare(case, inputs_at, folder)
    report = folder.with_name(f"{folder.name}.report")
    request = {**case._asdict(), "report": str(report), "program": "deit"}
    _change_owner(folder)
    command_server.run(
        cwd=folder,
        SETUP_FUNCTION="tests.helpers.odd_input.run:drop_privileges",
        MAIN_FUNCTION="tests.helpers.odd_input.run:supervise",
        FUZZ_CASE=json.dumps(request),
    )
    outcome = json.loads(report.read_text())
    report.unlink()
    return Outcome(damage=tuple(damage), **outcome)


def _change_owner(folder: Path) -> None:
    """Make the unprivileged user the owner of a folder, if the tests run as root."""
    if os.geteuid():
        return
    for path in (folder, *folder.rglob("*")):
        os.chown(path, _UNPRIVILEGED_ID, _UNPRIVILEGED_ID, follow_symlinks=False)


_UNPRIVILEGED_ID = 65534


def drop_privileges() -> None:
    """Become an unprivileged user, so that permissions apply and no case harms the machine.

    The right to read everything is kept: Python may be installed where only root can read.
    """
    if os.geteuid():
        return
    library = ctypes.CDLL(None, use_errno=True)

    def check(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    search = 2  # CAP_DAC_READ_SEARCH
    check(library.prctl(8, 1, 0, 0, 0))  # PR_SET_KEEPCAPS
    os.setgroups([])
    os.setgid(_UNPRIVILEGED_ID)
    os.setuid(_UNPRIVILEGED_ID)
    head = struct.pack("=Ii", 0x20080522, 0)
    check(library.capset(head, struct.pack("=6I", *(3 * (1 << search,)), 0, 0, 0)))
    check(library.prctl(47, 2, search, 0, 0))  # PR_CAP_AMBIENT, raise: for programs it starts


def supervise() -> int:
    """Run a case in a process of its own, end it if it hangs, and write a report."""
    case = json.loads(os.environ.pop("FUZZ_CASE"))
    for name in ("SETUP_FUNCTION", "MAIN_FUNCTION"):
        os.environ.pop(name)
    terminal, inside = os.openpty()
    out = os.open(f"{case['report']}.out", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    reading, broken = os.pipe()
    os.close(reading)
    kinds = {
        "null": os.open(os.devnull, os.O_RDWR),
        "file": out,
        "pty": inside,
        "broken": broken,
        "full": os.open("/dev/full", os.O_WRONLY),
    }
    streams = [None if kind == "closed" else kinds[kind] for kind in case["streams"]]
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        _set_terminal_size(inside, case["columns"])
        _run_program(case, streams)
    os.close(inside)
    screen = _TerminalReader(terminal)
    status, problem = _wait_for_end(pid)
    remains = _end_group(pid)
    seconds = time.monotonic() - started
    output = os.pread(out, 1 << 20, 0) + screen.finish()
    os.unlink(f"{case['report']}.out")
    text = output.replace(b"\0", b"").decode("utf-8", "replace")  # reads UTF-16 as well
    code = os.waitstatus_to_exitcode(status)
    problem = problem or _find_problem(code, text, case)
    problem = problem or ("left a process behind" if remains else "")
    report = {
        "code": code,
        "seconds": round(seconds, 2),
        "problem": problem,
        "output": text[-6000:],
    }
    Path(case["report"]).write_text(json.dumps(report))
    return 0


_BUG = re.compile(
    r"unexpected \w+: |Exception ignored|Exception in thread|"
    r"Fatal Python error|Segmentation fault|\w*Warning: |leaked \w+ objects"
)


def _find_problem(code: int, text: str, case: dict[str, Any]) -> str:
    streams, bug = case["streams"], _BUG.search(text)
    if bug:
        return f"prints {bug.group()!r}"
    if "Traceback (most recent" in text and "--debug" not in case["arguments"]:
        return "prints a traceback"
    if code not in CODES:
        return f"exit code {code}"
    has_message = "deit:error" in "".join(text.split())  # a terminal may be one column wide
    if code not in (0, 141) and streams[2] in ("file", "pty") and not has_message:
        return f"exit code {code} without a message" if code != 2 or "usage:" not in text else ""
    if code == 0 and has_message:
        return "exit code 0 after an error"
    return ""


def _set_terminal_size(terminal: int, columns: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    os.environ["COLUMNS"] = str(columns)


class _TerminalReader:
    """Reads the output of a terminal in a thread."""

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
        """Return all output, after the other end is closed."""
        self._thread.join(5)
        return b"".join(self._parts)


def _cpu_seconds(pid: int) -> float:
    """Return the processor time [s] of a process group."""
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == pid:
                total += sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


def _wait_for_end(pid: int) -> tuple[int, str]:
    """Wait for the end of a case; return its status and the problem, if it hangs."""
    started, wait = time.monotonic(), 0.002
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status, ""
        time.sleep(wait)
        wait = min(wait * 1.3, 0.1)
        passed = time.monotonic() - started
        busy = _cpu_seconds(pid) if passed > _BUSY_S else 0.0
        if busy > _BUSY_S or passed > _LONGEST_S:
            break
    idle = "" if busy > _BUSY_S else f"hangs: {busy:.1f} s of work in {passed:.0f} s"
    os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + _LEAVING_S
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status, idle
        time.sleep(0.01)
    os.kill(pid, signal.SIGABRT)  # and prints a traceback
    return os.waitpid(pid, 0)[1], idle or f"did not stop within {_LEAVING_S:.0f} s of SIGTERM"


def _end_group(group: int) -> bool:
    """End the remaining processes of a group; return whether there were any."""
    end = time.monotonic() + _LEAVING_S
    while time.monotonic() < end:
        if not remaining_processes(group, os.getpgid):
            return False
        time.sleep(0.01)
    with contextlib.suppress(OSError):
        os.killpg(group, signal.SIGKILL)
    return True


def _run_program(case: dict[str, Any], streams: list[int | None]) -> typing.NoReturn:
    """Run the command in this process, with the streams, locale and limits of the case."""
    for descriptor, stream in enumerate(streams):
        if stream is None:
            os.close(descriptor)
        else:
            os.dup2(stream, descriptor)
    arguments = case["arguments"]
    encoding, errors = case["encoding"], "strict"
    if encoding == "C":
        locale.setlocale(locale.LC_ALL, "C")
        encoding, errors = "ascii", "surrogateescape"
        arguments = [
            os.fsencode(argument).decode("ascii", "surrogateescape") for argument in arguments
        ]
        os.environ["LC_ALL"] = "C"
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        stream = None
        if streams[descriptor] is not None:
            raw = io.FileIO(descriptor, "r" if descriptor == 0 else "w", closefd=False)
            buffer = io.BufferedReader(raw) if descriptor == 0 else io.BufferedWriter(raw)
            stream = io.TextIOWrapper(
                buffer,
                encoding=encoding,
                errors="backslashreplace" if descriptor == 2 else errors,
                line_buffering=descriptor == 2 or os.isatty(descriptor),
            )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST, _LARGEST))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ |= {"HOME": os.getcwd(), "DEIT_FAULT": "step:4:term", "CUDA_VISIBLE_DEVICES": ""}
    from deit.cli import program

    sys.argv = [case["program"], *arguments]
    try:
        code = program()
    except SystemExit as error:
        code = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    _exit_like_python(code)


def _exit_like_python(code: Any) -> typing.NoReturn:
    """End as Python does, but without the teardown of all modules, which takes a second."""
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
