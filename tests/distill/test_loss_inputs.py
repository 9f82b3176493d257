"""The loss in other people's loops: forms of outputs, labels and targets; the loss as a module."""

import pytest
import torch

from deit.config.sections.loss import LossConfig
from deit.core.errors import ConfigError
from deit.core.types import StudentOutput, TeacherOutput
from deit.distill.losses import DISTILLATION_LOSSES, DistillationLoss, distillation_loss
from tests.helpers.errors import raises

CLASS, TOKEN = torch.randn(4, 3), torch.randn(4, 3)
LOGITS = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [0, 0, 2]])
TEACHER = TeacherOutput(LOGITS.argmax(dim=1, keepdim=True), LOGITS[:, None])
LABELS = torch.tensor([0, 1, 1, 2])
STRICT = (
    StudentOutput(CLASS, TOKEN[:, None]),
    torch.nn.functional.one_hot(LABELS, 3).float(),
    TEACHER,
)


@pytest.mark.parametrize("kind", [*DISTILLATION_LOSSES, "none"])
@pytest.mark.parametrize(
    ("outputs", "targets", "teacher"),
    [
        ((CLASS, TOKEN), LABELS, TEACHER.logits[:, 0]),
        ([CLASS, TOKEN[:, None]], STRICT[1], TEACHER.logits),
        ((CLASS, TOKEN), LABELS.int(), (TEACHER.labels[:, 0], TEACHER.logits[:, 0])),
        (StudentOutput(CLASS, TOKEN), LABELS, (TEACHER.labels[:, 0].int(), TEACHER.logits[:, 0])),
    ],
    ids=["timm's tuple", "with a token axis", "a target store", "without a token axis"],
)
def test_loss_takes_the_forms_of_other_libraries(kind, outputs, targets, teacher):
    loss = DistillationLoss(kind)
    expected = distillation_loss(*STRICT, LossConfig(kind))
    losses = loss(outputs, targets, teacher)
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], value) for name, value in expected.items())


def test_hard_distillation_takes_labels_alone_and_one_head():
    labels = torch.tensor([2, 0, 0, 1])
    loss = DistillationLoss("hard", head="class", label_smoothing=0.0)
    losses = loss(CLASS, LABELS, labels)
    by_hand = [-CLASS.log_softmax(dim=1)[range(4), index].mean() for index in (LABELS, labels)]
    assert torch.allclose(losses["loss"], sum(by_hand) / 2)
    assert torch.equal(loss(CLASS, LABELS, (labels, None))["loss"], losses["loss"])


def test_loss_module_has_no_parameters_and_shows_its_options():
    loss = DistillationLoss("soft", temperature=3, distillation_weight=0.9)
    assert not list(loss.parameters())
    assert loss.config == LossConfig("soft", temperature=3.0, distillation_weight=0.9)
    assert repr(loss) == "DistillationLoss(kind='soft', distillation_weight=0.9, temperature=3.0)"


@pytest.mark.parametrize(
    ("outputs", "targets", "teacher", "field"),
    [
        (CLASS[0], LABELS, TOKEN, "outputs"),
        ((CLASS, TOKEN, TOKEN), LABELS, TOKEN, "outputs"),
        ((CLASS, TOKEN[:, :2]), LABELS, TOKEN, "outputs"),
        ({"logits": CLASS}, LABELS, TOKEN, "outputs"),
        (CLASS, LABELS[:3], TOKEN, "targets"),
        (CLASS, [0, 1, 1, 2], TOKEN, "targets"),
        (CLASS, LABELS.float(), TOKEN, "targets"),
        (CLASS, LABELS, TOKEN[:, :2], "teacher"),
        (CLASS, LABELS, LABELS[:2], "teacher"),
        (CLASS, LABELS, "resnet18", "teacher"),
        (CLASS, LABELS, (TOKEN, LABELS), "teacher"),
        (CLASS, LABELS, (None, None), "teacher"),
        (CLASS, LABELS, object(), "teacher"),
        ((CLASS, TOKEN), torch.tensor([0, 1, 2, 3]), TOKEN, "targets"),
        ((CLASS, TOKEN), torch.tensor([0, 1, 2, -100]), TOKEN, "targets"),
        (CLASS, LABELS, (torch.tensor([0, 1, 2, 3]), TOKEN), "teacher"),
        (CLASS, LABELS, (torch.tensor([0, 1, 2, -100]), TOKEN), "teacher"),
        (
            CLASS,
            LABELS,
            TeacherOutput(torch.tensor([[0], [1], [2], [3]]), TOKEN[:, None]),
            "teacher",
        ),
        (CLASS, LABELS, TeacherOutput(LABELS[:, None] - 100, None), "teacher"),
        (CLASS, LABELS, TeacherOutput(LABELS[:1, None], TOKEN[:1, None]), "teacher"),
        (CLASS, LABELS, TeacherOutput(LABELS[:, None], TOKEN[:, None, :2]), "teacher"),
        (CLASS, LABELS, TeacherOutput(LABELS[:, None], TOKEN[:, None], (0.5, 0.5)), "teacher"),
        (StudentOutput(CLASS, TOKEN[:2]), LABELS, TOKEN, "outputs"),
    ],
)
def test_loss_of_wrong_types_and_shapes_raises(outputs, targets, teacher, field):
    with raises(ConfigError) as caught:
        DistillationLoss("soft", head="all")(outputs, targets, teacher)
    assert caught.value.problems[0].field == field


def test_student_with_one_head_needs_the_class_head():
    with raises(ConfigError, "loss.head", "head='class'"):
        DistillationLoss("hard")(CLASS, LABELS, TOKEN)


def test_several_teachers_need_a_head_each():
    teachers = torch.stack([TOKEN, TOKEN], dim=1)
    with raises(ConfigError, "teacher", "2 teachers", "1 heads", "num_distillation_tokens=2"):
        DistillationLoss("soft")((CLASS, TOKEN), LABELS, teachers)
    assert DistillationLoss("soft")((CLASS, teachers), LABELS, teachers)["loss"].isfinite()


def test_options_that_are_no_configuration_raise():
    with raises(ConfigError, "loss", "LossConfig('soft')", "got str"):
        distillation_loss(CLASS, LABELS, TOKEN, "soft")


def test_soft_loss_of_labels_alone_raises():
    with raises(ConfigError, "loss.kind", "labels only"):
        DistillationLoss("soft", head="class")(CLASS, LABELS, LABELS)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("hard", {"temperature": 3}),
        ("hard", {"standardize_logits": True}),
        ("soft", {"dkd_beta": 2}),
        ("none", {"temperature": 2, "head": "all"}),
    ],
)
def test_options_without_effect_raise(kind, options):
    with raises(ConfigError, *(f"loss.{name}" for name in options)) as caught:
        DistillationLoss(kind, **options)
    assert {problem.field for problem in caught.value.problems} == {f"loss.{n}" for n in options}


def test_loss_module_with_invalid_options_names_all():
    with raises(ConfigError) as caught:
        DistillationLoss("sotf", temperature=0, tau=3)
    problems = {problem.field: problem for problem in caught.value.problems}
    assert problems.keys() == {"loss.kind", "loss.temperature", "loss.tau"}
    assert "did you mean soft" in problems["loss.kind"].hint
