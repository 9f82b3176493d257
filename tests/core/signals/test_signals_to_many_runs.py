"""Several training processes with workers are stopped: all exit with the code of the signal and
leave nothing behind. All are real processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deit.core import run_folder
from deit.core.parent_process import SAME_SIGNAL_S
from tests.helpers.images import write_image_folder
from tests.helpers.leftovers import remaining_processes
from tests.helpers.processes import ROOT, STUCK_TEACHER, wait_until
from tests.helpers.small_runs import ON_IMAGES

DATA = ("--data.num_workers", "2", "--run.save_every_steps", "1")
TEACHER = """
import torch

def teacher():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3))
"""
TAUGHT = ("--loss", "deit-hard", "--student.name", "deit_micro", "--teacher.allow_near_chance")
GRID = '{"recipe": "folder", "grid": {"optim.lr": [0.001, 0.002]}}'


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """Return a folder with images, a sweep of two runs and a teacher."""
    folder = tmp_path_factory.mktemp("several")
    write_image_folder(folder / "pictures", images_per_class=16)
    (folder / "rates.json").write_text(GRID)
    (folder / "mine.py").write_text(TEACHER)
    return folder


def processes_of(folder: Path) -> list[str]:
    """Return the processes that have this folder in their arguments, or a file in it open."""
    processes = []
    for process in psutil.process_iter():
        try:
            opened = [file.path for file in process.open_files()]
            if any(str(folder) in text for text in (*process.cmdline(), *opened)):
                processes.append(f"{process.pid} {process.status()} {' '.join(process.cmdline())}")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return processes


def stopped(
    command: list[object], out: Path, runs: int, signum: int, *, to_group: bool
) -> tuple[int, str]:
    """Stop a command when `runs` of its runs have a checkpoint; return its code and errors.

    to_group: send the signal to all processes, as Ctrl-C in a terminal does.
    """
    arguments = [str(argument) for argument in command]
    with (out.parent / f"{out.name}.said").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
        try:
            wait_until(lambda: process.poll() is not None or learning(out) == runs)
            assert process.poll() is None, log.seek(0) or log.read()
            assert processes_of(out)
            send = os.killpg if to_group else os.kill
            send(process.pid, signum)
            code = process.wait(timeout=300)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        return code, log.read()


def learning(out: Path) -> int:
    """Return how many runs in a folder have a checkpoint."""
    # Not rglob: checkpoints are created and removed meanwhile.
    return sum(bool(run_folder.list_checkpoints(path)) for path in (out, *out.glob("runs/*")))


SWEEP = ("sweep", "rates.json", "--parallel", "2")
COMPARE = ("compare", "folder", "--parallel", "2")


@pytest.mark.parametrize(
    ("command", "runs", "signum", "to_group"),
    [
        (SWEEP, 2, signal.SIGTERM, False),
        pytest.param(SWEEP, 2, signal.SIGINT, True, marks=pytest.mark.slow),
        pytest.param(SWEEP[:2], 1, signal.SIGTERM, False, marks=pytest.mark.slow),
        pytest.param(COMPARE, 2, signal.SIGINT, True, marks=pytest.mark.slow),
    ],
)
def test_runs_end_with_their_command(
    command, runs, signum, to_group, workspace, tmp_path, monkeypatch
):
    monkeypatch.chdir(workspace)
    out = tmp_path / "out"
    arguments = ("deit", *command, *ON_IMAGES, *DATA, "--data.root", workspace / "pictures")
    if command is COMPARE:  # which needs a teacher
        arguments += (*TAUGHT, "--teacher.source", f"{workspace / 'mine.py'}:teacher")
    arguments += ("--optim.epochs", "100000", "--out", out)
    code, errors = stopped(arguments, out, runs, signum, to_group=to_group)
    assert code == 128 + signum, errors
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("deit: error: ")]
    assert signal.Signals(signum).name in line
    wait_until(lambda: not processes_of(out))


@pytest.mark.fault("A12")
@pytest.mark.slow
def test_stuck_run_ends_at_the_second_signal_to_its_command(workspace, tmp_path):
    """The other run saves and ends at the first signal."""
    (tmp_path / "stuck.py").write_text(STUCK_TEACHER)
    out = tmp_path / "out"
    arguments = (*COMPARE, *ON_IMAGES, *DATA, *TAUGHT, "--data.root", workspace / "pictures")
    arguments += (
        "--teacher.source",
        f"{tmp_path / 'stuck.py'}:teacher",
        "--run.save_every_steps",
        "1",
    )
    arguments += ("--optim.epochs", "100000", "--out", out)
    process = subprocess.Popen(
        [sys.executable, "-m", "deit", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(
            lambda: (
                process.poll() is not None
                or (log_contains(out, "distilled", "stuck") and learning(out))
            )
        )
        process.send_signal(signal.SIGTERM)
        wait_until(
            lambda: process.poll() is not None or log_contains(out, "undistilled", "SIGTERM")
        )
        assert process.poll() is None
        time.sleep(SAME_SIGNAL_S + 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 128 + signal.SIGTERM
        wait_until(lambda: not remaining_processes(process.pid), timeout=60)
    finally:
        for child in remaining_processes(process.pid):
            child.kill()
        process.wait()


def log_contains(out: Path, name: str, text: str) -> bool:
    """Return whether the log of a run of a sweep exists and contains a text."""
    return any(text in log.read_text() for log in out.glob(f"runs/{name}-seed-0-*.log"))


@pytest.mark.parametrize(
    ("signum", "to_group"),
    [(signal.SIGTERM, False), pytest.param(signal.SIGINT, True, marks=pytest.mark.slow)],
)
def test_torchrun_processes_and_their_workers_end(signum, to_group, workspace, tmp_path):
    out = tmp_path / "run"
    arguments = (
        "torch.distributed.run",
        "--nnodes=1",
        "--nproc_per_node=2",
        ROOT / "train_deit.py",
    )
    arguments += ("folder", "--data.root", workspace / "pictures", *ON_IMAGES, *DATA)
    arguments += ("--optim.epochs", "100000", "--out", out)
    code, errors = stopped(arguments, out, 1, signum, to_group=to_group)
    assert code != 0
    (line,) = [line for line in errors.splitlines() if line.startswith("deit: error: ")]
    assert signal.Signals(signum).name in line
    assert "--resume" in line
    wait_until(lambda: not processes_of(out))
