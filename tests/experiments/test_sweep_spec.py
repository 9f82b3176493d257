"""Sweep files: parsing, expansion into points, and error messages."""

import json
import re
from pathlib import Path

import pytest

from deit.cli.run_args import parse_run
from deit.config.presets import LOSS_PRESETS
from deit.config.recipes import RECIPES
from deit.config.recipes.handwriting import digits, digits_ensemble
from deit.config.schema import to_dict
from deit.config.validation import validate
from deit.core.errors import ConfigError
from deit.experiments.studies import STUDIES
from deit.experiments.sweep_grid import (
    SWEEPS,
    Point,
    boundary_points,
    find_sweep,
    points_of,
    with_command_line,
    with_fields,
)
from deit.experiments.sweep_plan import duplicate_points, make_sweep_runs
from deit.experiments.sweep_spec import SearchRange, text_of
from tests.helpers.errors import raises
from tests.helpers.sweeps import read


def test_grid_has_every_combination_with_the_last_field_fastest(tmp_path):
    sweep = read(tmp_path, "grid: {loss.temperature: [1, 3], optim: {lr: [1e-3, 2e-3]}}")
    points = points_of(sweep, digits())
    values = [(point.config.loss.temperature, point.config.optim.lr) for point in points]
    assert values == [(1, 1e-3), (1, 2e-3), (3, 1e-3), (3, 2e-3)]
    assert points[1].name == "temperature 1, lr 2e-3"
    assert points[1].values == {"loss.temperature": "1", "optim.lr": "2e-3"}
    same = digits().replace(loss={"temperature": 1.0}, optim={"lr": 2e-3})
    assert points[1].config == same


def test_runs_are_combined_with_the_grid(tmp_path):
    text = """
    grid: {data.split_seed: [3, 4]}
    runs:
      none: {loss: none}
      hard: {loss: deit-hard, optim.epochs: 7}
      as it is:
    """
    points = points_of(read(tmp_path, text), digits())
    assert [point.name for point in points] == [
        *("none, split seed 3", "hard, split seed 3", "as it is, split seed 3"),
        *("none, split seed 4", "hard, split seed 4", "as it is, split seed 4"),
    ]
    assert [point.config.loss.kind for point in points[:3]] == ["none", "hard", "soft"]
    assert points[4].config.optim.epochs == 7
    assert points[5].config == digits().replace(data={"split_seed": 4})


def test_listed_runs_are_named_by_their_fields(tmp_path):
    sweep = read(tmp_path, {"runs": [{"optim.lr": 0.01}, {}, {"loss": "none"}]}, "s.json")
    assert list(sweep.runs) == ["lr 0.01", "as it is", "loss none"]


def test_point_name_has_full_names_for_fields_with_equal_leaves(tmp_path):
    sweep = read(tmp_path, "grid: {student.image_size: [8], data.image_size: [8]}")
    (point,) = points_of(sweep, digits())
    assert point.name == "student.image_size 8, data.image_size 8"


def test_with_fields_applies_presets_first():
    fields = {"loss.temperature": 7, "loss": "deit-soft", "view_mode": "same/ic"}
    config = with_fields(digits(), fields, where="here")
    assert (config.loss.temperature, config.loss.distillation_weight) == (7, 0.1)
    assert config.views.crop == "random_resized"


def test_study_arms_are_combined_with_the_grid(tmp_path):
    sweep = read(tmp_path, "{study: teacher, grid: {loss.temperature: [1, 5]}, seeds: [0, 4]}")
    points = points_of(sweep, digits())
    assert [point.values for point in points] == [
        {"run": "distilled", "loss.temperature": "1"},
        {"run": "undistilled", "loss.temperature": "1"},
        {"run": "distilled", "loss.temperature": "5"},
        {"run": "undistilled", "loss.temperature": "5"},
    ]
    assert sweep.seeds == (0, 4)


@pytest.mark.parametrize("name", SWEEPS)
def test_built_in_sweep_has_valid_distinct_points(name):
    sweep = find_sweep(name)
    base = RECIPES[sweep.recipe]()
    if name == "ensemble":
        base = digits_ensemble()
    if name == "resolution":
        base = RECIPES["digits-finetune"]()
    points = points_of(sweep, base)
    assert len({point.name for point in points}) == len(points) > 1
    assert all(isinstance(point, Point) and point.values for point in points)
    assert STUDIES.keys() <= SWEEPS.keys()


