"""Trackers: the numbers of the run folder once more; never unasked, never in the way."""

import importlib.util

import pytest

from deit import journal, trackers
from deit.config import Trackers, derive
from deit.console import say
from deit.errors import EnvironmentFault, Stopped
from deit.recipes import digits_teacher
from deit.run import train

pytest.importorskip("sklearn")
NAMES = Trackers.__args__[0].__args__[0].__args__


def config(*names, **sections):
    small = derive(
        digits_teacher(),
        data={"train_fraction": 0.2},
        optim={"epochs": 3, "warmup_epochs": 1},
        run={"trackers": names, "evaluate_every": 1},
    )
    return derive(small, **sections)


def scalars(folder):
    """What TensorBoard's own reader finds: tag -> [(step, value)]."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for path in sorted({file.parent for file in folder.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(path))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((one.step, one.value) for one in events.Scalars(tag))
    return found


@pytest.mark.filterwarnings("ignore")  # of TensorBoard's own
def test_tensorboard_has_the_numbers_of_the_run_folder_also_after_a_stop(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from deit import faults

    out = tmp_path / "run"
    faults.arm("update:9:term")
    with pytest.raises(Stopped):
        train(config("tensorboard"), out)
    faults.arm(None)
    train(config("tensorboard"), out, resume=True)
    found = scalars(out / trackers.FOLDER)
    rows = journal.read(out / journal.METRICS)
    assert len(rows) == 3
    for group, name in (("train", "loss"), ("train", "lr"), ("validation", "class_top1")):
        told = [(row["step"], pytest.approx(row[group][name], rel=1e-6)) for row in rows]
        assert sorted(found[f"{group}/{name}"]) == told
    assert "speed/images_per_s" in found


def test_nothing_is_tracked_unless_asked(tmp_path):
    train(config(), tmp_path / "run")
    assert not (tmp_path / "run" / trackers.FOLDER).exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_said_before_the_work(name, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda one: None if one == name else real(one))
    with pytest.raises(EnvironmentFault, match=f"run.trackers {name}: .* pip install {name}"):
        train(config(name), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Failing:
    """A tracker whose server goes away after the first epoch."""

    name = "failing"

    def __init__(self):
        self.logged = []

    def log(self, values, step):
        self.logged.append((step, values))
        if len(self.logged) > 1:
            raise ConnectionError("no route to host")

    def finish(self):
        raise ConnectionError("no route to host")


def test_a_tracker_that_fails_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    one = Failing()
    begin = trackers.Accelerator.init_trackers

    def init(self, project, flat, settings):
        begin(self, project, flat, settings)
        self.trackers = [one]
        say(str(sorted(flat)[:1]))

    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    monkeypatch.setattr(trackers, "filter_trackers", lambda names, folder: [])
    monkeypatch.setattr(trackers.Accelerator, "init_trackers", init)
    train(config("wandb"), tmp_path / "run")
    assert len(one.logged) == 2
    assert "the tracker failing failed and is left alone now: no route" in capsys.readouterr().err
    step, values = one.logged[0]
    row = journal.read(tmp_path / "run" / journal.METRICS)[0]
    assert (step, values["validation/class_top1"]) == (row["step"], row["validation"]["class_top1"])


def test_a_tracker_that_cannot_begin_is_one_line(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise RuntimeError("no key\nsee there")

    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    monkeypatch.setattr(trackers.Accelerator, "init_trackers", refuse)
    with pytest.raises(EnvironmentFault, match=r"^run\.trackers wandb: no key$"):
        train(config("wandb"), tmp_path / "run")


def test_a_configuration_is_handed_on_in_types_that_all_take():
    flat = trackers._flat(config("tensorboard"))
    assert flat["optim.lr"] == 3e-3
    assert (flat["optim.clip_norm"], flat["run.trackers"]) == ("none", "tensorboard")
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())


def test_a_resumed_run_is_the_same_one_for_wandb(tmp_path):
    first = trackers._settings(tmp_path / "run", tmp_path)
    assert trackers._settings(tmp_path / "run", tmp_path) == first
    assert (first["wandb"]["name"], first["wandb"]["resume"]) == ("run", "allow")
