"""Studies of all recipes with a teacher, and the base runs that they depend on."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from deit.cli.run_args import parse_run
from deit.config.presets import LOSS_PRESETS
from deit.config.recipes import RECIPES, recipe_of_path
from deit.config.recipes.cifar import cifar10_finetune
from deit.config.recipes.handwriting import (
    digits,
    digits_ensemble,
    digits_few_labels,
    digits_few_labels_teacher,
    digits_finetune,
    digits_teacher,
)
from deit.config.schema import to_dict
from deit.config.sections.teacher import TeacherConfig
from deit.config.teachers import teacher_specs
from deit.config.validation import validate
from deit.core.errors import ConfigError
from deit.datasets.splits import load_splits
from deit.experiments.base_runs import BaseRuns, Experiment
from deit.experiments.studies import STUDIES
from deit.training.lr_schedule import set_lr
from deit.training.optimizer import build_optimizer
from tests.helpers.errors import raises

TAUGHT = [name for name, recipe in RECIPES.items() if recipe().loss.kind != "none"]


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("name", TAUGHT)
def test_study_arms_are_valid_and_have_equal_budget(name, study):
    config = RECIPES[name]()
    taught_by = recipe_of_path(config.teacher.source[0])
    invalid = {
        "table-2": (taught_by is None, "teacher.source"),
        "table-3": (not config.student.name.startswith("deit_"), "student.name"),
        "table-4": (not config.student.name.startswith("deit_"), "student.name"),
        "ensemble": (len(config.teacher.source) < 2, "teacher.source"),
        "resolution": (config.init.weights is None, "init.weights"),
    }
    is_invalid, field = invalid.get(study, (False, ""))
    if is_invalid:
        with raises(ConfigError, f"study {study}", field):
            STUDIES[study](config)
        return
    arms = STUDIES[study](config)
    assert len(arms) > 1
    if (study, name) == ("teacher", "digits-few-labels"):
        assert validate(arms.pop("undistilled"))  # has fewer images: see the tests below
    for arm in arms.values():
        assert validate(arm, live_teacher=False)
        assert arm.data == config.data
        assert arm.run == config.run
        if study not in ("epochs", "table-8"):
            assert arm.optim == config.optim


def test_teacher_study_with_few_labels_uses_the_same_labels_and_steps_in_both_arms():
    pytest.importorskip("sklearn")
    config = digits_few_labels()
    arms = STUDIES["teacher"](config)
    assert arms["distilled"] == config
    labeled = load_splits(digits_few_labels_teacher().data).train
    trained_on = {name: load_splits(arm.data).train for name, arm in arms.items()}
    assert torch.equal(trained_on["undistilled"].pixels, labeled.pixels)
    assert torch.equal(trained_on["undistilled"].labels, labeled.labels)
    assert len(labeled.labels) < len(trained_on["distilled"].labels) / 15
    for leaf in ("epochs", "warmup_epochs"):
        steps = [
            getattr(arm.optim, leaf) * (len(trained_on[name].labels) // arm.optim.batch_size)
            for name, arm in arms.items()
        ]
        assert steps[0] == steps[1] > 0
    evaluations = [arm.optim.epochs / arm.run.eval_every_epochs for arm in arms.values()]
    assert evaluations[0] == evaluations[1]


def labeled_run(folder, fraction):
    """Write the configuration of a teacher that was trained on a fraction of the images."""
    folder.mkdir()
    config = to_dict(digits_teacher().replace(data={"train_fraction": fraction}))
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_teacher_study_labels_are_those_that_its_teachers_learned_from(tmp_path):
    few, more = (labeled_run(tmp_path / str(part), part) for part in (0.1, 0.25))

    def fraction(sources=None, **sections):
        config = digits_few_labels().replace(**sections)
        if sources is not None:
            config = config.replace(teacher={"source": sources})
        return STUDIES["teacher"](config)["undistilled"].data.train_fraction

    assert fraction() == 0.05
    assert fraction((few,)) == 0.1
    assert fraction((few, more)) == 0.25  # the smaller part is in the larger one
    assert fraction((few, "resnet18")) == 1
    assert fraction(("resnet18",)) == 1
    assert fraction((more,), data={"train_fraction": 0.2}) == 0.2
    # Of a built-in recipe this option changes the teacher's images as well.
    assert fraction(data={"train_fraction": 0.2}) == 0.2


@pytest.mark.parametrize("loss", sorted(LOSS_PRESETS.keys() - {"none"}))
def test_teacher_study_with_a_loss_of_labels_keeps_all_images(loss):
    config = dataclasses.replace(digits_few_labels(), loss=LOSS_PRESETS[loss])
    undistilled = STUDIES["teacher"](config)["undistilled"]
    has_fewer = undistilled.data.train_fraction < 1
    assert has_fewer == (loss == "function-matching")
    assert has_fewer == (undistilled.optim.epochs > config.optim.epochs)


def test_study_arm_names_have_no_comma():
    config = digits_ensemble().replace(init={"weights": "checkpoints/digits"})
    for study in STUDIES.values():
        for name in study(config):
            assert "," not in name


def test_resolution_study_compares_teachers_before_and_after_fine_tuning():
    arms = STUDIES["resolution"](digits_finetune())
    seen = {name: (arm.teacher.source, arm.teacher.image_size) for name, arm in arms.items()}
    assert seen == {
        "teacher fitted": (("checkpoints/digits-finetune-teacher",), (16,)),
        "teacher resized": (("checkpoints/digits-teacher",), (16,)),
        "teacher as trained": (("checkpoints/digits-teacher",), ()),
        "none": (("checkpoints/digits-finetune-teacher",), (16,)),
    }
    assert arms["none"].loss.kind == "none"
    assert "teacher fitted" not in STUDIES["resolution"](cifar10_finetune())


def test_epochs_study_scales_warm_up_and_averaging():
    config = digits().replace(loss={"distillation_warmup_epochs": 30.0}, optim={"ema_epochs": 40.0})
    arms = STUDIES["epochs"](config)
    assert [arm.optim.epochs for arm in arms.values()] == [15, 15, 30, 30, 60, 60, 120, 120]
    assert arms["distilled-15"].loss.distillation_warmup_epochs == 3.75
    assert arms["distilled-15"].optim.ema_epochs == 7.5
    assert all(validate(arm) for arm in arms.values())


def test_ensemble_study_single_teacher_keeps_its_fields():
    config = digits_ensemble().replace(
        student={"num_distillation_tokens": 1},
        teacher={
            "source": ("runs/x/best", "runs/y/best"),
            "architecture": ("timm:resnet18",),
            "image_size": (8, 16),
            "mean": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
            "std": (1.0, 1.0, 1.0),
            "weights": (1.0, 2.0),
            "target_stores": ("none", "store"),
            "combine": "logits",
        },
    )
    arms = STUDIES["ensemble"](validate(config))
    first, second = arms["only runs/x/best"], arms["only runs/y/best"]
    for index, arm in enumerate((first, second)):
        assert validate(arm)
        (member,) = teacher_specs(arm.teacher)
        assert member == teacher_specs(config.teacher)[index]._replace(weight=1.0)
    assert (first.teacher.target_stores, second.teacher.target_stores) == ((), ("store",))
    assert isinstance(first.teacher, TeacherConfig)


def base_runs_of(arguments, folder, seed=3):
    run = parse_run(arguments, program="compare")
    return BaseRuns(run, run.config.replace(run={"seed": seed}), folder), run.config


def test_base_runs_of_user_recipe_are_empty(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from deit.config.recipes import find_recipe\n\n\n"
        "def recipe():\n    return find_recipe('digits')\n"
    )
    base_runs, config = base_runs_of([str(file)], tmp_path)
    assert base_runs.with_local_paths(config) == config
    assert base_runs.runs == {}


def test_base_runs_do_not_train_a_teacher_of_the_command_line(tmp_path):
    base_runs, config = base_runs_of(["digits", "--teacher.source", "mine"], tmp_path)
    assert base_runs.with_local_paths(config).teacher.source == ("mine",)
    assert base_runs.runs == {}


def test_base_runs_single_teacher_is_named_teacher(tmp_path):
    base_runs, config = base_runs_of(["digits", "--data.train_fraction", "0.5"], tmp_path)
    assert base_runs.with_local_paths(config).teacher.source == (str(tmp_path / "teacher"),)
    (teacher,) = base_runs.runs.values()
    assert teacher.data.train_fraction == 0.5
    assert teacher.run.seed == 3
    assert base_runs.teachers == {"teacher"}


def test_base_runs_of_fine_tuning_include_their_dependencies(tmp_path):
    base_runs, config = base_runs_of(["digits-finetune", "--data.train_fraction", "0.5"], tmp_path)
    arms = [base_runs.with_local_paths(arm) for arm in STUDIES["resolution"](config).values()]
    assert list(base_runs.runs) == ["digits-teacher", "digits-finetune-teacher", "digits"]
    folders = {name: str(tmp_path / name) for name in base_runs.runs}
    fitted = base_runs.runs["digits-finetune-teacher"]
    assert fitted.init.weights == folders["digits-teacher"]
    assert base_runs.runs["digits"].teacher.source == (folders["digits-teacher"],)
    assert {arm.init.weights for arm in arms} == {folders["digits"]}
    assert arms[0].teacher.source == (folders["digits-finetune-teacher"],)
    assert arms[1].teacher.source == (folders["digits-teacher"],)
    assert base_runs.teachers == {"digits-teacher", "digits-finetune-teacher"}
    sizes = {name: run.data.image_size for name, run in base_runs.runs.items()}
    assert sizes == {"digits-teacher": 8, "digits-finetune-teacher": 16, "digits": 8}
    assert all(run.data.train_fraction == 0.5 for run in base_runs.runs.values())
    assert all(run.run.seed == 3 for run in base_runs.runs.values())


def test_table_3_study_has_the_rows_of_the_paper():
    """In the DeiT paper's Table 3 the first three rows have no distillation token."""
    config = digits().replace(student={"name": "deit_tiny"})
    arms = STUDIES["table-3"](config)
    methods = {
        name: (arm.student.name, arm.loss.kind, arm.loss.head if arm.loss.kind != "none" else "")
        for name, arm in arms.items()
    }
    assert methods == {
        "none": ("vit_tiny", "none", ""),
        "soft": ("vit_tiny", "soft", "class"),
        "hard": ("vit_tiny", "hard", "class"),
        "token": ("deit_tiny", "hard", "distillation"),
    }
    assert (arms["soft"].loss.temperature, arms["soft"].loss.distillation_weight) == (3, 0.1)
    assert arms["hard"].loss.distillation_weight == 0.5
    assert STUDIES["table-4"](config) == {"undistilled": arms["none"], "distilled": arms["token"]}


