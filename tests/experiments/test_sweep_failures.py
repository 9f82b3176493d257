"""Runs of a sweep that fail, and sweeps that are refused."""

import dataclasses

import pytest
import torch
from PIL import Image

from deit.config.presets import LOSS_PRESETS
from deit.config.recipes.handwriting import digits
from deit.core.errors import SystemFault
from deit.distill.build import build_accelerator
from deit.experiments import shared_targets, sweep_execute
from deit.experiments.finished_runs import FinishedRunChecker
from deit.experiments.parallel_runs import FailedRun, RunSpec
from deit.experiments.shared_targets import TargetStorePlan
from deit.experiments.sweep_execute import train_all
from deit.experiments.sweep_grid import SWEEPS
from deit.experiments.sweep_plan import SweepPlan
from tests.helpers.commands import runs_over
from tests.helpers.sweeps import SMALL, result, write

pytest.importorskip("sklearn")


@pytest.mark.parametrize(
    ("code", "times"), [(2, 1), (3, 1), (4, 1), (6, 1), (1, 3), (-9, 3), (7, 3)]
)
def test_train_all_retries_transient_failures_only(code, times, tmp_path, monkeypatch):
    calls = mock_training(monkeypatch, tmp_path, {"bad": code})
    runs = [RunSpec(name, digits(), tmp_path / name) for name in ("bad", "good")]
    failures = train_all(
        plan_of([], [], runs), finished=FinishedRunChecker(), parallel=1, retries=2
    )
    assert [failure.run.name for failure in failures.failed] == ["bad"]
    assert calls == [["bad", "good"], *[["bad"]] * (times - 1)]
    total = len(runs) + times - 1  # each retry counts as a run
    assert runs_over(calls.progress[-1]) == [(total, total)]


def plan_of(base_runs, stores, runs):
    return SweepPlan(None, base_runs, [], stores, runs)


class Calls(list):
    """The names of the runs of each call. progress: a line for each run of the last call."""

    progress: list[str]


def mock_training(monkeypatch, tmp_path, codes):
    """Replace training: the runs named in `codes` fail with their codes. Returns the calls."""
    calls = Calls()

    def run_parallel(runs, *, num_parallel, progress):
        calls.append([run.name for run in runs])
        calls.progress = [progress.ended() for _ in runs]
        failing = [run for run in runs if run.name in codes]
        return [FailedRun(run, codes[run.name], "why", tmp_path) for run in failing]

    monkeypatch.setattr(sweep_execute, "run_parallel", run_parallel)
    return calls


def test_train_all_failure_blocks_only_dependent_runs(tmp_path, monkeypatch):
    """The first of two teachers fails, so its store and a run fine-tuned from it do not start."""
    calls = mock_training(monkeypatch, tmp_path, {"first": 3})
    written = []
    monkeypatch.setattr(shared_targets, "write", written.append)

    def spec(name, **sections):
        return RunSpec(name, digits().replace(**sections), tmp_path / name)

    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    base_runs = [
        spec("first", teacher={"source": ()}),
        spec("second", teacher={"source": ()}),
        spec("larger", init={"weights": first}, teacher={"source": ()}),
    ]
    stores = [
        TargetStorePlan(
            tmp_path / name, digits().replace(teacher={"source": (teacher,)}), 1, "full", None
        )
        for name, teacher in (("of-first", first), ("of-second", second))
    ]
    labels = dataclasses.replace(digits(), loss=LOSS_PRESETS["none"])
    runs = [
        spec("a", teacher={"source": (first,), "target_stores": (str(tmp_path / "of-first"),)}),
        spec("b", teacher={"source": (second,), "target_stores": (str(tmp_path / "of-second"),)}),
        spec("c", teacher={"source": (first,)}),
        spec("d", teacher={"source": (second,)}),
        spec("e", init={"weights": str(tmp_path / "larger")}, teacher={"source": (second,)}),
        RunSpec("f", labels.replace(teacher={"source": (first,)}), tmp_path / "f"),
    ]
    failures = train_all(
        plan_of(base_runs, stores, runs), finished=FinishedRunChecker(), parallel=1, retries=1
    )
    assert calls == [["first"], ["second"], ["b", "d", "f"]]
    # Two of three teachers and three of six runs can start.
    assert [runs_over(line) for line in calls.progress] == [
        [(num_done, 5)] for num_done in (3, 4, 5)
    ]
    assert [store.path.name for store in written] == ["of-second"]
    assert [failure.run.name for failure in failures.failed] == ["first"]
    reasons = {path.name: reason for path, reason in failures.reasons().items()}
    assert {name for name in reasons if len(name) == 1} == {"a", "c", "e"}
    assert first in reasons["c"]
    assert "why" in reasons["c"]


