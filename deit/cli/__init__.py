"""The command line: one grammar behind `deit` and the root scripts; errors become exit codes."""

import contextlib
import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import deit
from deit.cli.stop_signals import SignalsAsErrors
from deit.core.errors import (
    TRANSIENT,
    ConfigError,
    DeitError,
    PeerError,
    StoppedBySignal,
    SystemFault,
    compiler_failure,
    did_you_mean,
    first_line,
    in_line,
    is_out_of_memory,
    name_problem,
    open_streams,
)
from deit.core.fault_injection import install_faults
from deit.core.parent_process import (
    exit_with_parent,
    mark_standalone,
)
from deit.core.user_code import HUB_PREFIXES, address_hint

# The commands are imported inside the functions, when signals are obeyed already.

_ENDING_S = 1.0  # for the end of Python itself

# Before any library is imported that would otherwise count its users.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def run_command(name: str, arguments: list[str], program: str) -> int:
    """Run one command; the exit code. Errors are one message, with a traceback only for --debug."""
    open_streams()
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    with SignalsAsErrors() as leaving:
        try:
            exit_with_parent()
            return _written(_exit_code_of(name, arguments, program, debug, leaving))
        except StoppedBySignal as stop:  # in the moment between an error and what is said of it
            return stop.exit_code


AUTO_RESUMING = ("targets", "compare", "sweep", "lottery", "prune", "loss-landscape")


def _exit_code_of(
    name: str, arguments: list[str], program: str, debug: bool, leaving: "SignalsAsErrors"
) -> int:
    """Run a command; the exit code, also of an error, which is said."""
    try:
        _check_names(name, arguments)
        from deit.cli.commands import COMMANDS

        install_faults(os.environ.get("DEIT_FAULT"))
        _refuse_addresses(arguments)
        COMMANDS[name](arguments, program)
        _leave_processes()
        leaving.arrived = True
        return 0
    except BaseException as error:
        leaving.arrived = True  # a signal changes nothing any more
        if leaving.asked and isinstance(error, Exception) and not isinstance(error, DeitError):
            # A library that was interrupted may make another error of it.
            error = StoppedBySignal(leaving.asked)
        return _code_of(error, name, debug)


def _code_of(error: BaseException, name: str, debug: bool) -> int:
    """The exit code of an error, which is said in one message."""
    if isinstance(error, StoppedBySignal):
        return _stopped(name, error, debug)
    if isinstance(error, DeitError):
        _print_error(str(error), debug, everywhere=not isinstance(error, ConfigError))
        return error.exit_code
    if isinstance(error, SystemExit):
        return _left(error, debug)
    if not isinstance(error, Exception):
        raise error
    if isinstance(error, OSError) and error.filename is None and _unwritten():
        return 0  # of a standard stream, which `_written` reports
    if isinstance(error, BrokenPipeError):  # of one that Python has given up already
        return BROKEN_PIPE
    if _lost_peer(error):
        message = "another process is gone or did not answer; see what it said"
        _print_error(message, debug, everywhere=True)
        return PeerError.exit_code
    if (reason := _of_the_machine(error)) is not None:
        _print_error(f"{reason} (--debug shows where)", debug, everywhere=True)
        return SystemFault.exit_code
    reason = str(error).strip().split("\n")[0]
    message = f"unexpected {type(error).__name__}: {reason} (--debug shows where)"
    _print_error(message, debug, everywhere=True)
    return 1


def _left(error: SystemExit, debug: bool) -> int:
    """The exit code of a command that was left: for --help and wrong options, which is explained,
    or by code of the user's, in whose middle nothing is finished."""
    if isinstance(error.code, str):
        _print_error(error.code, debug, everywhere=True)
    elif not error.code and (where := _place_of(error)).partition(".")[0] not in _LEAVE:
        _print_error(f"left by sys.exit() in {where}", debug, everywhere=True)
        return 1
    return error.code if isinstance(error.code, int) else int(error.code is not None)


_LEAVE = ("argparse",)


