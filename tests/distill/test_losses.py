"""Losses compared with arithmetic by hand, and which heads get their gradients."""

import math
from typing import get_args

import pytest
import torch

from deit.config.field_types import LossKind
from deit.config.presets import LOSS_PRESETS
from deit.config.sections.loss import LossConfig
from deit.core.types import StudentOutput, TeacherOutput
from deit.distill.losses import (
    DISTILLATION_LOSSES,
    distillation_loss,
    dkd_losses,
    hard_distillation_loss,
    label_loss,
    smooth_labels,
    soft_cross_entropy,
    soft_distillation_loss,
    standardize_logits,
)

LN2, LN3 = math.log(2), math.log(3)


def softmax(values):
    exponentials = [math.exp(value) for value in values]
    return [value / sum(exponentials) for value in exponentials]


def test_smooth_labels_by_hand():
    target = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(smooth_labels(target, 0.1), torch.tensor([[0.925, 0.025, 0.025, 0.025]]))


def test_label_loss_by_hand():
    logits = torch.tensor([[LN3, 0.0]])  # softmax: 3/4, 1/4
    mixed = torch.tensor([[0.7, 0.3]])
    by_hand = -(0.7 * math.log(0.75) + 0.3 * math.log(0.25))
    assert label_loss(logits, mixed, 0.0).item() == pytest.approx(by_hand, rel=1e-6)
    # Smoothing 0.2 with two classes: 0.66 and 0.34. It is applied once, to the mixed target.
    by_hand = -(0.66 * math.log(0.75) + 0.34 * math.log(0.25))
    assert label_loss(logits, mixed, 0.2).item() == pytest.approx(by_hand, rel=1e-6)


def test_label_loss_of_unmixed_labels_equals_torch_cross_entropy():
    logits, labels = torch.randn(8, 5), torch.randint(5, (8,))
    targets = torch.nn.functional.one_hot(labels, 5).float()
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert torch.allclose(label_loss(logits, targets, 0.1), expected)


@pytest.mark.fault("D17")
def test_hard_distillation_loss_by_hand_is_not_smoothed():
    logits = torch.tensor([[LN3, 0.0], [0.0, LN3]])
    labels = torch.tensor([0, 0])
    by_hand = -(math.log(0.75) + math.log(0.25)) / 2
    assert hard_distillation_loss(logits, labels).item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_distillation_loss_by_hand(temperature):
    student, teacher = [[LN3, 0.0, 1.0], [0.5, -1.0, 0.0]], [[0.0, 2.0, 1.0], [1.0, 1.0, -2.0]]
    total = 0.0
    for s_row, t_row in zip(student, teacher):
        s = softmax([value / temperature for value in s_row])
        t = softmax([value / temperature for value in t_row])
        total += sum(p * math.log(p / q) for p, q in zip(t, s))
    by_hand = temperature**2 * total / 2
    result = soft_distillation_loss(torch.tensor(student), torch.tensor(teacher), temperature)
    assert result.item() == pytest.approx(by_hand, rel=1e-5)


def test_soft_loss_gradient_norm_is_stable_at_high_temperature():
    student, teacher = torch.randn(16, 10, requires_grad=True), torch.randn(16, 10)
    norms = []
    for temperature in (50.0, 100.0):
        (gradient,) = torch.autograd.grad(
            soft_distillation_loss(student, teacher, temperature), student
        )
        norms.append(gradient.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_soft_loss_is_zero_for_equal_logits_and_ignores_class_order():
    student, teacher = torch.randn(6, 7), torch.randn(6, 7)
    assert soft_distillation_loss(teacher, teacher, 2.0).abs() < 1e-6
    loss = soft_distillation_loss(student, teacher, 2.0)
    assert loss > 0
    order = torch.randperm(7)
    assert torch.allclose(soft_distillation_loss(student[:, order], teacher[:, order], 2.0), loss)


def entropy(logits, temperature):
    probabilities = (logits / temperature).softmax(dim=1)
    return -(probabilities * probabilities.log()).sum(dim=1).mean()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_cross_entropy_is_kl_plus_teacher_entropy(temperature):
    student, teacher = torch.randn(6, 7, requires_grad=True), torch.randn(6, 7)
    cross_entropy = soft_cross_entropy(student, teacher, temperature)
    kl = soft_distillation_loss(student, teacher, temperature)
    expected = kl + temperature**2 * entropy(teacher, temperature)
    assert cross_entropy.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (cross_entropy, kl)]
    assert torch.allclose(*gradients, atol=1e-6)


