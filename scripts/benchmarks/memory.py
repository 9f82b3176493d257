"""Measure the peak memory of a side of a benchmark in its own process."""

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_INTERVAL_S = 0.02
_NUM_STEPS = 6


def memory_of(make: Callable) -> float:
    """Return the peak memory of some steps of a side [10**6 bytes].

    It is the memory of the GPU, or without one that of the process and the private memory of its
    workers. make: a picklable function that returns the steps.
    """
    context = multiprocessing.get_context("spawn")
    result = context.SimpleQueue()
    process = context.Process(target=_report, args=(make, torch.get_num_threads(), result))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("a side failed in its own process; see the error above")
    return result.get()


def _report(make: Callable, threads: int, result: Any) -> None:
    torch.set_num_threads(threads)
    multiprocessing.set_start_method("fork", force=True)  # for workers, as in a training
    peak, stop = [0.0], threading.Event()

    def sample() -> None:
        while not stop.wait(_INTERVAL_S):
            peak[0] = max(peak[0], _private_bytes("self"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    side = make()
    for _ in range(_NUM_STEPS):
        next(side)
    time.sleep(2 * _INTERVAL_S)
    stop.set()
    sampler.join()
    # Not getrusage: its peak includes the memory of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    num_bytes = 1024 * int(status.partition("VmHWM:")[2].split()[0]) + peak[0]
    if torch.cuda.is_available():
        num_bytes = torch.cuda.max_memory_allocated()
    result.put(num_bytes / 1e6)
    side.close()


def _private_bytes(process: str) -> int:
    """Return the private memory of all descendants of a process [bytes]."""
    num_bytes = 0
    for file in (Path("/proc") / process).glob("task/*/children"):
        for child in file.read_text(encoding="utf-8").split():
            with contextlib.suppress(OSError):  # the process has ended
                rows = (
                    (Path("/proc") / child / "smaps_rollup")
                    .read_text(encoding="utf-8")
                    .splitlines()
                )
                private = [row.split()[1] for row in rows if row.startswith("Private_")]
                num_bytes += 1024 * sum(map(int, private)) + _private_bytes(child)
    return num_bytes
