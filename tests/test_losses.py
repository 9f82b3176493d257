"""Objectives against hand arithmetic, and where their gradients go."""

import math

import pytest
import torch

from deit.config import OBJECTIVES, LossConfig
from deit.losses import (
    KINDS,
    hard_teacher_loss,
    label_loss,
    objective,
    smooth,
    soft_teacher_loss,
)
from deit.records import Outputs

LN2, LN3 = math.log(2), math.log(3)


def softmax(values):
    exponentials = [math.exp(value) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def test_smoothing_by_hand():
    target = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(smooth(target, 0.1), torch.tensor([[0.925, 0.025, 0.025, 0.025]]))


def test_label_loss_by_hand():
    logits = torch.tensor([[LN3, 0.0]])  # softmax: 3/4, 1/4
    mixed = torch.tensor([[0.7, 0.3]])
    by_hand = -(0.7 * math.log(0.75) + 0.3 * math.log(0.25))
    assert label_loss(logits, mixed, 0.0).item() == pytest.approx(by_hand, rel=1e-6)
    # Smoothing 0.2 with two classes: 0.66 and 0.34. It is applied once, to the mixed target.
    by_hand = -(0.66 * math.log(0.75) + 0.34 * math.log(0.25))
    assert label_loss(logits, mixed, 0.2).item() == pytest.approx(by_hand, rel=1e-6)


def test_label_loss_is_torchs_smoothed_cross_entropy_on_plain_labels():
    logits, labels = torch.randn(8, 5), torch.randint(5, (8,))
    targets = torch.nn.functional.one_hot(labels, 5).float()
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.allclose(label_loss(logits, targets, 0.1), expected)


def test_hard_teacher_loss_by_hand_takes_the_argmax_unsmoothed():
    logits = torch.tensor([[LN3, 0.0], [0.0, LN3]])
    teacher = torch.tensor([[5.0, 1.0], [0.2, 0.1]])  # argmax 0 and 0
    by_hand = -(math.log(0.75) + math.log(0.25)) / 2
    assert hard_teacher_loss(logits, teacher).item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_teacher_loss_by_hand_is_batchmean_times_temperature_squared(temperature):
    student, teacher = [[LN3, 0.0, 1.0], [0.5, -1.0, 0.0]], [[0.0, 2.0, 1.0], [1.0, 1.0, -2.0]]
    total = 0.0
    for s_row, t_row in zip(student, teacher):
        s = softmax([value / temperature for value in s_row])
        t = softmax([value / temperature for value in t_row])
        total += sum(p * math.log(p / q) for p, q in zip(t, s))
    by_hand = temperature**2 * total / 2
    found = soft_teacher_loss(torch.tensor(student), torch.tensor(teacher), temperature)
    assert found.item() == pytest.approx(by_hand, rel=1e-5)


def test_soft_gradient_keeps_its_size_as_the_temperature_grows():
    student, teacher = torch.randn(16, 10, requires_grad=True), torch.randn(16, 10)
    sizes = []
    for temperature in (50.0, 100.0):
        (gradient,) = torch.autograd.grad(soft_teacher_loss(student, teacher, temperature), student)
        sizes.append(gradient.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


def test_soft_loss_is_zero_only_for_equal_answers_and_ignores_the_order_of_classes():
    student, teacher = torch.randn(6, 7), torch.randn(6, 7)
    assert soft_teacher_loss(teacher, teacher, 2.0).abs() < 1e-6
    loss = soft_teacher_loss(student, teacher, 2.0)
    assert loss > 0
    order = torch.randperm(7)
    assert torch.allclose(soft_teacher_loss(student[:, order], teacher[:, order], 2.0), loss)


def two_heads(requires_grad=True):
    return Outputs(
        torch.randn(4, 3, requires_grad=requires_grad),
        torch.randn(4, 3, requires_grad=requires_grad),
    )


TARGETS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.4, 0.6, 0], [0, 0, 1]])
TEACHER = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [0, 0, 2]])


def test_deit_hard_is_half_labels_half_teacher():
    outputs = two_heads()
    losses = objective(outputs, TARGETS, TEACHER, OBJECTIVES["deit-hard"])
    label = label_loss(outputs.class_logits, TARGETS, 0.1)
    teacher = hard_teacher_loss(outputs.distillation_logits, TEACHER)
    assert torch.allclose(losses["total"], (label + teacher) / 2)


def test_deit_soft_is_the_papers_lambda_and_tau():
    outputs = two_heads()
    losses = objective(outputs, TARGETS, TEACHER, OBJECTIVES["deit-soft"])
    label = label_loss(outputs.class_logits, TARGETS, 0.1)
    teacher = soft_teacher_loss(outputs.distillation_logits, TEACHER, 3.0)
    assert torch.allclose(losses["total"], 0.9 * label + 0.1 * teacher)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_head_learns_only_from_its_own_source(name):
    loss = OBJECTIVES[name]
    single = loss.through == "class"
    outputs = two_heads() if not single else Outputs(torch.randn(4, 3, requires_grad=True))
    teacher = TEACHER.clone().requires_grad_()
    losses = objective(outputs, TARGETS, None if loss.kind == "none" else teacher, loss)
    losses["total"].backward()
    assert teacher.grad is None
    assert outputs.class_logits.grad.abs().sum() > 0
    if not single:
        assert outputs.distillation_logits.grad.abs().sum() > 0
    if loss.kind != "none" and not single:
        # The label term alone reaches the class head, the teacher term the distillation head.
        (of_label,) = torch.autograd.grad(
            objective(two := two_heads(), TARGETS, TEACHER, loss)["class"],
            two.distillation_logits,
            allow_unused=True,
        )
        assert of_label is None
        (of_teacher,) = torch.autograd.grad(
            objective(two := two_heads(), TARGETS, TEACHER, loss)["teacher"],
            two.class_logits,
            allow_unused=True,
        )
        assert of_teacher is None


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_weight_zero_is_labels_and_weight_one_is_the_teacher(kind):
    outputs = two_heads()
    for weight, name in ((0.0, "class"), (1.0, "teacher")):
        loss = LossConfig(kind=kind, distillation_weight=weight)
        losses = objective(outputs, TARGETS, TEACHER, loss)
        assert torch.equal(losses["total"], losses[name])


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_float32_and_finite_for_extreme_half_precision_logits(kind):
    outputs = Outputs(*(logits.detach() * 1000 for logits in two_heads(False)))
    outputs = Outputs(*(logits.to(torch.bfloat16) for logits in outputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = objective(outputs, TARGETS, TEACHER.bfloat16() * 1000, LossConfig(kind=kind))
    for loss in losses.values():
        assert loss.dtype == torch.float32
        assert loss.isfinite()


def test_without_a_teacher_both_heads_learn_the_label_with_half_the_weight():
    outputs = two_heads()
    losses = objective(outputs, TARGETS, None, OBJECTIVES["none"])
    heads = [label_loss(logits, TARGETS, 0.1) for logits in outputs]
    assert torch.allclose(losses["total"], (heads[0] + heads[1]) / 2)
