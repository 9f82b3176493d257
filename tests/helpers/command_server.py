"""Run commands in processes that are forked from a server that has imported everything already.

Imports take seconds, so a forked command starts much faster than a new interpreter. Two environment
variables change what a process does, each as MODULE:FUNCTION: SETUP_FUNCTION is called before the
command, MAIN_FUNCTION in its place.
"""

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
    """A command that is running."""

    def __init__(self, server: "CommandServer", pid: int, out: Path, err: Path) -> None:
        self.server, self.pid, self.out, self.err = server, pid, out, err
        self.store: Any = None  # kept alive for the process group that meets in it

    def signal(self, signum: int) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, signum)

    def wait(self, *, timeout: float = 600) -> Completed:
        """Wait for its end; after `timeout` seconds abort it with a traceback of every thread."""
        code = wait_for(self.server.socket, self.pid, timeout=timeout)
        return Completed(code, self.out.read_text(), self.err.read_text())


def send_request(path: Path, request: dict[str, Any]) -> Any:
    """Send one request to the server with the socket `path`; return its response."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(json.dumps(request).encode() + b"\n")
        return _receive(connection)


def wait_for(path: Path, pid: int, *, timeout: float) -> int:
    """Return the exit code of a process that the server with the socket `path` has started."""
    end, signals = time.monotonic() + timeout, [signal.SIGABRT, signal.SIGKILL]
    while (code := send_request(path, {"wait": pid})) is None:
        if time.monotonic() > end and signals:
            os.kill(pid, signals.pop(0))
            end = time.monotonic() + 10
        time.sleep(0.005)
    return code


def process_environments(processes: int, of_node: int) -> tuple[Any, list[dict[str, str]]]:
    """Return the store in which processes meet, and the environment of each, as torchrun sets it.

    The store is served by this process, as torchrun's agent does. So none of the processes serves
    it, and no other program can take its port. It exists while a reference to it is kept.
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
    """Forks a process for each command.

    The server itself runs no operation of torch: a fork does not copy the threads of torch.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "socket"
        self.num_started = 0
        self.temporary_folder: Any = None  # removed with the last reference to it
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment["HF_HUB_OFFLINE"] = "1"  # read once, when it is imported
        environment["TMPDIR"] = str(folder)  # the files of killed processes are removed with it
        folder.chmod(0o1777)  # for commands that have given up the rights of root
        environment.pop("DEIT_FAULT", None)
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(self.socket), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        wait_until(lambda: self.process.poll() is not None or self.socket.exists())
        assert self.socket.exists(), "the command server ended at its start"

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
        self.num_started += 1
        out, err = (self.folder / f"{self.num_started}.{name}" for name in ("out", "err"))
        request = {
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
        return Running(self, send_request(self.socket, request), out, err)

    def run(
        self,
        *arguments: object,
        cwd: Path | None = None,
        script: str | None = None,
        **environment: str,
    ) -> Completed:
        """Run `deit ARGUMENTS`, or the root script of that name, and wait for its end."""
        return self.start(*arguments, cwd=cwd, script=script, **environment).wait()

    def start_processes(
        self,
        *arguments: object,
        processes: int = 2,
        of_node: int | None = None,
        **options: Any,
    ) -> list[Running]:
        """Start the processes of a command or script as torchrun would.

        of_node: number of processes of a node. Default: all on one node.
        """
        store, environments = process_environments(processes, of_node or processes)
        started = [self.start(*arguments, **options, **environment) for environment in environments]
        for process in started:
            process.store = store
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
        """Start the processes of a command or script as torchrun would, and wait for their end."""
        started = self.start_processes(
            *arguments, processes=processes, of_node=of_node, cwd=cwd, script=script, **environment
        )
        return [process.wait() for process in started]

    def close(self) -> None:
        """End the server."""
        self.process.kill()
        self.process.wait()


@functools.cache
def shared_server() -> CommandServer:
    """Return the command server of this process, started at the first call."""
    # A short path: the path of a socket has a limit, and commands and their workers make sockets in
    # this folder.
    parent = "/tmp" if os.path.isdir("/tmp") else None
    folder = TemporaryDirectory(prefix="deit-commands-", dir=parent)
    command_server = CommandServer(Path(folder.name))
    # A second reference: a fork by multiprocessing forgets that of `atexit` from Python 3.13 on.
    command_server.temporary_folder = folder
    atexit.register(folder.cleanup)
    atexit.register(command_server.close)
    return command_server


def _run_command(request: dict[str, Any]) -> None:
    """Run the command in the forked process, and exit."""
    for descriptor, name in ((1, "out"), (2, "err")):
        path = request[name]
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if path else 1, descriptor)
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)  # the tests may have been started with other handlers
    faulthandler.enable()  # print a traceback at a crash or at an abort
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    if name := os.environ.get("SETUP_FUNCTION"):
        _find_function(name)()
    if name := os.environ.get("MAIN_FUNCTION"):
        _exit_fast(_find_function(name)())
    from deit.cli import main, program
    from deit.core import parent_process

    parent_process._PARENT = os.getppid()  # that of the server until here
    parent_process.mark_standalone()
    sys.argv = [request["script"] or "deit", *request["arguments"]]
    if request["as_program"]:
        os.setsid()
        sys.exit(program())
    try:
        if request["script"]:
            path = ROOT / request["script"]
            sys.path.insert(0, str(path.parent))
            runpy.run_path(str(path), run_name="__main__")
            code = 0
        else:
            code = main()
    except SystemExit as error:
        code = error.code
    _exit_fast(code)


def _find_function(text: str) -> Callable[[], Any]:
    module, _, name = text.partition(":")
    return getattr(import_module(module), name)


def _exit_fast(code: int) -> None:
    """End this process without Python's teardown of all modules, which takes a second."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class ForkedRun:
    """The part of `subprocess.Popen` that `deit.experiments.parallel_runs` uses, for a forked run.

    A run that the server forks saves four seconds of imports."""

    def __init__(self, path: Path, arguments: list[str], env: dict[str, str]) -> None:
        self._path = path
        pipe = path.with_name(f"{uuid.uuid4().hex}.pipe")
        os.mkfifo(pipe)
        pipe.chmod(0o666)
        request = {
            "script": None,
            "as_program": False,
            "arguments": arguments[arguments.index("deit") + 1 :],
            "environment": env,
            "cwd": os.getcwd(),
            "out": str(pipe),
            "err": None,  # the same as "out"
        }
        self.pid = send_request(path, request)
        self.stdout = pipe.open(errors="replace")  # waits until the run has opened its end
        pipe.unlink()

    def terminate(self) -> None:
        """Send SIGTERM, unless the run has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> int:
        """Return the exit code, or minus the signal that killed the run."""
        return wait_for(self._path, self.pid, timeout=600)


def forked_runs(path: Path) -> SimpleNamespace:
    """Return a replacement of `subprocess`, for deit.experiments.parallel_runs, that forks."""

    def popen(arguments: list[str], *, env: dict[str, str], **options: Any) -> Any:
        if env["OMP_NUM_THREADS"] != "1":  # the server runs with one thread
            return subprocess.Popen(arguments, env=env, **options)
        return ForkedRun(path, arguments, env)

    names = ("DEVNULL", "PIPE", "STDOUT")
    return SimpleNamespace(Popen=popen, **{name: getattr(subprocess, name) for name in names})


_TIMING_S = {  # constants: how long something is timed [s]
    "deit.models.cost._ROUND_S": 0.01,
    "deit.deploy.variants._TIMED_S": 0.0,
    "deit.deploy.int8_compare._TIMED_S": 0.0,
}
# Modules that commands import late, so that no forked process has to.
_IMPORTED = (
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "sklearn.datasets"),
    *("optuna", "torch.utils.tensorboard"),
)


@contextmanager
def short_timings() -> Iterator[None]:
    """Shorten all timing of operations: no test depends on how exact the times of a table are."""
    with ExitStack() as stack:
        for name, seconds in _TIMING_S.items():
            stack.enter_context(mock.patch(name, seconds))
        yield


def _project_modules() -> list[str]:
    """Return the names of this project's modules."""
    files = [
        file.relative_to(ROOT / "deit" if folder == "deit" else ROOT).with_suffix("")
        for folder in ("deit", "models", "datasets")
        for file in sorted((ROOT / folder).rglob("*.py"))
        if not file.stem.startswith("__")
    ]
    return [".".join(("deit", *file.parts)) for file in files]


