"""Processes that end for any reason, with worker processes and without them: with their exit code,
and nothing of them stays. They end as real ones do, Python's own end included."""

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from accelerate import Accelerator

from deit.cli import commands, run_command, stop_signals
from deit.config.recipes import RECIPES
from deit.core import fault_injection, parent_process, run_folder, run_log
from deit.core import signals as interruption_module
from deit.core.errors import DataError, StoppedBySignal, SystemFault
from deit.core.signals import GracefulStop
from deit.datasets.decode_workers import Reader
from deit.datasets.stores import FolderStore
from deit.training.train import train
from tests.helpers.command_server import Running, Zygote
from tests.helpers.images import write_pictures
from tests.helpers.leftovers import left
from tests.helpers.processes import ROOT, STUCK_TEACHER, Completed, fresh, until
from tests.helpers.resume_helpers import stop_at
from tests.helpers.small_runs import ON_PICTURES

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures", number=16)


def words(pictures: Path, out: Path, workers: int) -> tuple[str, ...]:
    """A short training on pictures that worker processes read."""
    return (
        *("train", "folder", "--data.root", str(pictures), "--data.num_workers", str(workers)),
        *ON_PICTURES,
        *("--out", str(out), "--resume"),
    )


def ends_with_all_it_started(session: int) -> None:
    until(lambda: not left(session))


def ended(running: Running, code: int) -> Completed:
    """The end of a process, which has this exit code and leaves nothing behind."""
    done = running.wait(timeout=300)
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    ends_with_all_it_started(running.pid)
    return done


CODES = {"int": 130, "term": 143, "hup": 129, "memory": 5, "kill": -signal.SIGKILL, "nan": 6}


@pytest.mark.fault("A15")
@pytest.mark.parametrize(
    ("workers", "fault"),
    [
        *((0, fault) for fault in ("update:3:int", "evaluation:2:term")),
        *((1, fault) for fault in ("update:3:int", "evaluation:2:term")),
        *((2, f"update:3:{action}") for action in ("int", "term", "hup", "memory", "kill")),
        *((2, fault) for fault in ("evaluation:2:int", "loss:0:nan", "optimizer:1:term")),
    ],
)
def test_a_training_ends_with_its_code_and_leaves_nothing(
    workers, fault, zygote, pictures, tmp_path
):
    given = words(pictures, tmp_path / "run", workers)
    ended(zygote.start(*given, whole=True, DEIT_FAULT=fault), CODES[fault.split(":")[2]])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(
    "point", sorted(set(fault_injection.POINTS) - {"answers", "targets", "fit"})
)
def test_a_training_ends_at_every_fault_point(point, workers, zygote, pictures, tmp_path):
    """Those of stored targets and of run.auto_micro_batch have their own tests."""
    given = words(pictures, tmp_path / "run", workers)
    more = ("--optim.ema_epochs", "1", "--run.save_every_steps", "2")
    fault = f"{point}:1:term" + (",loss:2:nan" if point == "anomalies" else "")
    ended(zygote.start(*given, *more, whole=True, DEIT_FAULT=fault), 143)
    assert zygote.run(*given, *more).code == 0


def test_a_full_disk_ends_it_wherever_that_is_noticed(zygote, pictures, tmp_path):
    given = words(pictures, tmp_path / "run", 2)
    done = ended(zygote.start(*given, whole=True, DEIT_FAULT="update:3:full"), 5)
    assert "No space left on device" in done.err
    assert "--debug" in done.err


def test_the_end_of_training_is_the_end(zygote, pictures, tmp_path):
    ended(zygote.start(*words(pictures, tmp_path / "run", 2), whole=True), 0)


def nobody_writes(path: Path) -> None:
    """Put a pipe into the place of a file: who reads it waits for ever, as for a lost server."""
    path.unlink()
    os.mkfifo(path)


