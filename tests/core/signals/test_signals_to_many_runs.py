"""Several training processes, each with worker processes, that are stopped: every one ends, with
the code of the signal, and nothing of them stays. All of them are real processes."""

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
from tests.helpers.leftovers import left
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
def place(tmp_path_factory) -> Path:
    """A folder with pictures, a sweep of two runs and a teacher."""
    folder = tmp_path_factory.mktemp("several")
    write_image_folder(folder / "pictures", number=16)
    (folder / "rates.json").write_text(GRID)
    (folder / "mine.py").write_text(TEACHER)
    return folder


def those_of(folder: Path) -> list[str]:
    """The processes that were started with this folder as an argument, or that have a file open
    there."""
    found = []
    for process in psutil.process_iter():
        try:
            opened = [one.path for one in process.open_files()]
            if any(str(folder) in text for text in (*process.cmdline(), *opened)):
                found.append(f"{process.pid} {process.status()} {' '.join(process.cmdline())}")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def stopped(
    command: list[object], out: Path, runs: int, number: int, *, everybody: bool
) -> tuple[int, str]:
    """The code of a command, and what it wrote to standard error, that is stopped when so many runs
    have learnt something. everybody: the terminal's Ctrl-C, which all get."""
    arguments = [str(one) for one in command]
    with (out.parent / f"{out.name}.said").open("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
        )
        try:
            wait_until(lambda: process.poll() is not None or learning(out) == runs)
            assert process.poll() is None, said.seek(0) or said.read()
            assert those_of(out)
            send = os.killpg if everybody else os.kill
            send(process.pid, number)
            code = process.wait(timeout=300)
        finally:
            process.kill()
            process.wait()
        said.seek(0)
        return code, said.read()


def learning(out: Path) -> int:
    """How many runs in a folder have a checkpoint."""
    # Not rglob: checkpoints come and go meanwhile.
    return sum(bool(run_folder.list_checkpoints(one)) for one in (out, *out.glob("runs/*")))


AT_ONCE = ("sweep", "rates.json", "--parallel", "2")
COMPARED = ("compare", "folder", "--parallel", "2")


@pytest.mark.parametrize(
    ("command", "runs", "number", "everybody"),
    [
        (AT_ONCE, 2, signal.SIGTERM, False),
        pytest.param(AT_ONCE, 2, signal.SIGINT, True, marks=pytest.mark.slow),
        pytest.param(AT_ONCE[:2], 1, signal.SIGTERM, False, marks=pytest.mark.slow),
        pytest.param(COMPARED, 2, signal.SIGINT, True, marks=pytest.mark.slow),
    ],
)
def test_runs_of_one_command_end_with_it(
    command, runs, number, everybody, place, tmp_path, monkeypatch
):
    monkeypatch.chdir(place)
    out = tmp_path / "out"
    arguments = ("deit", *command, *ON_IMAGES, *DATA, "--data.root", place / "pictures")
    if command is COMPARED:  # which asks what a teacher is worth
        arguments += (*TAUGHT, "--teacher.source", f"{place / 'mine.py'}:teacher")
    arguments += ("--optim.epochs", "100000", "--out", out)
    code, said = stopped(arguments, out, runs, number, everybody=everybody)
    assert code == 128 + number, said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("deit: error: ")]
    assert signal.Signals(number).name in line
    wait_until(lambda: not those_of(out))


@pytest.mark.fault("A12")
def test_a_run_that_is_stuck_ends_with_the_second_signal_to_its_command(place, tmp_path):
    """The other one ends with the first signal, saved."""
    (tmp_path / "stuck.py").write_text(STUCK_TEACHER)
    out = tmp_path / "out"
    arguments = (*COMPARED, *ON_IMAGES, *DATA, *TAUGHT, "--data.root", place / "pictures")
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
                process.poll() is not None or (says(out, "distilled", "stuck") and learning(out))
            )
        )
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: process.poll() is not None or says(out, "undistilled", "SIGTERM"))
        assert process.poll() is None
        time.sleep(SAME_SIGNAL_S + 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 128 + signal.SIGTERM
        wait_until(lambda: not left(process.pid), timeout=60)
    finally:
        for one in left(process.pid):
            one.kill()
        process.wait()


def says(out: Path, name: str, arguments: str) -> bool:
    """Whether the log of a run of a sweep is there and holds these words."""
    return any(arguments in log.read_text() for log in out.glob(f"runs/{name}-seed-0-*.log"))


@pytest.mark.parametrize(
    ("number", "everybody"),
    [(signal.SIGTERM, False), pytest.param(signal.SIGINT, True, marks=pytest.mark.slow)],
)
def test_processes_of_torchrun_end_with_their_workers(number, everybody, place, tmp_path):
    out = tmp_path / "run"
    arguments = (
        "torch.distributed.run",
        "--nnodes=1",
        "--nproc_per_node=2",
        ROOT / "train_deit.py",
    )
    arguments += ("folder", "--data.root", place / "pictures", *ON_IMAGES, *DATA)
    arguments += ("--optim.epochs", "100000", "--out", out)
    code, said = stopped(arguments, out, 1, number, everybody=everybody)
    assert code != 0
    (line,) = [line for line in said.splitlines() if line.startswith("deit: error: ")]
    assert signal.Signals(number).name in line
    assert "--resume" in line
    wait_until(lambda: not those_of(out))
