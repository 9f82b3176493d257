"""A call from Python leaves no worker process and no temporary folder."""

import errno
import os
import signal
import tempfile
import threading
import time

import pytest
import torch

from deit.core.errors import StoppedBySignal
from deit.datasets.crops import ReadRequest
from deit.datasets.decode_workers import Reader
from deit.datasets.splits import load_splits
from deit.training.train import train
from tests.helpers.leftovers import child_processes
from tests.helpers.processes import wait_until
from tests.helpers.resume_helpers import stop_at
from tests.helpers.small_runs import image_run_config

pytest.importorskip("sklearn")


@pytest.mark.fault("E19")
def test_call_from_python_leaves_no_worker(image_folder, tmp_path):
    """Neither after a stop nor after an error: a notebook keeps running."""
    config, before = image_run_config(image_folder, 2), child_processes()
    stop_at(config, tmp_path / "stopped", "step:2:term")
    wait_until(lambda: child_processes() == before)
    train(config, tmp_path / "done")
    wait_until(lambda: child_processes() == before)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        stop_at(config, tmp_path / "full", "step:2:full")
    wait_until(lambda: child_processes() == before)


@pytest.mark.fault("E19")
def test_closing_the_reader_ends_a_worker_in_a_batch(image_folder, tmp_path):
    class Stuck:
        size = 4

        def decode(self, images, request):
            (tmp_path / str(os.getpid())).touch()
            time.sleep(1000)

    def raise_stopped(*_):
        raise StoppedBySignal(signal.SIGTERM)

    images = load_splits(image_run_config(image_folder, 1).data).train
    index = torch.zeros(1, dtype=torch.int64)
    before = child_processes()
    with Reader(images, (Stuck(),), num_workers=2, pin=False) as reader:
        batches = reader.read([ReadRequest(0, index, index)] * 50)

        def stop_later():
            try:
                wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
            finally:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

        stopper = threading.Thread(target=stop_later)
        previous = signal.signal(signal.SIGALRM, raise_stopped)
        stopper.start()
        try:
            with pytest.raises(StoppedBySignal):
                next(batches)
        finally:
            stopper.join()
            signal.signal(signal.SIGALRM, previous)
        assert len(child_processes() - before) == 2
    wait_until(lambda: child_processes() == before)


def test_killed_workers_leave_no_temporary_folders(image_folder, monkeypatch, tmp_path):
    """At most that of this process, which it removes when it exits."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    train(image_run_config(image_folder, 2), tmp_path / "run")
    assert len(list(tmp_path.glob("pymp-*"))) <= 1
