"""deit.train and deit.finetune: callbacks, silence, running a cell twice, Ctrl-C."""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

import deit
from deit.core import run_log
from tests.helpers.errors import raises
from tests.helpers.small_runs import two_epochs
from tests.helpers.trained import trained

CONFIG = two_epochs(run={"eval_every_epochs": 1})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of CONFIG without an interruption."""
    return trained(CONFIG, tmp_path_factory.mktemp("uninterrupted") / "run")


def test_callbacks_get_the_rows_of_metrics(tmp_path, uninterrupted):
    rows, epochs = [], []
    run = deit.train(
        CONFIG,
        str(tmp_path / "run"),
        callbacks=[rows.append, lambda row: epochs.append(row.pop("epoch"))],
        verbose=False,
    )
    assert epochs == [1, 2]
    assert rows == run.metrics == run_log.read(tmp_path / "run" / "metrics.jsonl")
    assert run.result["epochs"] == 2
    same = (tmp_path / "run" / "best/model.safetensors").read_bytes()
    assert same == (uninterrupted / "best/model.safetensors").read_bytes()


def test_silent_training_prints_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("deit.core.console._PLAIN_INTERVAL_S", 0)
    deit.train(CONFIG, tmp_path / "run", verbose=False)
    assert capfd.readouterr() == ("", "")
    deit.train(CONFIG, tmp_path / "loud")
    printed = capfd.readouterr()
    assert "epoch 2/2" in printed.out
    assert re.search(r"^epoch 2/2: \d+/\d+, ETA ", printed.err, re.MULTILINE)


def test_cell_that_runs_twice_destroys_nothing(uninterrupted, tmp_path):
    before = {path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()}
    with raises(deit.errors.ConfigError, uninterrupted):
        deit.train(CONFIG, uninterrupted, verbose=False)
    run = deit.train(CONFIG, uninterrupted, resume=True, verbose=False)
    assert run.result["epochs"] == 2
    assert {
        path: path.read_bytes() for path in uninterrupted.rglob("*") if path.is_file()
    } == before
    started = deit.train(CONFIG, tmp_path / "new", resume=True, verbose=False)  # nothing to resume
    assert started.result["epochs"] == 2


def test_keyboard_interrupt_saves_a_checkpoint_that_resumes_to_the_same_bits(
    uninterrupted, tmp_path
):
    def interrupt(row):
        if row["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        deit.train(CONFIG, tmp_path / "run", callbacks=[interrupt], verbose=False)
    assert signal.getsignal(signal.SIGINT) is before
    stopped = deit.load_run(tmp_path / "run")
    assert stopped.result is None
    assert len(stopped.metrics) == 1
    deit.train(CONFIG, tmp_path / "run", resume=True, verbose=False)
    for name in ("state_hashes.jsonl", "best/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (uninterrupted / name).read_bytes()


def fail_in_step(point):
    if point == "step":
        raise RuntimeError("enough")


def fail_to_predict(accelerator, model, batches, num_images):
    next(batches)
    raise RuntimeError("enough")


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("deit.training.epochs.fault_point", fail_in_step),
        ("deit.distill.inference.predict", fail_to_predict),
    ],
)
def test_error_ends_the_progress_bar(name, function, tmp_path, monkeypatch):
    started, ended = [], []

    def bar(items, total, title, done):
        started.append(title)
        try:
            yield from items
        finally:
            ended.append(title)

    monkeypatch.setattr("deit.core.console._lines", bar)
    monkeypatch.setattr(name, function)
    with pytest.raises(RuntimeError, match="enough") as caught:
        deit.train(CONFIG, tmp_path / "run")
    assert caught.tb  # as in a notebook, which keeps the traceback of the last error
    assert started == ended != []


@pytest.mark.parametrize("message", ["enough", "CUDA out of memory"])
def test_error_in_a_callback_keeps_the_run(uninterrupted, tmp_path, message):
    def fail(row):
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match=message):
        deit.train(CONFIG, tmp_path / "run", callbacks=[fail], verbose=False)
    run = deit.train(CONFIG, tmp_path / "run", resume=True, verbose=False)
    assert (run.path / "best/model.safetensors").read_bytes() == (
        uninterrupted / "best/model.safetensors"
    ).read_bytes()


def test_one_training_at_a_time(uninterrupted, tmp_path):
    refused = []

    def train_elsewhere(row):
        for out, resume in ((tmp_path / "run", True), (tmp_path / "other", False)):
            with ThreadPoolExecutor() as pool:
                call = pool.submit(deit.train, CONFIG, out, resume=resume, verbose=False)
            refused.append(call.exception())

    run = deit.train(CONFIG, tmp_path / "run", callbacks=[train_elsewhere], verbose=False)
    assert len(refused) == 4
    assert all(isinstance(error, deit.errors.SystemFault) for error in refused)
    assert all("another training runs in this process" in str(error) for error in refused)
    assert not (tmp_path / "other").exists()
    assert len(run.metrics) == 2
    assert (run.path / "best/model.safetensors").read_bytes() == (
        uninterrupted / "best/model.safetensors"
    ).read_bytes()
    deit.dry_run(CONFIG)  # a training can follow


def test_invalid_configuration_raises_before_work(tmp_path):
    with raises(deit.errors.ConfigError) as caught:
        deit.train(CONFIG.replace(optim={"epochs": 0, "lr": -1}), tmp_path / "run")
    fields = {problem.field for problem in caught.value.problems}
    assert fields == {"optim.epochs", "optim.lr"}
    with raises(deit.errors.ConfigError, "digist", "digits"):
        deit.train("digist", tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert deit.dry_run(CONFIG)["epoch"] == 0
    assert not list(tmp_path.iterdir())


def test_finetune_takes_a_run_and_fields(uninterrupted, tmp_path):
    rows = []
    run = deit.load_run(uninterrupted).finetune(
        tmp_path / "tuned",
        resolution=16,
        epochs=1,
        optim={"lr": 1e-4},
        callbacks=[rows.append],
        verbose=False,
    )
    assert (run.config.student.image_size, run.config.optim.lr) == (16, 1e-4)
    assert run.config.init.weights == str(uninterrupted)
    assert [row["epoch"] for row in rows] == [1]
    with raises(deit.errors.ConfigError, "optim.lrr", "optim.lr"):
        deit.finetune(uninterrupted, tmp_path / "other", optim={"lrr": 1})
    with raises(deit.errors.ConfigError, "epochs", 0):
        deit.finetune(uninterrupted, tmp_path / "other", epochs=0)
    assert not (tmp_path / "other").exists()