@pytest.mark.fault("A11")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_waits_for_images_for_ever_stops_with_a_checkpoint(
    workers, number, zygote, tmp_path
):
    pictures, out = write_pictures(tmp_path / "pictures", number=8), tmp_path / "run"
    given = (*words(pictures, out, workers), "--optim.epochs", "100000")
    running = zygote.start(*given, whole=True)
    metrics = out / run_log.METRICS
    until(lambda: metrics.is_file() and run_log.read(metrics))
    for path in sorted(pictures.rglob("*.*")):
        nobody_writes(path)
    until(lambda: waits(running.pid))
    running.signal(number)
    done = ended(running, 128 + number)
    assert signal.Signals(number).name in done.err
    assert "--resume" in done.err
    rows = run_log.read(metrics)
    assert run_folder.checkpoint_step(run_folder.latest_checkpoint(out)) >= rows[-1]["step"]


def waits(pid: int) -> bool:
    """Whether a process and those it has started use no processor for a while."""
    process = psutil.Process(pid)
    everyone = [process, *process.children(recursive=True)]
    before = [sum(one.cpu_times()[:2]) for one in everyone]
    time.sleep(0.5)
    return before == [sum(one.cpu_times()[:2]) for one in everyone]


@pytest.fixture
def never_read(monkeypatch):
    """No image is ever read, as from a lost server, until the test is over; and a signal comes."""
    over = threading.Event()

    def wait(store, position):
        over.wait()
        raise DataError("the test is over")

    monkeypatch.setattr(FolderStore, "read", wait)
    alarm = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
    alarm.start()
    yield
    over.set()
    alarm.cancel()


@pytest.fixture(scope="module")
def runs(zygote, pictures, tmp_path_factory) -> dict[int, Path]:
    """A finished run that is evaluated with this number of workers."""
    found = {}
    for workers in (0, 2):
        out = tmp_path_factory.mktemp("runs") / f"workers-{workers}"
        assert zygote.run(*words(pictures, out, workers), "--optim.epochs", "1").code == 0
        found[workers] = out
    return found


