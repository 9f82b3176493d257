"""Encoded images: the same views with any number of workers, processes and epochs."""

import dataclasses
import multiprocessing
import os
import re
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from deit.config.sections.optim import OptimConfig
from deit.config.sections.views import ViewsConfig
from deit.core.errors import WorkerLost
from deit.core.rng import Keys
from deit.datasets import decode_workers
from deit.datasets.crops import CenterSquare, ReadRequest
from deit.datasets.decode_workers import Reader
from deit.datasets.decoding import decode_square, open_image
from deit.datasets.images import InMemoryImages
from deit.datasets.loader import TrainLoader
from deit.datasets.views import sample_resized_crop
from tests.helpers.errors import raises
from tests.helpers.images import (
    CHANNEL_STATS,
    PLAIN,
    SIDE,
    joined,
    loader,
    write_image_folder,
)
from tests.helpers.processes import run_python


def global_epoch(images, num_processes=1, accumulate=1, epoch=3, **settings):
    """Return the global batches of an epoch in order, each field of a batch as one tensor."""
    parts = [
        list(loader(images, process, num_processes, accumulate, **settings).epoch(epoch))
        for process in range(num_processes)
    ]
    blocks = [block for blocks in zip(*parts) for block in blocks]
    return joined(blocks)


def same(actual, reference):
    """Return whether all fields of the batches are bit-equal."""
    return [torch.equal(*fields) for fields in zip(actual, reference)] == [True] * 5


@pytest.fixture(scope="module")
def expected(file_images):
    """Two epochs that the training process reads itself."""
    return {epoch: global_epoch(file_images, epoch=epoch) for epoch in (0, 1)}


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_over_epochs_equal_reading_in_process(workers, file_images, expected):
    train_loader = loader(file_images, workers=workers)
    for epoch in (0, 1, 0):
        result = joined(train_loader.epoch(epoch))
        assert result[0].shape == (32, 3, SIDE, SIDE)
        assert same(result, expected[epoch])
    assert not torch.equal(expected[0][0], expected[1][0])


class Usage(NamedTuple):
    """The result of shutil.disk_usage."""

    free: int


def test_small_shared_memory_passes_batches_in_files(file_images, expected, monkeypatch, capsys):
    decode_workers._warn_about_files.cache_clear()
    requested = []

    def usage(path):
        requested.append(str(path))
        return Usage(64)

    monkeypatch.setattr(decode_workers.shutil, "disk_usage", usage)
    monkeypatch.setattr(decode_workers, "supports_sockets", lambda folder: True)
    train_loader = loader(file_images, workers=2)
    assert same(joined(train_loader.epoch(1)), expected[1])
    assert set(requested) == {"/dev/shm"}
    assert len(re.findall(r"/dev/shm\b.* 0 MiB", capsys.readouterr().err)) == 1


REFUSALS = (
    "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)",
    "unable to open shared memory object </torch_1_2_3> in read-write mode: Too many open files",
    "unable to mmap 432 bytes from file </torch_1_2_3>: Cannot allocate memory (12)",
)


@pytest.mark.parametrize("printed", REFUSALS)
def test_full_shared_memory_passes_batch_in_file(printed, file_images, expected, monkeypatch):
    """Another process can fill the shared memory at any time."""

    def refusing(tensor):
        raise RuntimeError(printed)

    monkeypatch.setattr(torch.Tensor, "share_memory_", refusing)
    assert same(joined(loader(file_images, workers=2).epoch(1)), expected[1])
    task = decode_workers._DecodeTask(file_images, (CenterSquare(4), CenterSquare(5)))
    monkeypatch.setattr(decode_workers, "_task", task, raising=False)
    request = (0, np.arange(3), np.zeros(3, np.int64))
    with TemporaryDirectory() as folder:
        output = decode_workers._decode_in_worker(*request, folder, True)
        assert output.file.startswith(folder)
        result = decode_workers._with_pixels(output)
        assert os.listdir(folder) == []
    assert all(map(torch.equal, result.pixels, task(*request).pixels))


@pytest.mark.parametrize("output", REFUSALS)
def test_shared_memory_error_is_lost_worker(output):
    """It is not reported as out of memory, although the messages are similar."""
    future = Future()
    future.set_exception(RuntimeError(output))
    with raises(WorkerLost, "data.num_workers"):
        decode_workers._wait_for(future)
    other = Future()
    other.set_exception(RuntimeError("a mistake in our own code"))
    with pytest.raises(RuntimeError, match="a mistake in our own code"):
        decode_workers._wait_for(other)


def test_unsupported_sockets_pass_batches_in_files(
    file_images, expected, tmp_path, monkeypatch, capsys
):
    """The path of a socket is limited to 107 bytes, and shared memory is passed by a socket."""
    decode_workers._warn_about_files.cache_clear()
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", str(folder))
    assert same(joined(loader(file_images, workers=2).epoch(1)), expected[1])
    assert capsys.readouterr().err.count("TMPDIR") == 1
    with TemporaryDirectory(dir="/tmp") as short:
        assert decode_workers.supports_sockets(short)
        assert os.listdir(short) == []