def test_study_can_be_limited_to_some_arms(tmp_path):
    sweep = read(tmp_path, "{study: table-3, arms: [token, none]}")
    assert [point.name for point in points_of(sweep, digits())] == ["token", "none"]
    sweep = read(tmp_path, "{study: table-3, arms: [tokn]}")
    with raises(ConfigError, "arms = tokn", "token?"):
        points_of(sweep, digits())


def test_with_command_line_replaces_fields_of_runs_but_not_of_the_grid(tmp_path):
    recipe_config = digits()
    typed = recipe_config.replace(optim={"epochs": 3, "warmup_epochs": 1})
    sweep = read(tmp_path, "runs: {a: {optim.epochs: 70, optim.lr: 1.0e-2}, b: {}}")
    points = points_of(with_command_line(sweep, recipe_config, typed), typed)
    assert [point.config.optim.epochs for point in points] == [3, 3]
    assert points[0].config.optim.lr == 1e-2
    for text in ("grid: {optim.epochs: [5, 6]}", "search: {fields: {optim.epochs: [5, 6]}}"):
        with raises(ConfigError, "optim.epochs"):
            with_command_line(read(tmp_path, text), recipe_config, typed)


def test_boundary_points_combine_values_that_are_invalid_alone(tmp_path):
    """Five heads do not divide a width of 96, so they are combined with a width of 100. A value
    that is invalid with all others is refused."""
    fields = (
        "student.embed_dim: [96, 100], student.num_heads: [4, 5], optim.lr: {low: 1e-3, high: 1}"
    )
    sweep = read(tmp_path, f"search: {{fields: {{{fields}}}}}")
    wide = digits().replace(student={"embed_dim": 96, "num_heads": 4})
    points = boundary_points(sweep, wide)
    assert [point.name for point in points] == [
        *("the first", "embed dim 96", "embed dim 100", "num heads 4", "num heads 5"),
        *("lr 0.001", "lr 1"),
    ]
    sides = [(point.config.student.embed_dim, point.config.student.num_heads) for point in points]
    assert sides == [(96, 4), (96, 4), (100, 4), (96, 4), (100, 5), (96, 4), (96, 4)]
    bad = read(tmp_path, "search: {fields: {student.num_heads: [4, 7]}}")
    with raises(ConfigError, "num heads 7", "student.num_heads"):
        boundary_points(bad, wide)


def test_find_sweep_unknown_name_lists_the_sweeps():
    with raises(ConfigError, "view-mode", *SWEEPS) as raised:
        find_sweep("view-mode")
    assert str(raised.value).count("view-modes") == 2  # in the list, and as the suggestion


def test_find_sweep_recipe_name_suggests_recipe_option():
    with raises(ConfigError, "--recipe"):
        find_sweep("cifar10-micro")


def test_numeric_class_names_need_no_quotes(tmp_path):
    sweep = read(tmp_path, "grid: {data.unseen_classes: [[6, 7], [8]]}")
    points = points_of(sweep, digits())
    assert [point.config.data.unseen_classes for point in points] == [("6", "7"), ("8",)]


def test_point_changes_are_the_fields_of_its_run(tmp_path):
    sweep = read(tmp_path, "runs: {plain: {}, other: {loss.temperature: 4, optim.lr: 0.5}}")
    plain, other = points_of(sweep, digits())
    assert (plain.changes, other.changes) == ({}, {"loss.temperature": "4", "optim.lr": "0.5"})
    text = "runs: {soft: {loss: deit-soft}, hard: {loss: deit-hard, loss.label_smoothing: 0}}"
    soft, hard = (point.changes for point in points_of(read(tmp_path, text), digits()))
    assert soft == {
        "loss": "deit-soft",
        "loss.kind": "soft",
        "loss.distillation_weight": "0.1",
        "loss.temperature": "3",
        "loss.label_smoothing": "0.1",
    }
    assert hard["loss"] == "deit-hard"
    assert (hard["loss.kind"], hard["loss.distillation_weight"]) == ("hard", "0.5")
    assert (hard["loss.temperature"], hard["loss.label_smoothing"]) == ("1", "0")
    text = "{grid: {loss: [none, deit-hard]}, runs: {a: {}, b: {loss.kind: none}}}"
    changes = [point.changes for point in points_of(read(tmp_path, text), digits())]
    assert changes == [{}, {"loss.kind": "none"}] * 2
    (point,) = points_of(read(tmp_path, "grid: {optim.lr: [0.5]}"), digits())
    assert point.changes is None


