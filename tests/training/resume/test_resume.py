"""A run stopped at any update and resumed is the uninterrupted run, to the bit."""

import json
import signal
from pathlib import Path

import pytest
import torch

from deit.core import fault_injection, run_folder, run_log
from deit.core.errors import (
    NumericsError,
    StoppedBySignal,
)
from deit.training import save
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.resume_helpers import LAST, STEPS, results, resumes_after, stop_at


# The first, the last, the end of an epoch, and within one. All of them: test_with_any_number_...
@pytest.mark.fault("A1", "A10", "A19")
@pytest.mark.parametrize("step", [1, STEPS, STEPS + 2, STEPS + 3, LAST])
def test_stopped_at_any_update_and_resumed_is_the_same_run(
    step, config, uninterrupted_run, tmp_path
):
    out = tmp_path / "run"
    stop_at(config, out, f"update:{step}:term")
    assert run_folder.checkpoint_step(run_folder.latest_checkpoint(out)) == step
    torch.rand(17)  # a resumed process has another random state
    workers = 2 if step == 6 else 1 if step == 7 else 0
    train(config.replace(data={"num_workers": workers}), out, resume=True)
    assert results(out) == results(uninterrupted_run)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_goes_on_with_its_momentum(momentum, live_config, tmp_path):
    live_config = live_config.replace(optim={"name": "sgd", "momentum": momentum})
    train(live_config, tmp_path / "uninterrupted")
    stop_at(live_config, tmp_path / "run", "update:5:term")
    train(live_config, tmp_path / "run", resume=True)
    assert results(tmp_path / "run") == results(tmp_path / "uninterrupted")


@pytest.mark.fault("A19")
@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("step", range(1, LAST + 1))
def test_with_any_number_of_workers_too(step, workers, config, uninterrupted_run, tmp_path):
    out = tmp_path / "run"
    config = config.replace(data={"num_workers": workers})
    stop_at(config, out, f"update:{step}:term")
    train(config, out, resume=True)
    assert results(out) == results(uninterrupted_run)


@pytest.mark.fault("D12")
def test_skipped_updates_are_counted_over_a_stop(live_config, tmp_path):
    """The one field that only shows where a run fails: two in a row, one on each side of a stop."""
    live_config = live_config.replace(run={"max_nonfinite_steps": 2})
    fault_injection.install_faults("loss:5:nan,loss:6:nan")
    with raises(NumericsError, tmp_path / "uninterrupted" / run_log.NONFINITE_LOG):
        train(live_config, tmp_path / "uninterrupted")
    stop_at(live_config, tmp_path / "run", "loss:5:nan,update:5:term")
    fault_injection.install_faults("loss:1:nan")
    with raises(NumericsError, tmp_path / "run" / run_log.NONFINITE_LOG):
        train(live_config, tmp_path / "run", resume=True)
    for name in ("uninterrupted", "run"):
        left_out = run_log.read(tmp_path / name / run_log.NONFINITE_LOG)
        assert [row["step"] for row in left_out] == [5, 6]


def test_a_run_that_ended_so_goes_on_where_more_are_allowed(live_config, tmp_path):
    fault_injection.install_faults("loss:5:nan,loss:6:nan")
    with pytest.raises(NumericsError):
        train(live_config.replace(run={"max_nonfinite_steps": 2}), tmp_path / "run")
    fault_injection.install_faults("loss:1:nan,loss:2:nan")
    live_config = live_config.replace(run={"max_nonfinite_steps": 3})
    assert train(live_config, tmp_path / "run", resume=True)["skipped"] == 2


@pytest.mark.fault("A9")
def test_a_finished_run_stays_as_it_is_to_the_very_times_of_its_files(config, uninterrupted_run):
    def times() -> dict[Path, int]:
        everything = (uninterrupted_run, *uninterrupted_run.rglob("*"))
        return {path: path.stat().st_mtime_ns for path in everything}

    before = times()
    result = train(config, uninterrupted_run, resume=True)
    assert times() == before
    assert result == json.loads((uninterrupted_run / "result.json").read_text())


