"""Two processes: they stop together, skip together, and none waits for ever for another."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from deit.config.recipes.handwriting import digits_teacher
from deit.core import run_folder, run_log
from tests.helpers.command_server import CommandServer, Running
from tests.helpers.processes import ROOT, Completed, fake_datasets_package, wait_until
from tests.helpers.small_runs import SMALL, STEPS, assert_same_run
from tests.helpers.trained import trained

pytest.importorskip("sklearn")


def both(command_server: CommandServer, *arguments: object, fault: str = "") -> list[Running]:
    """Both processes of a command, as torchrun starts them."""
    return command_server.start_processes(*arguments, DEIT_FAULT=fault)


def start(
    command_server: CommandServer, out: Path, fault: str = "", *more: object
) -> list[Running]:
    arguments = ("train", *SMALL, "--out", out, "--resume", "--run.timeout_s", "20", *more)
    return both(command_server, *arguments, fault=fault)


def run(
    command_server: CommandServer, out: Path, fault: str = "", *more: object
) -> list[Completed]:
    return [process.wait() for process in start(command_server, out, fault, *more)]


def own_lines(output: str) -> list[str]:
    """The lines of standard error that are ours: Gloo complains where the machine's name leads to
    no address, and launchers print messages of their own."""
    return [line for line in output.splitlines() if line.startswith("deit")]


@pytest.fixture(scope="module")
def uninterrupted_run(command_server, tmp_path_factory) -> Path:
    """The run of two processes that nothing happens to."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    for done in run(command_server, out):
        assert done.code == 0, done.err
    return out


@pytest.mark.fault("A13")
@pytest.mark.parametrize("rank", [0, 1])
def test_signal_to_one_process_stops_both_at_the_same_step(
    rank, command_server, uninterrupted_run, tmp_path
):
    out = tmp_path / "run"
    done = run(command_server, out, f"step@{rank}:2:term")
    assert [rank.code for rank in done] == [143, 143]
    (line,) = own_lines(done[0].err)
    assert "SIGTERM" in line
    assert "--resume" in line
    assert own_lines(done[1].err) == []
    assert 2 <= run_folder.checkpoint_step(run_folder.latest_checkpoint(out)) < 2 * STEPS
    assert [rank.code for rank in run(command_server, out)] == [0, 0]
    assert_same_run(out, uninterrupted_run)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> tuple[str, ...]:
    """Options that name a teacher."""
    out = tmp_path_factory.mktemp("teacher") / "teacher"
    trained(digits_teacher().replace(optim={"epochs": 3}), out)
    return ("--loss", "deit-hard", "--teacher.source", str(out))


@pytest.fixture(scope="module")
def store(command_server, teacher, tmp_path_factory) -> Path:
    """The targets that one process writes."""
    out = tmp_path_factory.mktemp("store") / "targets"
    done = command_server.run("targets", "write", *SMALL, *teacher, "--out", out)
    assert done.code == 0, done.err
    return out


@pytest.fixture(scope="module")
def taught(teacher, store) -> tuple[str, ...]:
    """Options by which the student learns from stored targets."""
    return (*teacher, "--teacher.target_stores", str(store), "--run.save_every_steps", "1")


@pytest.fixture(scope="module")
def uninterrupted_distillation(command_server, taught, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("taught") / "run"
    for done in run(command_server, out, "", *taught):
        assert done.code == 0, done.err
    return out


@pytest.mark.fault("A1")
@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 2 * STEPS + 1))
def test_resume_after_a_kill_of_two_processes_is_bit_identical(
    step, command_server, taught, uninterrupted_distillation, tmp_path
):
    """With RandAugment, mixing, drop path, average and stored targets."""
    out = tmp_path / "run"
    for done in run(command_server, out, f"step:{step}:kill", *taught):
        assert done.code in (-signal.SIGKILL, 7)
    assert [rank.code for rank in run(command_server, out, "", *taught)] == [0, 0]
    assert_same_run(out, uninterrupted_distillation)


@pytest.fixture(scope="module")
def three_shards(teacher) -> tuple[str, ...]:
    """The command that writes targets that fill three shards."""
    more = ("--data.train_fraction", "1", "--optim.batch_size", "256", "--epochs", "9")
    return ("targets", "write", *SMALL, *teacher, *more, "--run.eval_batch_size", "256")


@pytest.fixture(scope="module")
def single_process_store(command_server, three_shards, tmp_path_factory) -> Path:
    """What one process writes."""
    out = tmp_path_factory.mktemp("single-process") / "targets"
    done = command_server.run(*three_shards, "--out", out)
    assert done.code == 0, done.err
    return out


