"""`deit compare` is the sweep of a study."""

import json

import pytest

from deit.experiments.arm_difference import difference_line
from tests.helpers.commands import assert_refused, run_in, tree
from tests.helpers.small_runs import two_epochs
from tests.helpers.trained import trained

SMALL = (
    *("--student.depth", "1", "--student.embed_dim", "16", "--student.num_heads", "2"),
    *("--optim.epochs", "2", "--optim.warmup_epochs", "1", "--data.train_fraction", "0.2"),
)


@pytest.mark.parametrize("file", ["config.json", "ant/1.png", "sweep.json"])
def test_compare_folder_with_other_content_is_refused_unchanged(file, tmp_path):
    path = tmp_path / "out" / file
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"sweep": "teacher", "recipe": "mnist"}))
    before = tree(tmp_path)
    done = run_in(tmp_path, "deit", "compare", "digits", "--out", "out")
    assert_refused(done, 2, "--out out", "sweep")
    assert tree(tmp_path) == before


def test_compare_and_sweep_of_a_study_share_runs(command_server, tmp_path):
    """Each command reuses the runs of the other with the same arms and seeds."""
    pytest.importorskip("sklearn")
    trained(two_epochs(loss={"kind": "none"}), tmp_path / "teacher")
    teacher = ("--teacher.source", tmp_path / "teacher", "--teacher.allow_near_chance")
    arguments = ("compare", "digits", *SMALL, *teacher, "--out", tmp_path / "out")
    done = command_server.run(*arguments, "--arms", "undistilled")
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(result["rows"]) == ["undistilled"]
    (folder,) = result["rows"]["undistilled"]["folders"]
    assert f"deit evaluate {folder}" in done.out
    sweep = ("sweep", "teacher", "--recipe", "digits", "--seeds", "0,1", *arguments[2:])
    done = command_server.run(*sweep, "--parallel", "2")
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = result["rows"]
    assert list(rows) == ["distilled", "undistilled"]
    assert rows["undistilled"]["folders"][0] == folder
    assert "1 of 4 runs are finished already" in done.out
    line = difference_line(result)
    assert "359 images, 2 seeds" in line
    assert line in done.out.splitlines()
    assert line in (tmp_path / "out" / "results.md").read_text().splitlines()


def test_compare_dry_run_lists_runs_and_writes_nothing(command_server, tmp_path):
    done = command_server.run("compare", "digits", "--dry-run", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert all(name in done.out for name in ("teacher", "distilled", "undistilled"))
    rows = [line for line in done.out.splitlines() if str(tmp_path) in line or " to " in line]
    assert any("needed first" in row and "to train" in row for row in rows)
    assert not any("base run" in row for row in rows)
    assert not (tmp_path / "out").exists()


def test_compare_loss_without_teacher_is_refused(command_server, tmp_path):
    done = command_server.run("compare", "digits-teacher", "--out", tmp_path / "out")
    assert (done.code, "loss.kind" in done.err) == (2, True), done.err