def _parse_once() -> None:
    """Parse the command line of a run: the libraries do some work at the first time only."""
    from deit.cli.run_args import parse_run

    parse_run(["digits"], program="deit")


def _serve(path: Path, parent: int) -> None:
    stack = ExitStack()
    stack.enter_context(short_timings())
    for name in (*_project_modules(), *_IMPORTED):
        with suppress(ImportError):  # an optional package
            import_module(name)
    _parse_once()
    import_module("torch").set_num_threads(1)
    gc.freeze()  # garbage collection in a forked process skips all that was imported
    runner = import_module("deit.experiments.parallel_runs")
    runner.subprocess = forked_runs(path)
    unfinished = path.with_suffix(".starting")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(unfinished))
    unfinished.chmod(0o777)  # for commands that have given up the rights of root
    listener.listen(64)
    unfinished.rename(path)  # a client that finds it can connect
    import_module("deit.core.parent_process").kill_with_parent(parent)
    while True:
        connection = listener.accept()[0]
        with connection:
            request = _receive(connection)
            if "wait" in request:
                ended, status = os.waitpid(request["wait"], os.WNOHANG)
                response = os.waitstatus_to_exitcode(status) if ended else None
            else:
                response = os.fork()
                if response == 0:
                    listener.close()
                    connection.close()
                    if request["as_program"]:  # its runs are real programs as well
                        runner.subprocess = subprocess
                    _run_command(request)
            connection.sendall(json.dumps(response).encode() + b"\n")


def _receive(connection: socket.socket) -> Any:
    """Read one line of JSON."""
    line = b""
    while not line.endswith(b"\n"):
        line += connection.recv(1 << 16)
    return json.loads(line)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
