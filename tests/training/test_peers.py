"""Two processes stop and skip at the same step, and never wait for each other forever."""

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


def start_both(command_server: CommandServer, *arguments: object, fault: str = "") -> list[Running]:
    """Start both processes of a command, as torchrun does."""
    return command_server.start_processes(*arguments, DEIT_FAULT=fault)


def start(
    command_server: CommandServer, out: Path, fault: str = "", *more: object
) -> list[Running]:
    arguments = ("train", *SMALL, "--out", out, "--resume", "--run.timeout_s", "20", *more)
    return start_both(command_server, *arguments, fault=fault)


def run(
    command_server: CommandServer, out: Path, fault: str = "", *more: object
) -> list[Completed]:
    return [process.wait() for process in start(command_server, out, fault, *more)]


def deit_lines(output: str) -> list[str]:
    """Return the lines of standard error that deit prints.

    Gloo warns if the host name has no address, and launchers print messages as well.
    """
    return [line for line in output.splitlines() if line.startswith("deit")]


@pytest.fixture(scope="module")
def uninterrupted_run(command_server, tmp_path_factory) -> Path:
    """Return a finished run of two processes without a stop."""
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
    assert [process.code for process in done] == [143, 143]
    (line,) = deit_lines(done[0].err)
    assert "SIGTERM" in line
    assert "--resume" in line
    assert deit_lines(done[1].err) == []
    assert 2 <= run_folder.checkpoint_step(run_folder.latest_checkpoint(out)) < 2 * STEPS
    assert [process.code for process in run(command_server, out)] == [0, 0]
    assert_same_run(out, uninterrupted_run)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> tuple[str, ...]:
    """Return the options of a teacher."""
    out = tmp_path_factory.mktemp("teacher") / "teacher"
    trained(digits_teacher().replace(optim={"epochs": 3}), out)
    return ("--loss", "deit-hard", "--teacher.source", str(out))


@pytest.fixture(scope="module")
def store(command_server, teacher, tmp_path_factory) -> Path:
    """Return targets that one process has written."""
    out = tmp_path_factory.mktemp("store") / "targets"
    done = command_server.run("targets", "write", *SMALL, *teacher, "--out", out)
    assert done.code == 0, done.err
    return out


@pytest.fixture(scope="module")
def distillation_options(teacher, store) -> tuple[str, ...]:
    """Return the options of training from stored targets."""
    return (*teacher, "--teacher.target_stores", str(store), "--run.save_every_steps", "1")


@pytest.fixture(scope="module")
def uninterrupted_distillation(command_server, distillation_options, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("distillation") / "run"
    for done in run(command_server, out, "", *distillation_options):
        assert done.code == 0, done.err
    return out


@pytest.mark.fault("A1")
@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 2 * STEPS + 1))
def test_resume_after_a_kill_of_two_processes_is_bit_identical(
    step, command_server, distillation_options, uninterrupted_distillation, tmp_path
):
    """With RandAugment, mixing, drop path, average and stored targets."""
    out = tmp_path / "run"
    for done in run(command_server, out, f"step:{step}:kill", *distillation_options):
        assert done.code in (-signal.SIGKILL, 7)
    resumed = run(command_server, out, "", *distillation_options)
    assert [process.code for process in resumed] == [0, 0]
    assert_same_run(out, uninterrupted_distillation)


@pytest.fixture(scope="module")
def three_shards_command(teacher) -> tuple[str, ...]:
    """Return the command that writes targets in three shards."""
    more = ("--data.train_fraction", "1", "--optim.batch_size", "256", "--epochs", "9")
    return ("targets", "write", *SMALL, *teacher, *more, "--run.eval_batch_size", "256")


@pytest.fixture(scope="module")
def single_process_targets(command_server, three_shards_command, tmp_path_factory) -> Path:
    """Return the targets in three shards that one process has written."""
    out = tmp_path_factory.mktemp("single-process") / "targets"
    done = command_server.run(*three_shards_command, "--out", out)
    assert done.code == 0, done.err
    return out


