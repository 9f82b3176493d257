"""A search: trials proposed, told, stopped and taken up again, by optuna's own database."""

import json
import re
import sqlite3
import warnings
from contextlib import closing

import pytest

from deit.core.errors import CheckpointError, ConfigError, SystemFault
from deit.experiments import search
from deit.experiments.runner import RunSpec
from deit.experiments.sweep_spec import SearchRange
from tests.helpers.errors import raises
from tests.helpers.processes import run_python
from tests.helpers.sweeps import finish, open_search, reach

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.filterwarnings("ignore")  # of SQLAlchemy and optuna


def test_it_learns_where_the_good_points_are(tmp_path):
    """Accuracy falls with the distance from lr 1e-2, in powers of ten."""
    import math

    one = open_search(tmp_path, trials=40)
    found = []
    for run in one.runs():
        lr = run.config.optim.lr
        found.append(abs(math.log10(lr) + 2))
        finish(run, 1 - found[-1] / 4)
        one.on_end(run, 0, "why")
    assert len(found) == 40
    assert sum(found[-10:]) < 0.7 * sum(found[:10])
    best = one.finished()[0]
    assert abs(math.log10(best.config.optim.lr) + 2) == pytest.approx(min(found))
    assert one.counts() == {"trials": 40, "finished": 40, "stopped": 0, "failed": 0}


def test_what_stays_below_the_median_is_stopped_not_before_a_quarter(tmp_path):
    one = open_search(tmp_path, trials=7)
    runs = one.runs()
    for _ in range(5):
        run = next(runs)
        for epoch in (1, 2, 4, 8):
            reach(run, epoch, 0.8)
            assert not one.should_stop(run)
        finish(run, 0.8)
        one.on_end(run, 0, "why")
    bad = next(runs)
    assert not one.should_stop(bad)  # nothing is known of it yet
    reach(bad, 1, 0.1)
    assert not one.should_stop(bad)
    reach(bad, 4, 0.1)
    assert one.should_stop(bad)
    one.on_end(bad, 143, "why")
    good = next(runs)
    reach(good, 4, 0.9)
    assert not one.should_stop(good)
    one.on_end(good, 3, "why")
    assert next(runs, None) is None
    assert one.progress.total == 1  # nothing was counted as over by hand, and nothing is left
    assert one.counts() == {"trials": 7, "finished": 5, "stopped": 1, "failed": 1}
    (stopped,) = one.stopped()
    assert (stopped.point.name, stopped.epoch, stopped.top1) == ("trial 5", 4, 0.1)
    assert stopped.point.values.keys() == {"run", "optim.lr"}


def test_a_run_at_its_end_is_not_stopped_and_counts_however_it_ended(tmp_path):
    """The evaluation of the last epoch is below the median; and a run that was finished when it was
    asked to stop."""
    one = open_search(tmp_path, epochs=8)
    runs = one.runs()
    for _ in range(5):
        run = next(runs)
        reach(run, 4, 0.9)
        one.should_stop(run)
        finish(run, 0.9)
        one.on_end(run, 0, "")
    late, last = next(runs), next(runs)
    reach(late, 4, 0.1)
    assert one.should_stop(late)
    finish(late, 0.3)
    one.on_end(late, 143, "")
    reach(last, 8, 0.1)
    assert not one.should_stop(last)
    finish(last, 0.1)
    one.on_end(last, 0, "")
    assert one.counts() == {"trials": 7, "finished": 7, "stopped": 0, "failed": 0}


def test_without_pruning_nothing_is_stopped(tmp_path):
    one = open_search(tmp_path, trials=7, prune=False)
    runs = one.runs()
    for top1 in (*[0.8] * 6, 0.1):
        run = next(runs)
        reach(run, 4, top1)
        assert not one.should_stop(run)
        finish(run, top1)
        one.on_end(run, 0, "why")


def test_trials_that_a_kill_left_open_are_proposed_again_and_count_once(tmp_path):
    one = open_search(tmp_path, trials=3)
    runs = one.runs()
    first, second = next(runs), next(runs)
    finish(first, 0.5)
    one.on_end(first, 0, "why")
    again = open_search(tmp_path, trials=3)
    assert again.num_done() == 1
    left = []
    for run in again.runs():
        left.append(run.config.optim.lr)
        finish(run, 0.6)
        again.on_end(run, 0, "why")
    assert len(left) == 2
    assert left[0] == second.config.optim.lr
    assert again.counts() == {"trials": 3, "finished": 3, "stopped": 0, "failed": 0}
    assert list(open_search(tmp_path, trials=3).runs()) == []
    more = [run.config.optim.lr for run in open_search(tmp_path, trials=5).runs()]
    assert len(more) == 2  # more, when more are asked for
    assert len({first.config.optim.lr, *left, *more}) == 5  # and none that was there


