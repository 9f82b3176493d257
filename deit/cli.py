"""The command line: one grammar behind `deit` and the root scripts; errors become exit codes."""

import os
import sys
import traceback

import deit
from deit.commands import COMMANDS
from deit.console import is_main_process, say
from deit.errors import ConfigError, DeitError
from deit.text import nearest


def run_command(name: str, arguments: list[str], program: str) -> int:
    """Run one command; the exit code. Errors are one message, with a traceback only for --debug."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        COMMANDS[name](arguments, program)
        _leave_processes()
        return 0
    except DeitError as error:
        _complain(str(error), debug, everywhere=not isinstance(error, ConfigError))
        return error.exit_code
    except KeyboardInterrupt:
        run = "a run goes on from its last finished epoch with --resume"
        _complain(f"interrupted; {'the same command goes on' if name == 'targets' else run}", debug)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # nobody reads any more: say nothing on the way out
        return 1
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        message = f"unexpected {type(error).__name__}: {reason} (--debug shows where)"
        _complain(message, debug, everywhere=True)
        return 1


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
