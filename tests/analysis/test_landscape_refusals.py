"""deit loss-landscape with invalid options and damaged search results."""

import json
import shutil

import pytest

from deit.analysis.landscape_options import KINDS, PARTS, LandscapeOptions
from deit.analysis.landscape_runs import landscape_points
from deit.core.errors import CheckpointError
from deit.experiments.sweep_tables import MANIFEST
from tests.helpers.errors import raises
from tests.helpers.json_edits import edits, error_of

pytest.importorskip("sklearn")

LEVEL = "search/seed-0/level-1"


@pytest.mark.parametrize(
    ("arguments", "code", "names"),
    [
        (("search", "--measure", "line"), 2, ("--measure line", *PARTS)),
        (("search", "--kinds", "randm"), 2, ("--kinds randm", *KINDS)),
        (("search", "--kinds", "one-shot"), 2, ("--kinds one-shot", "search")),
        ((LEVEL, "--rounds", "1"), 2, ("--rounds", LEVEL)),
        ((LEVEL, "--kinds", "random"), 2, ("--kinds", LEVEL)),
        ((LEVEL, "--measure", "lines"), 2, ("--measure lines", "level-1")),
        (("search", "--rounds", "7"), 2, ("--rounds 7", "search", "0, 1, 2")),
        (("search", "--rounds", "x"), 2, ("--rounds x",)),
        (("search", "--run-seed", "4"), 2, ("--run-seed 4", "search")),
        (("search", "--rays", "0"), 2, ("--rays 0",)),
        (("search", "--loss-rise", "-1"), 2, ("--loss-rise -1",)),
        (("search", "--plane-extent", "inf"), 2, ("--plane-extent inf",)),
        (("search", "--num-eigenvalues", "60"), 2, ("--num-eigenvalues 60", "steps")),
        (("elsewhere",), 4, ("elsewhere",)),
        (("search", "search/seed-0/level-0"), 2, ("error: search: ",)),
        (("search", "--out", "search"), 2, ("--out search", "landscape.request.json")),
    ],
)
def test_landscape_with_invalid_options_writes_nothing(
    lottery_folder, command_server, arguments, code, names
):
    out = () if "--out" in arguments else ("--out", "new")
    done = command_server.run("loss-landscape", *arguments, *out, cwd=lottery_folder)
    assert done.code == code, done.err
    for name in names:
        assert name in done.err
    assert not (lottery_folder / "new").exists()


def test_landscape_of_runs_with_different_data_is_refused(lottery_folder, command_server, tmp_path):
    config = json.loads((lottery_folder / "search/seed-0/level-0/config.json").read_text())
    shutil.copytree(lottery_folder / "search/seed-0/level-0", tmp_path / "fewer")
    config["data"]["train_fraction"] = 0.5
    (tmp_path / "fewer" / "config.json").write_text(json.dumps(config))
    runs = ("search/seed-0/level-0", tmp_path / "fewer")
    done = command_server.run("loss-landscape", *runs, "--out", tmp_path / "o", cwd=lottery_folder)
    assert done.code == 2
    for name in ("fewer", "data.train_fraction", "level-0"):
        assert name in done.err


def test_landscape_points_of_search_without_levels_is_refused(lottery_folder, tmp_path):
    results = json.loads((lottery_folder / "search/results.json").read_text())
    for row in results["rows"].values():
        row.pop("level", None)
    (tmp_path / "results.json").write_text(json.dumps(results))
    shutil.copy(lottery_folder / "search" / MANIFEST, tmp_path)
    with raises(CheckpointError, tmp_path / "results.json", "deit lottery"):
        landscape_points([tmp_path], LandscapeOptions(rounds=(1,)))


def test_landscape_points_of_damaged_results_names_the_file(lottery_folder, tmp_path):
    results = json.loads((lottery_folder / "search/results.json").read_text())
    shutil.copy(lottery_folder / "search" / MANIFEST, tmp_path)
    errors = {}
    damages = ({"seeds": []}, {"seeds": [7.5]}, {"seeds": ["0"]}, {"seeds": [True]})
    for damage in damages:
        (tmp_path / "results.json").write_text(json.dumps(results | damage))
        with raises(CheckpointError, "results.json"):
            landscape_points([tmp_path], LandscapeOptions(run_seed=0))
    for edit, content in edits(results, depth=4):
        (tmp_path / "results.json").write_text(json.dumps(content))
        errors[edit] = error_of(landscape_points, [tmp_path], LandscapeOptions())
    assert all(str(tmp_path) in str(error) for error in errors.values() if error is not None)
    damaged = [error for error in errors.values() if isinstance(error, CheckpointError)]
    assert sum("results.json" in str(error) for error in damaged) > 10
