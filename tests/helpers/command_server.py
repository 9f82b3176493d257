"""Commands in processes of their own, forked from one that has imported everything already."""

import atexit
import ctypes
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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).parents[2]


def until(condition: Callable[[], object], *, timeout: float = 300) -> None:
    """Wait for something that another process does; not for ever."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


class Completed(NamedTuple):
    """How a command ended: its exit code, or minus the signal that killed it."""

    code: int
    out: str
    err: str


def last_json(text: str) -> Any:
    """The last line that is an object of JSON: libraries say something at any time."""
    return json.loads([line for line in text.splitlines() if line.startswith("{")][-1])


def fresh(source: str, *arguments: object, path: Path | None = None) -> Completed:
    """Run a program in an interpreter that has imported nothing. path: a folder it imports from,
    besides this project."""
    done = subprocess.run(
        [sys.executable, "-c", source, *map(str, arguments)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *([path] if path else ())))),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Completed(done.returncode, done.stdout, done.stderr)


class Running:
    """A command under way."""

    def __init__(self, zygote: "Zygote", pid: int, out: Path, err: Path) -> None:
        self.zygote, self.pid, self.out, self.err = zygote, pid, out, err
        self.store: Any = None  # in which it meets others

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, *, timeout: float = 600) -> Completed:
        """Wait for its end; where that takes too long it is aborted, and says where it was."""
        code = self.zygote.ask({"wait": self.pid, "timeout": timeout})["code"]
        return Completed(code, self.out.read_text(), self.err.read_text())


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


class Zygote:
    """Forks a process for each command. It runs no operation of torch itself, whose threads a
    fork would not take along."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.spare = folder / "spare"
        self.number = 0
        self.held: Any = None  # what is there as long as this is
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment["HF_HUB_OFFLINE"] = "1"  # read once, when it is imported
        environment["TMPDIR"] = str(folder)  # what processes that are killed leave goes with it
        folder.chmod(0o1777)  # also for commands that gave up what root may
        environment.pop("DEIT_FAULT", None)
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(self.spare)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """One question, one answer."""
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        *arguments: object,
        cwd: Path | None = None,
        script: str | None = None,
        whole: bool = False,
        **environment: str,
    ) -> Running:
        """Start `deit ARGUMENTS`, or a root script of that name. whole: also its end is that of a
        real process, and so slower; and it and all that it starts are a session of their own."""
        self.number += 1
        out, err = (self.folder / f"{self.number}.{name}" for name in ("out", "err"))
        question = {
            "script": script,
            "whole": whole,
            "arguments": [str(argument) for argument in arguments],
            "environment": environment,
            "cwd": str(cwd or self.folder),
            "out": str(out),
            "err": str(err),
        }
        out.touch()
        err.touch()
        return Running(self, self.ask(question)["pid"], out, err)

    def run(
        self,
        *arguments: object,
        cwd: Path | None = None,
        script: str | None = None,
        **environment: str,
    ) -> Completed:
        """Run `deit ARGUMENTS`, or a root script of that name, to its end."""
        return self.start(*arguments, cwd=cwd, script=script, **environment).wait()

    def start_together(
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

    def together(
        self,
        *arguments: object,
        processes: int = 2,
        of_node: int | None = None,
        cwd: Path | None = None,
        script: str | None = None,
        **environment: str,
    ) -> list[Completed]:
        """The same, to their end."""
        started = self.start_together(
            *arguments, processes=processes, of_node=of_node, cwd=cwd, script=script, **environment
        )
        return [one.wait() for one in started]

    def close(self) -> None:
        """End the process that forks."""
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@functools.cache
def shared() -> Zygote:
    """The one of this process, started when it is first needed."""
    # Short, wherever temporary files should lie: the path of a socket has a limit, and commands and
    # their workers make some in it.
    short = "/tmp" if os.path.isdir("/tmp") else None
    folder = TemporaryDirectory(prefix="deit-commands-", dir=short)
    zygote = Zygote(Path(folder.name))
    # Held by more than its cleaning up, which a fork by multiprocessing forgets from Python 3.13
    # on: the folder would be removed with the last reference.
    zygote.held = folder
    atexit.register(folder.cleanup)
    atexit.register(zygote.close)
    return zygote


def _become(question: dict[str, Any]) -> None:
    """In the child: run the command and leave."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(question[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # whatever the tests themselves were started with
    faulthandler.enable()  # a crash, or the end of waiting for it, says where it was
    os.environ.update(question["environment"])
    os.chdir(question["cwd"])
    _first()
    if other := os.environ.get("FORKS_MAIN"):
        _leave(_named(other)())
    from deit.cli import main, program
    from deit.core.parent_process import mark_standalone

    mark_standalone()
    sys.argv = [question["script"] or "deit", *question["arguments"]]
    if question["whole"]:
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
    if place := os.environ.get("FORKS_FIRST"):
        _named(place)()


def _leave(code: int) -> None:
    """End this process without the second that Python takes to tear down what it has imported."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Copied(NamedTuple):
    """A process that the spare one made, as whoever asked for it sees it."""

    connection: socket.socket
    pid: int

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it was killed already
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        with self.connection:
            self.connection.recv(1)  # nothing, once it is gone


def copying(spare: Path) -> SimpleNamespace:
    """`subprocess` as deit.experiments.processes uses it: the process that runs are copies of is
    copied itself, from the spare one, and need not import for five seconds what is there."""

    def start(words: list[str], *, env: dict[str, str], pass_fds: tuple[int, ...] = (), **how: Any):
        if not pass_fds or env["OMP_NUM_THREADS"] != "1":  # no copies; it has read another number
            return subprocess.Popen(words, env=env, pass_fds=pass_fds, **how)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(str(spare))
        socket.send_fds(connection, [json.dumps(env).encode()], pass_fds)
        return _Copied(connection, int(connection.recv(32)))

    return SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL)


