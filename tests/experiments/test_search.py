"""A search with optuna: proposals, pruning, retries, and resumption from its database."""

import json
import re
import sqlite3
import warnings
from contextlib import closing

import pytest

from deit.core.errors import CheckpointError, ConfigError, SystemFault
from deit.experiments.parallel_runs import RunSpec
from deit.experiments.search import DATABASE, check_optuna
from deit.experiments.sweep_spec import SearchRange
from tests.helpers.errors import raises
from tests.helpers.processes import run_python
from tests.helpers.sweeps import add_epoch, finish, open_search

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.filterwarnings("ignore")  # of SQLAlchemy and optuna


def test_search_proposes_better_points_over_time(tmp_path):
    """Accuracy falls with the distance of the learning rate from 1e-2, in powers of ten."""
    import math

    search = open_search(tmp_path, trials=40)
    distances = []
    for run in search.runs():
        lr = run.config.optim.lr
        distances.append(abs(math.log10(lr) + 2))
        finish(run, 1 - distances[-1] / 4)
        search.on_end(run, 0, "why")
    assert len(distances) == 40
    assert sum(distances[-10:]) < 0.7 * sum(distances[:10])
    best = search.finished()[0]
    assert abs(math.log10(best.config.optim.lr) + 2) == pytest.approx(min(distances))
    assert search.counts() == {"trials": 40, "finished": 40, "stopped": 0, "failed": 0}


def test_search_stops_trials_below_the_median_after_a_quarter(tmp_path):
    search = open_search(tmp_path, trials=7)
    runs = search.runs()
    for _ in range(5):
        run = next(runs)
        for epoch in (1, 2, 4, 8):
            add_epoch(run, epoch, 0.8)
            assert not search.should_stop(run)
        finish(run, 0.8)
        search.on_end(run, 0, "why")
    bad = next(runs)
    assert not search.should_stop(bad)  # it has no evaluation yet
    add_epoch(bad, 1, 0.1)
    assert not search.should_stop(bad)
    add_epoch(bad, 4, 0.1)
    assert search.should_stop(bad)
    search.on_end(bad, 143, "why")
    good = next(runs)
    add_epoch(good, 4, 0.9)
    assert not search.should_stop(good)
    search.on_end(good, 3, "why")
    assert next(runs, None) is None
    assert search.progress.total == 1  # no trial is left; this test counts no ended runs
    assert search.counts() == {"trials": 7, "finished": 5, "stopped": 1, "failed": 1}
    (stopped,) = search.stopped()
    assert (stopped.point.name, stopped.epoch, stopped.top1) == ("trial 5", 4, 0.1)
    assert stopped.point.values.keys() == {"run", "optim.lr"}


def test_search_finished_run_counts_as_finished(tmp_path):
    """One run finishes before it can be stopped; the other is below the median at its last
    epoch."""
    search = open_search(tmp_path, epochs=8)
    runs = search.runs()
    for _ in range(5):
        run = next(runs)
        add_epoch(run, 4, 0.9)
        search.should_stop(run)
        finish(run, 0.9)
        search.on_end(run, 0, "")
    late, last = next(runs), next(runs)
    add_epoch(late, 4, 0.1)
    assert search.should_stop(late)
    finish(late, 0.3)
    search.on_end(late, 143, "")
    add_epoch(last, 8, 0.1)
    assert not search.should_stop(last)
    finish(last, 0.1)
    search.on_end(last, 0, "")
    assert search.counts() == {"trials": 7, "finished": 7, "stopped": 0, "failed": 0}


def test_search_without_pruning_stops_no_trial(tmp_path):
    search = open_search(tmp_path, trials=7, prune=False)
    runs = search.runs()
    for top1 in (*[0.8] * 6, 0.1):
        run = next(runs)
        add_epoch(run, 4, top1)
        assert not search.should_stop(run)
        finish(run, top1)
        search.on_end(run, 0, "why")


def test_search_open_trials_are_proposed_again_and_count_once(tmp_path):
    search = open_search(tmp_path, trials=3)
    runs = search.runs()
    first, second = next(runs), next(runs)
    finish(first, 0.5)
    search.on_end(first, 0, "why")
    resumed = open_search(tmp_path, trials=3)
    assert resumed.num_done() == 1
    rates = []
    for run in resumed.runs():
        rates.append(run.config.optim.lr)
        finish(run, 0.6)
        resumed.on_end(run, 0, "why")
    assert len(rates) == 2
    assert rates[0] == second.config.optim.lr
    assert resumed.counts() == {"trials": 3, "finished": 3, "stopped": 0, "failed": 0}
    assert list(open_search(tmp_path, trials=3).runs()) == []
    new_rates = [run.config.optim.lr for run in open_search(tmp_path, trials=5).runs()]
    assert len(new_rates) == 2  # a larger number of trials adds new ones
    assert len({first.config.optim.lr, *rates, *new_rates}) == 5  # without duplicates


