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

_PREFETCH_FACTOR = 2  # batches that each worker reads ahead, as in PyTorch's DataLoader
_KILL_TIMEOUT_S = 1.0  # a stalled disk can delay the end of a killed process
_SHARED_MEMORY = Path("/dev/shm")  # holds the batches of worker processes on Linux
_LOST_WORKER_MESSAGE = (
    "data.num_workers: the system killed a worker process, because memory or /dev/shm is full (in "
    "a container, raise it with --shm-size 2g); use fewer data.num_workers or a smaller "
    "optim.batch_size, or data.num_workers 0 for no worker processes"
)


def fits_shared_memory(needed: int) -> bool:
    """Return whether batches of `needed` bytes fit into the shared memory of this machine.

    Each training process of the machine can have two readers, such as those of training and
    evaluation, so twice as many bytes are required per process. A container has 64 MiB by default,
    and the system kills a process that writes beyond the limit.
    """
    required = 2 * needed * processes_on_host()
    try:
        return required <= shutil.disk_usage(_SHARED_MEMORY).free
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
def _warn_about_files(has_sockets: bool) -> None:
    """Warn, once per reason, that batches are passed in files instead of shared memory.

    has_sockets: whether sockets are supported; the shared memory is then too small.
    """
    if has_sockets:
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


def resolve_num_workers(num_workers: int | None) -> int:
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


class _ResultFile(NamedTuple):
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
    epoch: int, samples: np.ndarray, repeats: np.ndarray, folder: str, use_shared_memory: bool
) -> ReadResult | _ResultFile | DeitError:
    """Return a batch in shared memory, or in a file of `folder`.

    A file is used as well if shared memory or open files are exhausted, because other processes
    use them too. The executor's pipe is not used for pixels: after a worker is killed in the middle
    of a batch, the other end of the pipe would wait forever.
    """
    result = _task(epoch, samples, repeats)
    if isinstance(result, DeitError) or (use_shared_memory and _move_to_shared_memory(result)):
        return result
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        for pixels in result.pixels:
            file.write(pixels.numpy().data)
    sizes = tuple(pixels.shape[-1] for pixels in result.pixels)
    return _ResultFile(file.name, sizes, result.seconds)


def _move_to_shared_memory(result: ReadResult) -> bool:
    """Move a batch into shared memory; return whether it fit.

    Pickling would move it as well, but an error there would end the run.
    """
    try:
        for pixels in result.pixels:
            pixels.share_memory_()
    except (RuntimeError, OSError):
        return False
    return True


class _WorkerPool:
    """Worker processes that read batches. They have nothing to save, so `close` kills them."""

    def __init__(self, task: _DecodeTask, num_workers: int, *, pin: bool) -> None:
        self._executor = ProcessPoolExecutor(
            num_workers, initializer=_init_worker, initargs=(task, os.getpid())
        )
        self._pin_thread = ThreadPoolExecutor(1) if pin else None
        # Created and removed by this process; killed workers could not remove theirs.
        self._folder = tempfile.mkdtemp(dir=get_temp_dir())
        self.processes: list[BaseProcess] = []

    def submit(
        self, request: ReadRequest, *, use_shared_memory: bool
    ) -> "Future[ReadResult | _ResultFile | DeitError]":
        """Queue a batch. Raises WorkerLost if a worker was killed.

        use_shared_memory: pass the batch in shared memory, without a copy, if it fits; otherwise it
        is passed in a file.
        """
        # Arrays: a tensor would be passed as shared memory, whose file stays open with it.
        arguments = (request.epoch, request.samples.numpy(), request.repeats.numpy())
        try:
            # The first call starts the processes. A signal must not interrupt their registration.
            with nullcontext() if self.processes else _signals_deferred():
                before = set(multiprocessing.active_children())
                future = self._executor.submit(
                    _decode_in_worker, *arguments, self._folder, use_shared_memory
                )
                for process in set(multiprocessing.active_children()) - before:
                    # After a worker is lost, the executor sends SIGTERM to the others and waits for
                    # them, from Python 3.12 on with the lock that `submit` needs. The workers
                    # ignore SIGTERM, so `submit` would wait forever.
                    process.terminate = process.kill
                    self.processes.append(process)
            return future if self._pin_thread is None else self._pin_thread.submit(_pin, future)
        except BrokenProcessPool:
            raise WorkerLost(_LOST_WORKER_MESSAGE) from None

    def close(self) -> None:
        """Kill the processes, even in the middle of a batch."""
        for process in self.processes:
            process.kill()
        # Batches are not canceled: Python 3.11 prints an error if an executor with canceled batches
        # breaks.
        self._executor.shutdown(wait=False)
        if self._pin_thread is not None:
            self._pin_thread.shutdown(wait=False)
        running = {process.sentinel for process in self.processes}
        end = time.monotonic() + _KILL_TIMEOUT_S
        while running and (remaining := end - time.monotonic()) > 0:
            running.difference_update(multiprocessing.connection.wait(running, remaining))
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """Deliver signals to stop or to save only after this context.

    Processes that start within it inherit the signal mask, which blocks these signals.
    """
    received: list[int] = []
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # The mask is that of this thread. If another thread receives a signal, Python runs the handler
    # in the main thread, so the handlers are replaced as well.
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
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
        for signum in received:
            os.kill(os.getpid(), signum)