@pytest.mark.fault("A11")
@pytest.mark.parametrize("command", ["evaluate", "check-data"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_command_that_waits_for_images_for_ever_stops(
    command, workers, runs, pictures, never_read, capfd
):
    before = children()
    given = {"evaluate": runs[workers], "check-data": pictures}
    assert run_command(command, [str(given[command])], f"deit {command}") == 130
    assert "SIGINT" in capfd.readouterr().err
    until(lambda: children() == before)


def test_a_decoding_that_waits_for_ever_stops(pictures, never_read, tmp_path, capfd):
    given = ["folder", "--data.root", str(pictures), "--out", str(tmp_path / "run"), *ON_PICTURES]
    code = run_command("train", [*given, "--data.storage", "memory"], "deit train")
    assert code == 130, capfd.readouterr().err


@pytest.mark.fault("A11")
@pytest.mark.parametrize("workers", [0, 2])
def test_targets_stop_between_and_within_blocks(workers, zygote, pictures, tmp_path):
    teacher = tmp_path / "teacher"
    given = words(pictures, teacher, 0)
    assert zygote.run(*given, "--optim.epochs", "1").code == 0
    write = ("targets", "write", *given[1:-3], "--data.num_workers", workers)
    write += (
        "--loss",
        "deit-hard",
        "--teacher.source",
        teacher,
        "--teacher.allow_near_chance",
    )
    write += ("--student.name", "deit_micro", "--out", tmp_path / "store")
    ended(zygote.start(*write, whole=True, DEIT_FAULT="answers:2:int"), 130)
    ended(zygote.start(*write, whole=True), 0)


def test_two_processes_with_workers_stop_together(zygote, pictures, tmp_path):
    given = (*words(pictures, tmp_path / "run", 2), "--optim.epochs", "100000")
    both = zygote.start_together(*given, whole=True)
    until(lambda: run_folder.list_checkpoints(tmp_path / "run"))
    for one in both:
        one.signal(signal.SIGTERM)
    for one in both:
        ended(one, 143)


@pytest.mark.fault("E5")
def test_of_two_processes_neither_waits_for_images_for_ever(zygote, tmp_path):
    pictures, out = write_pictures(tmp_path / "pictures", number=8), tmp_path / "run"
    given = (*words(pictures, out, 1), "--optim.epochs", "100000")
    both = zygote.start_together(*given, whole=True)
    until(lambda: run_folder.list_checkpoints(out))
    for path in pictures.rglob("*.*"):
        nobody_writes(path)
    until(lambda: all(waits(one.pid) for one in both))
    for one in both:
        one.signal(signal.SIGTERM)
    for one in both:
        ended(one, 143)


@pytest.mark.fault("A15")
def test_workers_end_when_their_process_is_killed(zygote, pictures, tmp_path):
    given = (*words(pictures, tmp_path / "run", 2), "--optim.epochs", "100000")
    running = zygote.start(*given, whole=True)
    until(lambda: run_folder.list_checkpoints(tmp_path / "run"))
    running.signal(signal.SIGKILL)
    ended(running, -signal.SIGKILL)


@pytest.mark.fault("A12")
def test_a_second_signal_ends_what_is_stuck_in_a_library(zygote, pictures, tmp_path):
    """Python obeys a signal when the library returns, which this one does not."""
    (tmp_path / "stuck.py").write_text(STUCK_TEACHER)
    given = words(pictures, tmp_path / "run", 2)
    given += ("--loss", "deit-hard", "--teacher.source", f"{tmp_path / 'stuck.py'}:teacher")
    running = zygote.start(*given, "--student.name", "deit_micro", whole=True)
    until(lambda: "stuck" in running.out.read_text())
    running.signal(signal.SIGINT)
    time.sleep(stop_signals.SAME_SIGNAL_S + 2)
    running.signal(signal.SIGINT)
    done = running.wait(timeout=300)
    assert done.code == 130
    assert "signal" in done.err
    assert "--resume" not in done.err  # which is said where the first one was obeyed
    ends_with_all_it_started(running.pid)


@pytest.fixture
def code_of(monkeypatch):
    """The exit code of a command that does some work."""

    def command(work):
        monkeypatch.setitem(commands.COMMANDS, "recipes", lambda arguments, program: work())
        return run_command("recipes", [], "deit recipes")

    return command


@pytest.mark.fault("E18")
def test_a_stop_that_python_drops_comes_again(code_of, monkeypatch):
    """What a handler raises while an object is freed is printed, and the program goes on."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # pytest's keeps what it is given

    class Freed:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    def work():
        freed = Freed()
        del freed
        time.sleep(30)

    assert code_of(work) == 130


@pytest.mark.fault("E18")
def test_a_stop_in_a_library_that_makes_another_error_of_it_is_a_stop(monkeypatch, capsys):
    def command(arguments, program):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        except BaseException:
            raise ImportError("a part of a library failed to import") from None

    monkeypatch.setitem(commands.COMMANDS, "recipes", command)
    assert run_command("recipes", [], "deit recipes") == 143
    said = capsys.readouterr().err
    assert "SIGTERM" in said
    assert "ImportError" not in said


class TritonMissing(RuntimeError):
    """As PyTorch's compiler raises it, whose modules take seconds to import."""

    __module__ = "torch._inductor.exc"


@pytest.mark.parametrize(
    ("error", "code", "names"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/b"),
            5,
            ["/a/b: Permission denied"],
        ),
        (OSError(errno.EROFS, "Read-only file system", "/a"), 5, ["/a: Read-only file system"]),
        (OSError(errno.EMFILE, "Too many open files"), 5, ["Too many open files"]),
        (OSError(errno.ENAMETOOLONG, "File name too long", "aa"), 5, ["aa: File name too long"]),
        (FileExistsError(errno.EEXIST, "File exists", "a"), 5, ["a: File exists"]),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), 5, ["a/b: Not a directory"]),
        (MemoryError(), 5, ["MemoryError"]),
        (
            RuntimeError("alloc: can't allocate memory: 9 bytes"),
            5,
            ["alloc: can't allocate memory: 9 bytes"],
        ),
        (
            RuntimeError("Storage size calculation overflowed"),
            5,
            ["memory", "Storage size calculation overflowed"],
        ),
        (RuntimeError("Symlink loop from '/a'"), 5, ["Symlink loop from '/a'"]),  # Path.resolve
        (RuntimeError("CUDA error: out of memory"), 5, ["CUDA error: out of memory"]),
        (TritonMissing(), 5, ["torch.compile", "TritonMissing", "--run.compile"]),
        (OSError(errno.ENOTCONN, "Not connected", "/fuse/a"), 5, ["/fuse/a: Not connected"]),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
            5,
            ["No usable temporary directory found in ['/tmp']", "TMPDIR"],
        ),
        (FileNotFoundError(errno.ENOENT, "Gone", "/a"), 1, ["FileNotFoundError", "Gone", "/a"]),
        (ZeroDivisionError("zero"), 1, ["ZeroDivisionError", "zero"]),
    ],
)
def test_what_the_machine_lacks_is_no_bug(error, code, names, monkeypatch, capsys):
    """Wherever it is noticed: any file may meet a full disk or a permission at any time."""

    def command(arguments, program):
        raise error

    monkeypatch.setitem(commands.COMMANDS, "recipes", command)
    assert run_command("recipes", [], "deit recipes") == code
    said = capsys.readouterr().err
    assert said.startswith("deit: error: ")
    assert len(said.splitlines()) == 1
    for name in (*names, "--debug"):
        assert name in said


