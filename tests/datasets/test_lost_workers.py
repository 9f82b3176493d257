"""Workers that decode images: open files, damaged images, killed workers, number of workers."""

import dataclasses
import errno
import faulthandler
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from deit.config.schema import Config
from deit.config.sections.data import DataConfig
from deit.config.sections.run import RunConfig
from deit.config.sections.views import ViewsConfig
from deit.core.errors import DataError, SystemFault, WorkerLost
from deit.datasets.crops import CenterSquare, ReadRequest
from deit.datasets.decode_workers import Reader, resolve_num_workers
from deit.datasets.images import InMemoryImages
from deit.datasets.splits import load_splits
from deit.distill.inference import predict_split
from tests.helpers.errors import raises
from tests.helpers.images import PLAIN, SIDE, loader, write_image_folder


def test_open_files_do_not_grow_with_epoch_length(file_images):
    # Tensors that wait in a queue are shared memory, and each holds a file open.
    reader = Reader(file_images, (CenterSquare(4),), num_workers=1, pin=False)
    item = torch.zeros(1, dtype=torch.int64)
    batches = reader.read([ReadRequest(0, item.clone(), item.clone()) for _ in range(120)])
    opened = [len(os.listdir("/proc/self/fd")) for _ in batches]
    assert len(opened) == 120
    # Those that wait are a few, how many by the moment; kept open they would be one a batch.
    assert max(opened) - opened[0] < 60


@pytest.mark.fault("C24")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("views", [PLAIN, ViewsConfig()], ids=["cropped", "whole"])
def test_damaged_file_raises_in_one_line(workers, views, tmp_path):
    files_root = write_image_folder(tmp_path / "images", images_per_class=8)
    data = DataConfig(source="folder", root=str(files_root), storage="files", image_size=SIDE)
    train = load_splits(data).train
    broken, count = Path(train.name(7)), len(train.labels)
    train_loader = loader(train, batch_size=count, views=views, workers=workers)
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    # One line; and nothing here holds the error, whose traceback would keep the workers.
    with raises(DataError, str(broken)):
        list(train_loader.epoch(0))
    broken.unlink()
    with raises(DataError, str(broken)):
        list(train_loader.epoch(0))
    broken.write_bytes(content)
    assert len(next(train_loader.epoch(1)).images) == count  # and the workers continue


@pytest.mark.parametrize("workers", [0, 1])
def test_machine_fault_raises_system_fault(workers, file_images, monkeypatch):
    """It can be transient, and a failed run can be retried."""

    def failing(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", failing)
    request = [ReadRequest(0, torch.arange(2), torch.zeros(2, dtype=torch.int64))]
    with (
        Reader(file_images, (CenterSquare(4),), num_workers=workers, pin=False) as reader,
        raises(SystemFault, "Input/output error") as raised,
    ):
        list(reader.read(request))
    assert re.fullmatch(r".*\.(jpg|png): .*", str(raised.value))


def flattened_views(images, config):
    """Return the pixels of all views of a split in order, by a network that only flattens."""
    accelerator = Accelerator(cpu=True)
    return predict_split(
        accelerator, torch.nn.Flatten(), images, config.evaluation, "reading"
    ).class_logits


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_from_memory_and_files_is_equal(workers, files_root):
    data = DataConfig(source="folder", root=str(files_root), image_size=SIDE, num_workers=workers)
    result = {}
    for storage in ("memory", "files"):
        config = Config(
            data=dataclasses.replace(data, storage=storage),
            views=ViewsConfig(eval_crop_pct=10 / SIDE),
            run=RunConfig(eval_batch_size=4, device="cpu"),
        )
        config = dataclasses.replace(
            config, student=dataclasses.replace(config.student, image_size=10)
        )
        splits = load_splits(config.data)
        assert isinstance(splits.train, InMemoryImages) == (storage == "memory")
        result[storage] = flattened_views(splits.test, config)
        assert len(result[storage]) == len(splits.test.labels) == 12
    # Whole images, in order and once each: no two of them are equal.
    assert torch.equal(result["files"], result["memory"])
    assert len(result["files"].unique(dim=0)) == 12


def test_num_workers_is_share_of_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert resolve_num_workers(None) == 8
    assert resolve_num_workers(0) == 0
    assert resolve_num_workers(20) == 20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert resolve_num_workers(None) == 3
    assert resolve_num_workers(5) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert resolve_num_workers(None) == 1


def test_every_stage_is_measured(file_images):
    train_loader = loader(file_images, accumulate=2, workers=1)
    list(train_loader.epoch(0))
    assert train_loader.stages.images == {"views": 32, "reading": 32, "waiting": 32}
    assert train_loader.stages.rates().keys() == {"views", "reading", "waiting"}
    assert min(train_loader.stages.rates().values()) > 0


@pytest.mark.fault("A26")
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGBUS])  # no memory; a full /dev/shm
def test_killed_worker_raises_system_fault(signum, file_images):
    class Deadly:
        size = 4

        def decode(self, images, request):
            faulthandler.disable()  # pytest's prints the stack of the worker
            os.kill(os.getpid(), signum)

    requests = [ReadRequest(0, torch.arange(2), torch.zeros(2, dtype=torch.int64))]
    with raises(SystemFault, "data.num_workers"):
        list(Reader(file_images, (Deadly(),), num_workers=1, pin=False).read(requests))


def test_lost_worker_does_not_wait_for_busy_worker(file_images, tmp_path):
    """Python's pool holds a lock until the other workers have ended; the next batch needs it."""

    class Busy:
        size = 4

        def decode(self, images, request):
            try:
                (tmp_path / "first").touch(exist_ok=False)
            except FileExistsError:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(10000)

    requests = [ReadRequest(0, torch.arange(2), torch.zeros(2, dtype=torch.int64))] * 2
    with Reader(file_images, (Busy(),), num_workers=2, pin=False) as reader:
        for _ in range(2):
            with pytest.raises(WorkerLost):
                next(reader.read(requests))
