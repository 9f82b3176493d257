"""The most memory that a side of a benchmark takes, in a process of its own."""

import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

_EVERY_S = 0.02
_UPDATES = 6


class Memory(NamedTuple):
    """The most at any moment [10**6 bytes]. own: of the process, or of the GPU. with_workers: the
    processor's memory of the process and its workers, what several share counted once."""

    own: float
    with_workers: float


def memory_of(make: Callable) -> Memory:
    """What some updates of a side take. make: a function that can be sent to another process."""
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=_report, args=(make, torch.get_num_threads(), answer))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("a side ended with an error in a process of its own; see above")
    return Memory(*answer.get())


def _report(make: Callable, threads: int, answer: Any) -> None:
    torch.set_num_threads(threads)
    multiprocessing.set_start_method("fork", force=True)  # for workers: as in any training
    most, ended = [0.0], threading.Event()

    def look() -> None:
        while not ended.wait(_EVERY_S):
            most[0] = max(most[0], _shared_fairly("self"))

    watcher = threading.Thread(target=look)
    watcher.start()
    side = make()
    for _ in range(_UPDATES):
        next(side)
    time.sleep(2 * _EVERY_S)
    ended.set()
    watcher.join()
    # Not getrusage: what it tells begins with the memory of the process that started this one.
    status = Path("/proc/self/status").read_text()
    own = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    if torch.cuda.is_available():
        own = torch.cuda.max_memory_allocated()
    answer.put((own / 1e6, most[0] / 1e6))
    side.close()


def _shared_fairly(process: str) -> float:
    """Memory of a process and those it started [bytes]: of a page that n share, an n-th each."""
    place = Path("/proc") / process
    try:
        told = (place / "smaps_rollup").read_text()
        children = " ".join(file.read_text() for file in place.glob("task/*/children"))
    except OSError:
        return 0.0  # it has just ended
    own = 1024 * int(told.partition("\nPss:")[2].split()[0])
    return own + sum(map(_shared_fairly, children.split()))