def test_table_2_study_has_the_teachers_of_the_recipe_family():
    arms = STUDIES["table-2"](digits())
    assert {name: arm.teacher.source for name, arm in arms.items()} == {
        "ConvNet": ("checkpoints/digits-teacher",),
        "involution": ("checkpoints/digits-involution-teacher",),
        "transformer": ("checkpoints/digits-transformer-teacher",),
        "none": ("checkpoints/digits-teacher",),
    }
    for arm in arms.values():
        assert arm.loss.kind == ("none" if arm == arms["none"] else "soft")
    assert "transformer" not in STUDIES["table-2"](RECIPES["tiny-imagenet"]())


def test_table_8_study_changes_one_component_per_arm():
    arms = STUDIES["table-8"](digits())
    whole = to_dict(arms["DeiT"])
    assert arms["DeiT"].views.auto_augment == "randaugment"
    changed = {
        name: {
            f"{section}.{leaf}"
            for section, values in to_dict(arm).items()
            for leaf, value in values.items()
            if value != whole[section][leaf]
        }
        for name, arm in arms.items()
    }
    assert changed == {
        "DeiT": set(),
        "SGD": {f"optim.{leaf}" for leaf in ("name", "lr", "weight_decay", "clip_grad_norm")},
        "no RandAugment": {"views.auto_augment"},
        "AutoAugment": {"views.auto_augment"},
        "no mixup": {"views.mixup_alpha"},
        "no cutmix": {"views.cutmix_alpha"},
        "neither mixup nor cutmix": {"views.mixup_alpha", "views.cutmix_alpha"},
        "no erasing": {"views.erasing_prob"},
        "no stochastic depth": {"student.drop_path"},
        "no repeated augmentation": {"views.aug_repeats"},
        "dropout": {"student.dropout"},
        "weight average": {"optim.ema_epochs"},
    }


