"""Checkpoints that are damaged, unreadable, missing or hold other files."""

import errno
import os
import re
import shutil
from pathlib import Path

import pytest

from deit.core import run_folder
from deit.core.errors import (
    CheckpointError,
    ConfigError,
    DeitError,
)
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.resume_helpers import results, resumes_after, stop_at


@pytest.mark.fault("B5")
def test_resume_without_any_checkpoint_is_refused(config, uninterrupted_run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted_run, out)
    (out / "result.json").unlink()
    for _, folder in run_folder.list_checkpoints(out):
        shutil.rmtree(folder)
    with raises(CheckpointError, out, "another folder"):
        train(config, out, resume=True)


@pytest.mark.fault("B1", "B2", "B4")
def test_resume_renames_a_damaged_checkpoint_and_uses_the_one_before(
    config, uninterrupted_run, tmp_path, capsys
):
    out = tmp_path / "run"
    stop_at(config, out, "step:6:term")
    newest = run_folder.latest_checkpoint(out)
    assert [step for step, _ in run_folder.list_checkpoints(out)] == [6, 4]
    weights = newest / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    train(config, out, resume=True)
    output = capsys.readouterr()
    assert str(weights) in output.err
    assert resumes_after(4, out, output.out)
    assert (out / "damaged-checkpoint-00000006" / "model.safetensors").read_bytes() == content
    assert results(out) == results(uninterrupted_run)


@pytest.mark.parametrize(
    ("call", "error_number"),
    [("open", errno.EMFILE), ("open", errno.EACCES), ("lstat", errno.ESTALE)],
)
def test_unreadable_checkpoint_is_not_treated_as_damaged(
    call, error_number, config, uninterrupted_run, tmp_path, monkeypatch
):
    """For example a file server fails for a moment: nothing is renamed or trained again."""
    out = tmp_path / "run"
    stop_at(config, out, "step:6:term")
    before, sound = set(out.rglob("*")), getattr(Path, call)

    def failing(self, *arguments, **options):
        if self == run_folder.checkpoint_path(out, 6) / "model.safetensors":
            raise OSError(error_number, os.strerror(error_number), str(self))
        return sound(self, *arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Path, call, failing)
        with raises(DeitError, "model.safetensors") as raised:
            train(config, out, resume=True)
    assert raised.value.exit_code == 5
    assert before <= set(out.rglob("*"))
    train(config, out, resume=True)
    assert not list(out.glob("damaged-*"))
    assert results(out) == results(uninterrupted_run)


@pytest.mark.fault("B3", "B5")
def test_resume_with_all_checkpoints_damaged_is_refused(live_config, tmp_path):
    out = tmp_path / "run"
    stop_at(live_config, out, "step:6:term")
    (out / "checkpoint-00000004" / "manifest.json").unlink()
    (out / "checkpoint-00000006" / "optimizer.safetensors").write_bytes(b"")
    before = sorted(out.rglob("*"))
    empty, unfinished = out / "checkpoint-00000006", out / "checkpoint-00000004"
    with raises(CheckpointError, empty / "optimizer.safetensors", unfinished) as error:
        train(live_config, out, resume=True)
    assert re.search(r"optimizer\.safetensors\b.*\b0 bytes\b", str(error.value))
    assert re.search(r"checkpoint-00000004\W.*manifest\.json", str(error.value))
    assert error.value.exit_code == 4
    assert sorted(out.rglob("*")) == before


@pytest.mark.fault("B22")
def test_num_checkpoints_1_is_refused(config, tmp_path):
    with raises(ConfigError, "run.num_checkpoints"):
        train(config.replace(run={"num_checkpoints": 1}), tmp_path / "run")


@pytest.mark.fault("B3")
def test_unlisted_files_in_a_checkpoint_are_reported_and_not_read(
    config, uninterrupted_run, tmp_path, capsys
):
    out = tmp_path / "run"
    stop_at(config, out, "step:6:term")
    unlisted = run_folder.latest_checkpoint(out) / "optimizer.pt"
    unlisted.write_bytes(b"no")
    train(config, out, resume=True)
    assert str(unlisted) in capsys.readouterr().err
    assert results(out) == results(uninterrupted_run)


@pytest.mark.fault("B15")
def test_link_in_a_checkpoint_is_refused(stopped_run, tmp_path):
    config, stopped = stopped_run
    shutil.copytree(stopped, tmp_path / "run")
    path = run_folder.latest_checkpoint(tmp_path / "run") / "model.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with raises(CheckpointError, path, tmp_path / "elsewhere"):
        train(config, tmp_path / "run", resume=True)


@pytest.mark.fault("A25")
def test_out_that_is_a_checkpoint_is_refused(stopped_run, tmp_path):
    config, stopped = stopped_run
    shutil.copytree(stopped, tmp_path / "run")
    folder = run_folder.latest_checkpoint(tmp_path / "run")
    with raises(ConfigError, f"out = {folder}", run_folder.CONFIG):
        train(config, folder, resume=True)