def _place_of(error: BaseException) -> str:
    """The module that raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "")


_MACHINE = (
    *TRANSIENT,
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
)
"""What a system may answer at any path and time: permissions, a full or broken disk, limits, a
file in the place of a folder."""


def _of_the_machine(error: Exception) -> str | None:
    """What the machine lacks, where an error says so; None for any other error."""
    if is_out_of_memory(error):
        return f"not enough memory ({first_line(error)})"
    if isinstance(error, RuntimeError) and "Storage size calculation overflowed" in str(error):
        return f"more memory than any machine has ({first_line(error)})"
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return in_line(str(error))  # an OSError from Python 3.13 on
    if (failure := compiler_failure(error)) is not None:
        return f"{failure}; leave --run.compile out"
    if not isinstance(error, OSError):
        return None
    if error.errno in _MACHINE:
        where = "" if error.filename is None else f"{error.filename}: "
        return in_line(f"{where}{error.strerror}")
    # tempfile says so, and names the folders that it has tried.
    if error.errno == errno.ENOENT and "temporary directory" in str(error.strerror):
        return f"{error.strerror}; set TMPDIR to a folder that can be written"
    return None


_TIMM_LOADS = ("--teacher.source", "--init.weights", "--from", "--teacher")
"""Options that take a repository of the Hugging Face hub, as timm names it."""


def _refuse_addresses(arguments: list[str]) -> None:
    """Refuse an address in the place of a path, in any option of any command. Raises
    ConfigError."""
    option = ""
    for word in arguments:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            option = name
            if not equals:
                continue
        else:
            value = word
        for part in value.split(","):
            hub = part.startswith(HUB_PREFIXES) and option in _TIMM_LOADS
            if not hub and (advice := address_hint(part.strip().removeprefix("@"))) is not None:
                raise ConfigError(f"{option} {part}".strip() + f": {advice}")
        option = ""


def _stopped(name: str, stop: StoppedBySignal, debug: bool) -> int:
    word = f"stopped by {signal.Signals(stop.signum).name}; the same command goes on"
    _print_error(word if name in AUTO_RESUMING else str(stop), debug)
    return stop.exit_code


def _check_names(command: str, arguments: list[str]) -> None:
    """Refuse arguments, and a working directory, whose names no file of a run could hold. Raises
    ConfigError.

    Pictures to be predicted may be called anything: nothing refers to them later.
    """
    for word in arguments if command != "predict" else ():
        if trouble := name_problem(word):
            raise ConfigError(f"{in_line(word)}: {trouble}; rename it, or give another")
    with contextlib.suppress(OSError):  # it is gone, which who needs it reports
        if trouble := name_problem(os.getcwd()):
            raise ConfigError(
                f"the working directory {in_line(os.getcwd())}: {trouble}; rename it, or work in "
                "another"
            )


BROKEN_PIPE = 128 + 13
"""The exit code where nobody reads standard output any more, as shells give it for SIGPIPE."""


def _unwritten() -> dict[str, OSError]:
    """The standard streams that do not take what was said, each with the reason."""
    found = {}
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()  # never missing: see open_streams
        except OSError as error:
            found[name] = error
    return found


def _written(code: int) -> int:
    """The exit code of a command, once all that it said is out."""
    found = _unwritten()
    for name in found:  # what Python writes as it ends goes nowhere
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, getattr(sys, name).fileno())
        os.close(nothing)
    if code or not found:
        return code
    name, error = next(iter(found.items()))
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    _print_error(f"{name}: cannot be written ({error.strerror})", False, everywhere=True)
    return SystemFault.exit_code


def _lost_peer(error: Exception) -> bool:
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "deit.core.accelerator" not in sys.modules:
        return False
    from deit.core.accelerator import is_peer_failure

    return is_peer_failure(error)


def _leave_processes() -> None:
    """After success only: after an error, the others may be waiting for this process."""
    if "deit.core.accelerator" in sys.modules:
        from deit.core.accelerator import destroy_process_group

        destroy_process_group()


def _print_error(message: str, debug: bool, *, everywhere: bool = False) -> None:
    """One message; of an error that may be this process's alone also from the other processes."""
    from deit.core.console import complain, is_main_process

    if is_main_process():
        prefix = "deit: error"
    elif everywhere:
        prefix = f"deit: error in process {os.environ['RANK']}"
    else:
        return
    try:
        if debug:
            traceback.print_exc()
        complain(f"{prefix}: {message}")
    except OSError:  # nobody reads it, or its disk is full: the exit code alone says it
        _written(SystemFault.exit_code)


def program() -> int:
    """The console script `deit COMMAND ...`, a process of its own; returns the exit code."""
    mark_standalone()
    return _ending(main())


def script(name: str) -> int:
    """A root script, which is one command and a process of its own; returns the exit code."""
    mark_standalone()
    return _ending(run_command(name, sys.argv[1:], Path(sys.argv[0]).name))


def main() -> int:
    """`deit COMMAND ...` as sys.argv has it; returns the exit code."""
    from deit.cli.commands import COMMANDS

    open_streams()
    arguments = sys.argv[1:]
    if arguments[:1] == ["help"]:
        named = [word for word in arguments[1:2] if word != "help" and not word.startswith("-")]
        arguments = [*named, "--help"]
    if arguments and arguments[0] in COMMANDS:
        return run_command(arguments[0], arguments[1:], f"deit {arguments[0]}")
    try:
        return _written(_without_command(arguments))
    except (OSError, SystemFault):  # of a standard stream
        return _written(0 if arguments else 2)


def _without_command(arguments: list[str]) -> int:
    from deit.cli.commands import COMMANDS
    from deit.core.console import complain, info

    if arguments == ["--version"]:
        info(f"deit {deit.__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        write = info if arguments else complain  # without a command it is an error
        write("usage: deit COMMAND [options]     (deit COMMAND --help tells more)\n")
        for name, command in COMMANDS.items():
            write(f"  {name:<10} {(command.__doc__ or '').strip()}")
        return 0 if arguments else 2
    _print_error(
        f"no command {arguments[0]!r}{did_you_mean(arguments[0], COMMANDS)}; see deit --help", False
    )
    return 2


def _ending(code: int) -> int:
    """End the processes that this one started, and see to it that it ends itself: Python waits for
    the threads of libraries, which may wait for something that never comes."""
    for child in multiprocessing.active_children():
        child.kill()
    threading.Thread(target=_end, args=(code,), daemon=True).start()
    return code


def _end(code: int) -> None:
    time.sleep(_ENDING_S)
    os._exit(code)