@pytest.mark.fault("A13")
@pytest.mark.parametrize(("rank", "block"), [(0, 1), (1, 2), (0, 24)])
def test_signal_to_one_process_stops_both_target_writers(
    rank, block, command_server, three_shards_command, single_process_targets, tmp_path
):
    """There are three shards: in the end the second process waits for the first."""
    out = tmp_path / "targets"
    arguments = (*three_shards_command, "--out", out)
    processes = start_both(command_server, *arguments, fault=f"teacher@{rank}:{block}:term")
    done = [process.wait() for process in processes]
    assert [process.code for process in done] == [143, 143], done[0].err
    (line,) = deit_lines(done[0].err)
    assert "SIGTERM" in line
    assert deit_lines(done[1].err) == []
    assert not (out / "targets.bin").exists()
    repeated = [process.wait() for process in start_both(command_server, *arguments)]
    assert [process.code for process in repeated] == [0, 0], repeated[0].err
    for name in ("targets.bin", "checks.bin"):
        assert (out / name).read_bytes() == (single_process_targets / name).read_bytes()


@pytest.mark.fault("A13")
@pytest.mark.parametrize("rank", [0, 1])
def test_signal_to_one_process_stops_both_evaluations(
    rank, command_server, uninterrupted_run, tmp_path
):
    out = shutil.copytree(uninterrupted_run, tmp_path / "run")
    config = json.loads((out / "config.json").read_text())
    config["run"]["eval_batch_size"] = 16
    (out / "config.json").write_text(json.dumps(config))
    processes = start_both(command_server, "evaluate", out, fault=f"evaluation@{rank}:4:term")
    done = [process.wait() for process in processes]
    assert [process.code for process in done] == [143, 143], done[0].err
    (line,) = deit_lines(done[0].err)
    assert "SIGTERM" in line
    assert deit_lines(done[1].err) == []


@pytest.mark.fault("A20", "B9")
def test_resume_with_one_process_instead_of_two_matches(
    command_server, uninterrupted_run, tmp_path
):
    out = tmp_path / "run"
    run(command_server, out, "step:6:term")
    stopped = run_folder.checkpoint_step(run_folder.latest_checkpoint(out))
    assert 6 <= stopped <= 2 * STEPS
    arguments = ("train", *SMALL, "--out", out, "--resume", "--optim.grad_accum_steps", "2")
    done = command_server.run(*arguments)
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
    assert [process.code for process in done] == [0, 0]
    assert json.loads((out / "result.json").read_text())["skipped"] == 1
    for value in load_file(run_folder.latest_checkpoint(out) / "model.safetensors").values():
        assert value.isfinite().all()
    chains = [
        run_log.read(folder / run_log.HASH_CHAIN)[0]["model"] for folder in (out, uninterrupted_run)
    ]
    assert chains[0] != chains[1]  # one step is missing
    logged_rows = run_log.read(out / run_log.NONFINITE_LOG)
    assert sorted(row["process"] for row in logged_rows) == [0, 1]
    assert {row["step"] for row in logged_rows} == {3}


@pytest.mark.fault("D11")
def test_too_many_nonfinite_steps_stop_both_processes(command_server, tmp_path):
    done = run(command_server, tmp_path / "run", "loss@1:0:nan", "--run.max_nonfinite_steps", "2")
    assert [process.code for process in done] == [6, 6]


@pytest.mark.fault("E4")
def test_process_exits_with_7_if_the_other_is_killed(command_server, uninterrupted_run, tmp_path):
    out = tmp_path / "run"
    # It does not wait for the timeout of 600 s, after which the test would fail.
    first, second = run(command_server, out, "step@1:7:kill", "--run.timeout_s", "600")
    assert second.code == -signal.SIGKILL
    assert first.code == 7, first.err
    (line,) = deit_lines(first.err)
    assert re.search(r"\b600 s\b.*--resume\b", line)
    assert [process.code for process in run(command_server, out)] == [0, 0]
    assert_same_run(out, uninterrupted_run)


@pytest.mark.fault("E5")
def test_process_exits_with_7_if_the_other_hangs(command_server, tmp_path):
    first, second = start(command_server, tmp_path / "run", "step@1:2:hang", "--run.timeout_s", "4")
    done = first.wait(timeout=300)
    assert done.code == 7, done.err
    (line,) = deit_lines(done.err)
    assert re.search(r"\b4 s\b.*--resume\b", line)
    hung = second.wait(timeout=0)
    assert hung.code == -signal.SIGABRT
    assert "fault_injection.py" in hung.err  # the stack of the process


