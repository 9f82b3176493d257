"""A run that is stopped and resumed is bit-identical to the uninterrupted run."""

import json
import signal
from pathlib import Path

import pytest
import torch

from deit.core import fault_injection, run_folder, run_log
from deit.core.errors import NumericsError, StoppedBySignal
from deit.training import save
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.resume_helpers import LAST, STEPS, results, resumes_after, stop_at


# First, last, end of an epoch, within an epoch. All steps: the slow test below.
@pytest.mark.fault("A1", "A10", "A19")
@pytest.mark.parametrize("step", [1, STEPS, STEPS + 2, STEPS + 3, LAST])
def test_resume_after_any_step_is_bit_identical(step, config, uninterrupted_run, tmp_path):
    out = tmp_path / "run"
    stop_at(config, out, f"step:{step}:term")
    assert run_folder.checkpoint_step(run_folder.latest_checkpoint(out)) == step
    torch.rand(17)  # a resumed process has a different random state
    workers = 2 if step == 6 else 1 if step == 7 else 0
    train(config.replace(data={"num_workers": workers}), out, resume=True)
    assert results(out) == results(uninterrupted_run)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_resume_restores_the_momentum_of_sgd(momentum, live_config, tmp_path):
    live_config = live_config.replace(optim={"name": "sgd", "momentum": momentum})
    train(live_config, tmp_path / "uninterrupted")
    stop_at(live_config, tmp_path / "run", "step:5:term")
    train(live_config, tmp_path / "run", resume=True)
    assert results(tmp_path / "run") == results(tmp_path / "uninterrupted")


@pytest.mark.fault("A19")
@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("step", range(1, LAST + 1))
def test_resume_with_any_number_of_workers_is_bit_identical(
    step, workers, config, uninterrupted_run, tmp_path
):
    out = tmp_path / "run"
    config = config.replace(data={"num_workers": workers})
    stop_at(config, out, f"step:{step}:term")
    train(config, out, resume=True)
    assert results(out) == results(uninterrupted_run)


@pytest.mark.fault("D12")
def test_resume_continues_the_count_of_skipped_steps(live_config, tmp_path):
    """Two skipped steps in a row, one before and one after a stop, end the run."""
    live_config = live_config.replace(run={"max_nonfinite_steps": 2})
    fault_injection.install_faults("loss:5:nan,loss:6:nan")
    with raises(NumericsError, tmp_path / "uninterrupted" / run_log.NONFINITE_LOG):
        train(live_config, tmp_path / "uninterrupted")
    stop_at(live_config, tmp_path / "run", "loss:5:nan,step:5:term")
    fault_injection.install_faults("loss:1:nan")
    with raises(NumericsError, tmp_path / "run" / run_log.NONFINITE_LOG):
        train(live_config, tmp_path / "run", resume=True)
    for name in ("uninterrupted", "run"):
        skipped = run_log.read(tmp_path / name / run_log.NONFINITE_LOG)
        assert [row["step"] for row in skipped] == [5, 6]


def test_resume_with_more_allowed_nonfinite_steps_continues(live_config, tmp_path):
    fault_injection.install_faults("loss:5:nan,loss:6:nan")
    with pytest.raises(NumericsError):
        train(live_config.replace(run={"max_nonfinite_steps": 2}), tmp_path / "run")
    fault_injection.install_faults("loss:1:nan,loss:2:nan")
    live_config = live_config.replace(run={"max_nonfinite_steps": 3})
    assert train(live_config, tmp_path / "run", resume=True)["skipped"] == 2


@pytest.mark.fault("A9")
def test_resume_of_a_finished_run_changes_no_file(config, uninterrupted_run):
    def times() -> dict[Path, int]:
        paths = (uninterrupted_run, *uninterrupted_run.rglob("*"))
        return {path: path.stat().st_mtime_ns for path in paths}

    before = times()
    result = train(config, uninterrupted_run, resume=True)
    assert times() == before
    assert result == json.loads((uninterrupted_run / "result.json").read_text())


