"""Trackers log the numbers of the run folder, only if configured, and never stop a run."""

import importlib.util
import json
import re
import sqlite3

import pytest

from deit.config.field_types import Trackers
from deit.config.recipes.handwriting import digits_teacher
from deit.core import run_log
from deit.core.console import info
from deit.core.errors import StoppedBySignal, SystemFault
from deit.training import trackers
from deit.training.train import train
from tests.helpers.errors import raises

pytest.importorskip("sklearn")
NAMES = Trackers.__args__[0].__args__[0].__args__


def config(*names, **sections):
    small = digits_teacher().replace(
        data={"train_fraction": 0.2},
        optim={"epochs": 3, "warmup_epochs": 1},
        run={"trackers": names, "eval_every_epochs": 1},
    )
    return small.replace(**sections)


def scalars(folder):
    """Return the scalars that TensorBoard reads: tag -> [(step, value)]."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = {}
    for path in sorted({file.parent for file in folder.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(path))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            values.setdefault(tag, []).extend(
                (event.step, event.value) for event in events.Scalars(tag)
            )
    return values


@pytest.mark.filterwarnings("ignore")  # TensorBoard's
def test_tensorboard_has_the_metrics_of_a_resumed_run(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from deit.core import fault_injection

    out = tmp_path / "run"
    fault_injection.install_faults("step:9:term")
    with pytest.raises(StoppedBySignal):
        train(config("tensorboard"), out)
    fault_injection.install_faults(None)
    train(config("tensorboard"), out, resume=True)
    values = scalars(out / trackers.FOLDER)
    rows = run_log.read(out / run_log.METRICS)
    assert len(rows) == 3
    for group, name in (("train", "loss"), ("train", "lr"), ("validation", "class_top1")):
        expected = [(row["step"], pytest.approx(row[group][name], rel=1e-6)) for row in rows]
        assert sorted(values[f"{group}/{name}"]) == expected
    assert "speed/images_per_s" in values


def test_default_config_has_no_tracker(tmp_path):
    train(config(), tmp_path / "run")
    assert not (tmp_path / "run" / trackers.FOLDER).exists()


@pytest.mark.parametrize("name", NAMES)
def test_missing_tracker_package_is_refused_before_training(name, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        trackers, "find_spec", lambda package: None if package == name else find_spec(package)
    )
    with raises(SystemFault, f"run.trackers {name}", f"pip install {name}"):
        train(config(name), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Failing:
    """A tracker whose server cannot be reached after the first epoch."""

    name = "failing"

    def __init__(self):
        self.logged = []

    def log(self, values, step):
        self.logged.append((step, values))
        if len(self.logged) > 1:
            raise ConnectionError("no route to host")

    def finish(self):
        raise ConnectionError("no route to host")


def test_failing_tracker_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    tracker = Failing()
    init_trackers = trackers.Accelerator.init_trackers

    def init_failing_tracker(self, project, flat, settings):
        init_trackers(self, project, flat, settings)
        self.trackers = [tracker]
        info(str(sorted(flat)[:1]))

    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    monkeypatch.setattr(trackers, "filter_trackers", lambda names, folder: [])
    monkeypatch.setattr(trackers.Accelerator, "init_trackers", init_failing_tracker)
    train(config("wandb"), tmp_path / "run")
    assert len(tracker.logged) == 2
    stderr = capsys.readouterr().err
    assert re.search(r"\bfailing\b.*no route to host", stderr)
    assert stderr.count("no route to host") == 1  # then it is disabled
    step, values = tracker.logged[0]
    row = run_log.read(tmp_path / "run" / run_log.METRICS)[0]
    assert (step, values["validation/class_top1"]) == (row["step"], row["validation"]["class_top1"])


def test_tracker_that_cannot_start_is_reported_in_one_line(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("no key\nsee there")

    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    monkeypatch.setattr(trackers.Accelerator, "init_trackers", refuse)
    with raises(SystemFault, "run.trackers wandb", "no key") as raised:
        train(config("wandb"), tmp_path / "run")
    assert "\n" not in str(raised.value)


@pytest.fixture
def tracker_arguments(monkeypatch):
    """Return a function that returns the configuration and settings that trackers receive."""
    calls = []
    monkeypatch.setattr(trackers, "filter_trackers", lambda names, folder: [])
    monkeypatch.setattr(
        trackers.Accelerator,
        "init_trackers",
        lambda self, project, *arguments: calls.append(arguments),
    )

    def arguments_of(out, name="wandb"):
        with trackers.tracked(trackers.Accelerator(cpu=True), config(name), out):
            return calls[-1]

    return arguments_of


def test_tracker_config_has_plain_types(tracker_arguments, tmp_path):
    flat, _ = tracker_arguments(tmp_path / "run", "tensorboard")
    assert flat["optim.lr"] == 3e-3
    assert (flat["optim.clip_grad_norm"], flat["run.trackers"]) == ("none", "tensorboard")
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())


def test_tracker_names_are_kept_on_resume_and_unique_per_folder(tracker_arguments, tmp_path):
    _, first = tracker_arguments(tmp_path / "a" / "run")
    assert tracker_arguments(tmp_path / "a" / "run")[1] == first
    assert (first["wandb"]["name"], first["wandb"]["resume"]) == ("run", "allow")
    _, other = tracker_arguments(tmp_path / "b" / "run")
    assert other["wandb"]["id"] != first["wandb"]["id"]
    assert other["trackio"]["name"] != first["trackio"]["name"]


def logged_by_mlflow(folder):
    import mlflow

    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert run.data.params["optim.epochs"] == "3"
    assert run.info.status == "FINISHED"
    return [(metric.step, metric.value) for metric in history]


def logged_by_trackio(folder):
    cursor = sqlite3.connect(folder / "trackio" / "deit.db").execute(
        "SELECT run_id, step, metrics FROM metrics ORDER BY step"
    )
    rows = cursor.fetchall()
    assert len({row[0] for row in rows}) == 1
    return [(step, json.loads(metrics)["train/loss"]) for _, step, metrics in rows]


def logged_by_wandb(folder):
    """Offline, each start of a run has its file; `wandb sync` joins those of one identifier."""
    parts = sorted((folder / "run" / trackers.FOLDER / "wandb").glob("offline-run-*-*"))
    assert len(parts) == 2
    assert len({part.name.rpartition("-")[2] for part in parts}) == 1
    # Protocol buffers: a key, the tag of its value in JSON, the length, the value.
    content = b"".join(next(part.glob("*.wandb")).read_bytes() for part in parts)
    steps = re.findall(rb"_step\x82\x01.([0-9]+)", content, re.DOTALL)
    losses = re.findall(rb"train/loss\x82\x01.([0-9.e-]+)", content, re.DOTALL)
    # A set, because the summary repeats the last values.
    return sorted(set(zip(map(int, steps), map(float, losses), strict=True)))


LOGGED_BY = {"mlflow": logged_by_mlflow, "trackio": logged_by_trackio, "wandb": logged_by_wandb}


@pytest.mark.filterwarnings("ignore")  # those of the packages
@pytest.mark.parametrize("name", LOGGED_BY)
def test_tracker_has_the_metrics_of_a_resumed_run_as_one_run(name, tmp_path, monkeypatch):
    """Without a network: wandb offline, mlflow and trackio in files."""
    from deit.core import fault_injection

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    out = tmp_path / "run"
    fault_injection.install_faults("step:9:term")
    with pytest.raises(StoppedBySignal):
        train(config(name), out)
    fault_injection.install_faults(None)
    train(config(name, run={"num_checkpoints": 3}), out, resume=True)
    rows = run_log.read(out / run_log.METRICS)
    expected = [(row["step"], pytest.approx(row["train"]["loss"], rel=1e-6)) for row in rows]
    assert len(expected) == 3
    assert LOGGED_BY[name](tmp_path) == expected
