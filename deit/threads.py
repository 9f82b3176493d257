"""Threads that work for this process, and do not keep it from leaving."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def threads(number: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads that is waited for at its end, but not where an error or a signal ends it:
    what has not begun by then is dropped. number: of threads; None: as Python chooses."""
    pool = ThreadPoolExecutor(number)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
