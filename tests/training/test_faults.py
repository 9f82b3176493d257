"""Runs under faults: full disks, killed workers, locks, unusual names, missing files."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import psutil
import pytest
from accelerate import Accelerator
from safetensors.torch import load_file

from deit.cli import run_command
from deit.config.recipes.handwriting import digits_teacher
from deit.core import fault_injection, run_folder, run_log, signals
from deit.core.errors import ConfigError, SystemFault
from deit.core.filesystem import check_space
from deit.models import student
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.images import write_image_folder
from tests.helpers.leftovers import has_ended
from tests.helpers.process_setup import Gate
from tests.helpers.processes import wait_until
from tests.helpers.small_runs import SMALL, STEPS, assert_same_run, run

pytest.importorskip("sklearn")


@pytest.mark.fault("D10", "E7")
def test_second_run_in_a_locked_folder_is_refused(command_server, uninterrupted_run, tmp_path):
    out = tmp_path / "run"
    running = command_server.start("train", *SMALL, "--out", out, DEIT_FAULT="step:2:hang")
    wait_until(lambda: (out / "config.json").is_file())
    second = run(command_server, out)  # does not wait for the first, which hangs for an hour
    assert second.code == 5
    assert f"--out {out}" in second.err
    assert re.search(rf"\bprocess {running.pid}\b", second.err)
    running.signal(signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    assert run(command_server, out).code == 0
    assert_same_run(out, uninterrupted_run)


@pytest.mark.fault("B19")
def test_full_disk_keeps_the_previous_checkpoint(command_server, uninterrupted_run, tmp_path):
    for fault in ("optimizer:2:full", "manifest:3:full", "rename:3:full"):
        out = tmp_path / fault.replace(":", "-")
        full = run(command_server, out, fault)
        assert full.code == 5
        assert str(run_folder.checkpoint_path(out, 2 * STEPS)) in full.err
        # The free space and the needed space.
        assert re.search(r"No space left on device\b.* [kMGT]?B\b.* [kMGT]?B\b", full.err)
        assert [step for step, _ in run_folder.list_checkpoints(out)] == [5]
        assert not list(out.glob(".deit-*"))
        assert run(command_server, out).code == 0
        assert_same_run(out, uninterrupted_run)


@pytest.mark.fault("E3")
def test_out_of_memory_suggests_a_smaller_micro_batch(command_server, tmp_path):
    done = run(command_server, tmp_path / "run", "step:3:memory")
    assert done.code == 5
    assert re.search(r"\b64 images\b.*\b32\b.*--optim\.grad_accum_steps 2\b.*\b64\b", done.err)
    assert run(command_server, tmp_path / "run", "", "--optim.grad_accum_steps", "2").code == 0


@pytest.mark.fault("D12")
def test_nonfinite_losses_stop_the_run_and_log_their_images(command_server, tmp_path):
    out = tmp_path / "run"
    done = run(command_server, out, "loss:0:nan", "--run.max_nonfinite_steps", "3")
    assert done.code == 6
    assert str(out / run_log.NONFINITE_LOG) in done.err.splitlines()[-1]
    rows = run_log.read(out / run_log.NONFINITE_LOG)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(len(row["images"]) == len(row["names"]) == 64 for row in rows)


@pytest.mark.fault("D11")
def test_skipped_step_is_logged_and_counted(command_server, uninterrupted_run, tmp_path):
    out = tmp_path / "run"
    done = run(command_server, out, "loss:2:nan")
    assert done.code == 0
    assert re.search(r"\bstep 2\b.*\b1\b.*\b10\b", done.err)
    (skipped,) = run_log.read(out / run_log.NONFINITE_LOG)
    assert skipped["step"] == 2
    assert skipped["names"][0] in done.err
    assert json.loads((out / "result.json").read_text())["skipped"] == 1
    for row in run_log.read(out / run_log.METRICS):
        assert row["train"]["loss"] is not None


@pytest.mark.parametrize(
    "text", ["step", "step:1", "nothing:1:kill", "step:x:kill", "step@a:1:kill"]
)
def test_invalid_fault_is_refused(text, command_server, tmp_path):
    with raises(ConfigError, f"DEIT_FAULT={text}"):
        fault_injection.install_faults(text)
    done = command_server.run("recipes", DEIT_FAULT=text)
    assert done.code == 2


def test_check_space_without_enough_space_raises(tmp_path):
    with raises(SystemFault, f"out = {tmp_path / 'a' / 'b'}", "1e+03 TB"):
        check_space(tmp_path / "a" / "b", 10**15, name="out")
    check_space(tmp_path / "a" / "b", 1000, name="out")


@pytest.mark.fault("B24", "B25", "E9", "E14")
def test_moved_run_resumes_bit_identical(command_server, uninterrupted_run, tmp_path):
    """The folder does not contain its own path; read-only checkpoints can be read."""
    out = tmp_path / "run"
    assert run(command_server, out, "step:7:kill").code == -signal.SIGKILL
    moved = tmp_path / "elsewhere" / "a b"
    moved.parent.mkdir()
    shutil.move(out, moved)
    for path in moved.glob("checkpoint-*/*"):
        path.chmod(0o444)
    assert run(command_server, moved).code == 0
    assert_same_run(moved, uninterrupted_run)
    assert str(out) not in "".join(
        path.read_text() for path in moved.rglob("*.json") if "environment" not in path.name
    )


def test_faults_are_documented():
    text = (Path(__file__).parents[2] / "docs" / "reference" / "run-folder.md").read_text()
    for name, description in fault_injection.POINTS.items():
        assert f"| `{name}` | {description} |" in text
    _, _, actions = text.partition("\nActions: ")
    assert all(f"`{name}`" in actions.split("\n\n")[0] for name in fault_injection.ACTIONS)


def test_every_log_of_a_run_is_a_fault_point():
    for name in (run_log.METRICS, run_log.HASH_CHAIN, run_log.NONFINITE_LOG):
        assert Path(name).stem in fault_injection.POINTS


@pytest.mark.fault("E5")
def test_hung_process_prints_its_stack_after_a_signal(capfd, monkeypatch):
    """The process does not handle the signal in time."""
    monkeypatch.setattr(signals, "_STUCK_S", 0.2)
    with signals.GracefulStop(Accelerator(cpu=True)) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: "test_hung_process_prints_its_stack" in capfd.readouterr().err)
        assert stop.pending_signal() == signal.SIGTERM


FOLDER_ARGUMENTS = (
    *("folder", "--loss", "none", "--student.name", "vit_micro", "--student.depth", "1"),
    *("--student.embed_dim", "16", "--student.num_heads", "2", "--student.image_size", "16"),
    *("--student.patch_size", "4", "--data.image_size", "18", "--optim.batch_size", "8"),
    *("--optim.epochs", "40", "--optim.warmup_epochs", "0", "--data.storage", "files"),
    *("--data.num_workers", "2"),
)


def workers_of(pid: int) -> list[int]:
    """Return the worker processes of a process: forks, which have the same command line.

    Libraries start other processes.
    """
    process = psutil.Process(pid)
    return [child.pid for child in process.children() if child.cmdline() == process.cmdline()]


@pytest.fixture
def run_with_workers(command_server, tmp_path):
    """Start a run whose images are read by two workers, and return it."""
    write_image_folder(tmp_path / "pictures", images_per_class=16)
    arguments = (*FOLDER_ARGUMENTS, "--data.root", tmp_path / "pictures", "--out", tmp_path / "run")
    running = command_server.start("train", *arguments)
    wait_until(lambda: list((tmp_path / "run").glob("checkpoint-*")))
    return running


@pytest.mark.fault("A26")
def test_killed_worker_is_reported_and_the_checkpoint_stays(
    run_with_workers, command_server, tmp_path
):
    running = run_with_workers
    os.kill(workers_of(running.pid)[0], signal.SIGKILL)
    done = running.wait(timeout=300)
    assert done.code == 5
    assert "data.num_workers" in done.err
    assert "--resume" in done.err
    assert run_folder.latest_checkpoint(tmp_path / "run") is not None


@pytest.mark.fault("D10")
def test_killed_run_with_live_workers_releases_its_folder(command_server, tmp_path):
    out = tmp_path / "run"
    image_folder = write_image_folder(tmp_path / "pictures", images_per_class=16)
    more = ("--optim.epochs", "4", "--data.root", image_folder, "--out", out)
    arguments = ("train", *FOLDER_ARGUMENTS, *more)
    running = command_server.start(*arguments, DEIT_FAULT="step:9:hang")  # in the third epoch
    wait_until(lambda: list(out.glob("checkpoint-*")))
    assert workers_of(running.pid)
    running.signal(signal.SIGKILL)
    running.wait()
    done = command_server.run(*arguments, "--resume")
    assert done.code == 0, done.err


@pytest.mark.fault("A11")
def test_stopped_run_leaves_no_workers(run_with_workers, tmp_path):
    running = run_with_workers
    workers = workers_of(running.pid)
    assert workers
    for pid in workers:  # a signal to the process group reaches them as well
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    running.signal(signal.SIGTERM)
    assert running.wait().code == 143
    wait_until(lambda: all(map(has_ended, workers)))


@pytest.mark.fault("B21")
def test_run_folder_deleted_in_training_is_reported_in_one_line(command_server, tmp_path):
    out = tmp_path / "run"
    gate, arguments = Gate(tmp_path / "gate"), ("train", *SMALL, "--out", out)
    running = command_server.start(*arguments, DEIT_FAULT="step:7:slow", **gate.environment)
    gate.wait()
    shutil.rmtree(out)
    gate.open()
    done = running.wait()
    assert done.code == 5, done.err
    assert len(done.err.splitlines()) == 1
    assert str(out) in done.err


@pytest.mark.fault("E14")
def test_environment_variables_are_not_saved(command_server, tmp_path):
    out = tmp_path / "run"
    secrets = {"HF_TOKEN": "secret-of-mine", "USER": "ann-the-user", "WANDB_API_KEY": "another-one"}
    assert command_server.run("train", *SMALL, "--out", out, **secrets).code == 0
    for path in out.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not any(secret.encode() in content for secret in secrets.values()), path


@pytest.mark.fault("E17")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_saved_files_follow_the_umask(mask, tmp_path):
    """Also the weights, which other users of a shared folder read."""
    out = tmp_path / "run"
    arguments = ("--out", str(out), "--optim.epochs", "1", "--optim.warmup_epochs", "0")
    before = os.umask(mask)
    try:
        assert run_command("train", [*SMALL, *arguments], "deit train") == 0
    finally:
        os.umask(before)
    files = (*out.rglob("*.safetensors"), *out.rglob("*.json"), *out.rglob("*.jsonl"))
    assert files
    for path in files:
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path


@pytest.mark.fault("E15")
def test_training_without_home_and_tmpdir_succeeds(command_server, tmp_path):
    """Temporary files are in the folder of their final files."""
    out = tmp_path / "run"
    environment = {"TMPDIR": "/dev/null/nowhere", "HOME": "/dev/null/nobody"}
    done = command_server.run("train", *SMALL, "--out", out, **environment)
    assert done.code == 0, done.err


@pytest.mark.fault("E9")
def test_too_long_folder_name_is_reported_in_one_line(command_server, tmp_path):
    for name in ("x" * 300, "a/" + "y" * 300):
        done = command_server.run("train", *SMALL, "--out", tmp_path / name)
        assert done.code == 5, done.err
        assert len(done.err.splitlines()) == 1


@pytest.mark.fault("E9")
@pytest.mark.parametrize("name", ["with space", "ünïcödé", "-dash", "a.b", "x" * 200])
def test_killed_run_in_an_unusual_folder_name_resumes(
    name, command_server, uninterrupted_run, tmp_path
):
    out = tmp_path / name
    assert run(command_server, out, "step:7:kill").code == -signal.SIGKILL
    done = run(command_server, out)
    assert done.code == 0, done.err
    assert_same_run(out, uninterrupted_run)


@pytest.mark.fault("E9")
def test_tilde_in_out_is_expanded(command_server, tmp_path):
    done = command_server.run("train", *SMALL, "--out=~/run", HOME=str(tmp_path))
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "result.json").is_file()


@pytest.mark.fault("E3")
def test_auto_micro_batch_halves_until_one_fits(command_server, tmp_path):
    """The run is bit-identical to one with these micro-batches."""
    automatic, manual = tmp_path / "fitted", tmp_path / "given"
    done = run(command_server, automatic, "fit:1:memory,fit:2:memory", "--run.auto_micro_batch")
    assert done.code == 0, done.err
    first, second = re.findall(r"^memory .*", done.out, re.MULTILINE)
    assert re.search(r"\b64 images\b.*\boptim\.grad_accum_steps 2\b.*\b32 images\b", first)
    assert re.search(r"\b32 images\b.*\boptim\.grad_accum_steps 4\b.*\b16 images\b", second)
    assert run(command_server, manual, "", "--optim.grad_accum_steps", "4").code == 0
    assert_same_run(automatic, manual)
    plain = tmp_path / "plain"
    assert run(command_server, plain, "", "--run.auto_micro_batch").code == 0
    assert json.loads((plain / "config.json").read_text())["optim"]["grad_accum_steps"] == 1


def test_auto_micro_batch_without_a_fit_creates_no_folder(command_server, tmp_path):
    done = run(command_server, tmp_path / "run", "fit:0:memory", "--run.auto_micro_batch")
    assert done.code == 5
    assert re.search(r"\brun\.auto_micro_batch\b.*\b2 images\b", done.err)
    assert not (tmp_path / "run").exists()


def test_dry_run_with_a_nonfinite_loss_fails_and_writes_nothing(command_server, tmp_path):
    (tmp_path / "run").mkdir()
    done = command_server.run(
        "train", *SMALL, "--out", tmp_path / "run", "--dry-run", DEIT_FAULT="loss:1:nan"
    )
    assert done.code == 6
    assert len(done.err.splitlines()) == 1
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.fault("E7")
def test_run_that_finds_its_folder_taken_is_refused(command_server, uninterrupted_run, tmp_path):
    """Both find it empty; the slower one continues after the other has finished."""
    out = tmp_path / "run"
    arguments = ("train", *SMALL, "--out", out)
    gate = Gate(tmp_path / "gate")
    slower = command_server.start(
        *arguments, "--run.auto_micro_batch", DEIT_FAULT="fit:1:slow", **gate.environment
    )
    gate.wait()
    assert command_server.run(*arguments).code == 0
    gate.open()
    done = slower.wait()
    assert done.code == 2
    assert f"--out {out}" in done.err
    assert "--resume" in done.err
    assert_same_run(out, uninterrupted_run)


@pytest.mark.fault("D11")
def test_batch_norm_statistics_exclude_skipped_steps(command_server, tmp_path, monkeypatch):
    """A forward pass that overflows changes them before the step is skipped."""
    epochs = {"epochs": 2, "warmup_epochs": 1, "ema_epochs": 1}
    config = digits_teacher().replace(data={"train_fraction": 0.2}, optim=epochs)
    calls = iter(range(10**6))

    def overflow_once(images):
        return images * float("inf") if next(calls) == 3 else images

    original = student.Student.forward
    monkeypatch.setattr(
        student.Student, "forward", lambda self, images: original(self, overflow_once(images))
    )
    assert train(config, tmp_path / "run")["skipped"] == 1
    folders = (tmp_path / "run" / "best", run_folder.latest_checkpoint(tmp_path / "run"))
    files = [file for folder in folders for file in folder.glob("*.safetensors")]
    assert len(files) == 4  # including the weight average
    for file in files:
        for name, value in load_file(file).items():
            assert value.isfinite().all(), name


@pytest.mark.fault("B3")
@pytest.mark.parametrize("damage", ["gone", "damaged"])
def test_resume_with_a_lost_best_checkpoint_warns(
    damage, command_server, uninterrupted_run, tmp_path
):
    out = tmp_path / "run"
    assert run(command_server, out, "step:7:term").code == 143
    if damage == "gone":
        shutil.rmtree(out / "best")
    else:
        (out / "best" / "model.safetensors").write_bytes(b"")
    done = run(command_server, out)
    assert done.code == 0
    assert str(out / "best") in done.err
    assert command_server.run("evaluate", out).code == 0


@pytest.mark.fault("B5")
def test_resume_with_deleted_checkpoints_of_the_first_epoch_is_refused(command_server, tmp_path):
    out = tmp_path / "run"
    done = run(command_server, out, "step:4:kill", "--run.save_every_steps", "1")
    assert done.code == -signal.SIGKILL
    for _, folder in run_folder.list_checkpoints(out):
        shutil.rmtree(folder)
    done = run(command_server, out, "", "--run.save_every_steps", "1")
    assert done.code == 4
    assert str(out) in done.err
    assert "--out" in done.err