@pytest.mark.parametrize(("independent", "decay"), [(False, 0.05), (True, 1e-3)])
def test_table_8_study_sgd_decays_weights_like_adamw(independent, decay):
    """Without gradients, SGD and AdamW shrink the weights by the same share per step."""
    config = digits().replace(
        optim={"independent_weight_decay": independent, "weight_decay": decay}
    )
    arms = STUDIES["table-8"](config)
    shares = []
    for arm in ("DeiT", "SGD"):
        layer = nn.Linear(4, 4, bias=False)
        optimizer = build_optimizer(layer, arms[arm].optim)
        sizes = []
        for _ in range(300):
            set_lr(optimizer, arms[arm].optim.peak_lr)
            layer.weight.grad = torch.zeros_like(layer.weight)
            optimizer.step()
            sizes.append(layer.weight.norm().item())
        shares.append(math.log(sizes[100] / sizes[299]) / 199)
    assert shares[0] == pytest.approx(shares[1], rel=0.02)
    assert shares[0] > 1e-6


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar10-micro"])
def test_base_runs_include_the_teachers_of_study_arms(name):
    config = RECIPES[name]()
    experiment = Experiment(name, config, None)
    arms = STUDIES["table-2"](config)
    base_runs = BaseRuns(experiment, config, Path("out"), arms=arms.values())
    sources = {arm: base_runs.with_local_paths(arms[arm]).teacher.source for arm in arms}
    assert sources["transformer"] == (f"out/{name}-transformer-teacher",)
    assert base_runs.teachers == set(base_runs.runs) >= {f"{name}-teacher"}
    typed = config.replace(teacher={"source": ("mine",)})
    base_runs = BaseRuns(experiment, typed, Path("out"), arms=arms.values())
    assert (
        base_runs.with_local_paths(arms["transformer"]).teacher.source
        == arms["transformer"].teacher.source
    )
