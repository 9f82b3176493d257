"""The most memory that a side of a benchmark takes, in a process of its own."""

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_EVERY_S = 0.02
_UPDATES = 6


def memory_of(make: Callable) -> float:
    """The most that some updates of a side take [10**6 bytes]: on a GPU's machine of the GPU, else
    of the process, with what its workers have for themselves. make: a function that can be sent to
    another process."""
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=_report, args=(make, torch.get_num_threads(), answer))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("a side ended with an error in a process of its own; see above")
    return answer.get()


def _report(make: Callable, threads: int, answer: Any) -> None:
    torch.set_num_threads(threads)
    multiprocessing.set_start_method("fork", force=True)  # for workers: as in any training
    most, ended = [0.0], threading.Event()

    def look() -> None:
        while not ended.wait(_EVERY_S):
            most[0] = max(most[0], _of_workers("self"))

    watcher = threading.Thread(target=look)
    watcher.start()
    side = make()
    for _ in range(_UPDATES):
        next(side)
    time.sleep(2 * _EVERY_S)
    ended.set()
    watcher.join()
    # Not getrusage: what it tells begins with the memory of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = 1024 * int(status.partition("VmHWM:")[2].split()[0]) + most[0]
    if torch.cuda.is_available():
        found = torch.cuda.max_memory_allocated()
    answer.put(found / 1e6)
    side.close()


def _of_workers(process: str) -> int:
    """What the processes that one started hold and share with none [bytes]."""
    found = 0
    for file in (Path("/proc") / process).glob("task/*/children"):
        for child in file.read_text(encoding="utf-8").split():
            with contextlib.suppress(OSError):  # it has just ended
                rows = (
                    (Path("/proc") / child / "smaps_rollup")
                    .read_text(encoding="utf-8")
                    .splitlines()
                )
                private = [row.split()[1] for row in rows if row.startswith("Private_")]
                found += 1024 * sum(map(int, private)) + _of_workers(child)
    return found