def test_train_all_failed_store_blocks_only_its_runs(tmp_path, monkeypatch):
    calls = mock_training(monkeypatch, tmp_path, {})

    def fails(store):
        raise SystemFault("no space left")

    monkeypatch.setattr(shared_targets, "write", fails)
    taught = digits().replace(teacher={"target_stores": (str(tmp_path / "store"),)})
    runs = [RunSpec("a", taught, tmp_path / "a"), RunSpec("b", digits(), tmp_path / "b")]
    store = TargetStorePlan(tmp_path / "store", digits(), 1, "full", None)
    failures = train_all(
        plan_of([], [store], runs), finished=FinishedRunChecker(), parallel=1, retries=1
    )
    assert calls == [["b"]]
    (failed,) = failures.failed
    assert (failed.code, failed.reason) == (5, "no space left")
    assert "no space left" in failures.blocked[tmp_path / "a"]


def test_build_accelerator_changes_precision_in_one_process():
    """A sweep over run.precision does this; Accelerate alone would keep the first precision."""
    for precision, name in (("fp32", "no"), ("bf16", "bf16"), ("fp32", "no")):
        config = digits().replace(run={"precision": precision, "device": "cpu"})
        assert build_accelerator(config.run).mixed_precision == name


CODE = {
    "set": {"set": {**SMALL, "teacher.source": "mine.py:teacher"}, "study": "teacher"},
    "grid": {"grid": {"teacher.source": ["mine.py:teacher", "checkpoints/digits-teacher"]}},
    "runs": {"runs": {"a": {"teacher.source": "mine.py:teacher"}, "b": {"loss": "none"}}},
    "search": {"search": {"fields": {"teacher.source": ["mine.py:teacher", "x.py:y"]}}},
}


@pytest.mark.parametrize("content", CODE.values(), ids=CODE)
def test_sweep_code_named_only_in_the_file_is_not_run(content, command_server, tmp_path):
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    write(tmp_path / "s.json", **content)
    for arguments in ((), ("--dry-run",)):
        done = command_server.run("sweep", "s.json", "--out", "out", *arguments, cwd=tmp_path)
        assert done.code == 2, done.err
        assert "--teacher.source mine.py:teacher" in done.err
    assert not (tmp_path / "ran").exists()


def test_sweep_moved_images_are_found_by_data_root(command_server, tmp_path):
    for split, num_images in (("train", 6), ("test", 2)):
        for label in "ab":
            (tmp_path / "pictures" / split / label).mkdir(parents=True)
            for index in range(num_images):
                pixels = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
                file = tmp_path / "pictures" / split / label / f"{index}.png"
                Image.fromarray(pixels).save(file)
    more = {"loss": "none", "data.source": "folder", "optim.batch_size": 4}
    small = {**SMALL, "optim": {"epochs": 1, "warmup_epochs": 0}, **more}
    write(tmp_path / "s.json", set=small, grid={"student.depth": [1, 2]})
    arguments = ("sweep", "s.json", "--teacher.source", "none", "--data.train_fraction", "1")
    done = command_server.run(*arguments, "--data.root", "pictures", "--out", "out", cwd=tmp_path)
    assert done.code == 0, done.err
    first = result(tmp_path / "out")["rows"]
    for path in (tmp_path / "out" / "runs").glob("*.evaluation.json"):
        path.unlink()
    (tmp_path / "pictures").rename(tmp_path / "moved")
    done = command_server.run(*arguments, "--data.root", "pictures", "--out", "out", cwd=tmp_path)
    assert (done.code, "data.root pictures" in done.err) == (3, True), done.err
    done = command_server.run(*arguments, "--data.root", "moved", "--out", "out", cwd=tmp_path)
    assert done.code == 0, done.err
    again = result(tmp_path / "out")["rows"]
    assert {name: row["top1"] for name, row in again.items()} == {
        name: row["top1"] for name, row in first.items()
    }


def test_sweep_missing_teacher_is_refused_before_training(command_server, tmp_path):
    runs = {"a": {}, "b": {"teacher.source": "checkpoints/nothing"}}
    file = write(tmp_path / "s.json", runs=runs)
    done = command_server.run("sweep", file, "--out", tmp_path / "out", "--dry-run")
    assert (done.code, "teacher.source checkpoints/nothing" in done.err) == (3, True), done.err