def test_where_no_point_is_left_the_search_ends(tmp_path, capsys):
    """Four points, and eight trials asked for."""
    fields = {"loss.temperature": (1, 3), "views.auto_augment": ("none", "randaugment")}

    def run_of(point):  # as in a sweep: the folder is known by what is in it
        name = f"{point.config.loss.temperature}-{point.config.views.auto_augment}"
        return RunSpec(point.name, point.config, tmp_path / name)

    one, seen = open_search(tmp_path, trials=8, fields=fields, run_of=run_of), set()
    for run in one.runs():
        seen.add((run.config.loss.temperature, run.config.views.auto_augment))
        finish(run, 0.5)
        one.on_end(run, 0, "")
    assert len(seen) == 4
    assert (one.num_left(), one.counts()["trials"], len(one.finished())) == (0, 4, 4)
    assert re.search(r"\b30\b", capsys.readouterr().out)  # proposals in a row that were not new


def test_an_epoch_without_an_evaluation_is_reported_once(tmp_path):
    one = open_search(tmp_path)
    run = next(one.runs())
    reach(run, 1, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not one.should_stop(run)
        assert not one.should_stop(run)


def test_a_trial_that_failed_is_tried_again_so_often_and_once_more_by_the_next_call(tmp_path):
    one = open_search(tmp_path, trials=2, retries=1)
    names = []
    for code in (-9, 1, 0):  # the first twice: killed, then of itself; the second is sound
        run = next(one.runs())
        names.append((run.name, run.config.optim.lr))
        if code == 0:
            finish(run, 0.5)
        one.on_end(run, code, "no memory\nleft")
    assert names[0] == names[1] != names[2]
    assert list(one.runs()) == []
    assert one.counts() == {"trials": 2, "finished": 1, "stopped": 0, "failed": 1}
    (point,) = one.failed()
    assert (point.name, point.config.optim.lr) == names[0]
    again = open_search(tmp_path, trials=2)
    assert (again.num_done(), again.failed()) == (1, [])
    run = next(again.runs())
    assert (run.name, run.config.optim.lr) == names[0]
    finish(run, 0.6)
    again.on_end(run, 0, "")
    assert again.counts() == {"trials": 2, "finished": 2, "stopped": 0, "failed": 0}
    assert [point.name for point in again.finished()] == [names[0][0], names[2][0]]


@pytest.mark.parametrize("code", [2, 3, 4, 6])
def test_a_trial_that_would_fail_the_same_way_is_not_tried_again_at_once(code, tmp_path):
    one = open_search(tmp_path, trials=1, retries=3)
    one.on_end(next(one.runs()), code, "why")
    assert list(one.runs()) == []
    assert len(one.failed()) == 1


def test_whole_numbers_and_names_are_proposed_as_such(tmp_path):
    fields = {
        "student.depth": SearchRange(2, 4, whole=True),
        "loss": ("deit-soft", "deit-hard"),
        "views.crop": ("none", "padded"),
    }
    one = open_search(tmp_path, trials=12, fields=fields)
    seen = set()
    for run in one.runs():
        assert run.config.student.depth in (2, 3, 4)
        seen.add((run.config.loss.kind, run.config.views.crop))
        one.on_end(run, 1, "why")
    assert {kind for kind, _ in seen} == {"soft", "hard"}
    assert {crop for _, crop in seen} == {"none", "padded"}


def test_a_trial_that_cannot_be_ends_nothing(tmp_path, capsys):
    """Hard labels know no temperature: about half of these are no configurations."""
    fields = {"loss.kind": ("soft", "hard"), "loss.temperature": SearchRange(2.0, 5.0)}
    one = open_search(tmp_path, trials=12, fields=fields)
    for run in one.runs():
        assert run.config.loss.kind == "soft"
        finish(run, 0.5)
        one.on_end(run, 0, "why")
    counts = one.counts()
    assert counts["trials"] == 12 == counts["finished"] + counts["failed"]
    assert counts["failed"] > 0
    told = [line for line in capsys.readouterr().out.splitlines() if "loss.temperature" in line]
    assert len(told) == counts["failed"]
    assert list(open_search(tmp_path, trials=12, fields=fields).runs()) == []


def test_a_trial_that_is_under_way_already_is_not_begun_twice(tmp_path):
    one = open_search(
        tmp_path,
        trials=4,
        run_of=lambda point: RunSpec(point.name, point.config, tmp_path / "same"),
    )
    runs = one.runs()
    first = next(runs)
    assert next(runs, None) is None  # the others would be the same run
    finish(first, 0.5)
    one.on_end(first, 0, "why")
    assert one.counts() == {"trials": 1, "finished": 1, "stopped": 0, "failed": 0}
    assert list(one.runs()) == []
    assert one.num_left() == 0


def test_another_search_in_the_same_database_is_refused(tmp_path):
    open_search(tmp_path)
    with raises(ConfigError, tmp_path / search.DATABASE, "trials", "--out"):
        open_search(tmp_path, search_hash="that")
    open_search(tmp_path, trials=99)


def test_a_database_that_is_none_is_told(tmp_path):
    (tmp_path / search.DATABASE).write_text("no database" * 100)
    with raises(CheckpointError, tmp_path / search.DATABASE, "sqlite3.DatabaseError"):
        open_search(tmp_path)


PROGRAM = """
import resource
import sys
from pathlib import Path

from deit.core import run_folder as checkpoint
from deit.core.errors import SystemFault
from tests.helpers.sweeps import finish, open_search

def told(call):
    try:
        call()
    except SystemFault as error:
        print(f"{call.__name__}: {error}")

new, old = Path(sys.argv[1]), Path(sys.argv[2])
one = open_search(old)
runs = one.runs()
run = next(runs)
most = resource.getrlimit(resource.RLIMIT_FSIZE)

def allow(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most[1]))

def ended():
    allow((old / "optuna.db").stat().st_size)
    one.on_end(run, 1, "x" * 100_000)

def again():
    for other in runs:
        one.on_end(other, 1, "x" * 100_000)

def begun():
    allow(4096)
    open_search(new)

for call in (ended, again, begun):
    told(call)
allow(most[0])
for folder in (old, new):
    (run,) = open_search(folder, trials=1).runs()
    print("goes on")
"""


def test_a_full_disk_is_a_fault_of_the_machine(tmp_path):
    """And the search goes on once there is room."""
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
    done = run_python(PROGRAM, tmp_path / "new", tmp_path / "old")
    lines = done.out.splitlines()
    assert len(lines) == 5, done.err
    for line, call, folder in zip(lines, ("ended", "again", "begun"), ("old", "old", "new")):
        place = tmp_path / folder / search.DATABASE
        assert line.startswith(f"{call}: {place}: "), line
    assert lines[3:] == ["goes on"] * 2


CALLS = {
    "runs": lambda one, run: next(one.runs()),
    "hopeless": lambda one, run: one.should_stop(run),
    "ended": lambda one, run: one.on_end(run, 1, "why"),
    "done": lambda one, run: one.num_done(),
    "left": lambda one, run: one.num_left(),
    "counts": lambda one, run: one.counts(),
    "failed": lambda one, run: one.failed(),
    "stopped": lambda one, run: one.stopped(),
    "finished": lambda one, run: one.finished(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_database_that_fails_later_is_one_too(call, tmp_path):
    one = open_search(tmp_path)
    run = next(one.runs())
    reach(run, 4, 0.5)
    with closing(sqlite3.connect(tmp_path / search.DATABASE)) as database:
        for table in ("trials", "trial_intermediate_values"):
            database.execute(f"drop table {table}")
        database.commit()
    with raises(SystemFault, tmp_path / search.DATABASE, "no such table"):
        call(one, run)


def test_the_database_is_sqlite_that_optunas_tools_read(tmp_path):
    one = open_search(tmp_path, trials=1)
    for run in one.runs():
        finish(run, 0.5)
        one.on_end(run, 0, "why")
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / search.DATABASE}")
    study = optuna.load_study(study_name="s", storage=storage)
    assert study.best_value == 0.5
    storage.engine.dispose()
    with closing(sqlite3.connect(tmp_path / search.DATABASE)) as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)


def test_without_optuna_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(search, "find_spec", lambda name: None)
    with raises(SystemFault, "'deit[search]'"):
        search.check_optuna()


def test_a_search_is_a_sweep(command_server, tmp_path):
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    fields = {"optim.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "loss.temperature": [1, 3]}
    file = {
        "recipe": "digits",
        "set": {
            "student": small,
            "optim": {"epochs": 2, "warmup_epochs": 1},
            "run.eval_every_epochs": 1,
            "data.train_fraction": 0.1,
        },
        "search": {"trials": 3, "fields": fields},
        "seeds": [0, 1],
    }
    (tmp_path / "s.json").write_text(json.dumps(file))
    arguments = ("sweep", "s.json", "--out", "out", "--parallel", "2", "--top", "1")
    done = command_server.run(*arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["search"] == {"trials": 3, "finished": 3, "stopped": 0, "failed": 0}
    seeds = [row["seeds"] for name, row in found["rows"].items() if name.startswith("trial")]
    assert sorted(seeds) == [[0], [0], [0, 1]]
    assert seeds[0] == [0, 1]  # the best on the validation split
    (best,) = found["best"]
    assert f"1. {best}: lr " in done.out
    assert (tmp_path / "out" / "search.png").stat().st_size > 5000
    stores = {
        tuple(json.loads(path.read_text())["teacher"]["target_stores"])
        for path in (tmp_path / "out" / "runs").glob("*-seed-0-*/config.json")
    }
    assert len(stores) == 1
    again = command_server.run(*arguments, cwd=tmp_path)
    assert again.code == 0, again.err
    for number in (3, 4):  # trials that are over, runs that are finished
        assert re.search(rf"^{number}[^\d\n]+{number}\b", again.out, re.MULTILINE)
    done = command_server.run("report", "out", "--out", "page", cwd=tmp_path)
    assert done.code == 0, done.err
