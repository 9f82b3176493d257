"""scripts/convert_grid.py, which converts a grid of AditMeh/Distillation to a sweep."""

import json

import pytest

from deit.config.recipes.handwriting import digits
from deit.experiments.sweep_grid import points_of
from deit.experiments.sweep_spec import read_sweep

RUN = {"lr": 0.01, "classes": [0, 1, 2, 3, 4, 5], "weight": 0.9, "epochs": 7, "T": 10.0}


def convert(command_server, tmp_path, grid):
    file = tmp_path / "grid.json"
    file.write_text(json.dumps(grid))
    return command_server.run(file, script="scripts/convert_grid.py", cwd=tmp_path)


def test_convert_grid_runs_become_runs_of_a_sweep(command_server, tmp_path):
    """L = (1 - w) T^2 CE(teacher at T) + w CE(label), trained without some classes."""
    grid = {
        "warm": RUN,
        "no teacher": {**RUN, "weight": 1.0, "T": 1.0, "classes": list(range(10))},
        "numbered": {**RUN, "classes": 5},
    }
    done = convert(command_server, tmp_path, grid)
    assert done.code == 0, done.err
    sweep = tmp_path / "sweep.json"
    sweep.write_text(done.out)
    warm, without_teacher, numbered = points_of(read_sweep(sweep), digits())
    assert [warm.name, without_teacher.name, numbered.name] == list(grid)
    loss, optim = warm.config.loss, warm.config.optim
    assert (loss.kind, loss.temperature, loss.head) == ("cross_entropy", 10.0, "all")
    weights = (loss.effective_label_weight, loss.distillation_weight, loss.label_smoothing)
    assert weights == (0.9, 0.1, 0)
    assert (optim.lr, optim.epochs) == (0.01, 7)
    unseen = ("6", "7", "8", "9")
    assert warm.config.data.unseen_classes == numbered.config.data.unseen_classes == unseen
    assert without_teacher.config.data.unseen_classes == ()
    assert (without_teacher.config.loss.kind, without_teacher.config.loss.label_smoothing) == (
        "none",
        0,
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"weight": 2.5},
        {"weight": "much"},
        {"classes": [0, 10]},
        {"classes": []},
        {"classes": [[1]]},
        {"classes": [1.0, True]},
        {"patience": 3},
    ],
)
def test_convert_grid_error_names_the_run(changed, command_server, tmp_path):
    done = convert(command_server, tmp_path, {"good": RUN, "bad": {**RUN, **changed}})
    assert (done.code, done.out) == (2, "")
    assert "grid.json: bad: " in done.err
    assert len(done.err.splitlines()) == 1
