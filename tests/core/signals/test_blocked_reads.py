"""Commands blocked on reading images, as from a lost server, stop at a signal."""

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
from deit.datasets.sources.image_stores import FolderStore
from tests.helpers.images import write_image_folder
from tests.helpers.leftovers import assert_ends, child_processes
from tests.helpers.processes import wait_until
from tests.helpers.small_runs import ON_IMAGES, image_run_arguments

pytest.importorskip("sklearn")


def replace_by_pipe(path: Path) -> None:
    """Replace a file by a pipe without a writer: reading it blocks, as with a lost server."""
    path.unlink()
    os.mkfifo(path)


@pytest.mark.fault("A11")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_run_blocked_on_images_stops_with_a_checkpoint(workers, signum, command_server, tmp_path):
    image_folder, out = (
        write_image_folder(tmp_path / "pictures", images_per_class=8),
        tmp_path / "run",
    )
    given = (*image_run_arguments(image_folder, out, workers), "--optim.epochs", "100000")
    running = command_server.start(*given, as_program=True)
    metrics = out / run_log.METRICS
    wait_until(lambda: metrics.is_file() and run_log.read(metrics))
    for path in sorted(image_folder.rglob("*.*")):
        replace_by_pipe(path)
    wait_until(lambda: is_idle(running.pid))
    running.signal(signum)
    done = assert_ends(running, 128 + signum)
    assert signal.Signals(signum).name in done.err
    assert "--resume" in done.err
    rows = run_log.read(metrics)
    assert run_folder.checkpoint_step(run_folder.latest_checkpoint(out)) >= rows[-1]["step"]


def is_idle(pid: int) -> bool:
    """Return whether a process and its children use no CPU time for a while."""
    parent = psutil.Process(pid)
    processes = [parent, *parent.children(recursive=True)]
    before = [sum(process.cpu_times()[:2]) for process in processes]
    time.sleep(0.5)
    return before == [sum(process.cpu_times()[:2]) for process in processes]


@pytest.fixture
def never_read(monkeypatch):
    """Block all reads of images until the end of the test, and send a signal after a second."""
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
    """Return finished runs by their number of workers."""
    runs_by_workers = {}
    for workers in (0, 2):
        out = tmp_path_factory.mktemp("runs") / f"workers-{workers}"
        assert (
            command_server.run(
                *image_run_arguments(image_folder, out, workers), "--optim.epochs", "1"
            ).code
            == 0
        )
        runs_by_workers[workers] = out
    return runs_by_workers


@pytest.mark.fault("A11")
@pytest.mark.parametrize("command", ["evaluate", "check-data"])
@pytest.mark.parametrize("workers", [0, 2])
def test_command_blocked_on_images_stops(command, workers, runs, image_folder, never_read, capfd):
    before = child_processes()
    given = {"evaluate": runs[workers], "check-data": image_folder}
    assert run_command(command, [str(given[command])], f"deit {command}") == 130
    assert "SIGINT" in capfd.readouterr().err
    wait_until(lambda: child_processes() == before)


def test_blocked_decoding_stops(image_folder, never_read, tmp_path, capfd):
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
def test_two_processes_blocked_on_images_stop(command_server, tmp_path):
    image_folder, out = (
        write_image_folder(tmp_path / "pictures", images_per_class=8),
        tmp_path / "run",
    )
    given = (*image_run_arguments(image_folder, out, 1), "--optim.epochs", "100000")
    both = command_server.start_processes(*given, as_program=True)
    wait_until(lambda: run_folder.list_checkpoints(out))
    for path in image_folder.rglob("*.*"):
        replace_by_pipe(path)
    wait_until(lambda: all(is_idle(process.pid) for process in both))
    for process in both:
        process.signal(signal.SIGTERM)
    for process in both:
        assert_ends(process, 143)
