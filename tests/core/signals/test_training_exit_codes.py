"""Training exits with the right code and leaves no process, with and without workers."""

import signal

import pytest

from deit.core import fault_injection, run_folder
from tests.helpers.leftovers import assert_ends
from tests.helpers.processes import wait_until
from tests.helpers.small_runs import image_run_arguments

pytest.importorskip("sklearn")

CODES = {"int": 130, "term": 143, "hup": 129, "memory": 5, "kill": -signal.SIGKILL, "nan": 6}


@pytest.mark.fault("A15")
@pytest.mark.parametrize(
    ("workers", "fault"),
    [
        *((0, fault) for fault in ("step:3:int", "evaluation:2:term")),
        *((1, fault) for fault in ("step:3:int", "evaluation:2:term")),
        *((2, f"step:3:{action}") for action in ("int", "term", "hup", "memory", "kill")),
        *((2, fault) for fault in ("evaluation:2:int", "loss:0:nan", "optimizer:1:term")),
    ],
)
def test_stopped_training_exits_with_its_code_and_leaves_no_process(
    workers, fault, command_server, image_folder, tmp_path
):
    given = image_run_arguments(image_folder, tmp_path / "run", workers)
    assert_ends(
        command_server.start(*given, as_program=True, DEIT_FAULT=fault), CODES[fault.split(":")[2]]
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(
    "point", sorted(set(fault_injection.POINTS) - {"teacher", "targets", "fit"})
)
def test_training_stops_at_every_fault_point(
    point, workers, command_server, image_folder, tmp_path
):
    """Those of stored targets and of run.auto_micro_batch have their own tests."""
    given = image_run_arguments(image_folder, tmp_path / "run", workers)
    more = ("--optim.ema_epochs", "1", "--run.save_every_steps", "2")
    fault = f"{point}:1:term" + (",loss:2:nan" if point == "nonfinite_steps" else "")
    assert_ends(command_server.start(*given, *more, as_program=True, DEIT_FAULT=fault), 143)
    assert command_server.run(*given, *more).code == 0


def test_full_disk_exits_with_code_5(command_server, image_folder, tmp_path):
    given = image_run_arguments(image_folder, tmp_path / "run", 2)
    done = assert_ends(command_server.start(*given, as_program=True, DEIT_FAULT="step:3:full"), 5)
    assert "No space left on device" in done.err
    assert "--debug" in done.err


def test_finished_training_exits_without_delay(command_server, image_folder, tmp_path):
    assert_ends(
        command_server.start(
            *image_run_arguments(image_folder, tmp_path / "run", 2), as_program=True
        ),
        0,
    )


@pytest.mark.fault("A11")
@pytest.mark.parametrize("workers", [0, 2])
def test_writing_targets_stops_between_and_within_blocks(
    workers, command_server, image_folder, tmp_path
):
    teacher = tmp_path / "teacher"
    given = image_run_arguments(image_folder, teacher, 0)
    assert command_server.run(*given, "--optim.epochs", "1").code == 0
    write = ("targets", "write", *given[1:-3], "--data.num_workers", workers)
    write += (
        "--loss",
        "deit-hard",
        "--teacher.source",
        teacher,
        "--teacher.allow_near_chance",
    )
    write += ("--student.name", "deit_micro", "--out", tmp_path / "store")
    assert_ends(command_server.start(*write, as_program=True, DEIT_FAULT="teacher:2:int"), 130)
    assert_ends(command_server.start(*write, as_program=True), 0)


def test_two_processes_with_workers_stop_together(command_server, image_folder, tmp_path):
    given = (*image_run_arguments(image_folder, tmp_path / "run", 2), "--optim.epochs", "100000")
    both = command_server.start_processes(*given, as_program=True)
    wait_until(lambda: run_folder.list_checkpoints(tmp_path / "run"))
    for process in both:
        process.signal(signal.SIGTERM)
    for process in both:
        assert_ends(process, 143)


@pytest.mark.fault("A15")
def test_workers_end_when_their_process_is_killed(command_server, image_folder, tmp_path):
    given = (*image_run_arguments(image_folder, tmp_path / "run", 2), "--optim.epochs", "100000")
    running = command_server.start(*given, as_program=True)
    wait_until(lambda: run_folder.list_checkpoints(tmp_path / "run"))
    running.signal(signal.SIGKILL)
    assert_ends(running, -signal.SIGKILL)
