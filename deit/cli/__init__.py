"""Entry points of `deit` and of the root scripts; errors become one message and an exit code."""

import contextlib
import errno
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import deit
from deit.cli.interrupts import SignalsAsErrors
from deit.cli.option_names import with_option
from deit.core.errors import (
    TRANSIENT,
    ConfigError,
    DeitError,
    PeerError,
    StoppedBySignal,
    SystemFault,
    compiler_failure,
    first_line,
    is_out_of_memory,
    name_problem,
    open_streams,
    single_line,
)
from deit.core.fault_injection import install_faults
from deit.core.parent_process import (
    exit_with_parent,
    mark_standalone,
)
from deit.core.user_code import HUB_PREFIXES, address_hint

# Commands are imported inside functions, so that signal handlers are installed before.

_EXIT_TIMEOUT_S = 1.0

# Set before a library is imported that would send usage statistics.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def run_command(name: str, arguments: list[str], program: str) -> int:
    """Run one command and return its exit code. program: its name in messages.

    An error is printed as one message; --debug also prints its traceback.
    """
    open_streams()
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    with SignalsAsErrors() as signals:
        try:
            exit_with_parent()
            return _flush_streams(_execute(name, arguments, program, debug, signals))
        except StoppedBySignal as stop:  # between an error and its message
            return stop.exit_code


HELP_OPTIONS = ("-h", "--help", "--help-all")
"""The options that print a help text and exit."""

AUTO_RESUMING = ("targets", "compare", "sweep", "lottery", "prune", "loss-landscape")
"""Commands that resume without an option when they are run again."""


def _execute(
    name: str, arguments: list[str], program: str, debug: bool, signals: "SignalsAsErrors"
) -> int:
    """Run a command and return its exit code; print its error."""
    try:
        _check_names(name, arguments)
        from deit.cli.commands import COMMANDS

        install_faults(os.environ.get("DEIT_FAULT"))
        _check_no_addresses(arguments)
        COMMANDS[name](arguments, program)
        _leave_process_group()
        signals.handled = True
        return 0
    except BaseException as error:
        signals.handled = True
        interrupted = isinstance(error, Exception) and not isinstance(error, DeitError)
        if signals.first_signal and interrupted:
            # A library may turn the interruption into an error of its own.
            error = StoppedBySignal(signals.first_signal)
        return _report(error, name, debug)


def _report(error: BaseException, name: str, debug: bool) -> int:
    """Print an error as one message and return its exit code."""
    if isinstance(error, StoppedBySignal):
        return _report_stop(name, error, debug)
    if isinstance(error, DeitError):
        message = with_option(str(error))
        _print_error(message, debug, all_processes=not isinstance(error, ConfigError))
        return error.exit_code
    if isinstance(error, SystemExit):
        return _report_exit(error, debug)
    if not isinstance(error, Exception):
        raise error
    if isinstance(error, OSError) and error.filename is None and _broken_streams():
        return 0  # `_flush_streams` reports it
    if isinstance(error, BrokenPipeError):  # of a stream that Python has already closed
        return BROKEN_PIPE
    if _is_peer_failure(error):
        message = "another process of this run exited or does not respond; see its output"
        _print_error(message, debug, all_processes=True)
        return PeerError.exit_code
    if (reason := _system_failure(error)) is not None:
        _print_error(f"{reason} (--debug prints the traceback)", debug, all_processes=True)
        return SystemFault.exit_code
    reason = str(error).strip().split("\n")[0]
    message = f"unexpected {type(error).__name__}: {reason} (--debug prints the traceback)"
    _print_error(message, debug, all_processes=True)
    return 1


def _report_exit(error: SystemExit, debug: bool) -> int:
    """Return the exit code of a SystemExit.

    argparse raises it for --help. User code that calls sys.exit() ends the command unfinished,
    which is an error even with exit code 0.
    """
    if isinstance(error.code, str):
        _print_error(error.code, debug, all_processes=True)
    elif not error.code and (module := _raising_module(error)).partition(".")[0] != "argparse":
        _print_error(
            f"{module} called sys.exit() before the command finished", debug, all_processes=True
        )
        return 1
    return error.code if isinstance(error.code, int) else int(error.code is not None)


def _raising_module(error: BaseException) -> str:
    """Return the name of the module that raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "")


_SYSTEM_ERRNOS = (
    *TRANSIENT,
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
)
"""Errors that any path can raise at any time: permissions, a full or broken disk, limits, a file
where a folder should be."""


def _system_failure(error: Exception) -> str | None:
    """Return what the system lacks according to an error; None for any other error."""
    if is_out_of_memory(error):
        return f"not enough memory ({first_line(error)})"
    if isinstance(error, RuntimeError) and "Storage size calculation overflowed" in str(error):
        return f"needs more memory than any machine has ({first_line(error)})"
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return single_line(str(error))  # an OSError from Python 3.13 on
    if (failure := compiler_failure(error)) is not None:
        return f"{failure}; remove --run.compile"
    if not isinstance(error, OSError):
        return None
    if error.errno in _SYSTEM_ERRNOS:
        where = "" if error.filename is None else f"{error.filename}: "
        return single_line(f"{where}{error.strerror}")
    # From tempfile; the message lists the folders that it tried.
    if error.errno == errno.ENOENT and "temporary directory" in str(error.strerror):
        return f"{error.strerror}; set TMPDIR to a writable folder"
    return None


_HUB_OPTIONS = ("--teacher.source", "--init.weights", "--from", "--teacher")
"""Options that accept a repository of the Hugging Face hub, in timm's notation."""


