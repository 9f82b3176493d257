"""What is left of processes. One that has ended is gone, also where nobody has waited for it: in a
container whose first process does not, it stays a zombie."""

import multiprocessing
import os
from collections.abc import Callable

import psutil

from tests.helpers.command_server import Running
from tests.helpers.processes import Completed, wait_until


def is_gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def left(session: int, of: Callable[[int], int] = os.getsid) -> list[psutil.Process]:
    """What is still there of a session, which nothing that a process starts leaves; or, with
    os.getpgid, of a process group."""
    return [one for one in psutil.process_iter() if _is(one.pid, of, session)]


def _is(pid: int, of: Callable[[int], int], session: int) -> bool:
    try:
        return of(pid) == session and not is_gone(pid)
    except (ProcessLookupError, PermissionError):
        return False


def assert_no_leftovers(session: int) -> None:
    wait_until(lambda: not left(session))


def assert_ends(running: Running, code: int) -> Completed:
    """The end of a process, which has this exit code and leaves nothing behind."""
    done = running.wait(timeout=300)
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert_no_leftovers(running.pid)
    return done


def child_processes() -> set[multiprocessing.Process]:
    return set(multiprocessing.active_children())