@pytest.mark.fault("A13")
@pytest.mark.parametrize(("rank", "block"), [(0, 1), (1, 2), (0, 24)])
def test_signal_to_one_process_stops_both_target_writers(
    rank, block, command_server, three_shards, single_process_store, tmp_path
):
    """There are three shards: at the end the second process waits for the first."""
    out = tmp_path / "targets"
    arguments = (*three_shards, "--out", out)
    done = [
        rank.wait()
        for rank in both(command_server, *arguments, fault=f"teacher@{rank}:{block}:term")
    ]
    assert [rank.code for rank in done] == [143, 143], done[0].err
    (line,) = own_lines(done[0].err)
    assert "SIGTERM" in line
    assert own_lines(done[1].err) == []
    assert not (out / "targets.bin").exists()
    again = [rank.wait() for rank in both(command_server, *arguments)]
    assert [rank.code for rank in again] == [0, 0], again[0].err
    for name in ("targets.bin", "checks.bin"):
        assert (out / name).read_bytes() == (single_process_store / name).read_bytes()


@pytest.mark.fault("A13")
@pytest.mark.parametrize("rank", [0, 1])
def test_signal_to_one_process_stops_both_evaluations(
    rank, command_server, uninterrupted_run, tmp_path
):
    out = shutil.copytree(uninterrupted_run, tmp_path / "run")
    config = json.loads((out / "config.json").read_text())
    config["run"]["eval_batch_size"] = 16
    (out / "config.json").write_text(json.dumps(config))
    running = both(command_server, "evaluate", out, fault=f"evaluation@{rank}:4:term")
    done = [rank.wait() for rank in running]
    assert [rank.code for rank in done] == [143, 143], done[0].err
    (line,) = own_lines(done[0].err)
    assert "SIGTERM" in line
    assert own_lines(done[1].err) == []


@pytest.mark.fault("A20", "B9")
def test_resume_with_one_process_instead_of_two_matches(
    command_server, uninterrupted_run, tmp_path
):
    out = tmp_path / "run"
    run(command_server, out, "step:6:term")
    stopped = run_folder.checkpoint_step(run_folder.latest_checkpoint(out))
    assert 6 <= stopped <= 2 * STEPS
    single_process = ("train", *SMALL, "--out", out, "--resume", "--optim.grad_accum_steps", "2")
    done = command_server.run(*single_process)
    assert done.code == 0, done.err
    assert re.search(r"\bprocesses\b[^;]*\b2\b[^;]*\b1\b", done.err)
    resumed, expected = (
        load_file(run_folder.latest_checkpoint(folder) / "model.safetensors")
        for folder in (out, uninterrupted_run)
    )
    for name, value in expected.items():
        assert (resumed[name] - value).abs().max() < 1e-4, name
    rows = [run_log.read(folder / run_log.METRICS) for folder in (out, uninterrupted_run)]
    for actual_row, expected_row in zip(*rows, strict=True):
        assert actual_row["step"] == expected_row["step"]
        assert actual_row["train"] == pytest.approx(expected_row["train"], abs=1e-4)


@pytest.mark.fault("D11")
def test_nonfinite_loss_in_one_process_is_skipped_by_both(
    command_server, uninterrupted_run, tmp_path
):
    out = tmp_path / "run"
    done = run(command_server, out, "loss@1:3:nan")
    assert [rank.code for rank in done] == [0, 0]
    assert json.loads((out / "result.json").read_text())["skipped"] == 1
    for value in load_file(run_folder.latest_checkpoint(out) / "model.safetensors").values():
        assert value.isfinite().all()
    chains = [
        run_log.read(folder / run_log.HASH_CHAIN)[0]["model"] for folder in (out, uninterrupted_run)
    ]
    assert chains[0] != chains[1]  # an update is missing
    rows_logged = run_log.read(out / run_log.NONFINITE_LOG)
    assert sorted(row["process"] for row in rows_logged) == [0, 1]
    assert {row["step"] for row in rows_logged} == {3}


@pytest.mark.fault("D11")
def test_too_many_nonfinite_steps_stop_both_processes(command_server, tmp_path):
    done = run(command_server, tmp_path / "run", "loss@1:0:nan", "--run.max_nonfinite_steps", "2")
    assert [rank.code for rank in done] == [6, 6]


@pytest.mark.fault("E4")
def test_process_exits_with_7_if_the_other_is_killed(command_server, uninterrupted_run, tmp_path):
    out = tmp_path / "run"
    # It does not wait: after these 600 s the test itself would have failed.
    first, second = run(command_server, out, "step@1:7:kill", "--run.timeout_s", "600")
    assert second.code == -signal.SIGKILL
    assert first.code == 7, first.err
    (line,) = own_lines(first.err)
    assert re.search(r"\b600 s\b.*--resume\b", line)
    assert [rank.code for rank in run(command_server, out)] == [0, 0]
    assert_same_run(out, uninterrupted_run)


@pytest.mark.fault("E5")
def test_process_exits_with_7_if_the_other_hangs(command_server, tmp_path):
    first, second = start(command_server, tmp_path / "run", "step@1:2:hang", "--run.timeout_s", "4")
    done = first.wait(timeout=300)
    assert done.code == 7, done.err
    (line,) = own_lines(done.err)
    assert re.search(r"\b4 s\b.*--resume\b", line)
    hung = second.wait(timeout=0)
    assert hung.code == -signal.SIGABRT
    assert "fault_injection.py" in hung.err  # where it was


