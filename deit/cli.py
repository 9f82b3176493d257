"""The command line: one grammar behind `deit` and the root scripts; errors become exit codes."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deit
from deit.commands import COMMANDS
from deit.console import is_main_process, say
from deit.errors import ConfigError, DeitError, PeerError, Stopped
from deit.faults import arm
from deit.launcher import SAME_SIGNAL_S, follow
from deit.text import nearest

# Before any library is imported that would otherwise count its users.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def run_command(name: str, arguments: list[str], program: str) -> int:
    """Run one command; the exit code. Errors are one message, with a traceback only for --debug."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    with _leaving():
        follow()
        return _outcome(name, arguments, program, debug)


_GO_ON = ("targets", "compare", "sweep", "tickets", "prune", "landscape")


def _outcome(name: str, arguments: list[str], program: str, debug: bool) -> int:
    try:
        arm(os.environ.get("DEIT_FAULT"))
        COMMANDS[name](arguments, program)
        _leave_processes()
        return 0
    except Stopped as stop:
        word = f"stopped by {signal.Signals(stop.number).name}; the same command goes on"
        _complain(word if name in _GO_ON else str(stop), debug)
        return stop.exit_code
    except DeitError as error:
        _complain(str(error), debug, everywhere=not isinstance(error, ConfigError))
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads any more: say nothing on the way out
        return 1
    except Exception as error:
        if _lost_peer(error):
            message = "another process is gone or did not answer; see what it said"
            _complain(message, debug, everywhere=True)
            return PeerError.exit_code
        reason = str(error).strip().split("\n")[0]
        message = f"unexpected {type(error).__name__}: {reason} (--debug shows where)"
        _complain(message, debug, everywhere=True)
        return 1


@contextmanager
def _leaving() -> Iterator[None]:
    """While it is entered, a signal that asks to stop is an error: what is open is closed, what is
    unfinished removed. Another within two seconds is the same one again (torchrun hands on what
    the terminal has sent already), a later one ends the process at once.

    SIGUSR1, which SLURM sends as a warning and which would end the process, is for training alone.
    Signals that are ignored, by nohup for instance, stay so.
    """
    first: list[float] = []

    def leave(number: int, frame: object) -> None:
        first.append(time.monotonic())
        if first[-1] - first[0] >= SAME_SIGNAL_S:
            os._exit(128 + number)
        if len(first) == 1:
            raise Stopped(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, leave)
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _lost_peer(error: Exception) -> bool:
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "deit.environment" not in sys.modules:
        return False
    from deit.environment import lost_peer

    return lost_peer(error)


def _leave_processes() -> None:
    """After success only: after an error, the others may be waiting for this process."""
    if "deit.environment" in sys.modules:
        from deit.environment import leave_processes

        leave_processes()


def _complain(message: str, debug: bool, *, everywhere: bool = False) -> None:
    """One message; of an error that may be this process's alone also from the other processes."""
    if is_main_process():
        prefix = "deit: error"
    elif everywhere:
        prefix = f"deit: error in process {os.environ['RANK']}"
    else:
        return
    if debug:
        traceback.print_exc()
    print(f"{prefix}: {message}", file=sys.stderr, flush=True)


def main() -> int:
    """The console script `deit COMMAND ...`; returns the exit code."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        return run_command(arguments[0], arguments[1:], f"deit {arguments[0]}")
    if arguments == ["--version"]:
        say(f"deit {deit.__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        say("usage: deit COMMAND [options]     (deit COMMAND --help tells more)\n")
        for name, command in COMMANDS.items():
            say(f"  {name:<10} {(command.__doc__ or '').strip()}")
        return 0 if arguments else 2
    _complain(
        f"no command {arguments[0]!r}{nearest(arguments[0], COMMANDS)}; see deit --help", False
    )
    return 2
