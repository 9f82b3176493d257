"""Encoded images read, decoded and cropped by worker processes, each view by its own key."""

import functools
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from itertools import islice
from multiprocessing.process import BaseProcess
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deit.core.console import warn
from deit.core.errors import DeitError, WorkerLost
from deit.core.hardware import num_cores
from deit.core.parent_process import SIGNALS, kill_with_parent, processes_on_host
from deit.datasets.decoders import Decoder, ReadRequest
from deit.datasets.decoding import open_image
from deit.datasets.images import EncodedImages

_AHEAD = 2  # batches of each worker
_KILLED_S = 1.0  # how long to wait for the end of a killed process: a dead disk may hold it
_SHARED = Path("/dev/shm")  # where the batches of worker processes lie, on Linux
LOST_WORKER = (
    "data.num_workers: the system ended a worker process: the memory is used up, or /dev/shm is "
    "full "
    "(in a container: --shm-size 2g); fewer data.num_workers or a smaller optim.batch_size need "
    "less, "
    "and data.num_workers 0 no such process"
)


def fits_shared(needed: int) -> bool:
    """Whether so many bytes of batches have room in the shared memory of the machine, beside those
    of a second reader and of its other processes. A container has 64 MiB of it unless it asks for
    more, and the system ends a process that writes beyond."""
    try:
        return 2 * needed * processes_on_host() <= shutil.disk_usage(_SHARED).free
    except OSError:
        return True  # no Linux: shared memory has no size of its own


@functools.cache
def has_sockets(folder: str) -> bool:
    """Whether a worker could hand over what it shares, by a socket in this folder for temporary
    files: the path of one has a limit (107 bytes on Linux), and not every disk has sockets. Tried
    with a name as long as those of multiprocessing, whose folder it is."""
    path = tempfile.mktemp(prefix="listener-", dir=folder)
    try:
        with socket.socket(socket.AF_UNIX) as tried:
            tried.bind(path)
        os.unlink(path)
    except OSError:
        return False
    return True


@functools.cache
def _warn_of_files(sockets: bool) -> None:
    """Say once why batches do not come in shared memory. sockets: whether it is for its size."""
    if sockets:
        free = shutil.disk_usage(_SHARED).free
        why = f"{_SHARED} has {free / 2**20:.0f} MiB free, too little for the batches"
        advice = "in a container --shm-size 2g gives more"
    else:
        why = "the temporary folder takes no socket, by which shared memory is handed over"
        advice = "a TMPDIR on this machine with a shorter name may take one"
    warn(
        f"{why}: those of data.num_workers come in files in {tempfile.gettempdir()}, which takes a "
        f"little longer; {advice}"
    )