@pytest.mark.fault("A16")
def test_usr1_saves_a_checkpoint_and_training_continues(
    config, uninterrupted_run, tmp_path, monkeypatch
):
    steps = []
    write = run_folder.save_checkpoint
    monkeypatch.setattr(
        run_folder,
        "save_checkpoint",
        lambda out, step, *a, **k: (steps.append(step), write(out, step, *a, **k)),
    )
    fault_injection.install_faults("step:6:usr1")
    train(config, tmp_path / "run")
    assert steps == [4, 6, 8, 12]
    assert results(tmp_path / "run") == results(uninterrupted_run)


def test_save_every_steps_keeps_num_checkpoints(config, uninterrupted_run, tmp_path):
    out = tmp_path / "run"
    train(config.replace(run={"save_every_steps": 3, "num_checkpoints": 3}), out)
    assert [step for step, _ in run_folder.list_checkpoints(out)] == [12, 9, 8]
    chain = [row["step"] for row in run_log.read(out / run_log.HASH_CHAIN)]
    assert chain == [3, 4, 6, 8, 9, 12]
    # The hash chains differ: they have an entry for each checkpoint.
    actual, expected = ({**results(run), "chain": b""} for run in (out, uninterrupted_run))
    actual["result"].pop("chain"), expected["result"].pop("chain")
    assert actual == expected


@pytest.mark.fault("A15", "A17")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
def test_signal_stops_the_run_with_its_exit_code(signum, live_config, tmp_path):
    before = signal.signal(signum, signal.SIG_DFL)  # ignored if the tests run in the background
    name = signal.Signals(signum).name.removeprefix("SIG").lower()
    fault_injection.install_faults(f"step:2:{name}")
    with pytest.raises(StoppedBySignal) as stop:
        train(live_config, tmp_path / "run")
    assert signal.signal(signum, before) == signal.SIG_DFL  # the handler is restored
    assert stop.value.exit_code == 128 + signum
    assert run_folder.checkpoint_step(run_folder.latest_checkpoint(tmp_path / "run")) == 2
    assert "--resume" in str(stop.value)


@pytest.mark.fault("A6", "A11")
def test_stop_in_an_evaluation_repeats_only_the_evaluation(
    config, uninterrupted_run, tmp_path, capsys
):
    out = tmp_path / "run"
    small = config.replace(run={"eval_batch_size": 4})
    stop_at(small, out, "evaluation:5:term")  # the first three evaluate the teacher
    capsys.readouterr()
    fault_injection.install_faults("step:1:term")
    with pytest.raises(StoppedBySignal):
        train(small, out, resume=True)
    assert resumes_after(4, out, capsys.readouterr().out)
    assert [row["epoch"] for row in run_log.read(out / run_log.METRICS)] == [1]
    assert run_folder.checkpoint_step(run_folder.latest_checkpoint(out)) == 5
    fault_injection.install_faults(None)
    train(small, out, resume=True)
    assert results(out) == results(uninterrupted_run)


@pytest.mark.fault("A18")
def test_slow_checkpoint_is_logged(live_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(save, "_SLOW_S", 0.0)
    stop_at(live_config, tmp_path / "run", "step:1:term")
    assert str(run_folder.checkpoint_path(tmp_path / "run", 1)) in capsys.readouterr().err


@pytest.mark.fault("B11", "D15")
@pytest.mark.parametrize("top1", [float("nan"), 0.5])
def test_nan_accuracy_is_never_the_best(top1, live_config, tmp_path, monkeypatch):
    values = iter([0.25, top1, 0.2])
    monkeypatch.setattr(save, "selection_metric", lambda validation: next(values))
    best = train(live_config, tmp_path / "run")["best"]["epoch"]
    assert best == (2 if top1 == 0.5 else 1)


@pytest.mark.fault("A11")
@pytest.mark.parametrize("fault", ["optimizer:1:term", "manifest:1:term", "metrics:1:term"])
def test_signal_during_a_save_stops_after_the_save(fault, config, uninterrupted_run, tmp_path):
    out = tmp_path / "run"
    stop_at(config, out, fault)
    assert run_folder.checkpoint_step(run_folder.latest_checkpoint(out)) in (4, 5)
    train(config, out, resume=True)
    assert results(out) == results(uninterrupted_run)