def asks_to_stop(folder: Path, rest: str) -> None:
    """A module that a signal meets while it is imported."""
    folder.mkdir(exist_ok=True)
    sys.modules.pop("asks_to_stop", None)
    text = f"import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\n{rest}\n"
    (folder / "asks_to_stop.py").write_text(text)


def test_no_import_is_interrupted(code_of, tmp_path, monkeypatch):
    """Libraries of C++ end the process where an exception leaves them while they are set up."""
    asks_to_stop(tmp_path, "time.sleep(1.5)\nwhole = True")
    monkeypatch.syspath_prepend(str(tmp_path))
    done = []

    def work():
        import asks_to_stop

        done.append(asks_to_stop.whole)
        time.sleep(30)

    assert code_of(work) == 143
    assert done == [True]


def test_a_stop_during_an_import_is_for_whoever_handles_signals_next(
    code_of, tmp_path, monkeypatch
):
    asks_to_stop(tmp_path, "pass")
    monkeypatch.syspath_prepend(str(tmp_path))

    def work():
        import_module("asks_to_stop")
        with GracefulStop(Accelerator(cpu=True)) as interruption:
            interruption.raise_if_stopped()

    assert code_of(work) == 143
    assert parent_process.stop_remembered() == 0


def test_a_stop_after_the_last_question_is_for_whoever_handles_signals_next(code_of):
    def work():
        with GracefulStop(Accelerator(cpu=True)) as interruption:
            interruption.raise_if_stopped()
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    assert code_of(work) == 143


IMPORTS = """
import sys
from deit import cli; from deit.cli import commands, stop_signals

def command(arguments, program):
    import asks_to_stop

commands.COMMANDS["recipes"] = command
sys.argv = ["deit", "recipes"]
sys.exit(cli.program())
"""


def test_a_command_that_still_imports_leaves_at_once(tmp_path):
    asks_to_stop(tmp_path, "time.sleep(1000)")
    done = fresh(IMPORTS, path=tmp_path)
    assert done.code == 143
    (line,) = done.err.splitlines()
    assert line.startswith("deit: error: ")
    assert "SIGTERM" in line