def test_cross_entropy_loss_with_label_weight_by_hand():
    """(1 - w) T^2 CE(student / T, softmax(teacher / T)) + w CE(student, label): the formula of the
    grids in AditMeh/Distillation, where w is the weight of the label."""
    w, temperature = 0.9, 10.0
    outputs, labels = StudentOutput(torch.randn(5, 4)), torch.tensor([0, 1, 2, 3, 0])
    loss = LossConfig(
        kind="cross_entropy",
        head="class",
        distillation_weight=1 - w,
        temperature=temperature,
        label_smoothing=0.0,
    )
    teacher = torch.randn(5, 4)
    targets = torch.nn.functional.one_hot(labels, 4).float()
    soft = -(
        (teacher / temperature).softmax(1) * (outputs.class_logits / temperature).log_softmax(1)
    )
    by_hand = (1 - w) * temperature**2 * soft.sum(1).mean()
    by_hand += w * torch.nn.functional.cross_entropy(outputs.class_logits, labels)
    result = distillation_loss(outputs, targets, one_teacher(teacher), loss)["loss"]
    assert result.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_dkd_losses_by_hand():
    student, teacher = [1.0, 0.0, -1.0], [2.0, 1.0, 0.0]
    temperature, label = 2.0, 1
    s = softmax([value / temperature for value in student])
    t = softmax([value / temperature for value in teacher])
    tckd = t[1] * math.log(t[1] / s[1]) + (1 - t[1]) * math.log((1 - t[1]) / (1 - s[1]))
    s_non_target, t_non_target = ([p[0] / (1 - p[1]), p[2] / (1 - p[1])] for p in (s, t))
    nckd = sum(p * math.log(p / q) for p, q in zip(t_non_target, s_non_target))
    result = dkd_losses(
        torch.tensor([student]), torch.tensor([teacher]), torch.tensor([label]), temperature
    )
    assert result[0].item() == pytest.approx(temperature**2 * tckd, rel=1e-5)
    assert result[1].item() == pytest.approx(temperature**2 * nckd, abs=1e-6)


def test_dkd_losses_recombine_to_the_kl():
    """KL = TCKD + (1 - p_label) * NCKD for each sample (Zhao et al. 2022, equation 5)."""
    student, teacher, labels = torch.randn(8, 6), torch.randn(8, 6), torch.arange(8) % 6
    for row in range(8):
        sample = slice(row, row + 1)
        tckd, nckd = dkd_losses(student[sample], teacher[sample], labels[sample], 1.0)
        non_target = 1 - teacher[row].softmax(0)[labels[row]]
        kl = soft_distillation_loss(student[sample], teacher[sample], 1.0)
        assert (tckd + non_target * nckd).item() == pytest.approx(kl.item(), abs=1e-5)


def test_dkd_losses_of_confident_outputs_are_finite():
    teacher = torch.tensor([[1000.0, 0.0, -1000.0]])
    for labels in (torch.tensor([0]), torch.tensor([2])):
        student = (-teacher).requires_grad_()
        total = sum(dkd_losses(student, teacher, labels, 1.0))
        total.backward()
        assert total.isfinite()
        assert student.grad.isfinite().all()


def test_standardize_logits_removes_shift_and_scale():
    logits = torch.randn(5, 9)
    result = standardize_logits(logits)
    assert torch.allclose(result.mean(dim=1), torch.zeros(5), atol=1e-6)
    assert torch.allclose(result.std(dim=1, unbiased=False), torch.ones(5), atol=1e-5)
    assert torch.allclose(standardize_logits(7 * logits - 3), result, atol=1e-4)
    assert standardize_logits(torch.ones(2, 4)).isfinite().all()
    # Log-probabilities, as a store holds them, serve as well as logits.
    assert torch.allclose(standardize_logits(logits.log_softmax(1)), result, atol=1e-5)


