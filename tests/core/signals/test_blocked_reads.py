"""Commands that wait forever for their images, as for a lost server, stop at a signal."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from deit.cli import run_command
from deit.core import run_folder, run_log
from deit.core.errors import DataError
from deit.datasets.stores import FolderStore
from tests.helpers.images import write_image_folder
from tests.helpers.leftovers import assert_ends, child_processes
from tests.helpers.processes import wait_until
from tests.helpers.small_runs import ON_IMAGES, image_run_arguments

pytest.importorskip("sklearn")


def nobody_writes(path: Path) -> None:
    """Put a pipe into the place of a file: who reads it waits for ever, as for a lost server."""
    path.unlink()
    os.mkfifo(path)


@pytest.mark.fault("A11")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_waits_for_images_for_ever_stops_with_a_checkpoint(
    workers, number, command_server, tmp_path
):
    image_folder, out = write_image_folder(tmp_path / "pictures", number=8), tmp_path / "run"
    given = (*image_run_arguments(image_folder, out, workers), "--optim.epochs", "100000")
    running = command_server.start(*given, as_program=True)
    metrics = out / run_log.METRICS
    wait_until(lambda: metrics.is_file() and run_log.read(metrics))
    for path in sorted(image_folder.rglob("*.*")):
        nobody_writes(path)
    wait_until(lambda: waits(running.pid))
    running.signal(number)
    done = assert_ends(running, 128 + number)
    assert signal.Signals(number).name in done.err
    assert "--resume" in done.err
    rows = run_log.read(metrics)
    assert run_folder.checkpoint_step(run_folder.latest_checkpoint(out)) >= rows[-1]["step"]


def waits(pid: int) -> bool:
    """Whether a process and those it has started use no processor for a while."""
    process = psutil.Process(pid)
    everyone = [process, *process.children(recursive=True)]
    before = [sum(one.cpu_times()[:2]) for one in everyone]
    time.sleep(0.5)
    return before == [sum(one.cpu_times()[:2]) for one in everyone]


@pytest.fixture
def never_read(monkeypatch):
    """No image is ever read, as from a lost server, until the test is over; and a signal comes."""
    over = threading.Event()

    def wait(store, position):
        over.wait()
        raise DataError("the test is over")

    monkeypatch.setattr(FolderStore, "read", wait)
    alarm = threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT))
    alarm.start()
    yield
    over.set()
    alarm.cancel()


@pytest.fixture(scope="module")
def runs(command_server, image_folder, tmp_path_factory) -> dict[int, Path]:
    """A finished run that is evaluated with this number of workers."""
    found = {}
    for workers in (0, 2):
        out = tmp_path_factory.mktemp("runs") / f"workers-{workers}"
        assert (
            command_server.run(
                *image_run_arguments(image_folder, out, workers), "--optim.epochs", "1"
            ).code
            == 0
        )
        found[workers] = out
    return found


@pytest.mark.fault("A11")
@pytest.mark.parametrize("command", ["evaluate", "check-data"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_command_that_waits_for_images_for_ever_stops(
    command, workers, runs, image_folder, never_read, capfd
):
    before = child_processes()
    given = {"evaluate": runs[workers], "check-data": image_folder}
    assert run_command(command, [str(given[command])], f"deit {command}") == 130
    assert "SIGINT" in capfd.readouterr().err
    wait_until(lambda: child_processes() == before)


def test_a_decoding_that_waits_for_ever_stops(image_folder, never_read, tmp_path, capfd):
    given = [
        "folder",
        "--data.root",
        str(image_folder),
        "--out",
        str(tmp_path / "run"),
        *ON_IMAGES,
    ]
    code = run_command("train", [*given, "--data.storage", "memory"], "deit train")
    assert code == 130, capfd.readouterr().err


@pytest.mark.fault("E5")
def test_of_two_processes_neither_waits_for_images_for_ever(command_server, tmp_path):
    image_folder, out = write_image_folder(tmp_path / "pictures", number=8), tmp_path / "run"
    given = (*image_run_arguments(image_folder, out, 1), "--optim.epochs", "100000")
    both = command_server.start_processes(*given, as_program=True)
    wait_until(lambda: run_folder.list_checkpoints(out))
    for path in image_folder.rglob("*.*"):
        nobody_writes(path)
    wait_until(lambda: all(waits(one.pid) for one in both))
    for one in both:
        one.signal(signal.SIGTERM)
    for one in both:
        assert_ends(one, 143)