def _pin(future: "Future[ReadResult | _ResultFile | DeitError]") -> ReadResult | DeitError:
    """Return the batch in pinned memory, from which a GPU can copy while it computes."""
    result = _with_pixels(future.result())
    if isinstance(result, DeitError):
        return result
    return result._replace(pixels=tuple(pixels.pin_memory() for pixels in result.pixels))


def _with_pixels(result: "ReadResult | _ResultFile | DeitError") -> ReadResult | DeitError:
    """Read the pixels of a batch that was passed in a file, and remove the file."""
    if not isinstance(result, _ResultFile):
        return result
    content = torch.from_numpy(np.fromfile(result.file, np.uint8))
    os.unlink(result.file)
    num_images = len(content) // sum(3 * size**2 for size in result.sizes)
    parts = content.split([num_images * 3 * size**2 for size in result.sizes])
    pixels = tuple(
        part.view(num_images, 3, size, size) for part, size in zip(parts, result.sizes, strict=True)
    )
    return ReadResult(pixels, result.seconds)


class Reader:
    """Read batches ahead, in order, with worker processes.

    The processes start with the first batch and run until `close` or the end of a `with` block.

    decoders: each returns one tensor per batch. num_workers: the number of processes; 0: read in
    this process. pin: return batches in pinned memory.
    """

    def __init__(
        self, images: EncodedImages, decoders: tuple[Decoder, ...], *, num_workers: int, pin: bool
    ) -> None:
        self._task = _DecodeTask(images, decoders)
        self._num_workers, self._pin = num_workers, pin
        self._pool: _WorkerPool | None = None
        self._largest_batch = 0  # in images
        self._largest_fits = True  # into shared memory

    def read(self, requests: Iterable[ReadRequest]) -> Iterator[ReadResult]:
        """Yield the requested batches in order.

        Raises DataError for an unreadable image, SystemFault if an image cannot be read at the
        moment, WorkerLost if a worker was killed.
        """
        for result in self._batches(iter(requests)):
            if isinstance(result, DeitError):
                raise type(result)(str(result))  # without the worker's traceback
            yield result

    def close(self) -> None:
        """End the worker processes; the next `read` starts new ones."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def _can_share(self, num_images: int) -> bool:
        """Return whether shared memory can pass batches of this size.

        It must hold all batches that are read ahead and the current one.
        """
        if num_images > self._largest_batch:
            batch_bytes = num_images * 3 * sum(decoder.size**2 for decoder in self._task.decoders)
            needed = (_PREFETCH_FACTOR * self._num_workers + 1) * batch_bytes
            has_sockets = supports_sockets(get_temp_dir())
            self._largest_batch = num_images
            self._largest_fits = has_sockets and fits_shared_memory(needed)
            if not self._largest_fits:
                _warn_about_files(has_sockets)
        return self._largest_fits

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _batches(self, requests: Iterator[ReadRequest]) -> Iterator[ReadResult | DeitError]:
        if self._num_workers == 0:
            for epoch, samples, repeats in requests:
                yield self._task(epoch, samples.numpy(), repeats.numpy())
            return
        if self._pool is None:
            self._pool = _WorkerPool(self._task, self._num_workers, pin=self._pin)
        pending: deque[Future[ReadResult | _ResultFile | DeitError]] = deque()
        while True:
            for request in islice(requests, _PREFETCH_FACTOR * self._num_workers - len(pending)):
                can_share = self._can_share(len(request.samples))
                pending.append(self._pool.submit(request, use_shared_memory=can_share))
            if not pending:
                return
            yield _wait_for(pending.popleft())


def _wait_for(future: "Future[ReadResult | _ResultFile | DeitError]") -> ReadResult | DeitError:
    """Return a batch when it is read. Raises WorkerLost if a worker was killed."""
    try:
        return _with_pixels(future.result())  # with pinning, `_pin` has read them already
    except BrokenProcessPool:
        raise WorkerLost(_LOST_WORKER_MESSAGE) from None
    except RuntimeError as error:
        # A batch in shared memory could not be received.
        if any(text in str(error) for text in ("shared memory", "unable to mmap")):
            raise WorkerLost(_LOST_WORKER_MESSAGE) from None
        raise
