"""deit.recipe: fields, presets and paths as Python values; every problem in one ConfigError."""

import json
from pathlib import Path

import pytest

from deit.cli.run_args import parse_run
from deit.config.presets import LOSS_PRESETS, PRESETS
from deit.config.recipes import RECIPES, find_recipe, list_recipes, recipe
from deit.config.schema import to_dict
from deit.core.errors import ConfigError
from tests.helpers.errors import raises


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_without_changes_is_the_recipe(name):
    if name.startswith("transfer-"):  # its network comes from weights that the user gives
        with raises(ConfigError, "init.weights"):
            recipe(name)
        return
    assert recipe(name) == find_recipe(name)


def test_patterns_select_recipes():
    assert list_recipes() == list(RECIPES)
    assert list_recipes("cifar10-*") == [name for name in RECIPES if name.startswith("cifar10-")]
    assert list_recipes("no such") == []


@pytest.mark.parametrize(
    ("option", "name"), [(option, name) for option in PRESETS for name in PRESETS[option].names]
)
def test_presets_are_applied_as_on_the_command_line(option, name):
    flag = f"--{option.replace('_', '-')}"
    arguments = ["digits", flag, name]
    outcomes = []
    for make in (
        lambda: parse_run(arguments, program="deit train", live_teacher=False).config,
        lambda: recipe("digits", **{option: name}),
    ):
        try:
            outcomes.append(make())
        except ConfigError as error:  # digits does not fit some of them
            outcomes.append(error.problems)
    assert outcomes[0] == outcomes[1]


def test_fields_are_converted_and_paths_become_text():
    config = recipe(
        "digits",
        teacher={"source": [Path("runs/a"), "runs/b"], "weights": [1, 3]},
        data={"source": "folder", "root": Path("pictures"), "classes": "ant,bee"},
        optim={"lr": "1e-3"},
    )
    assert config.teacher.source == ("runs/a", "runs/b")
    assert config.teacher.weights == (1.0, 3.0)
    assert (config.data.root, config.data.classes) == ("pictures", ("ant", "bee"))
    assert config.optim.lr == 0.001


def test_fields_replace_those_of_a_preset():
    config = recipe("digits", view_mode="same/ic", views={"crop_scale": (0.5, 1)})
    assert (config.views.crop, config.views.crop_scale) == ("random_resized", (0.5, 1.0))
    assert recipe("digits", loss={"temperature": 2}).loss.kind == find_recipe("digits").loss.kind
    assert recipe("digits", loss="usi").loss == LOSS_PRESETS["usi"]


def test_fewer_epochs_limit_warm_ups_that_are_not_given():
    config = recipe("digits", optim={"epochs": 4})
    assert config.optim.warmup_epochs <= 2
    with raises(ConfigError, "optim.warmup_epochs"):
        recipe("digits", optim={"epochs": 4, "warmup_epochs": 9})


def test_all_problems_are_in_one_error():
    with raises(ConfigError) as caught:
        recipe(
            "digits",
            loss="deit-hrad",
            optim={"epochs": 0, "learning_rate": 1},
            teachers={"source": "x"},
            run=3,
        )
    problems = {problem.field: problem.hint for problem in caught.value.problems}
    expected = {"loss", "optim.epochs", "optim.learning_rate", "teachers", "run"}
    assert problems.keys() == expected
    assert "did you mean deit-hard" in problems["loss"]
    assert "did you mean teacher" in problems["teachers"]


def test_run_folder_is_a_recipe_but_does_not_choose_code(tmp_path):
    config = recipe("digits", optim={"epochs": 7})
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    for name in (tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert recipe(name).optim.epochs == 7
    values = to_dict(config)
    values["teacher"]["source"] = ["mine.py:net"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with raises(ConfigError, "mine.py:net", "Python code"):
        recipe(tmp_path)
    assert recipe(tmp_path, teacher={"source": "resnet18"}).teacher.source == ("resnet18",)
