"""Processes for runs: fresh ones, or copies of one that has imported everything already."""

import contextlib
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

from deit.core import parent_process
from deit.core.errors import SystemFault

Environment: TypeAlias = dict[str, str]
# What a run imports in any case, and the data set that most small ones are of.
_IMPORTED = ("deit.cli", "deit.training.train", "sklearn.datasets")
_LONGEST = 1 << 16  # of a question or an answer [bytes]
_LOST = -signal.SIGTERM  # a copy whose source is gone was asked to stop
_NOT_YET = 1000  # of one that has not ended; exit codes are smaller
_TRIES = 3  # servers that were lost, before it is done without


class Process(Protocol):
    """A process under way."""

    def terminate(self) -> None:
        """Ask it to stop."""

    def wait(self) -> int:
        """Wait for its end; its exit code, or minus the signal that killed it."""


class Source(Protocol):
    """Where processes come from."""

    def start(self, arguments: list[str], environment: Environment, says: int) -> Process:
        """Start `deit ARGUMENTS`. says: the file descriptor that takes all it says."""

    def close_idle(self) -> None:
        """End the servers that no process under way was copied from. One that is needed again is
        started again."""

    def close(self) -> None:
        """Let go of it; copies that are under way are asked to stop."""


@functools.cache
def source(*, gpu: bool) -> Source:
    """The one of this process: copies, which spare each run some seconds of imports; fresh ones
    where a GPU is used, whose driver works in no copy of a process that has asked it anything, and
    where the system does not tell a process that its parent has died."""
    return Fresh() if gpu or sys.platform != "linux" else Copies()


def _program(module: str, *arguments: str) -> list[str]:
    """A module of ours as a program, wherever it is started: nothing that lies in the working
    directory is taken for it."""
    return [sys.executable, "-P", "-m", module, *arguments]


def _found(environment: Environment) -> Environment:
    """An environment in which our modules are found where this process found them."""
    found = {**environment, "PYTHONUNBUFFERED": "1"}
    root = Path(__file__).resolve().parents[2]
    if root.name != "site-packages":  # which is found, and goes behind Python's own library
        path = filter(None, (str(root), environment.get("PYTHONPATH")))
        found["PYTHONPATH"] = os.pathsep.join(path)
    return found


class Fresh:
    """Processes that import everything themselves."""

    def start(self, arguments: list[str], environment: Environment, says: int) -> Process:
        return subprocess.Popen(
            _program("deit", *arguments),
            stdin=subprocess.DEVNULL,
            stdout=says,
            stderr=says,
            env=_found(environment),
        )

    def close_idle(self) -> None:
        pass

    def close(self) -> None:
        pass


class Copies:
    """Copies of a process that has imported everything, one for each environment that is asked for:
    libraries read it as they are imported. It computes nothing, for threads do not come along with
    a copy; and it ignores what asks to stop, for it has nothing to save."""

    def __init__(self) -> None:
        self._servers: dict[frozenset[tuple[str, str]], _Server] = {}
        self._lost = 0

    def start(self, arguments: list[str], environment: Environment, says: int) -> Process:
        key = frozenset(environment.items())
        while self._lost < _TRIES:
            try:
                server = self._servers.get(key) or self._another(key, environment)
            except OSError:  # a system that has no such sockets, or no process left
                break
            copy = server.copied(arguments, says)
            if copy is not None:
                return copy
            self._servers.pop(key).close()  # it was killed: another one
            self._lost += 1
        return Fresh().start(arguments, environment, says)

    def _another(self, key: frozenset[tuple[str, str]], environment: Environment) -> "_Server":
        self.close_idle()  # each takes half a gigabyte, and old environments are seldom used again
        self._servers[key] = _Server(environment)
        return self._servers[key]

    def close_idle(self) -> None:
        for key, server in tuple(self._servers.items()):
            if not server.under_way:
                self._servers.pop(key).close()

    def close(self) -> None:
        for server in self._servers.values():
            server.close()
        self._servers.clear()