def test_standardize_logits_applies_to_both_before_the_temperature():
    loss = LossConfig(
        kind="soft", temperature=2.0, standardize_logits=True, distillation_weight=1.0
    )
    outputs = two_heads()
    result = distillation_loss(outputs, TARGETS, TEACHER, loss)["distillation_loss"]
    logits = outputs.distillation_logits[:, 0]
    expected = soft_distillation_loss(
        standardize_logits(logits), standardize_logits(TEACHER.logits[:, 0]), 2.0
    )
    assert torch.allclose(result, expected)


def two_heads(requires_grad=True, tokens=1):
    return StudentOutput(
        torch.randn(4, 3, requires_grad=requires_grad),
        torch.randn(4, tokens, 3, requires_grad=requires_grad),
    )


def one_teacher(logits):
    return TeacherOutput(logits.argmax(dim=1)[:, None], logits[:, None])


TARGETS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.4, 0.6, 0], [0, 0, 1]])
TEACHER = one_teacher(torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [0, 0, 2]]))


def test_deit_hard_is_half_labels_half_teacher():
    outputs = two_heads()
    losses = distillation_loss(outputs, TARGETS, TEACHER, LOSS_PRESETS["deit-hard"])
    label = label_loss(outputs.class_logits, TARGETS, 0.1)
    teacher = hard_distillation_loss(outputs.distillation_logits[:, 0], TEACHER.labels[:, 0])
    assert torch.allclose(losses["loss"], (label + teacher) / 2)


def test_hard_distillation_without_teacher_logits_is_equal():
    outputs, loss = two_heads(), LOSS_PRESETS["deit-hard"]
    with_logits = distillation_loss(outputs, TARGETS, TEACHER, loss)
    without_logits = distillation_loss(outputs, TARGETS, TEACHER._replace(logits=None), loss)
    assert torch.equal(with_logits["loss"], without_logits["loss"])


def test_deit_soft_has_lambda_and_tau_of_the_paper():
    outputs = two_heads()
    losses = distillation_loss(outputs, TARGETS, TEACHER, LOSS_PRESETS["deit-soft"])
    label = label_loss(outputs.class_logits, TARGETS, 0.1)
    teacher = soft_distillation_loss(outputs.distillation_logits[:, 0], TEACHER.logits[:, 0], 3.0)
    assert torch.allclose(losses["loss"], 0.9 * label + 0.1 * teacher)


def test_function_matching_is_the_mean_kl_of_the_heads():
    outputs, loss = two_heads(), LOSS_PRESETS["function-matching"]
    total = distillation_loss(outputs, TARGETS, TEACHER, loss)["loss"]
    heads = [outputs.class_logits, outputs.distillation_logits[:, 0]]
    kls = [soft_distillation_loss(head, TEACHER.logits[:, 0], 1.0) for head in heads]
    assert torch.allclose(total, (kls[0] + kls[1]) / 2)
    total_of_other_labels = distillation_loss(outputs, TARGETS.flip(0), TEACHER, loss)["loss"]
    assert torch.equal(total, total_of_other_labels)


def test_usi_is_label_loss_plus_five_times_kl():
    outputs = StudentOutput(torch.randn(4, 3))
    total = distillation_loss(outputs, TARGETS, TEACHER, LOSS_PRESETS["usi"])["loss"]
    label = label_loss(outputs.class_logits, TARGETS, 0.0)
    kl = soft_distillation_loss(outputs.class_logits, TEACHER.logits[:, 0], 1.0)
    assert torch.allclose(total, label + 5 * kl)


def test_teacher_term_warms_up():
    outputs, loss = (
        two_heads(),
        LossConfig(kind="hard", distillation_warmup_epochs=4.0, label_weight=1.0),
    )
    full = distillation_loss(outputs, TARGETS, TEACHER, loss)
    for epoch, share in ((0.0, 0.0), (1.0, 0.25), (4.0, 1.0), (9.0, 1.0)):
        result = distillation_loss(outputs, TARGETS, TEACHER, loss, epoch=epoch)["loss"]
        assert torch.allclose(result, full["label_loss"] + 0.5 * share * full["distillation_loss"])


def test_each_distillation_token_learns_from_its_teacher():
    outputs = two_heads(tokens=2)
    teachers = TeacherOutput(torch.tensor([[0, 1], [1, 1], [2, 0], [0, 2]]), None, (0.75, 0.25))
    losses = distillation_loss(outputs, TARGETS, teachers, LOSS_PRESETS["deit-hard"])
    token_losses = [
        hard_distillation_loss(outputs.distillation_logits[:, index], teachers.labels[:, index])
        for index in (0, 1)
    ]
    assert torch.allclose(losses["distillation_loss_1"], token_losses[0])
    assert torch.allclose(losses["distillation_loss_2"], token_losses[1])
    assert torch.allclose(
        losses["distillation_loss"], 0.75 * token_losses[0] + 0.25 * token_losses[1]
    )