def _keep_spare(path: Path) -> None:
    """In the process that forks: a copy of it that does nothing but to be copied, as long as this
    one lives; commands find it at a path."""
    from deit.experiments import processes

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    path.chmod(0o777)  # for commands that gave up what root may
    listener.listen()
    processes.subprocess = copying(path)
    if os.fork():
        listener.close()
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # when its parent ends
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for its copies
    while True:
        connection = listener.accept()[0]
        if os.fork() == 0:
            listener.close()
            _be_copied(connection)
        connection.close()


def _be_copied(connection: socket.socket) -> None:
    """In a copy of the spare process: what deit.experiments.processes starts."""
    from deit.experiments.processes import _serve

    words, descriptors, *_ = socket.recv_fds(connection, 1 << 17, 1)
    connection.send(str(os.getpid()).encode())
    os.register_at_fork(after_in_child=connection.close)  # it ends with this process's end alone
    os.environ.clear()
    os.environ.update(json.loads(words))
    _first()
    try:
        _serve(socket.socket(fileno=descriptors[0]))
    except SystemExit as leaving:  # in a copy, from being the command
        _leave(leaving.code)


def _end_of(pid: int, timeout: float) -> int:
    end, left = time.monotonic() + timeout, [signal.SIGABRT, signal.SIGKILL]
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end and left:
            os.kill(pid, left.pop(0))
            end = time.monotonic() + 10
        time.sleep(0.005)


_MEASURED = {
    "deit.models.memory_format": {"_FASTER": float("inf"), "_TRIES": 0, "_PIXELS_OF_A_CPU": 1},
    "deit.models.onednn_linear": {"_FASTER": float("inf"), "_TRIES": 0},
    "deit.models.cost": {"_ROUND_S": 0.01},
    "deit.deploy.variants": {"_TIMED_S": 0.0},
    "deit.deploy.int8_compare": {"_TIMED_S": 0.0},
}
_ORIGINAL: dict[tuple[str, str], Any] = {}  # as the modules have them
# What commands import when they come to it, so that no copy has to.
_IMPORTED = (
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "sklearn.datasets"),
    *("optuna", "torch.utils.tensorboard"),
)


@contextmanager
def measuring(*, really: bool) -> Iterator[None]:
    """What a run chooses by measuring depends on how busy the machine is: a test that compares the
    bits of two runs must not, so nothing is ever faster enough, and hardly tried. And the seconds
    for which a table's times are measured are moments: no test asks how exact they are."""
    with ExitStack() as stack:
        for place, values in _MEASURED.items():
            module = import_module(place)
            for name, value in values.items():
                original = _ORIGINAL.setdefault((place, name), getattr(module, name))
                stack.enter_context(mock.patch.object(module, name, original if really else value))
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


def _serve() -> None:
    stack = ExitStack()
    stack.enter_context(measuring(really=False))
    for name in (*_ours(), *_IMPORTED):
        with suppress(ImportError):  # it is optional
            import_module(name)
    _parse()
    import_module("torch").set_num_threads(1)
    gc.freeze()  # a copy that collects garbage need not look through all that was imported
    if sys.platform == "linux":  # elsewhere no run is a copy
        _keep_spare(Path(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = {"code": _end_of(question["wait"], question["timeout"])}
        else:
            pid = os.fork()
            if pid == 0:
                sys.stdin.close()
                _become(question)
            answer = {"pid": pid}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    _leave(0)


if __name__ == "__main__":
    _serve()
