"""Commands in processes of their own, forked from one that has imported everything already."""

import atexit
import faulthandler
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.helpers.processes import ROOT, Completed, wait_until


class Running:
    """A command under way."""

    def __init__(self, server: "CommandServer", pid: int, out: Path, err: Path) -> None:
        self.server, self.pid, self.out, self.err = server, pid, out, err
        self.store: Any = None  # in which it meets others

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, *, timeout: float = 600) -> Completed:
        """Wait for its end; where that takes too long it is aborted, and says where it was."""
        code = wait_for(self.server.socket, self.pid, timeout=timeout)
        return Completed(code, self.out.read_text(), self.err.read_text())


def ask(path: Path, question: dict[str, Any]) -> Any:
    """One question to the server that listens at a path, one answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(json.dumps(question).encode() + b"\n")
        return _receive(connection)


def wait_for(path: Path, pid: int, *, timeout: float) -> int:
    """The exit code of a process that the server at a path started."""
    end, left = time.monotonic() + timeout, [signal.SIGABRT, signal.SIGKILL]
    while (code := ask(path, {"wait": pid})) is None:
        if time.monotonic() > end and left:
            os.kill(pid, left.pop(0))
            end = time.monotonic() + 10
        time.sleep(0.005)
    return code


def places(processes: int, of_node: int) -> tuple[Any, list[dict[str, str]]]:
    """The store in which processes meet, and the environment of each, as torchrun makes it.

    The store is kept by this process, as torchrun's is by its agent: none of theirs serves it, and
    no other process can have taken its port meanwhile. It is there as long as somebody holds it.
    """
    if processes == 1:
        return None, [{}]
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(of_node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    return store, [
        {**common, "RANK": str(rank), "LOCAL_RANK": str(rank % of_node)}
        for rank in range(processes)
    ]


class CommandServer:
    """Forks a process for each command. It runs no operation of torch itself, whose threads a
    fork would not take along."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "socket"
        self.number = 0
        self.held: Any = None  # what is there as long as this is
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment["HF_HUB_OFFLINE"] = "1"  # read once, when it is imported
        environment["TMPDIR"] = str(folder)  # what processes that are killed leave goes with it
        folder.chmod(0o1777)  # also for commands that gave up what root may
        environment.pop("DEIT_FAULT", None)
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(self.socket), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        wait_until(lambda: self.process.poll() is not None or self.socket.exists())
        assert self.socket.exists(), "the process that forks ended at its start"

    def start(
        self,
        *arguments: object,
        cwd: Path | None = None,
        script: str | None = None,
        as_program: bool = False,
        **environment: str,
    ) -> Running:
        """Start `deit ARGUMENTS`, or the root script of that name.

        as_program: the process exits as a real program does, which is slower, and leads a session
        of its own.
        """
        self.number += 1
        out, err = (self.folder / f"{self.number}.{name}" for name in ("out", "err"))
        question = {
            "script": script,
            "as_program": as_program,
            "arguments": [str(argument) for argument in arguments],
            "environment": environment,
            "cwd": str(cwd or self.folder),
            "out": str(out),
            "err": str(err),
        }
        out.touch()
        err.touch()
        return Running(self, ask(self.socket, question), out, err)

    def run(
        self,
        *arguments: object,
        cwd: Path | None = None,
        script: str | None = None,
        **environment: str,
    ) -> Completed:
        """Run `deit ARGUMENTS`, or a root script of that name, to its end."""
        return self.start(*arguments, cwd=cwd, script=script, **environment).wait()

    def start_processes(
        self,
        *arguments: object,
        processes: int = 2,
        of_node: int | None = None,
        **how: Any,
    ) -> list[Running]:
        """Start the processes of a command or script as torchrun would, on nodes of so many (None:
        one node)."""
        store, environments = places(processes, of_node or processes)
        started = [self.start(*arguments, **how, **place) for place in environments]
        for one in started:
            one.store = store
        return started

    def run_processes(
        self,
        *arguments: object,
        processes: int = 2,
        of_node: int | None = None,
        cwd: Path | None = None,
        script: str | None = None,
        **environment: str,
    ) -> list[Completed]:
        """The same, to their end."""
        started = self.start_processes(
            *arguments, processes=processes, of_node=of_node, cwd=cwd, script=script, **environment
        )
        return [one.wait() for one in started]

    def close(self) -> None:
        """End the process that forks."""
        self.process.kill()
        self.process.wait()


@functools.cache
def shared_server() -> CommandServer:
    """The one of this process, started when it is first needed."""
    # Short, wherever temporary files should lie: the path of a socket has a limit, and commands and
    # their workers make some in it.
    short = "/tmp" if os.path.isdir("/tmp") else None
    folder = TemporaryDirectory(prefix="deit-commands-", dir=short)
    command_server = CommandServer(Path(folder.name))
    # Held by more than its cleaning up, which a fork by multiprocessing forgets from Python 3.13
    # on: the folder would be removed with the last reference.
    command_server.held = folder
    atexit.register(folder.cleanup)
    atexit.register(command_server.close)
    return command_server