UNREAD = """
import ctypes, os, sys
from deit import cli; from deit.cli import commands, stop_signals

def command(arguments, program):
    lock = ctypes.create_string_buffer(256)
    system = ctypes.CDLL(None)
    os.write(1, b"stuck")
    for _ in range(2):
        system.pthread_mutex_lock(lock)

stop_signals.SAME_SIGNAL_S = 0.1
commands.COMMANDS["recipes"] = command
sys.argv = ["deit", "recipes"]
sys.exit(cli.program())
"""


@pytest.mark.parametrize("closed", [True, False])
def test_a_second_signal_ends_a_process_whose_words_nobody_reads(closed):
    """Of a pipe whose reader is gone, or has stopped to read."""
    reader, writer = os.pipe()
    if closed:
        os.close(reader)
    else:
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, bytes(4096))
        os.set_blocking(writer, True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", UNREAD]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=writer
    ) as process:
        try:
            assert process.stdout.read(5) == b"stuck"
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=300) == 130
        finally:
            process.kill()
    os.close(writer)
    if not closed:
        os.close(reader)


def test_a_signal_while_an_error_is_said_changes_nothing(monkeypatch, capsys):
    """As torchrun's, which ends all processes when the first fails."""

    def command(arguments, program):
        raise SystemFault("the disk is full")

    def complain(message):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        print(message, file=sys.stderr)

    monkeypatch.setattr("deit.core.console.complain", complain)
    monkeypatch.setitem(commands.COMMANDS, "recipes", command)
    assert run_command("recipes", [], "deit recipes") == 5
    assert capsys.readouterr().err == "deit: error: the disk is full\n"


WARNED = """
import os, signal, sys
from deit import cli; from deit.cli import commands, stop_signals

commands.COMMANDS["recipes"] = lambda arguments, program: None
sys.argv = ["deit", "recipes"]
code = cli.program()
os.kill(os.getpid(), signal.SIGUSR1)
sys.exit(code)
"""


def test_a_request_to_save_does_not_kill_a_process_that_is_done():
    done = fresh(WARNED)
    assert (done.code, done.err) == (0, "")


def test_a_shell_with_accelerates_variables_is_no_launcher(monkeypatch):
    """Where it ends, what it started under nohup goes on."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for name in ("TORCHELASTIC_RUN_ID", parent_process.PARALLEL_RUNS_ENV):
        monkeypatch.delenv(name, raising=False)
    done = fresh("from deit.core import parent_process as launcher; print(launcher.has_launcher())")
    assert (done.code, done.out) == (0, "False\n"), done.err


HELD = """
import sys, threading, time
threading.Thread(target=time.sleep, args=(1000,)).start()
sys.argv = ["deit", "--version"]
from deit.cli import program
sys.exit(program())
"""


@pytest.mark.fault("E18")
def test_a_thread_of_a_library_does_not_keep_a_process_that_is_done():
    done = fresh(HELD)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("deit ")


@pytest.fixture
def interruption():
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # what is not obeyed comes again
    with GracefulStop(Accelerator(cpu=True)) as entered:
        yield entered
    parent_process.forget_stop()
    signal.signal(signal.SIGTERM, before)


def test_an_update_in_its_middle_is_finished_while_its_images_come(interruption, monkeypatch):
    """However many micro-batches are left: it is the update of the checkpoint."""

    now, between = [0.0], interruption_module._PATIENCE_S / 2
    monkeypatch.setattr(interruption_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow():
        for number in range(100):
            now[0] += between
            os.kill(os.getpid(), signal.SIGALRM)  # as the timer does, again and again
            yield number

    seen = []
    for number in interruption.micro_batches(slow(), each=8):
        seen.append(number)
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    assert seen == list(range(8))


def test_an_update_whose_images_never_come_is_given_up(interruption):
    def lost():
        yield 0
        time.sleep(1000)

    seen = []

    def learn():
        for number in interruption.micro_batches(lost(), each=8):
            seen.append(number)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedBySignal):
        learn()
    assert seen == [0]


def test_a_stop_that_comes_while_processes_agree_to_save_is_kept(interruption, monkeypatch):
    def agree(said, *arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

    monkeypatch.setattr(interruption, "_several", True)
    monkeypatch.setattr("torch.distributed.all_reduce", agree)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert interruption.pending_signal(now=True) == signal.SIGUSR1
    assert interruption.noted == signal.SIGTERM
    assert interruption.pending_signal(now=True) == signal.SIGTERM


TWICE = """
import os, signal, threading, time
from deit import cli; from deit.cli import commands, stop_signals

