"""deit.compare and deit.sweep: the same runs as the commands, and their results as an object."""

import json
import statistics

import pytest

import deit
from tests.helpers.errors import raises

SMALL = {
    "student": {"depth": 1, "embed_dim": 16, "num_heads": 2},
    "data": {"train_fraction": 0.2},
    "optim": {"epochs": 2, "batch_size": 32},
    "run": {"eval_every_epochs": 1},
    "teacher": {"source": "network.py:teacher", "allow_near_chance": True},
}
TEACHER = """
import torch
def teacher():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    (folder / "network.py").write_text(TEACHER)
    return folder


@pytest.fixture
def result(folder, fork_runs, monkeypatch):
    """A comparison with two seeds; made once, because the same call continues it."""
    monkeypatch.chdir(folder)
    config = deit.recipe("digits", **SMALL)
    return deit.compare(config, "out", seeds=(0, 1), parallel=2, verbose=False)


def test_comparison_has_rows_runs_table_and_figure(result, folder):
    assert [*result.rows] == ["distilled", "undistilled"]
    runs = result.runs("distilled")
    assert [run.config.run.seed for run in runs] == [0, 1]
    assert all(run.result["epochs"] == 2 for run in runs)
    fused = [100 * top1["fused"] for top1 in result.rows["distilled"]["top1"]]
    cell = f"{statistics.mean(fused):.1f} +- {statistics.stdev(fused):.1f}"
    assert cell in result.table()
    assert f"<td>{cell}</td>" in result._repr_html_()
    assert cell in repr(result)
    assert "distilled" in result.best
    assert result.figure().axes
    assert result.data == json.loads((folder / "out" / "results.json").read_text())


def test_same_comparison_again_trains_nothing(result, folder, capfd):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("best/*")}
    again = deit.compare(deit.recipe("digits", **SMALL), "out", seeds=(0, 1), verbose=False)
    assert again.rows.keys() == result.rows.keys()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("best/*")} == before
    assert capfd.readouterr() == ("", "")


def test_results_are_found_after_a_move(result, folder, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(folder / "out", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    moved = deit.SweepResult("moved")
    assert len(moved.runs("undistilled")) == 2
    with raises(deit.errors.ConfigError, "undistiled", "undistilled"):
        moved.runs("undistiled")


def test_unknown_studies_arms_and_sweeps_raise_before_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with raises(deit.errors.ConfigError, "study", "techer", "teacher"):
        deit.compare("digits", "out", study="techer")
    with raises(deit.errors.ConfigError, "arms", "destilled"):
        deit.compare("digits", "out", arms=["destilled"])
    with raises(deit.errors.ConfigError, "optim.lrr"):
        deit.sweep({"recipe": "digits", "grid": {"optim.lrr": [1]}}, "out")
    assert not list(tmp_path.iterdir())