def worker_count(num_workers: int | None) -> int:
    """Return the number of worker processes of one training process.

    num_workers: data.num_workers; None: this process's share of the cores, at most 8.
    """
    if num_workers is not None:
        return num_workers
    return max(1, min(8, num_cores() // processes_on_host()))


class ReadResult(NamedTuple):
    """What a worker sends back.

    pixels: uint8 [batch, 3, size, size], one for each cutter. seconds: how long one worker took.
    """

    pixels: tuple[Tensor, ...]
    seconds: float


class _Sent(NamedTuple):
    """A Read on its way in a file.

    sizes: of each square [px], in the order of their bytes.
    """

    file: str
    sizes: tuple[int, ...]
    seconds: float


class _Work:
    """What a worker does. An image that cannot be read is its answer and not raised there: a
    traceback of the worker would stand before the message."""

    def __init__(self, images: EncodedImages, cutters: tuple[Decoder, ...]) -> None:
        self.images = images
        self.cutters = cutters

    def __call__(
        self, epoch: int, samples: np.ndarray, repeats: np.ndarray
    ) -> ReadResult | DeitError:
        started = time.perf_counter()
        try:
            pictures = [
                open_image(self.images.read(index), self.images.name(index))
                for index in samples.tolist()
            ]
        except DeitError as error:
            return error
        views = ReadRequest(epoch, torch.from_numpy(samples), torch.from_numpy(repeats))
        pixels = tuple(cutter.cut(pictures, views) for cutter in self.cutters)
        return ReadResult(pixels, time.perf_counter() - started)


_work: _Work  # in a worker process


def _begin_worker(work: _Work, parent: int) -> None:
    """In a new worker: signals to a whole group of processes are for the training process, which
    ends its workers when it is done with them."""
    global _work
    _work = work
    torch.set_num_threads(1)
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    kill_with_parent(parent)


def _in_worker(
    epoch: int, samples: np.ndarray, repeats: np.ndarray, folder: str, shared: bool
) -> ReadResult | _Sent | DeitError:
    """The batch: in shared memory, or in a file of this folder where it should not be shared, or
    cannot be: other processes fill the same memory, and take the same files.

    Not through the pool's pipe: who reads half a batch of a worker that was killed waits for ever.
    """
    read = _work(epoch, samples, repeats)
    if isinstance(read, DeitError) or (shared and _share(read)):
        return read
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        for pixels in read.pixels:
            file.write(pixels.numpy().data)
    return _Sent(file.name, tuple(pixels.shape[-1] for pixels in read.pixels), read.seconds)


def _share(read: ReadResult) -> bool:
    """Move a batch into shared memory; whether there was room. Pickling would do it as well, but
    there its error ends the run."""
    try:
        for pixels in read.pixels:
            pixels.share_memory_()
    except (RuntimeError, OSError):
        return False
    return True


class _Workers:
    """Processes that read batches. They have nothing to save, so they are killed in the end."""

    def __init__(self, work: _Work, number: int, *, pin: bool) -> None:
        self._pool = ProcessPoolExecutor(
            number, initializer=_begin_worker, initargs=(work, os.getpid())
        )
        self._pins = ThreadPoolExecutor(1) if pin else None
        # Made here, it is this process's, and removed with it; each killed worker would leave one.
        self._folder = tempfile.mkdtemp(dir=get_temp_dir())
        self.processes: list[BaseProcess] = []

    def submit(
        self, wanted: ReadRequest, *, shared: bool
    ) -> "Future[ReadResult | _Sent | DeitError]":
        """Have a batch read. shared: whether it comes in shared memory, without a copy, where that
        has room; else in a file. Raises WorkerLost where a worker is gone.

        It is asked for in arrays: a tensor would travel as shared memory, whose file stays open
        while it lives.
        """
        words = (wanted.epoch, wanted.samples.numpy(), wanted.repeats.numpy())
        try:
            # The first call starts the processes: no signal may come between one and its list.
            with nullcontext() if self.processes else _signals_later():
                before = set(multiprocessing.active_children())
                future = self._pool.submit(_in_worker, *words, self._folder, shared)
                for process in set(multiprocessing.active_children()) - before:
                    # Where one is lost the pool ends the others by SIGTERM, which they ignore, and
                    # waits for them; from Python 3.12 on it takes no calls meanwhile.
                    process.terminate = process.kill
                    self.processes.append(process)
            return future if self._pins is None else self._pins.submit(_pinned, future)
        except BrokenProcessPool:
            raise WorkerLost(LOST_WORKER) from None

    def close(self) -> None:
        """End the processes, also in the middle of a batch."""
        for process in self.processes:
            process.kill()
        # Nothing is canceled: where a pool breaks that holds canceled batches, Python 3.11 prints
        # an error.
        self._pool.shutdown(wait=False)
        if self._pins is not None:
            self._pins.shutdown(wait=False)
        left, end = {process.sentinel for process in self.processes}, time.monotonic() + _KILLED_S
        while left and (rest := end - time.monotonic()) > 0:
            left.difference_update(multiprocessing.connection.wait(left, rest))
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def _signals_later() -> Iterator[None]:
    """Signals that ask to stop or to save arrive when it is left; processes that start within it
    begin without them."""
    came: list[int] = []
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # for the processes that start
    # Another thread may still take a signal; its handler would run in the main thread.
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS} if main else {}
    before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number in came:
            os.kill(os.getpid(), number)


def _pinned(future: "Future[ReadResult | _Sent | DeitError]") -> ReadResult | DeitError:
    """The batch in memory that a GPU can copy from while it computes."""
    read = _received(future.result())
    if isinstance(read, DeitError):
        return read
    return read._replace(pixels=tuple(pixels.pin_memory() for pixels in read.pixels))


def _received(answer: "ReadResult | _Sent | DeitError") -> ReadResult | DeitError:
    if not isinstance(answer, _Sent):
        return answer
    content = torch.from_numpy(np.fromfile(answer.file, np.uint8))
    os.unlink(answer.file)
    number = len(content) // sum(3 * size**2 for size in answer.sizes)
    parts = content.split([number * 3 * size**2 for size in answer.sizes])
    pixels = tuple(
        part.view(number, 3, size, size) for part, size in zip(parts, answer.sizes, strict=True)
    )
    return ReadResult(pixels, answer.seconds)


class Reader:
    """Reads batches ahead, in order, with a number of worker processes (0: in this one).

    The processes start with the first batch and stay until `close`, or the end of its `with`.
    pin: whether batches are read into memory that a GPU can copy from while it computes.
    """

    def __init__(
        self, images: EncodedImages, cutters: tuple[Decoder, ...], *, workers: int, pin: bool
    ) -> None:
        self._work = _Work(images, cutters)
        self._number, self._pin = workers, pin
        self._workers: _Workers | None = None
        self._largest, self._shared = 0, True  # batch so far [images], and how it comes

    def read(self, batches: Iterable[ReadRequest]) -> Iterator[ReadResult]:
        """The batches, in their order. Raises DataError at an unreadable image, SystemFault
        where one cannot be read now, WorkerLost where a worker was killed."""
        for answer in self._answers(iter(batches)):
            if isinstance(answer, DeitError):
                raise type(answer)(str(answer))  # of this process, without a worker's traceback
            yield answer

    def close(self) -> None:
        """End the worker processes; what is read next starts others."""
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.close()

    def _has_room(self, number: int) -> bool:
        """Whether batches of so many images, as many as are read ahead and the one in use, have
        room in shared memory, and a way out of it."""
        if number > self._largest:
            each = number * 3 * sum(cutter.size**2 for cutter in self._work.cutters)
            needed = (_AHEAD * self._number + 1) * each
            sockets = has_sockets(get_temp_dir())
            self._largest, self._shared = number, sockets and fits_shared(needed)
            if not self._shared:
                _warn_of_files(sockets)
        return self._shared

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _answers(self, batches: Iterator[ReadRequest]) -> Iterator[ReadResult | DeitError]:
        if self._number == 0:
            for epoch, samples, repeats in batches:
                yield self._work(epoch, samples.numpy(), repeats.numpy())
            return
        if self._workers is None:
            self._workers = _Workers(self._work, self._number, pin=self._pin)
        waiting: deque[Future[ReadResult | _Sent | DeitError]] = deque()
        while True:
            for wanted in islice(batches, _AHEAD * self._number - len(waiting)):
                shared = self._has_room(len(wanted.samples))
                waiting.append(self._workers.submit(wanted, shared=shared))
            if not waiting:
                return
            yield _answer(waiting.popleft())


def _answer(future: "Future[ReadResult | _Sent | DeitError]") -> ReadResult | DeitError:
    try:
        return _received(future.result())
    except BrokenProcessPool:
        raise WorkerLost(LOST_WORKER) from None
    except RuntimeError as error:
        # A batch in shared memory that could not be handed over.
        if any(word in str(error) for word in ("shared memory", "unable to mmap")):
            raise WorkerLost(LOST_WORKER) from None
        raise
