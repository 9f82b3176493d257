"""Signals that arrive in imports, in library code, while an error is printed, or after the end."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
from accelerate import Accelerator

from deit.cli import commands, run_command, stop_signals
from deit.core import parent_process
from deit.core.errors import SystemFault
from deit.core.signals import GracefulStop
from tests.helpers.leftovers import assert_no_leftovers
from tests.helpers.processes import ROOT, STUCK_TEACHER, run_python, wait_until
from tests.helpers.small_runs import image_run_arguments

pytest.importorskip("sklearn")


@pytest.mark.fault("A12")
def test_a_second_signal_ends_what_is_stuck_in_a_library(command_server, image_folder, tmp_path):
    """Python obeys a signal when the library returns, which this one does not."""
    (tmp_path / "stuck.py").write_text(STUCK_TEACHER)
    given = image_run_arguments(image_folder, tmp_path / "run", 2)
    given += ("--loss", "deit-hard", "--teacher.source", f"{tmp_path / 'stuck.py'}:teacher")
    running = command_server.start(*given, "--student.name", "deit_micro", as_program=True)
    wait_until(lambda: "stuck" in running.out.read_text())
    running.signal(signal.SIGINT)
    time.sleep(stop_signals.SAME_SIGNAL_S + 2)
    running.signal(signal.SIGINT)
    done = running.wait(timeout=300)
    assert done.code == 130
    assert "signal" in done.err
    assert "--resume" not in done.err  # which is said where the first one was obeyed
    assert_no_leftovers(running.pid)


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
    assert parent_process.pending_stop() == 0


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
    done = run_python(IMPORTS, path=tmp_path)
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
    done = run_python(WARNED)
    assert (done.code, done.err) == (0, "")


def test_a_shell_with_accelerates_variables_is_no_launcher(monkeypatch):
    """Where it ends, what it started under nohup goes on."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    for name in ("TORCHELASTIC_RUN_ID", parent_process.PARALLEL_RUNS_ENV):
        monkeypatch.delenv(name, raising=False)
    done = run_python(
        "from deit.core import parent_process as launcher; print(launcher.has_launcher())"
    )
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
    done = run_python(HELD)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("deit ")


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
    done = run_python(TWICE)
    assert (done.code, done.out) == (0, "130 and the notebook is there\n"), done.err