def test_points_are_valid_and_serializable_configurations(tmp_path):
    sweep = read(
        tmp_path, 'grid: {views.crop_scale: ["0.3,1", [0.5, 1]], data.unseen_classes: ["7", []]}'
    )
    for point in points_of(sweep, digits()):
        assert validate(point.config) == point.config
        assert json.loads(json.dumps(to_dict(point.config)))
    assert [text_of(value) for value in (None, 0.5, 1e-5, [1, 2], "a", True)] == [
        *("none", "0.5", "1e-05", "1,2", "a", "True")
    ]


def test_read_sweep_files_of_the_documentation(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "guides" / "sweeps.md").read_text()
    _, text, searching = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert read(tmp_path, searching).search.trials == 30
    sweep = read(tmp_path, text)
    assert len(points_of(sweep, RECIPES[sweep.recipe]())) == 3 * 2 * 2
    named = set(re.findall(r"`([a-z0-9-]+)`", page.split("## Built-in sweeps")[1].split("##")[0]))
    assert named >= set(SWEEPS)


def test_sweep_of_the_guide_to_losses_compares_labels_through_the_token(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "guides" / "losses.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    losses = {point.name: point.config.loss for point in points_of(read(tmp_path, text), digits())}
    assert losses == {"soft": LOSS_PRESETS["deit-soft"], "hard": LOSS_PRESETS["deit-hard"]}
    assert {loss.head for loss in losses.values()} == {"distillation"}
    weights = [losses[name].distillation_weight for name in ("soft", "hard")]
    assert re.search(
        "weight of (.+) and a temperature of 3,\n.*weight of (.+). It", page
    ).groups() == (*map(str, weights),)


def test_search_range_is_whole_for_integer_fields(tmp_path):
    text = """
    search:
      trials: 7
      fields:
        student.depth: {low: 2, high: 6}
        student.embed_dim: {low: 16, high: 64, log: true}
        loss.temperature: {low: 1, high: 20}
        loss.kind: [soft, hard]
    """
    space = read(tmp_path, text).search
    assert (space.trials, space.prune) == (7, True)
    assert space.fields == {
        "student.depth": SearchRange(2, 6, is_integer=True),
        "student.embed_dim": SearchRange(16, 64, log=True, is_integer=True),
        "loss.temperature": SearchRange(1.0, 20.0),
        "loss.kind": ("soft", "hard"),
    }


@pytest.mark.fault("E11")
def test_duplicate_points_are_reported(tmp_path):
    sweep = read(tmp_path, "runs: {quick: {optim.lr: 0.5}, fast: {optim.lr: 0.5}, other: {}}")
    sweep_runs = make_sweep_runs(
        points_of(sweep, digits()), (0, 1), tmp_path, lambda config: config
    )
    (message,) = duplicate_points(sweep_runs)
    assert message.startswith("fast: ")
    assert "quick" in message


@pytest.mark.parametrize("name", SWEEPS)
def test_built_in_sweep_fits_one_epoch(name):
    """The warm-up of these recipes is longer than one epoch."""
    base = run_of(SWEEPS[name].recipe, "--optim.epochs", "1")
    assert points_of(SWEEPS[name], base)


def test_warm_up_fitted_to_few_epochs_can_vary(tmp_path):
    typed = run_of("digits", "--optim.epochs", "4")
    assert typed.optim.warmup_epochs == 2
    sweep = read(tmp_path, "grid: {optim.warmup_epochs: [0, 1]}")
    points = points_of(with_command_line(sweep, digits(), typed), typed)
    assert [point.config.optim.warmup_epochs for point in points] == [0, 1]
    points = points_of(read(tmp_path, "grid: {optim.epochs: [2, 60]}"), digits())
    assert [point.config.optim.warmup_epochs for point in points] == [1, 5]
    text = "{set: {optim.warmup_epochs: 4}, grid: {optim.epochs: [4, 60]}}"
    points = points_of(read(tmp_path, text), digits().replace(optim={"warmup_epochs": 4}))
    assert [point.config.optim.warmup_epochs for point in points] == [2, 4]
    text = "runs: {a: {optim.epochs: 4, optim.warmup_epochs: 3}}"
    (point,) = points_of(read(tmp_path, text), digits())
    assert point.config.optim.warmup_epochs == 3


def run_of(*arguments):
    return parse_run(list(arguments), program="deit sweep", live_teacher=False).config
