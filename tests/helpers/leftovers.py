"""Find processes that a test has left running.

A zombie counts as ended: in a container whose first process does not wait for it, it stays one.
"""

import multiprocessing
import os
from collections.abc import Callable

import psutil

from tests.helpers.command_server import Running
from tests.helpers.processes import Completed, wait_until


def has_ended(pid: int) -> bool:
    """Return whether a process has ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def remaining_processes(
    session: int, group_of: Callable[[int], int] = os.getsid
) -> list[psutil.Process]:
    """Return the running processes of a session, or with os.getpgid those of a process group.

    A process that another one starts is in the same session.
    """
    return [p for p in psutil.process_iter() if _is_running(p.pid, group_of, session)]


def _is_running(pid: int, group_of: Callable[[int], int], session: int) -> bool:
    try:
        return group_of(pid) == session and not has_ended(pid)
    except (ProcessLookupError, PermissionError):
        return False


def assert_no_leftovers(session: int) -> None:
    """Wait until all processes of a session have ended."""
    wait_until(lambda: not remaining_processes(session))


def assert_ends(running: Running, code: int) -> Completed:
    """Assert that a process ends with this exit code, prints no traceback and leaves no process."""
    done = running.wait(timeout=300)
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert_no_leftovers(running.pid)
    return done


def child_processes() -> set[multiprocessing.Process]:
    """Return the running workers that this process has started by multiprocessing."""
    return set(multiprocessing.active_children())