def _become(question: dict[str, Any]) -> None:
    """In the child: run the command and leave."""
    for number, name in ((1, "out"), (2, "err")):
        path = question[name]
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if path else 1, number)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # whatever the tests themselves were started with
    faulthandler.enable()  # a crash, or the end of waiting for it, says where it was
    os.environ.update(question["environment"])
    os.chdir(question["cwd"])
    _first()
    if other := os.environ.get("MAIN_FUNCTION"):
        _leave(_named(other)())
    from deit.cli import main, program
    from deit.core import parent_process

    parent_process._PARENT = os.getppid()  # not that of the process that imported it
    parent_process.mark_standalone()
    sys.argv = [question["script"] or "deit", *question["arguments"]]
    if question["as_program"]:
        os.setsid()
        sys.exit(program())
    try:
        if question["script"]:
            path = ROOT / question["script"]
            sys.path.insert(0, str(path.parent))
            runpy.run_path(str(path), run_name="__main__")
            code = 0
        else:
            code = main()
    except SystemExit as leaving:
        code = leaving.code
    _leave(code)


def _named(place: str) -> Callable[[], Any]:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def _first() -> None:
    """What a process does before it becomes a command, as its environment says."""
    if place := os.environ.get("SETUP_FUNCTION"):
        _named(place)()


def _leave(code: int) -> None:
    """End this process without the second that Python takes to tear down what it has imported."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class ForkedRun:
    """The part of `subprocess.Popen` that `deit.experiments.runner` uses, for a run that the server
    forks: it need not import for four seconds what is there."""

    def __init__(self, path: Path, arguments: list[str], env: dict[str, str]) -> None:
        self._path = path
        pipe = path.with_name(f"{uuid.uuid4().hex}.pipe")
        os.mkfifo(pipe)
        pipe.chmod(0o666)
        question = {
            "script": None,
            "as_program": False,
            "arguments": arguments[arguments.index("deit") + 1 :],
            "environment": env,
            "cwd": os.getcwd(),
            "out": str(pipe),
            "err": None,  # the same
        }
        self.pid = ask(path, question)
        self.stdout = pipe.open(errors="replace")  # waits until the run has opened its end
        pipe.unlink()

    def terminate(self) -> None:
        """Ask it to stop; nothing where it has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> int:
        """Its exit code, or minus the signal that killed it."""
        return wait_for(self._path, self.pid, timeout=600)


def forked_runs(path: Path) -> SimpleNamespace:
    """A stand-in for `subprocess` in `deit.experiments.runner`, with the server at a path."""

    def popen(arguments: list[str], *, env: dict[str, str], **how: Any) -> Any:
        if env["OMP_NUM_THREADS"] != "1":  # the server has read another number
            return subprocess.Popen(arguments, env=env, **how)
        return ForkedRun(path, arguments, env)

    names = ("DEVNULL", "PIPE", "STDOUT")
    return SimpleNamespace(Popen=popen, **{name: getattr(subprocess, name) for name in names})


_TIMING_S = {  # constants that say for how long something is timed [s]
    "deit.models.cost._ROUND_S": 0.01,
    "deit.deploy.variants._TIMED_S": 0.0,
    "deit.deploy.int8_compare._TIMED_S": 0.0,
}
# What commands import when they come to it, so that no copy has to.
_IMPORTED = (
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "sklearn.datasets"),
    *("optuna", "torch.utils.tensorboard"),
)


@contextmanager
def short_timings() -> Iterator[None]:
    """Time for moments instead of seconds: no test asks how exact the times of a table are."""
    with ExitStack() as stack:
        for place, seconds in _TIMING_S.items():
            stack.enter_context(mock.patch(place, seconds))
        yield


def _ours() -> list[str]:
    """The modules of this project, by their files."""
    files = [
        file.relative_to(ROOT / "deit" if folder == "deit" else ROOT).with_suffix("")
        for folder in ("deit", "models", "datasets")
        for file in sorted((ROOT / folder).rglob("*.py"))
        if not file.stem.startswith("__")
    ]
    return [".".join(("deit", *file.parts)) for file in files]


def _parse() -> None:
    """Read the command line of a run once, for what its libraries do the first time only."""
    from deit.cli.run_args import parse_run

    parse_run(["digits"], program="deit", about="")


def _serve(path: Path, parent: int) -> None:
    stack = ExitStack()
    stack.enter_context(short_timings())
    for name in (*_ours(), *_IMPORTED):
        with suppress(ImportError):  # it is optional
            import_module(name)
    _parse()
    import_module("torch").set_num_threads(1)
    gc.freeze()  # a copy that collects garbage need not look through all that was imported
    runner = import_module("deit.experiments.runner")
    runner.subprocess = forked_runs(path)
    unfinished = path.with_suffix(".begun")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(unfinished))
    unfinished.chmod(0o777)  # for commands that gave up what root may
    listener.listen(64)
    unfinished.rename(path)  # whoever finds it can connect
    import_module("deit.core.parent_process").kill_with_parent(parent)
    while True:
        connection = listener.accept()[0]
        with connection:
            question = _receive(connection)
            if "wait" in question:
                ended, status = os.waitpid(question["wait"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if ended else None
            else:
                answer = os.fork()
                if answer == 0:
                    listener.close()
                    connection.close()
                    if question["as_program"]:  # so are the runs that it starts
                        runner.subprocess = subprocess
                    _become(question)
            connection.sendall(json.dumps(answer).encode() + b"\n")


def _receive(connection: socket.socket) -> Any:
    """A line of JSON."""
    line = b""
    while not line.endswith(b"\n"):
        line += connection.recv(1 << 16)
    return json.loads(line)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