def command(arguments, program):
    asked = threading.Event()
    def ask():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
        asked.set()
    threading.Timer(0.1, ask).start()
    try:
        time.sleep(1000)
    finally:
        asked.wait()

stop_signals.SAME_SIGNAL_S = 0.1
commands.COMMANDS["recipes"] = command
print(cli.run_command("recipes", [], "deit recipes"), "and the notebook is there")
"""


def test_a_program_that_calls_a_command_is_not_ended_by_a_second_signal():
    done = fresh(TWICE)
    assert (done.code, done.out) == (0, "130 and the notebook is there\n"), done.err


@pytest.mark.parametrize(
    ("code", "expected", "said"),
    [
        (1, 1, None),
        (3, 3, None),
        ("a reason", 1, "a reason"),
        (None, 1, "tests.core.test_signals"),
        (0, 1, "tests.core.test_signals"),
    ],
)
def test_code_of_the_users_that_exits_does_not_look_finished(
    code, expected, said, monkeypatch, capsys
):
    """141 is for a pipe alone."""

    def command(arguments, program):
        sys.exit(code)

    monkeypatch.setitem(commands.COMMANDS, "recipes", command)
    assert run_command("recipes", [], "deit recipes") == expected
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (said is not None)
    assert all(line.startswith("deit: error: ") and said in line for line in lines)


def small(pictures: Path, workers: int):
    """The configuration of a short training."""
    data = {"root": str(pictures), "storage": "files", "num_workers": workers, "image_size": 18}
    student = {"name": "vit_micro", "depth": 1, "embed_dim": 16, "num_heads": 2, "image_size": 16}
    return RECIPES["folder"]().replace(
        data=data,
        student={**student, "patch_size": 4},
        teacher={"source": ()},
        loss={"kind": "none"},
        optim={"batch_size": 8, "epochs": 1, "warmup_epochs": 0},
    )


def children() -> set[multiprocessing.Process]:
    return set(multiprocessing.active_children())


@pytest.mark.fault("E19")
def test_a_call_from_python_leaves_no_worker(pictures, tmp_path):
    """However it ends: a notebook goes on after it."""
    config, before = small(pictures, 2), children()
    stop_at(config, tmp_path / "stopped", "update:2:term")
    until(lambda: children() == before)
    train(config, tmp_path / "done")
    until(lambda: children() == before)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        stop_at(config, tmp_path / "full", "update:2:full")
    until(lambda: children() == before)


@pytest.mark.fault("E19")
def test_a_closed_reader_leaves_a_worker_in_the_middle_of_its_batch(pictures):
    from deit.datasets.splits import load_splits

    class Slow:
        size = 4

        def cut(self, pictures, wanted):
            time.sleep(1000)

    import torch

    from deit.datasets.decoders import ReadRequest

    images = load_splits(small(pictures, 1).data).train
    one = torch.zeros(1, dtype=torch.int64)
    before = children()
    with Reader(images, (Slow(),), workers=2, pin=False) as reader:
        batches = reader.read([ReadRequest(0, one, one)] * 50)

        def ask():
            try:
                until(lambda: reader._workers and len(reader._workers.processes) == 2)
            finally:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

        asking = threading.Thread(target=ask)
        previous = signal.signal(
            signal.SIGALRM, lambda *_: (_ for _ in ()).throw(StoppedBySignal(15))
        )
        asking.start()
        try:
            with pytest.raises(StoppedBySignal):
                next(batches)
        finally:
            asking.join()
            signal.signal(signal.SIGALRM, previous)
        assert len(children() - before) == 2
    until(lambda: children() == before)


def test_killed_workers_leave_no_temporary_folders(pictures, monkeypatch, tmp_path):
    """At most this process's own, which it removes at its end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    train(small(pictures, 2), tmp_path / "run")
    assert len(list(tmp_path.glob("pymp-*"))) <= 1