def test_search_ends_if_no_new_point_is_left(tmp_path, capsys):
    """The space has four points, and eight trials are requested."""
    fields = {"loss.temperature": (1, 3), "views.auto_augment": ("none", "randaugment")}

    def run_of(point):  # as in a sweep, the folder depends on the values only
        name = f"{point.config.loss.temperature}-{point.config.views.auto_augment}"
        return RunSpec(point.name, point.config, tmp_path / name)

    search, seen = open_search(tmp_path, trials=8, fields=fields, run_of=run_of), set()
    for run in search.runs():
        seen.add((run.config.loss.temperature, run.config.views.auto_augment))
        finish(run, 0.5)
        search.on_end(run, 0, "")
    assert len(seen) == 4
    assert (search.num_left(), search.counts()["trials"], len(search.finished())) == (0, 4, 4)
    assert re.search(r"\b30\b", capsys.readouterr().out)  # duplicates in a row


def test_search_evaluation_is_reported_once(tmp_path):
    search = open_search(tmp_path)
    run = next(search.runs())
    add_epoch(run, 1, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not search.should_stop(run)
        assert not search.should_stop(run)


def test_search_failed_trial_is_retried_now_and_by_the_next_command(tmp_path):
    search = open_search(tmp_path, trials=2, retries=1)
    names = []
    for code in (-9, 1, 0):  # the first trial is killed, then fails; the second succeeds
        run = next(search.runs())
        names.append((run.name, run.config.optim.lr))
        if code == 0:
            finish(run, 0.5)
        search.on_end(run, code, "no memory\nleft")
    assert names[0] == names[1] != names[2]
    assert list(search.runs()) == []
    assert search.counts() == {"trials": 2, "finished": 1, "stopped": 0, "failed": 1}
    (point,) = search.failed()
    assert (point.name, point.config.optim.lr) == names[0]
    resumed = open_search(tmp_path, trials=2)
    assert (resumed.num_done(), resumed.failed()) == (1, [])
    run = next(resumed.runs())
    assert (run.name, run.config.optim.lr) == names[0]
    finish(run, 0.6)
    resumed.on_end(run, 0, "")
    assert resumed.counts() == {"trials": 2, "finished": 2, "stopped": 0, "failed": 0}
    assert [point.name for point in resumed.finished()] == [names[0][0], names[2][0]]


@pytest.mark.parametrize("code", [2, 3, 4, 6])
def test_search_permanent_failure_is_not_retried(code, tmp_path):
    search = open_search(tmp_path, trials=1, retries=3)
    search.on_end(next(search.runs()), code, "why")
    assert list(search.runs()) == []
    assert len(search.failed()) == 1


def test_search_proposes_integers_and_names(tmp_path):
    fields = {
        "student.depth": SearchRange(2, 4, is_integer=True),
        "loss": ("deit-soft", "deit-hard"),
        "views.crop": ("none", "padded"),
    }
    search = open_search(tmp_path, trials=12, fields=fields)
    seen = set()
    for run in search.runs():
        assert run.config.student.depth in (2, 3, 4)
        seen.add((run.config.loss.kind, run.config.views.crop))
        search.on_end(run, 1, "why")
    assert {kind for kind, _ in seen} == {"soft", "hard"}
    assert {crop for _, crop in seen} == {"none", "padded"}


def test_search_skips_invalid_trials(tmp_path, capsys):
    """Hard labels take no temperature, so about half of these configurations are invalid."""
    fields = {"loss.kind": ("soft", "hard"), "loss.temperature": SearchRange(2.0, 5.0)}
    search = open_search(tmp_path, trials=12, fields=fields)
    for run in search.runs():
        assert run.config.loss.kind == "soft"
        finish(run, 0.5)
        search.on_end(run, 0, "why")
    counts = search.counts()
    assert counts["trials"] == 12 == counts["finished"] + counts["failed"]
    assert counts["failed"] > 0
    messages = [line for line in capsys.readouterr().out.splitlines() if "loss.temperature" in line]
    assert len(messages) == counts["failed"]
    assert list(open_search(tmp_path, trials=12, fields=fields).runs()) == []


def test_search_active_run_is_not_started_twice(tmp_path):
    search = open_search(
        tmp_path,
        trials=4,
        run_of=lambda point: RunSpec(point.name, point.config, tmp_path / "same"),
    )
    runs = search.runs()
    first = next(runs)
    assert next(runs, None) is None  # all trials have the same run
    finish(first, 0.5)
    search.on_end(first, 0, "why")
    assert search.counts() == {"trials": 1, "finished": 1, "stopped": 0, "failed": 0}
    assert list(search.runs()) == []
    assert search.num_left() == 0


def test_search_database_of_another_search_is_refused(tmp_path):
    open_search(tmp_path)
    with raises(ConfigError, tmp_path / DATABASE, "trials", "another folder"):
        open_search(tmp_path, search_hash="that")
    open_search(tmp_path, trials=99)


def test_search_damaged_database_raises(tmp_path):
    (tmp_path / DATABASE).write_text("no database" * 100)
    with raises(CheckpointError, tmp_path / DATABASE, "sqlite3.DatabaseError"):
        open_search(tmp_path)


PROGRAM = """
import resource
import sys
from pathlib import Path

from deit.core import run_folder as checkpoint
from deit.core.errors import SystemFault
from tests.helpers.sweeps import add_epoch, finish, open_search

def report_fault(call):
    try:
        call()
    except SystemFault as error:
        print(f"{call.__name__}: {error}")

new, old = Path(sys.argv[1]), Path(sys.argv[2])
search = open_search(old)
runs = search.runs()
run = next(runs)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

def end_run():
    limit_file_size((old / "optuna.db").stat().st_size)
    search.on_end(run, 1, "x" * 100_000)

def end_other_runs():
    for other in runs:
        search.on_end(other, 1, "x" * 100_000)

def create():
    limit_file_size(4096)
    open_search(new)

for call in (end_run, end_other_runs, create):
    report_fault(call)
limit_file_size(soft)
for folder in (old, new):
    (run,) = open_search(folder, trials=1).runs()
    print("resumed")
"""


def test_search_full_disk_raises_system_fault(tmp_path):
    """The search resumes once there is space."""
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
    done = run_python(PROGRAM, tmp_path / "new", tmp_path / "old")
    lines = done.out.splitlines()
    assert len(lines) == 5, done.err
    calls = ("end_run", "end_other_runs", "create")
    for line, call, folder in zip(lines, calls, ("old", "old", "new")):
        path = tmp_path / folder / DATABASE
        assert line.startswith(f"{call}: {path}: "), line
    assert lines[3:] == ["resumed"] * 2


CALLS = {
    "runs": lambda search, run: next(search.runs()),
    "should_stop": lambda search, run: search.should_stop(run),
    "on_end": lambda search, run: search.on_end(run, 1, "why"),
    "num_done": lambda search, run: search.num_done(),
    "num_left": lambda search, run: search.num_left(),
    "counts": lambda search, run: search.counts(),
    "failed": lambda search, run: search.failed(),
    "stopped": lambda search, run: search.stopped(),
    "finished": lambda search, run: search.finished(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_search_database_that_fails_later_raises_system_fault(call, tmp_path):
    search = open_search(tmp_path)
    run = next(search.runs())
    add_epoch(run, 4, 0.5)
    with closing(sqlite3.connect(tmp_path / DATABASE)) as database:
        for table in ("trials", "trial_intermediate_values"):
            database.execute(f"drop table {table}")
        database.commit()
    with raises(SystemFault, tmp_path / DATABASE, "no such table"):
        call(search, run)


def test_search_database_is_readable_by_optuna(tmp_path):
    search = open_search(tmp_path, trials=1)
    for run in search.runs():
        finish(run, 0.5)
        search.on_end(run, 0, "why")
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / DATABASE}")
    study = optuna.load_study(study_name="s", storage=storage)
    assert study.best_value == 0.5
    storage.engine.dispose()
    with closing(sqlite3.connect(tmp_path / DATABASE)) as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)


def test_check_optuna_names_the_package_to_install(monkeypatch):
    monkeypatch.setattr("deit.experiments.search.find_spec", lambda name: None)
    with raises(SystemFault, "'deit[search]'"):
        check_optuna()


def test_sweep_command_runs_a_search(command_server, tmp_path):
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
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["search"] == {"trials": 3, "finished": 3, "stopped": 0, "failed": 0}
    seeds = [row["seeds"] for name, row in results["rows"].items() if name.startswith("trial")]
    assert sorted(seeds) == [[0], [0], [0, 1]]
    assert seeds[0] == [0, 1]  # the best on the validation split
    (best,) = results["best"]
    assert f"1. {best}: lr " in done.out
    assert (tmp_path / "out" / "search.png").stat().st_size > 5000
    stores = {
        tuple(json.loads(path.read_text())["teacher"]["target_stores"])
        for path in (tmp_path / "out" / "runs").glob("*-seed-0-*/config.json")
    }
    assert len(stores) == 1
    repeated = command_server.run(*arguments, cwd=tmp_path)
    assert repeated.code == 0, repeated.err
    for count in (3, 4):  # ended trials, finished runs
        assert re.search(rf"^{count}[^\d\n]+{count}\b", repeated.out, re.MULTILINE)
    done = command_server.run("report", "out", "--out", "page", cwd=tmp_path)
    assert done.code == 0, done.err
