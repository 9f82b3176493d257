"""Runs that are killed or stopped at named points, and how they resume."""

import random
import signal
import time

import pytest

from deit.cli import run_command
from deit.core import fault_injection, run_folder, run_log
from deit.core.parent_process import SAME_SIGNAL_S
from tests.helpers.process_setup import Gate
from tests.helpers.processes import wait_until
from tests.helpers.small_runs import SMALL, STEPS, assert_same_run, run

pytest.importorskip("sklearn")


@pytest.mark.fault("A1", "A3", "A4", "A6", "A8", "A24")
@pytest.mark.parametrize(
    "fault",
    [
        *("step:1", "step:5", "step:7", "evaluation:1", "evaluation:4", "metrics:1"),
        *("model:1", "optimizer:2", "average:2", "state:1", "state:2", "manifest:1", "manifest:2"),
        # 1: the first checkpoint, 2: best, 3: the second checkpoint, 4: best
        *("rename:1", "rename:2", "rename:3", "renamed:1", "renamed:2", "renamed:4", "finish:1"),
    ],
)
def test_resume_after_a_kill_at_any_point_is_bit_identical(
    fault, command_server, uninterrupted_run, tmp_path
):
    out = tmp_path / "run"
    killed = run(command_server, out, f"{fault}:kill")
    assert killed.code == -signal.SIGKILL
    if fault == "renamed:1":
        # The renamed checkpoint is valid already.
        assert run_folder.checkpoint_step(run_folder.latest_checkpoint(out)) == STEPS
    done = run(command_server, out)
    assert done.code == 0, done.err
    assert_same_run(out, uninterrupted_run)


@pytest.mark.fault("A2")
@pytest.mark.slow
def test_resume_after_100_random_kills_is_bit_identical(command_server, tmp_path):
    """Runs are started until a hundred kills have hit; each must end with the same bits."""
    long = ("--optim.epochs", "60", "--run.save_every_steps", "3", "--views.mixup_alpha", "0.8")
    generator, kills, runs = random.Random(0), 0, 0
    uninterrupted = tmp_path / "uninterrupted"
    assert run(command_server, uninterrupted, "", *long).code == 0
    while kills < 100:
        out, runs = tmp_path / f"run-{runs}", runs + 1
        done = None
        while done is None or done.code != 0:
            running = command_server.start("train", *SMALL, "--out", out, "--resume", *long)
            if kills < 100:
                time.sleep(generator.uniform(0.1, 2.5))
                running.signal(signal.SIGKILL)
            done = running.wait()
            assert done.code in (0, -signal.SIGKILL), done.err
            kills += done.code == -signal.SIGKILL
        for name in (run_log.HASH_CHAIN, "best/model.safetensors"):
            assert (out / name).read_bytes() == (uninterrupted / name).read_bytes()
    print(f"{kills} kills over {runs} runs")


@pytest.mark.fault("A5")
def test_resume_after_a_kill_during_checkpoint_removal(command_server, uninterrupted_run, tmp_path):
    out, every = tmp_path / "run", ("--run.save_every_steps", "2")
    assert run(command_server, out, "rotate:2:kill", *every).code == -signal.SIGKILL
    assert run(command_server, out, "", *every).code == 0
    assert [step for step, _ in run_folder.list_checkpoints(out)] == [10, 8]
    assert not list(out.glob(".deit-*"))
    assert (out / "best" / "model.safetensors").read_bytes() == (
        uninterrupted_run / "best" / "model.safetensors"
    ).read_bytes()


@pytest.mark.fault("A10")
def test_sigterm_saves_a_checkpoint_and_exits_with_143(command_server, uninterrupted_run, tmp_path):
    out = tmp_path / "run"
    gate = Gate(tmp_path / "gate")
    arguments = ("train", *SMALL, "--out", out, "--resume")
    running = command_server.start(*arguments, DEIT_FAULT="step:2:slow", **gate.environment)
    gate.wait()
    running.signal(signal.SIGTERM)
    gate.open()
    done = running.wait()
    assert done.code == 143
    assert "SIGTERM" in done.err
    assert "--resume" in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert run(command_server, out).code == 0
    assert_same_run(out, uninterrupted_run)


def test_sigterm_before_the_first_step_exits_with_143(command_server, tmp_path):
    gate, arguments = Gate(tmp_path / "gate"), ("train", *SMALL, "--out", tmp_path / "run")
    running = command_server.start(*arguments, DEIT_FAULT="evaluation:1:slow", **gate.environment)
    gate.wait()
    running.signal(signal.SIGTERM)
    gate.open()
    assert running.wait().code == 143


@pytest.mark.fault("A12")
def test_second_signal_exits_at_once_and_keeps_the_checkpoint(
    command_server, uninterrupted_run, tmp_path
):
    out = tmp_path / "run"
    running = command_server.start("train", *SMALL, "--out", out, DEIT_FAULT="step:7:hang")
    wait_until(lambda: list(out.glob("checkpoint-*")))
    time.sleep(1)
    for _ in range(5):  # the same signal again, as launchers forward it
        running.signal(signal.SIGTERM)
        time.sleep(0.02)
    time.sleep(SAME_SIGNAL_S + 2)
    running.signal(signal.SIGINT)
    done = running.wait(timeout=300)
    assert done.code == 130
    assert "signal" in done.err
    assert "--resume" not in done.err  # printed only if the first signal was handled
    assert run(command_server, out).code == 0
    assert_same_run(out, uninterrupted_run)


@pytest.mark.fault("A17")
def test_sighup_ignored_by_nohup_stays_ignored(uninterrupted_run, tmp_path):
    out = tmp_path / "run"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    fault_injection.install_faults("step:3:hup")
    try:
        assert run_command("train", [*SMALL, "--out", str(out)], "deit train") == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        fault_injection.install_faults(None)
        signal.signal(signal.SIGHUP, before)
    assert_same_run(out, uninterrupted_run)
