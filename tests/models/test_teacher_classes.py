"""The order of a teacher's classes: detected, configured, rejected; and teachers near chance."""

import re

import pytest
import torch
from torch import nn

from deit.config.schema import Config
from deit.config.sections.teacher import TeacherConfig
from deit.config.teachers import single_teacher, teacher_specs
from deit.config.validation import validate
from deit.core.errors import ConfigError, DataError
from deit.distill.teacher_check import (
    better_order,
    check_accuracy,
    check_class_order,
    log_class_order,
)
from deit.models.teachers import ASSUMED, LoadedNetwork, Teacher
from tests.helpers.errors import raises
from tests.helpers.recorder_teacher import MEAN, ROOM_CLASSES, STD, Recorder, recorder_teacher


def test_classes_are_set_per_teacher():
    multiple = TeacherConfig(source=("one", "other"), classes=("none", "natural"))
    assert [item.classes for item in teacher_specs(multiple)] == [None, ("natural",)]
    assert [single_teacher(multiple, index).classes for index in range(2)] == [(), ("natural",)]
    both = TeacherConfig(source=("one", "other"), classes=("natural",))
    assert [item.classes for item in teacher_specs(both)] == [("natural",)] * 2
    for source, classes, errors in (
        (("x", "y"), ("natual",), "natual"),
        (("x", "y"), ("a", "b", "c"), ("a", "b", "c")),
        (("x", "y"), ("a", "natural"), "a"),
        (("x",), ("natual",), "natual"),
    ):
        with raises(ConfigError, "teacher.classes") as refused:
            validate(Config().replace(teacher={"source": source, "classes": classes}))
        problem = refused.value.problems[0]
        assert (problem.field, problem.value) == ("teacher.classes", errors)
        if errors == "natual":
            assert problem.hint.endswith("natural?")
    none = validate(Config().replace(teacher={"source": ("x",), "classes": "none"}))
    assert none.teacher.classes == ()


def test_better_class_order_is_found():
    labels = torch.arange(3).repeat(10)
    taught = torch.tensor([0, 2, 1])  # in natural order: room2 is its class 1
    better = better_order(taught[labels], labels, ROOM_CLASSES)
    assert (better.order, better.images, better.before, better.after) == ("natural", 20, 0.0, 1.0)
    assert better.luck < 1e-3
    assert better_order(labels, labels, ROOM_CLASSES) is None


@pytest.mark.fault("D2")
def test_class_order_is_not_found_by_chance():
    names = tuple(f"room{index}" for index in range(1, 13))
    names = tuple(sorted(names))
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12).repeat(20)
    for sure in (0.0, 0.2, 0.6):
        for _ in range(100):
            known = torch.rand(len(labels), generator=generator) < sure
            guessed = torch.randint(12, (len(labels),), generator=generator)
            better = better_order(torch.where(known, labels, guessed), labels, names)
            assert better is None or better.luck > 1e-3 or better.after - better.before < 0.1


def test_constant_teacher_fits_no_order_better():
    labels = torch.tensor([0] * 400 + [1] * 600)
    teacher = Teacher(LoadedNetwork(Recorder(), "same", None, MEAN, STD, None), class_order=ASSUMED)
    check_class_order(
        teacher, torch.zeros(1000, dtype=torch.long), labels, ("ant", "bee")
    )  # reversed, it is right more often


@pytest.mark.fault("D2")
@pytest.mark.parametrize("order", [ASSUMED, "teacher.classes data"])
def test_teacher_in_other_class_order_raises_unless_configured(order, capsys):
    labels = torch.arange(3).repeat(10)
    outputs = torch.tensor([0, 2, 1])[labels]
    teacher = Teacher(LoadedNetwork(Recorder(), "mine", None, MEAN, STD, None), class_order=order)
    log_class_order(teacher, ROOM_CLASSES)
    output = capsys.readouterr().out
    assert order in output
    assert ("--teacher.classes" in output) == (order == ASSUMED)
    if order != ASSUMED:
        check_class_order(teacher, outputs, labels, ROOM_CLASSES)
        return
    with raises(DataError, "mine", "--teacher.classes natural", 20, "100.0 %"):
        check_class_order(teacher, outputs, labels, ROOM_CLASSES)


def judged(right, copies=1):
    """Check a teacher with `right` of six images correct; with three classes, chance is a third."""
    labels = torch.arange(6) % 3
    outputs = torch.where(torch.arange(6) < right, labels, (labels + 1) % 3)
    labels, outputs = labels.repeat(copies), outputs.repeat(copies)
    logits = nn.functional.one_hot(outputs, 3).float()
    check_accuracy(recorder_teacher(), logits, labels, 1 / 3)


def test_teacher_near_chance_raises_or_warns_with_few_images(capsys):
    names = ("recorder", "33.3 %", "largest class", "6 validation images", "19.2 points")
    with raises(DataError, *names, "is near chance", "teacher.allow_near_chance"):
        judged(2)  # sqrt(1/3 * 2/3 / 6) = 0.192
    with raises(DataError, *names, "16.7 %", "is below chance"):
        judged(1)
    judged(4)
    output = capsys.readouterr().err
    assert all(item in output for item in ("recorder", "66.7 %", "33.3 %", "largest class"))
    assert re.search(r"\b6 validation images", output)
    judged(6)
    with raises(DataError) as refused:
        judged(1, copies=20)
    assert "points" not in str(refused.value)  # 120 images are enough
    assert not capsys.readouterr().err