@pytest.mark.parametrize("name", LOSS_PRESETS)
def test_each_head_gets_gradients_of_its_own_term_only(name):
    loss = LOSS_PRESETS[name]
    only_class_head = loss.head == "class"
    outputs = two_heads()
    if only_class_head:
        outputs = StudentOutput(outputs.class_logits)
    logits = TEACHER.logits.clone().requires_grad_()
    teacher_output = None if loss.kind == "none" else TEACHER._replace(logits=logits)
    losses = distillation_loss(outputs, TARGETS, teacher_output, loss)
    losses["loss"].backward()
    assert logits.grad is None
    assert outputs.class_logits.grad.abs().sum() > 0
    if not only_class_head:
        assert outputs.distillation_logits.grad.abs().sum() > 0
    if loss.kind != "none" and loss.head == "distillation":
        # The label term alone reaches the class head, the teacher term the distillation head.
        outputs = two_heads()
        (label_gradient,) = torch.autograd.grad(
            distillation_loss(outputs, TARGETS, TEACHER, loss)["label_loss"],
            outputs.distillation_logits,
            allow_unused=True,
        )
        assert label_gradient is None
        outputs = two_heads()
        (teacher_gradient,) = torch.autograd.grad(
            distillation_loss(outputs, TARGETS, TEACHER, loss)["distillation_loss"],
            outputs.class_logits,
            allow_unused=True,
        )
        assert teacher_gradient is None


def test_every_loss_kind_has_a_distillation_loss():
    assert set(get_args(LossKind)) == {*DISTILLATION_LOSSES, "none"}


@pytest.mark.parametrize("kind", DISTILLATION_LOSSES)
def test_distillation_weight_0_is_labels_and_1_is_the_teacher(kind):
    outputs = two_heads()
    for weight, name in ((0.0, "label_loss"), (1.0, "distillation_loss")):
        loss = LossConfig(kind=kind, distillation_weight=weight)
        losses = distillation_loss(outputs, TARGETS, TEACHER, loss)
        assert torch.equal(losses["loss"], losses[name])


@pytest.mark.parametrize("weight", [0.5, 1.0])
@pytest.mark.parametrize("kind", [*DISTILLATION_LOSSES, "none"])
def test_uses_labels_tells_whether_other_labels_change_the_loss(kind, weight):
    loss, outputs = LossConfig(kind=kind, distillation_weight=weight), two_heads()
    losses = [
        distillation_loss(outputs, targets, TEACHER, loss)["loss"]
        for targets in (TARGETS, TARGETS.roll(1, dims=1))
    ]
    assert loss.uses_labels != torch.equal(*losses)


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("kind", [*DISTILLATION_LOSSES, "none"])
def test_losses_of_extreme_bf16_logits_are_finite_float32(kind, standardize):
    outputs = StudentOutput(*(logits.detach() * 1000 for logits in two_heads(False)))
    outputs = StudentOutput(*(logits.to(torch.bfloat16) for logits in outputs))
    teacher_output = (
        None if kind == "none" else TEACHER._replace(logits=TEACHER.logits.bfloat16() * 1000)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = distillation_loss(
            outputs, TARGETS, teacher_output, LossConfig(kind=kind, standardize_logits=standardize)
        )
    for loss in losses.values():
        assert loss.dtype == torch.float32
        assert loss.isfinite()


@pytest.mark.parametrize("tokens", [1, 2])
def test_loss_without_a_teacher_is_the_mean_label_loss_of_the_heads(tokens):
    outputs = two_heads(tokens=tokens)
    losses = distillation_loss(outputs, TARGETS, None, LOSS_PRESETS["none"])
    head_logits = [outputs.class_logits, *outputs.distillation_logits.unbind(dim=1)]
    head_losses = [label_loss(logits, TARGETS, 0.1) for logits in head_logits]
    assert torch.allclose(losses["loss"], sum(head_losses) / (1 + tokens))