MOMENTS = 100  # of each seed


def of_kind(kind: int, pictures: Path, out: Path) -> tuple[str, ...]:
    """A training on pictures, with so many workers, or on digits, which are imported late."""
    more = ("--optim.epochs", "30", "--run.save_every_steps", "2")
    if kind < 3:
        return (*words(pictures, out, kind), *more)
    given = (
        "train",
        "digits",
        *ON_PICTURES[:-2],
        "--student.image_size",
        "8",
        "--data.image_size",
        "8",
    )
    few = (
        "--student.patch_size",
        "2",
        "--data.train_fraction",
        "0.1",
        "--run.linear_backend",
        "torch",
    )
    return (*given, *few, *more, "--out", str(out), "--resume")


@pytest.mark.fault("A15")
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_two_hundred_stops_at_random_moments(seed, zygote: Zygote, pictures, tmp_path):
    """Of real processes, from their first moment on: each ends with the code of its signal and
    leaves nothing behind, and what it leaves in its folder is resumed to the same bits. A row for
    each is in stops.jsonl of the test's folder (--basetemp)."""
    moments = random.Random(seed)
    straight = [tmp_path / f"straight-{kind}" for kind in range(4)]
    for kind, out in enumerate(straight):
        assert zygote.run(*of_kind(kind, pictures, out)).code == 0
    rows, wrong, number = [], [], 0
    while sum(row["code"] != 0 for row in rows) < MOMENTS:  # of others the end came first
        number += 1
        out, kind = tmp_path / f"run-{number}", number % 4
        sent = moments.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        given = of_kind(kind, pictures, out)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (tmp_path / "said").open("w+") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "deit", *given],
                env=environment,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
            after, everybody = moments.uniform(0.02, 8), moments.random() < 0.5
            time.sleep(after)
            moment = time.monotonic()
            if everybody:
                os.killpg(process.pid, sent)
            else:
                process.send_signal(sent)
            code = process.wait(timeout=300)
            took = time.monotonic() - moment
            said.seek(0)
            text = said.read()
        ends_with_all_it_started(process.pid)
        # Before our first line runs, Python dies of the signal itself, or says where it was.
        right = code in (128 + sent, -sent, 0) and ("Traceback" not in text or not out.exists())
        begun = out.exists()
        same = code == 0 or same_as(straight[kind], out, zygote.run(*given))
        row = {"kind": kind, "signal": sent.name, "everybody": everybody, "after_s": after}
        row |= {"code": code, "ended_s": took, "begun": begun, "same_bits": same}
        rows.append(row)
        with (tmp_path / "stops.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        if not (right and same):
            wrong.append(f"stop {number}: {row}: {text}")
    took = sorted(row["ended_s"] for row in rows if row["code"])
    codes = Counter(row["code"] for row in rows)
    print(
        f"{len(took)} stops: codes {dict(codes)}; half within {took[len(took) // 2]:.2f} s, ",
        end="",
    )
    print(f"95 % within {took[int(0.95 * len(took))]:.2f} s, all within {took[-1]:.2f} s")
    assert not wrong, "\n\n".join(wrong)


def same_as(straight: Path, out: Path, resumed: Completed) -> bool:
    """Whether a resumed run is to the bit the one that was not stopped."""
    files = (run_log.HASH_CHAIN, "best/model.safetensors")
    return resumed.code == 0 and all(
        (out / name).read_bytes() == (straight / name).read_bytes() for name in files
    )
