"""Read, decode and crop encoded images in worker processes."""

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
from deit.datasets.crops import Decoder, ReadRequest
from deit.datasets.decoding import open_image
from deit.datasets.images import EncodedImages

_AHEAD = 2  # batches read ahead per worker
_KILLED_S = 1.0  # to wait for the end of a killed process, which a stalled disk can delay
_SHARED_MEMORY = Path("/dev/shm")  # holds the batches of worker processes on Linux
LOST_WORKER = (
    "data.num_workers: the system killed a worker process, because memory or /dev/shm is full (in "
    "a container, raise it with --shm-size 2g); use fewer data.num_workers or a smaller "
    "optim.batch_size, or data.num_workers 0 for no worker processes"
)


def fits_shared_memory(needed: int) -> bool:
    """Return whether batches of `needed` bytes fit into the shared memory of this machine.

    Twice as much is required, for a second reader, in each training process of the machine. A
    container has 64 MiB by default, and the system kills a process that writes beyond the limit.
    """
    try:
        return 2 * needed * processes_on_host() <= shutil.disk_usage(_SHARED_MEMORY).free
    except OSError:
        return True  # not Linux: shared memory has no limit of its own


@functools.cache
def supports_sockets(folder: str) -> bool:
    """Return whether sockets can be created in this folder of multiprocessing.

    Shared memory is handed over by a socket. The length of its path is limited (107 bytes on
    Linux), and not all file systems support sockets. The test uses a name of multiprocessing's
    length.
    """
    path = tempfile.mktemp(prefix="listener-", dir=folder)
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(path)
        os.unlink(path)
    except OSError:
        return False
    return True


@functools.cache
def _warn_of_files(sockets: bool) -> None:
    """Warn once that batches are passed in files instead of shared memory, and why.

    sockets: whether sockets are supported, so that the reason is the size of the shared memory.
    """
    if sockets:
        free = shutil.disk_usage(_SHARED_MEMORY).free
        reason = f"{_SHARED_MEMORY} has {free / 2**20:.0f} MiB free, too little for the batches"
        advice = "in a container, raise it with --shm-size 2g"
    else:
        reason = "the temporary folder supports no sockets, which shared memory requires"
        advice = "set TMPDIR to a local folder with a shorter name"
    warn(
        f"{reason}: worker processes (data.num_workers) pass batches in files in "
        f"{tempfile.gettempdir()}, which is a little slower; {advice}"
    )