@pytest.mark.fault("A16")
def test_a_warning_signal_saves_and_the_run_goes_on(
    config, uninterrupted_run, tmp_path, monkeypatch
):
    steps = []
    write = run_folder.save_checkpoint
    monkeypatch.setattr(
        run_folder,
        "save_checkpoint",
        lambda out, step, *a, **k: (steps.append(step), write(out, step, *a, **k)),
    )
    fault_injection.install_faults("update:6:usr1")
    train(config, tmp_path / "run")
    assert steps == [4, 6, 8, 12]
    assert results(tmp_path / "run") == results(uninterrupted_run)


def test_checkpoints_within_an_epoch_stay_as_few_as_asked_for(config, uninterrupted_run, tmp_path):
    out = tmp_path / "run"
    train(config.replace(run={"save_every_steps": 3, "num_checkpoints": 3}), out)
    assert [step for step, _ in run_folder.list_checkpoints(out)] == [12, 9, 8]
    chain = [row["step"] for row in run_log.read(out / run_log.HASH_CHAIN)]
    assert chain == [3, 4, 6, 8, 9, 12]
    ours, theirs = ({**results(one), "chain": b""} for one in (out, uninterrupted_run))
    ours["result"].pop("chain"), theirs["result"].pop("chain")
    assert ours == theirs


@pytest.mark.fault("A15", "A17")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_other_signals_stop_as_well_each_with_its_code(number, live_config, tmp_path):
    before = signal.signal(number, signal.SIG_DFL)  # where the tests run in the background
    name = signal.Signals(number).name.removeprefix("SIG").lower()
    fault_injection.install_faults(f"update:2:{name}")
    with pytest.raises(StoppedBySignal) as stop:
        train(live_config, tmp_path / "run")
    assert signal.signal(number, before) == signal.SIG_DFL  # put back
    assert stop.value.exit_code == 128 + number
    assert run_folder.checkpoint_step(run_folder.latest_checkpoint(tmp_path / "run")) == 2
    assert "--resume" in str(stop.value)


@pytest.mark.fault("A6", "A11")
def test_a_stop_in_an_evaluation_evaluates_again_and_trains_nothing_again(
    config, uninterrupted_run, tmp_path, capsys
):
    out = tmp_path / "run"
    small = config.replace(run={"eval_batch_size": 4})
    stop_at(small, out, "evaluation:5:term")  # the first three are of the teacher
    capsys.readouterr()
    fault_injection.install_faults("update:1:term")
    with pytest.raises(StoppedBySignal):
        train(small, out, resume=True)
    assert resumes_after(4, out, capsys.readouterr().out)
    assert [row["epoch"] for row in run_log.read(out / run_log.METRICS)] == [1]
    assert run_folder.checkpoint_step(run_folder.latest_checkpoint(out)) == 5
    fault_injection.install_faults(None)
    train(small, out, resume=True)
    assert results(out) == results(uninterrupted_run)


@pytest.mark.fault("A18")
def test_a_slow_checkpoint_is_told(live_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(save, "_SLOW_S", 0.0)
    stop_at(live_config, tmp_path / "run", "update:1:term")
    assert str(run_folder.checkpoint_path(tmp_path / "run", 1)) in capsys.readouterr().err


@pytest.mark.fault("B11", "D15")
@pytest.mark.parametrize("top1", [float("nan"), 0.5])
def test_an_accuracy_that_is_no_number_is_never_the_best(top1, live_config, tmp_path, monkeypatch):
    values = iter([0.25, top1, 0.2])
    monkeypatch.setattr(save, "selection_metric", lambda validation: next(values))
    best = train(live_config, tmp_path / "run")["best"]["epoch"]
    assert best == (2 if top1 == 0.5 else 1)


@pytest.mark.fault("A11")
@pytest.mark.parametrize("fault", ["optimizer:1:term", "manifest:1:term", "metrics:1:term"])
def test_a_signal_during_a_save_stops_after_it(fault, config, uninterrupted_run, tmp_path):
    out = tmp_path / "run"
    stop_at(config, out, fault)
    assert run_folder.checkpoint_step(run_folder.latest_checkpoint(out)) in (4, 5)
    train(config, out, resume=True)
    assert results(out) == results(uninterrupted_run)