@pytest.mark.fault("E6")
def test_error_of_the_main_process_stops_both(command_server, uninterrupted_run, tmp_path):
    """All checkpoints are damaged, which the first process alone looks at."""
    out = tmp_path / "run"
    run(command_server, out, "step:7:term")
    for _, folder in run_folder.list_checkpoints(out):
        (folder / "state.json").write_text("{}")
    done = run(command_server, out)
    assert [rank.code for rank in done] == [4, 4]
    for _, folder in run_folder.list_checkpoints(out):
        assert str(folder / "state.json") in done[0].err
        assert str(folder) not in done[1].err
    assert re.search(r"\bprocess 0\b", done[1].err)


@pytest.mark.fault("E6")
@pytest.mark.parametrize("fault", ["model@0:1:full", "evaluation@1:1:full"])
def test_process_exits_with_7_if_the_other_fails(fault, command_server, tmp_path):
    """While a checkpoint is written; and before the first update, while teachers are measured."""
    done = run(command_server, tmp_path / "run", fault)
    failed = int(fault.split("@")[1][0])
    assert done[failed].code in (1, 5)
    assert done[1 - failed].code == 7, done[1 - failed].err


@pytest.mark.fault("A20")
def test_resume_with_two_processes_instead_of_one_matches(command_server, tmp_path):
    out, expected_row = tmp_path / "run", tmp_path / "alone"
    split = ("--optim.grad_accum_steps", "2")
    single_process = ("train", *SMALL, *split, "--resume")
    assert command_server.run(*single_process, "--out", expected_row).code == 0
    assert command_server.run(*single_process, "--out", out, DEIT_FAULT="step:4:term").code == 143
    done = run(command_server, out)
    assert [rank.code for rank in done] == [0, 0], done[0].err
    resumed, expected = (
        load_file(run_folder.latest_checkpoint(folder) / "model.safetensors")
        for folder in (out, expected_row)
    )
    for name, value in expected.items():
        assert (resumed[name] - value).abs().max() < 1e-4, name


@contextmanager
def nothing_left(process: subprocess.Popen) -> Iterator[None]:
    """Kill the processes of a process's session at the end, also after a failure."""
    try:
        yield
    finally:
        for candidate in psutil.process_iter():
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(candidate.pid) == process.pid:
                    candidate.kill()


@pytest.mark.fault("A14")
def test_sigterm_to_accelerate_launch_stops_the_training_process(tmp_path):
    """It does not hand the signal on: the training process would never end."""
    out = tmp_path / "run"
    launcher = subprocess.Popen(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"),
            *("--num_machines", "1", "--mixed_precision", "bf16", "--dynamo_backend", "no"),
            *(str(ROOT / "train_deit.py"), *SMALL, "--out", str(out), "--optim.epochs", "4000"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with nothing_left(launcher):
        wait_until(lambda: list(out.glob("checkpoint-*")))
        launcher.terminate()
        _, output = launcher.communicate(timeout=300)  # until the training process closes it too
    assert any("SIGTERM" in line for line in own_lines(output))
    assert run_folder.latest_checkpoint(out) is not None
    environment = json.loads((out / "environment.json").read_text())
    assert environment["precision"] == "bf16"  # as set by the launcher
    assert environment["command"].startswith("train_deit.py ")


@pytest.mark.fault("E3")
def test_auto_micro_batch_is_the_smallest_of_all_processes(command_server, tmp_path):
    done = run(command_server, tmp_path / "run", "fit@1:1:memory", "--run.auto_micro_batch")
    assert [rank.code for rank in done] == [0, 0], done[0].err
    assert re.search(r"\boptim\.grad_accum_steps 2\b.*\b16 images\b", done[0].out)


@pytest.mark.fault("A15")
def test_ctrl_c_under_torchrun_saves_once(tmp_path):
    """Send it as a terminal does, to all processes; torchrun sends it to its processes again.

    Hugging Face's package datasets is installed, with the name of our own folder.
    """
    out, printed = tmp_path / "run", tmp_path / "printed"
    path = os.pathsep.join((fake_datasets_package(tmp_path / "site"), str(ROOT)))
    with printed.open("w") as file:
        torchrun = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
                *(str(ROOT / "train_deit.py"), *SMALL, "--out", str(out), "--optim.epochs", "4000"),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    with nothing_left(torchrun):
        wait_until(lambda: list(out.glob("checkpoint-*")))
        os.killpg(torchrun.pid, signal.SIGINT)
        _, output = torchrun.communicate(timeout=300)
    (line,) = own_lines(output)
    assert "SIGINT" in line
    assert "--resume" in line
    step = run_folder.checkpoint_step(run_folder.latest_checkpoint(out))
    assert step > len(run_log.read(out / run_log.METRICS)) * STEPS  # of its very update
    assert re.search(r"\b64 = 2\b\D+\b1\b\D+\b32\b", printed.read_text())