@pytest.mark.parametrize("shared", [True, False])
def test_killed_worker_raises(shared, file_images, monkeypatch):
    """Also while its batch is being read."""
    monkeypatch.setattr(decode_workers, "fits_shared_memory", lambda needed: shared)
    request = ReadRequest(0, torch.arange(8), torch.zeros(8, dtype=torch.int64))
    with Reader(file_images, (CenterSquare(256),), num_workers=2, pin=False) as reader:
        batches = reader.read([request] * 100_000)
        next(batches)
        folder = Path(reader._pool._folder)
        reader._pool.processes[0].kill()
        with raises(WorkerLost, "data.num_workers"):
            list(batches)
        assert folder.is_dir()
    assert not folder.exists()


PROGRAM = """
import sys
import torch
from deit.datasets import crops, decode_workers as reading
from tests.helpers.images import images_at

reading.fits_shared_memory = lambda needed: False
wanted = crops.ReadRequest(0, torch.arange(8), torch.zeros(8, dtype=torch.int64))
images, decoders = images_at(sys.argv[1]), (crops.CenterSquare(512),)
reader = reading.Reader(images, decoders, num_workers=2, pin=False)
batches = reader.read([wanted] * 1000)
for _ in range(4):
    next(batches)
reader.close()
print("done")
"""


def test_program_exits_after_reader_is_closed(tmp_path):
    """A notebook has no command line that ends the workers."""
    write_image_folder(tmp_path / "pictures", images_per_class=16)
    done = run_python(PROGRAM, tmp_path / "pictures")
    assert (done.code, done.out.splitlines()[-1:]) == (0, ["done"]), done.err


def test_signals_are_deferred_until_workers_started():
    """In whichever thread the system delivers them."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: came.append(signum))
    other = threading.Event()
    threading.Thread(target=other.wait, daemon=True).start()
    try:
        with decode_workers._signals_deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            assert came == []
        assert came == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
        other.set()


def test_required_shared_memory_counts_batches_ahead(file_images, monkeypatch):
    monkeypatch.setattr(decode_workers, "supports_sockets", lambda folder: True)
    needed = (2 * 2 + 1) * 6 * 3 * (4**2 + 5**2)  # read ahead and in use, of 6 images, two squares
    for free, fits in ((2 * needed, True), (2 * needed - 1, False)):
        monkeypatch.setattr(
            decode_workers.shutil, "disk_usage", lambda path, free=free: Usage(free)
        )
        reader = Reader(file_images, (CenterSquare(4), CenterSquare(5)), num_workers=2, pin=False)
        assert reader._can_share(6) == fits
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert not decode_workers.fits_shared_memory(needed)

    def missing(path):
        raise FileNotFoundError

    monkeypatch.setattr(decode_workers.shutil, "disk_usage", missing)
    assert decode_workers.fits_shared_memory(2**50)


@pytest.mark.parametrize(
    ("num_processes", "accumulate", "workers"),
    [(1, 2, 1), (2, 1, 0), (2, 1, 1), (2, 4, 0), (4, 1, 0), (4, 2, 1)],
)
def test_encoded_batches_do_not_depend_on_processes(
    num_processes, accumulate, workers, file_images, expected
):
    result = global_epoch(file_images, num_processes, accumulate, epoch=1, workers=workers)
    assert same(result, expected[1])


def test_random_crop_equals_pillow_crop_of_its_key(file_images):
    views = dataclasses.replace(PLAIN, aug_repeats=2)
    train_loader = TrainLoader(
        file_images,
        3,
        views=views,
        optim=OptimConfig(batch_size=16),
        student_size=SIDE,
        channel_stats=CHANNEL_STATS,
        seed=9,
        num_workers=1,
    )
    seen = set()
    for batch in train_loader.epoch(4):
        assert torch.equal(batch.sample_ids[:8], batch.sample_ids[8:])
        assert (batch.images[:8] != batch.images[8:]).flatten(1).any(dim=1).all()
        for row, sample in enumerate(batch.sample_ids.tolist()):
            image = open_image(file_images.read(sample), file_images.name(sample))
            keys = Keys(9, 4, torch.tensor([sample]), torch.tensor([row // 8]))
            box = sample_resized_crop(
                keys, image.height, image.width, scale=(0.2, 1.0), ratio=views.crop_ratio
            )
            top, left, height, width = box[0].tolist()
            cut = image.crop((left, top, left + width, top + height))
            cut = np.array(cut.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
            levels = (batch.images[row] * 255).round().to(torch.uint8).permute(1, 2, 0)
            assert np.array_equal(levels.numpy(), cut)
            seen.add((height, width))
    assert len(seen) > 16


@pytest.mark.parametrize("crop", ["none", "padded"])
def test_other_crops_are_taken_from_center_square(crop, file_images):
    views = ViewsConfig(crop=crop, crop_padding=2, mixup_alpha=0.8)
    squares = InMemoryImages(
        torch.stack(
            [
                decode_square(file_images.read(i), file_images.name(i), 16)
                for i in range(len(file_images.labels))
            ]
        ),
        file_images.labels,
    )
    reference = global_epoch(squares, views=views)
    assert same(global_epoch(file_images, views=views, workers=1), reference)


def test_abandoned_epoch_leaves_no_files_or_processes(file_images, expected):
    train_loader = loader(file_images, accumulate=2, workers=2)
    for _ in range(2):
        epoch = train_loader.epoch(0)
        next(epoch)
        del epoch
        result = joined(train_loader.epoch(1))
        assert same(result, expected[1])


def test_workers_do_not_use_global_random_state(file_images):
    before = torch.random.get_rng_state()
    first = global_epoch(file_images, workers=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(77)
    assert same(global_epoch(file_images, workers=1), first)