def worker_count(num_workers: int | None) -> int:
    """Return the number of worker processes of one training process.

    num_workers: data.num_workers; None: this process's share of the cores, at most 8.
    """
    if num_workers is not None:
        return num_workers
    return max(1, min(8, num_cores() // processes_on_host()))


class ReadResult(NamedTuple):
    """A decoded batch.

    pixels: uint8 [batch, 3, size, size] for each decoder, RGB. seconds: the worker's time.
    """

    pixels: tuple[Tensor, ...]
    seconds: float


class _ReadFile(NamedTuple):
    """A ReadResult whose pixels are stored in a file.

    sizes: side [px] of each tensor, in the order of their bytes.
    """

    file: str
    sizes: tuple[int, ...]
    seconds: float


class _DecodeTask:
    """Decodes batches in a worker.

    An unreadable image is returned as an error and not raised, so that no traceback of the worker
    is printed before the message.
    """

    def __init__(self, images: EncodedImages, decoders: tuple[Decoder, ...]) -> None:
        self.images = images
        self.decoders = decoders

    def __call__(
        self, epoch: int, samples: np.ndarray, repeats: np.ndarray
    ) -> ReadResult | DeitError:
        started = time.perf_counter()
        try:
            images = [
                open_image(self.images.read(index), self.images.name(index))
                for index in samples.tolist()
            ]
        except DeitError as error:
            return error
        request = ReadRequest(epoch, torch.from_numpy(samples), torch.from_numpy(repeats))
        pixels = tuple(decoder.decode(images, request) for decoder in self.decoders)
        return ReadResult(pixels, time.perf_counter() - started)


_task: _DecodeTask  # of a worker process


def _init_worker(task: _DecodeTask, parent: int) -> None:
    """Set up a new worker process.

    It ignores signals to the whole process group, because the training process ends its workers.
    """
    global _task
    _task = task
    torch.set_num_threads(1)
    signal.set_wakeup_fd(-1)
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    kill_with_parent(parent)


def _decode_in_worker(
    epoch: int, samples: np.ndarray, repeats: np.ndarray, folder: str, shared: bool
) -> ReadResult | _ReadFile | DeitError:
    """Return a batch in shared memory, or in a file of `folder`.

    A file is used if `shared` is false, or if shared memory or open files are exhausted, because
    other processes use them too. The pool's pipe is not used for pixels: after a worker is killed
    in the middle of a batch, its reader would wait forever.
    """
    result = _task(epoch, samples, repeats)
    if isinstance(result, DeitError) or (shared and _share(result)):
        return result
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        for pixels in result.pixels:
            file.write(pixels.numpy().data)
    sizes = tuple(pixels.shape[-1] for pixels in result.pixels)
    return _ReadFile(file.name, sizes, result.seconds)


def _share(result: ReadResult) -> bool:
    """Move a batch into shared memory; return whether it fit.

    Pickling would move it as well, but an error there would end the run.
    """
    try:
        for pixels in result.pixels:
            pixels.share_memory_()
    except (RuntimeError, OSError):
        return False
    return True


class _Workers:
    """Worker processes that read batches. They have nothing to save, so `close` kills them."""

    def __init__(self, task: _DecodeTask, count: int, *, pin: bool) -> None:
        self._pool = ProcessPoolExecutor(
            count, initializer=_init_worker, initargs=(task, os.getpid())
        )
        self._pins = ThreadPoolExecutor(1) if pin else None
        # Created and removed by this process; killed workers could not remove theirs.
        self._folder = tempfile.mkdtemp(dir=get_temp_dir())
        self.processes: list[BaseProcess] = []

    def submit(
        self, request: ReadRequest, *, shared: bool
    ) -> "Future[ReadResult | _ReadFile | DeitError]":
        """Queue a batch. Raises WorkerLost if a worker was killed.

        shared: pass the batch in shared memory, without a copy, if it fits; otherwise in a file.
        """
        # Arrays: a tensor would be passed as shared memory, whose file stays open with it.
        arguments = (request.epoch, request.samples.numpy(), request.repeats.numpy())
        try:
            # The first call starts the processes. A signal must not interrupt their registration.
            with nullcontext() if self.processes else _signals_deferred():
                before = set(multiprocessing.active_children())
                future = self._pool.submit(_decode_in_worker, *arguments, self._folder, shared)
                for process in set(multiprocessing.active_children()) - before:
                    # After a worker is lost, the pool ends the others by SIGTERM, which they
                    # ignore, and waits for them; from Python 3.12 on it accepts no calls meanwhile.
                    process.terminate = process.kill
                    self.processes.append(process)
            return future if self._pins is None else self._pins.submit(_pin, future)
        except BrokenProcessPool:
            raise WorkerLost(LOST_WORKER) from None

    def close(self) -> None:
        """Kill the processes, even in the middle of a batch."""
        for process in self.processes:
            process.kill()
        # Batches are not canceled: Python 3.11 prints an error if a pool with canceled batches
        # breaks.
        self._pool.shutdown(wait=False)
        if self._pins is not None:
            self._pins.shutdown(wait=False)
        running = {process.sentinel for process in self.processes}
        end = time.monotonic() + _KILLED_S
        while running and (remaining := end - time.monotonic()) > 0:
            running.difference_update(multiprocessing.connection.wait(running, remaining))
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Deliver signals to stop or to save only after this context; new processes start blocked."""
    received: list[int] = []
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited by new processes
    # Another thread can still receive a signal; its handler would run in the main thread.
    main = threading.current_thread() is threading.main_thread()
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS} if main else {}
    handlers = {signum: handler for signum, handler in handlers.items() if callable(handler)}
    for signum in handlers:
        signal.signal(signum, lambda signum, frame: received.append(signum))
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for signum in received:
            os.kill(os.getpid(), signum)


def _pin(future: "Future[ReadResult | _ReadFile | DeitError]") -> ReadResult | DeitError:
    """Return the batch in pinned memory, from which a GPU can copy while it computes."""
    result = _receive(future.result())
    if isinstance(result, DeitError):
        return result
    return result._replace(pixels=tuple(pixels.pin_memory() for pixels in result.pixels))


def _receive(sent: "ReadResult | _ReadFile | DeitError") -> ReadResult | DeitError:
    if not isinstance(sent, _ReadFile):
        return sent
    content = torch.from_numpy(np.fromfile(sent.file, np.uint8))
    os.unlink(sent.file)
    batch = len(content) // sum(3 * size**2 for size in sent.sizes)
    parts = content.split([batch * 3 * size**2 for size in sent.sizes])
    pixels = tuple(
        part.view(batch, 3, size, size) for part, size in zip(parts, sent.sizes, strict=True)
    )
    return ReadResult(pixels, sent.seconds)


class Reader:
    """Read batches ahead, in order, with worker processes.

    The processes start with the first batch and run until `close` or the end of a `with` block.

    decoders: each returns one tensor per batch. workers: the number of processes; 0: read in this
    process. pin: return batches in pinned memory.
    """

    def __init__(
        self, images: EncodedImages, decoders: tuple[Decoder, ...], *, workers: int, pin: bool
    ) -> None:
        self._task = _DecodeTask(images, decoders)
        self._num_workers, self._pin = workers, pin
        self._workers: _Workers | None = None
        self._largest, self._shared = 0, True  # largest batch [images], and if it fits shared

    def read(self, batches: Iterable[ReadRequest]) -> Iterator[ReadResult]:
        """Yield the batches in order.

        Raises DataError for an unreadable image, SystemFault if an image cannot be read at the
        moment, WorkerLost if a worker was killed.
        """
        for result in self._results(iter(batches)):
            if isinstance(result, DeitError):
                raise type(result)(str(result))  # without the worker's traceback
            yield result

    def close(self) -> None:
        """End the worker processes; the next `read` starts new ones."""
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.close()

    def _can_share(self, batch: int) -> bool:
        """Return whether shared memory can pass batches of `batch` images.

        It must hold all batches that are read ahead and the current one.
        """
        if batch > self._largest:
            batch_bytes = batch * 3 * sum(decoder.size**2 for decoder in self._task.decoders)
            needed = (_AHEAD * self._num_workers + 1) * batch_bytes
            sockets = supports_sockets(get_temp_dir())
            self._largest, self._shared = batch, sockets and fits_shared_memory(needed)
            if not self._shared:
                _warn_of_files(sockets)
        return self._shared

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _results(self, batches: Iterator[ReadRequest]) -> Iterator[ReadResult | DeitError]:
        if self._num_workers == 0:
            for epoch, samples, repeats in batches:
                yield self._task(epoch, samples.numpy(), repeats.numpy())
            return
        if self._workers is None:
            self._workers = _Workers(self._task, self._num_workers, pin=self._pin)
        pending: deque[Future[ReadResult | _ReadFile | DeitError]] = deque()
        while True:
            for request in islice(batches, _AHEAD * self._num_workers - len(pending)):
                shared = self._can_share(len(request.samples))
                pending.append(self._workers.submit(request, shared=shared))
            if not pending:
                return
            yield _result(pending.popleft())


def _result(future: "Future[ReadResult | _ReadFile | DeitError]") -> ReadResult | DeitError:
    try:
        return _receive(future.result())
    except BrokenProcessPool:
        raise WorkerLost(LOST_WORKER) from None
    except RuntimeError as error:
        # A batch in shared memory could not be received.
        if any(text in str(error) for text in ("shared memory", "unable to mmap")):
            raise WorkerLost(LOST_WORKER) from None
        raise
