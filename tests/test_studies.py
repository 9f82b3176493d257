"""Every study of every recipe with a teacher consists of valid configurations at equal budget."""

import pytest

from deit.config import TeacherConfig, derive, members
from deit.errors import ConfigError
from deit.recipes import RECIPES, digits, digits_ensemble
from deit.studies import STUDIES
from deit.validation import validate

TAUGHT = [name for name, recipe in RECIPES.items() if recipe().loss.kind != "none"]


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("name", TAUGHT)
def test_every_arm_is_valid_and_has_the_same_budget(name, study):
    config = RECIPES[name]()
    if study == "ensemble" and len(config.teacher.source) < 2:
        with pytest.raises(ConfigError, match="needs several teachers"):
            STUDIES[study](config)
        return
    arms = STUDIES[study](config)
    assert len(arms) > 1
    for arm in arms.values():
        assert validate(arm, online=False)
        assert arm.data == config.data
        assert arm.run == config.run
        if study != "patience":
            assert arm.optim == config.optim


def test_the_arms_of_a_study_can_be_named_on_a_command_line():
    for study in STUDIES.values():
        for name in study(digits_ensemble()):
            assert "," not in name


def test_patience_scales_what_is_counted_in_epochs():
    config = derive(digits(), loss={"distillation_warmup": 30.0}, optim={"ema_epochs": 40.0})
    arms = STUDIES["patience"](config)
    assert [arm.optim.epochs for arm in arms.values()] == [15, 15, 30, 30, 60, 60, 120, 120]
    assert arms["distilled-15"].loss.distillation_warmup == 3.75
    assert arms["distilled-15"].optim.ema_epochs == 7.5
    assert all(validate(arm) for arm in arms.values())


def test_a_teacher_alone_keeps_what_was_said_of_it():
    config = derive(
        digits_ensemble(),
        student={"distillation_tokens": 1},
        teacher={
            "source": ("runs/x/best", "runs/y/best"),
            "architecture": ("timm:resnet18",),
            "image_size": (8, 16),
            "mean": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
            "std": (1.0, 1.0, 1.0),
            "weight": (1.0, 2.0),
            "targets": ("none", "store"),
            "combine": "logits",
        },
    )
    arms = STUDIES["ensemble"](validate(config))
    one, two = arms["only runs/x/best"], arms["only runs/y/best"]
    for place, arm in enumerate((one, two)):
        assert validate(arm)
        (member,) = members(arm.teacher)
        assert member == members(config.teacher)[place]._replace(weight=1.0)
    assert (one.teacher.targets, two.teacher.targets) == ((), ("store",))
    assert isinstance(one.teacher, TeacherConfig)


def test_a_recipe_of_ones_own_brings_its_teacher_to_a_comparison(tmp_path):
    from deit.arguments import parse_run
    from deit.comparison import _teachers

    file = tmp_path / "mine.py"
    file.write_text("from deit.recipes import digits\n\n\ndef recipe():\n    return digits()\n")
    run = parse_run([str(file)], program="compare", about="")
    teachers, student = _teachers(run, tmp_path, seed=3)
    assert teachers == {}
    assert student.teacher == digits().teacher
    assert student.run.seed == 3