def _check_no_addresses(arguments: list[str]) -> None:
    """Raise ConfigError if any option is given a web address instead of a path."""
    option = ""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            option = name
            if not equals:
                continue
        else:
            value = argument
        for part in value.split(","):
            hub = part.startswith(HUB_PREFIXES) and option in _HUB_OPTIONS
            if not hub and (advice := address_hint(part.strip().removeprefix("@"))) is not None:
                raise ConfigError(f"{option} {part}".strip() + f": {advice}")
        option = ""


def _report_stop(name: str, stop: StoppedBySignal, debug: bool) -> int:
    message = str(stop)
    if name in AUTO_RESUMING:
        signal_name = signal.Signals(stop.signum).name
        message = f"stopped by {signal_name}; run the same command again to resume"
    _print_error(message, debug)
    return stop.exit_code


def _check_names(command: str, arguments: list[str]) -> None:
    """Raise ConfigError if an argument or the working directory has a name that the files of a run
    cannot contain.

    Arguments of predict may have any name: no file refers to them later.
    """
    for argument in arguments if command != "predict" else ():
        if problem := name_problem(argument):
            raise ConfigError(f"{single_line(argument)}: {problem}; rename it, or use another")
    with contextlib.suppress(OSError):  # a deleted directory is reported where it is needed
        if problem := name_problem(os.getcwd()):
            raise ConfigError(
                f"the working directory {single_line(os.getcwd())}: {problem}; rename it, or work "
                "in another"
            )


BROKEN_PIPE = 128 + 13
"""The exit code if the reader of standard output has gone, as shells return it for SIGPIPE."""


def _broken_streams() -> dict[str, OSError]:
    """Return the standard streams that cannot be flushed, each with its error."""
    broken = {}
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()  # never None: see open_streams
        except OSError as error:
            broken[name] = error
    return broken


def _flush_streams(code: int) -> int:
    """Flush the standard streams; return `code`, or that of a stream that cannot be written."""
    broken = _broken_streams()
    for name in broken:  # discard what Python writes to it at exit
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, getattr(sys, name).fileno())
        os.close(devnull)
    if code or not broken:
        return code
    name, error = next(iter(broken.items()))
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    _print_error(f"{name}: cannot be written ({error.strerror})", False, all_processes=True)
    return SystemFault.exit_code


def _is_peer_failure(error: Exception) -> bool:
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "deit.core.accelerator" not in sys.modules:
        return False
    from deit.core.accelerator import is_peer_failure

    return is_peer_failure(error)


def _leave_process_group() -> None:
    """Only after success: after an error, other processes may still wait for this one."""
    if "deit.core.accelerator" in sys.modules:
        from deit.core.accelerator import destroy_process_group

        destroy_process_group()


def _print_error(message: str, debug: bool, *, all_processes: bool = False) -> None:
    """Print one message on the main process.

    all_processes: also on the others, for an error that may have happened on one process only.
    """
    from deit.core.console import complain, is_main_process

    if is_main_process():
        prefix = "deit: error"
    elif all_processes:
        prefix = f"deit: error in process {os.environ['RANK']}"
    else:
        return
    try:
        if debug:
            traceback.print_exc()
        complain(f"{prefix}: {message}")
    except OSError:  # standard error cannot be written; the exit code has to do
        _flush_streams(SystemFault.exit_code)


def program() -> int:
    """Run the console script `deit COMMAND ...` as its own process; return the exit code."""
    mark_standalone()
    return _end_process(main())


def script(name: str) -> int:
    """Run a root script, which is one command, as its own process; return the exit code."""
    mark_standalone()
    return _end_process(run_command(name, sys.argv[1:], Path(sys.argv[0]).name))


def main() -> int:
    """Run `deit COMMAND ...` with the arguments of sys.argv; return the exit code."""
    from deit.cli.commands import COMMANDS

    open_streams()
    arguments = sys.argv[1:]
    if arguments[:1] == ["help"]:
        topic = [name for name in arguments[1:2] if name != "help" and not name.startswith("-")]
        arguments = [*topic, "--help"]
    if arguments and arguments[0] in COMMANDS:
        return run_command(arguments[0], arguments[1:], f"deit {arguments[0]}")
    try:
        return _flush_streams(_without_command(arguments))
    except (OSError, SystemFault):  # of a standard stream
        return _flush_streams(0 if arguments else 2)


def _without_command(arguments: list[str]) -> int:
    """Print the version, the help, or an error; return the exit code."""
    from deit.cli.commands import suggest_command
    from deit.cli.overview import overview

    if arguments == ["--version"]:
        print(f"deit {deit.__version__}", flush=True)
        return 0
    if not arguments or arguments[0] in HELP_OPTIONS:
        # A missing command is an error.
        print(overview(), file=sys.stdout if arguments else sys.stderr, flush=True)
        return 0 if arguments else 2
    suggestion = suggest_command(arguments[0])
    _print_error(f"no command {arguments[0]!r}{suggestion}; see deit --help", False)
    return 2


def _end_process(code: int) -> int:
    """Kill the child processes, and make sure that this process exits: at exit Python waits for the
    threads of libraries, which may wait forever."""
    if (multiprocessing := sys.modules.get("multiprocessing")) is not None:
        for child in multiprocessing.active_children():
            child.kill()
    threading.Thread(target=_exit_later, args=(code,), daemon=True).start()
    return code


def _exit_later(code: int) -> None:
    time.sleep(_EXIT_TIMEOUT_S)
    os._exit(code)
