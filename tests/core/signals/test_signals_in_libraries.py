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

from deit.cli import commands, interrupts, run_command
from deit.core import parent_process
from deit.core.errors import SystemFault
from deit.core.signals import GracefulStop
from tests.helpers.leftovers import assert_no_leftovers
from tests.helpers.processes import ROOT, STUCK_TEACHER, run_python, wait_until
from tests.helpers.small_runs import image_run_arguments

pytest.importorskip("sklearn")


@pytest.mark.fault("A12")
def test_second_signal_ends_a_process_stuck_in_a_library(command_server, image_folder, tmp_path):
    """Python runs signal handlers when the library returns, which this one does not."""
    (tmp_path / "stuck.py").write_text(STUCK_TEACHER)
    given = image_run_arguments(image_folder, tmp_path / "run", 2)
    given += ("--loss", "deit-hard", "--teacher.source", f"{tmp_path / 'stuck.py'}:teacher")
    running = command_server.start(*given, "--student.name", "deit_micro", as_program=True)
    wait_until(lambda: "stuck" in running.out.read_text())
    running.signal(signal.SIGINT)
    time.sleep(interrupts.SAME_SIGNAL_S + 2)
    running.signal(signal.SIGINT)
    done = running.wait(timeout=300)
    assert done.code == 130
    assert "signal" in done.err
    assert "--resume" not in done.err  # printed only if the first signal was obeyed
    assert_no_leftovers(running.pid)


@pytest.fixture
def code_of(monkeypatch):
    """Return a function that runs work as a command and returns its exit code."""

    def command(work):
        monkeypatch.setitem(commands.COMMANDS, "recipes", lambda arguments, program: work())
        return run_command("recipes", [], "deit recipes")

    return command


@pytest.mark.fault("E18")
def test_stop_dropped_by_python_is_raised_again(code_of, monkeypatch):
    """Python prints an error that a handler raises while an object is freed, and continues."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # pytest's keeps the object

    class Freed:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    def work():
        freed = Freed()
        del freed
        time.sleep(30)

    assert code_of(work) == 130


@pytest.mark.fault("E18")
def test_stop_wrapped_in_another_error_is_a_stop(monkeypatch, capsys):
    def command(arguments, program):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        except BaseException:
            raise ImportError("a part of a library failed to import") from None

    monkeypatch.setitem(commands.COMMANDS, "recipes", command)
    assert run_command("recipes", [], "deit recipes") == 143
    errors = capsys.readouterr().err
    assert "SIGTERM" in errors
    assert "ImportError" not in errors


def write_stopping_module(folder: Path, rest: str) -> None:
    """Write a module that sends SIGTERM to its process while it is imported."""
    folder.mkdir(exist_ok=True)
    sys.modules.pop("stopping_module", None)
    text = f"import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\n{rest}\n"
    (folder / "stopping_module.py").write_text(text)


def test_imports_are_not_interrupted(code_of, tmp_path, monkeypatch):
    """C++ libraries end the process if an exception is raised while they are initialized."""
    write_stopping_module(tmp_path, "time.sleep(1.5)\ncomplete = True")
    monkeypatch.syspath_prepend(str(tmp_path))
    done = []

    def work():
        import stopping_module

        done.append(stopping_module.complete)
        time.sleep(30)

    assert code_of(work) == 143
    assert done == [True]


def test_stop_during_an_import_is_passed_to_the_next_handler(code_of, tmp_path, monkeypatch):
    write_stopping_module(tmp_path, "pass")
    monkeypatch.syspath_prepend(str(tmp_path))

    def work():
        import_module("stopping_module")
        with GracefulStop(Accelerator(cpu=True)) as interruption:
            interruption.raise_if_stopped()

    assert code_of(work) == 143
    assert parent_process.pending_stop() == 0


def test_stop_after_the_last_check_is_passed_to_the_next_handler(code_of):
    def work():
        with GracefulStop(Accelerator(cpu=True)) as interruption:
            interruption.raise_if_stopped()
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    assert code_of(work) == 143


IMPORTS = """
import sys
from deit import cli; from deit.cli import commands, interrupts

def command(arguments, program):
    import stopping_module

commands.COMMANDS["recipes"] = command
sys.argv = ["deit", "recipes"]
sys.exit(cli.program())
"""


def test_command_stopped_during_its_imports_exits_at_once(tmp_path):
    write_stopping_module(tmp_path, "time.sleep(1000)")
    done = run_python(IMPORTS, path=tmp_path)
    assert done.code == 143
    (line,) = done.err.splitlines()
    assert line.startswith("deit: error: ")
    assert "SIGTERM" in line


UNREAD = """
import ctypes, os, sys
from deit import cli; from deit.cli import commands, interrupts

def command(arguments, program):
    lock = ctypes.create_string_buffer(256)
    system = ctypes.CDLL(None)
    os.write(1, b"stuck")
    for _ in range(2):
        system.pthread_mutex_lock(lock)

interrupts.SAME_SIGNAL_S = 0.1
commands.COMMANDS["recipes"] = command
sys.argv = ["deit", "recipes"]
sys.exit(cli.program())
"""


@pytest.mark.parametrize("closed", [True, False])
def test_second_signal_ends_a_process_with_an_unread_pipe(closed):
    """The reader of standard error has exited, or no longer reads."""
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


def test_signal_while_an_error_is_printed_is_ignored(monkeypatch, capsys):
    """For example from torchrun, which ends all processes when the first one fails."""

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


SIGNALED = """
import os, signal, sys
from deit import cli; from deit.cli import commands, interrupts

commands.COMMANDS["recipes"] = lambda arguments, program: None
sys.argv = ["deit", "recipes"]
code = cli.program()
os.kill(os.getpid(), signal.SIGUSR1)
sys.exit(code)
"""


def test_save_signal_does_not_kill_a_finished_process():
    done = run_python(SIGNALED)
    assert (done.code, done.err) == (0, "")


def test_shell_with_variables_of_accelerate_is_not_a_launcher(monkeypatch):
    """When it exits, commands that it started under nohup continue."""
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
def test_library_thread_does_not_keep_a_finished_process_alive():
    done = run_python(HELD)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("deit ")


TWICE = """
import os, signal, threading, time
from deit import cli; from deit.cli import commands, interrupts

def command(arguments, program):
    sent = threading.Event()
    def send_twice():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)
        sent.set()
    threading.Timer(0.1, send_twice).start()
    try:
        time.sleep(1000)
    finally:
        sent.wait()

interrupts.SAME_SIGNAL_S = 0.1
commands.COMMANDS["recipes"] = command
print(cli.run_command("recipes", [], "deit recipes"), "and the program continues")
"""


def test_second_signal_does_not_end_a_calling_program():
    done = run_python(TWICE)
    assert (done.code, done.out) == (0, "130 and the program continues\n"), done.err