@pytest.mark.fault("E6")
def test_error_of_the_main_process_stops_both(command_server, uninterrupted_run, tmp_path):
    """All checkpoints are damaged, and only the main process reads them."""
    out = tmp_path / "run"
    run(command_server, out, "step:7:term")
    for _, folder in run_folder.list_checkpoints(out):
        (folder / "state.json").write_text("{}")
    done = run(command_server, out)
    assert [process.code for process in done] == [4, 4]
    for _, folder in run_folder.list_checkpoints(out):
        assert str(folder / "state.json") in done[0].err
        assert str(folder) not in done[1].err
    assert re.search(r"\bprocess 0\b", done[1].err)


@pytest.mark.fault("E6")
@pytest.mark.parametrize("fault", ["model@0:1:full", "evaluation@1:1:full"])
def test_process_exits_with_7_if_the_other_fails(fault, command_server, tmp_path):
    """While a checkpoint is written, or in an evaluation."""
    done = run(command_server, tmp_path / "run", fault)
    failed = int(fault.split("@")[1][0])
    assert done[failed].code in (1, 5)
    assert done[1 - failed].code == 7, done[1 - failed].err


@pytest.mark.fault("A20")
def test_resume_with_two_processes_instead_of_one_matches(command_server, tmp_path):
    out, one_process = tmp_path / "run", tmp_path / "one-process"
    accumulation = ("--optim.grad_accum_steps", "2")
    arguments = ("train", *SMALL, *accumulation, "--resume")
    assert command_server.run(*arguments, "--out", one_process).code == 0
    assert command_server.run(*arguments, "--out", out, DEIT_FAULT="step:4:term").code == 143
    done = run(command_server, out)
    assert [process.code for process in done] == [0, 0], done[0].err
    resumed, expected = (
        load_file(run_folder.latest_checkpoint(folder) / "model.safetensors")
        for folder in (out, one_process)
    )
    for name, value in expected.items():
        assert (resumed[name] - value).abs().max() < 1e-4, name


@contextmanager
def killing_session(process: subprocess.Popen) -> Iterator[None]:
    """Kill all processes of a process's session at the end, even after a failure."""
    try:
        yield
    finally:
        for candidate in psutil.process_iter():
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getsid(candidate.pid) == process.pid:
                    candidate.kill()


@pytest.mark.fault("A14")
@pytest.mark.slow
def test_sigterm_to_accelerate_launch_stops_the_training_process(tmp_path):
    """accelerate launch does not forward the signal; the training process stops nevertheless."""
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
    with killing_session(launcher):
        wait_until(lambda: list(out.glob("checkpoint-*")))
        launcher.terminate()
        _, output = launcher.communicate(timeout=300)  # until the training process closes it too
    assert any("SIGTERM" in line for line in deit_lines(output))
    assert run_folder.latest_checkpoint(out) is not None
    environment = json.loads((out / "environment.json").read_text())
    assert environment["precision"] == "bf16"  # as set by the launcher
    assert environment["command"].startswith("train_deit.py ")


@pytest.mark.fault("E3")
def test_auto_micro_batch_is_the_smallest_of_all_processes(command_server, tmp_path):
    done = run(command_server, tmp_path / "run", "fit@1:1:memory", "--run.auto_micro_batch")
    assert [process.code for process in done] == [0, 0], done[0].err
    assert re.search(r"\boptim\.grad_accum_steps 2\b.*\b16 images\b", done[0].out)


@pytest.mark.fault("A15")
@pytest.mark.slow
def test_ctrl_c_under_torchrun_saves_once(tmp_path):
    """A terminal sends SIGINT to all processes, and torchrun sends it to its processes again.

    Hugging Face's package datasets is installed, which has the name of our folder.
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
    with killing_session(torchrun):
        wait_until(lambda: list(out.glob("checkpoint-*")))
        os.killpg(torchrun.pid, signal.SIGINT)
        _, output = torchrun.communicate(timeout=300)
    (line,) = deit_lines(output)
    assert "SIGINT" in line
    assert "--resume" in line
    step = run_folder.checkpoint_step(run_folder.latest_checkpoint(out))
    # The checkpoint is from the step of the signal.
    assert step > len(run_log.read(out / run_log.METRICS)) * STEPS
    assert re.search(r"\b64 = 2\b\D+\b1\b\D+\b32\b", printed.read_text())