class _Server:
    """The process that copies itself, as whoever asks it sees it. under_way: the numbers of the
    copies that were not waited for."""

    def __init__(self, environment: Environment) -> None:
        self.under_way: set[int] = set()
        self._asks, answers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._asked = 0
        with answers:
            self._process = subprocess.Popen(
                _program(__name__, str(answers.fileno())),
                pass_fds=(answers.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what is wrong with a library its copies say
                env=_found(environment),
            )

    def ask(self, question: dict[str, Any], *descriptors: int) -> int | None:
        """The number that it answers; None where it is gone."""
        self._asked += 1
        words = json.dumps({**question, "number": self._asked}).encode()
        try:
            socket.send_fds(self._asks, [words], descriptors)
            while answer := self._asks.recv(_LONGEST):
                number, found = json.loads(answer)
                if number == self._asked:  # and not of a question that a signal interrupted
                    return found
        except OSError:
            pass
        return None

    def copied(self, arguments: list[str], says: int) -> "_Copy | None":
        """A copy that is `deit ARGUMENTS`; None where the server is gone. Raises SystemFault
        where the system lets it start no process."""
        pid = self.ask({"start": arguments, "folder": os.getcwd()}, says)
        if pid is not None and pid < 0:
            raise SystemFault(f"no process could be started ({os.strerror(-pid)})")
        if pid is None:
            return None
        self.under_way.add(pid)
        return _Copy(self, pid)

    def close(self) -> None:
        """End it; the system tells its copies."""
        self._process.kill()
        self._process.wait()
        self._asks.close()


class _Copy(NamedTuple):
    """A copy under way. Its server keeps its number until it was waited for."""

    server: _Server
    pid: int

    def terminate(self) -> None:
        self.server.ask({"stop": self.pid})

    def wait(self) -> int:
        # Asked again and again: the server is there for the others too.
        while (code := self.server.ask({"wait": self.pid})) == _NOT_YET:
            time.sleep(0.01)
        self.server.under_way.discard(self.pid)
        return _LOST if code is None else code


def _serve(answers: socket.socket) -> None:
    """Answer until nobody asks any more. In a copy it returns from being the command."""
    # Ctrl-C reaches everybody at a terminal: those who compute save, whoever asks waits for them.
    before = {
        number: signal.signal(number, signal.SIG_IGN)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    }
    for name in _IMPORTED:
        with contextlib.suppress(Exception):  # the run that needs it says what is wrong with it
            import_module(name)
    with contextlib.suppress(Exception):
        import_module(
            "deit.core.accelerator"
        ).git_commit()  # of the code that is here now, for all copies
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would take the exit codes away
    server = os.getpid()
    while True:
        try:
            words, descriptors, *_ = socket.recv_fds(answers, _LONGEST, 1)
        except OSError:
            words = b""
        if not words:
            os._exit(0)  # nobody asks any more
        asked = json.loads(words)
        try:
            found = os.fork() if "start" in asked else _about(asked)
        except OSError as error:
            found = -error.errno
        if "start" in asked and found == 0:
            answers.close()
            for number, handler in before.items():
                signal.signal(number, handler)
            _become(asked["start"], asked["folder"], descriptors[0], parent=server)
            return
        for descriptor in descriptors:
            os.close(descriptor)
        with contextlib.suppress(OSError):
            answers.send(json.dumps([asked["number"], found]).encode())


def _about(asked: dict[str, Any]) -> int:
    """Ask a copy to stop, or whether it has ended: its exit code. Raises OSError."""
    if "stop" in asked:
        os.kill(asked["stop"], signal.SIGTERM)
        return 0
    ended, status = os.waitpid(asked["wait"], os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else _NOT_YET


def _become(arguments: list[str], folder: str, says: int, *, parent: int) -> None:
    """In a copy: be the command."""
    parent_process.set_parent(parent)
    for number in (1, 2):
        os.dup2(says, number)
    os.close(says)
    os.chdir(folder)
    sys.argv = ["deit", *arguments]
    runpy.run_module("deit", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