MISTAKES = {
    "no seed": (("teacher", "--seeds", "-1"), ("--seeds -1",)),
    "nothing": ((), SWEEPS),
    "no file": (("nowhere.yaml",), ("nowhere.yaml", *SWEEPS)),
    "recipe": (("teacher", "--recipe", "digitz"), ("'digitz'", "digits")),
    "seeds": (("teacher", "--seeds", "1,x"), ("--seeds 1,x",)),
    "at once": (("teacher", "--parallel", "0"), ("--parallel 0",)),
    "retries": (("teacher", "--retries", "-1"), ("--retries -1",)),
    "best": (("teacher", "--top", "0"), ("--top 0",)),
    "resume": (("teacher", "--resume"), ("deit sweep", "--resume")),
    "value": (("teacher", "--optim.lr", "-1"), ("optim.lr = '-1'",)),
    "study": (("ensemble", "--recipe", "digits"), ("study ensemble", "teacher.source")),
    "seed": (("teacher", "--run.seed", "3"), ("run.seed = 3", "seeds")),
}
INCOMPATIBLE = {
    "the same run": ({"runs": {"a": {"run.compile": "default"}, "b": {}}}, ("run.compile",)),
    "splits": ({"grid": {"data.split_seed": [0, 1]}}, ("split seed 1", "data.split_seed")),
    "crops without store": (
        {"study": "view-modes", "share_targets": False},
        ("fix/ic_ens", "teacher.target_stores"),
    ),
    "searched splits": (
        {"search": {"fields": {"data.test_fraction": {"low": 0.1, "high": 0.3}}}},
        ("test fraction 0.1", "data.test_fraction"),
    ),
    "searched value": (
        {"search": {"fields": {"optim.lr": {"low": 1e-6, "high": 1}}}},
        ("lr 1e-06", "optim.min_lr"),
    ),
    "searched word": (
        {"search": {"fields": {"views.auto_augment": ["none", "rand"]}}},
        ("auto augment rand", "views.auto_augment = 'rand'"),
    ),
    "searched crops": (
        {"search": {"fields": {"view_mode": ["same/rc", "fix/ic_ens"]}}},
        ("fix/ic_ens", "teacher.target_stores"),
    ),
    "searched records": (
        {"search": {"fields": {"loss.temperature": [1, 3]}}, "content": "hard"},
        ("content: hard", "loss.kind 'soft'"),
    ),
    "teacher name": (
        {"runs": {"teacher": {}, "b": {"optim.lr": 1}}},
        ("sweep a, teacher: ",),
    ),
}


@pytest.mark.parametrize(("content", "names"), INCOMPATIBLE.values(), ids=INCOMPATIBLE)
def test_sweep_points_that_must_not_share_a_sweep_are_refused(
    content, names, command_server, tmp_path
):
    done = command_server.run(
        "sweep", write(tmp_path / "a.json", **content), "--out", tmp_path / "out"
    )
    assert done.code == 2, done.err
    for name in names:
        assert name in done.err
    assert not (tmp_path / "out").exists()


def test_sweep_under_torchrun_is_refused(command_server, tmp_path):
    done = command_server.run(
        "sweep", "teacher", "--out", tmp_path / "out", WORLD_SIZE="2", RANK="0"
    )
    assert (done.code, "torchrun" in done.err) == (2, True), done.err
    assert not (tmp_path / "out").exists()


def test_sweep_trains_no_unused_teacher(command_server, tmp_path):
    file = write(
        tmp_path / "t.json", grid={"teacher.source": ["checkpoints/digits-involution-teacher"]}
    )
    done = command_server.run("sweep", file, "--out", tmp_path / "out", "--dry-run")
    assert done.code == 0, done.err
    listed = [line.split("│")[1].strip() for line in done.out.splitlines() if line[:1] == "│"]
    teacher = "digits-involution-teacher"
    assert listed == [teacher, f"source checkpoints/{teacher}, seed 0"]


@pytest.mark.parametrize(("arguments", "names"), MISTAKES.values(), ids=MISTAKES)
def test_sweep_invalid_option_is_refused_before_training(
    arguments, names, command_server, tmp_path
):
    done = command_server.run("sweep", *arguments, cwd=tmp_path)
    assert done.code == 2
    for name in names:
        assert name in done.err
    assert done.err.startswith("deit: error: ")
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []
