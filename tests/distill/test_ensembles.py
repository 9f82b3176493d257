"""Combined teachers and the overlap of their errors, compared with arithmetic by hand."""

import math

import pytest
import torch

from deit.distill.losses import soft_distillation_loss
from deit.distill.teacher_ensemble import combine_teachers, error_overlap

TWO_TEACHERS = torch.tensor([[[math.log(3.0), 0.0], [0.0, math.log(9.0)]]])
"""Logits with the probabilities 3/4, 1/4 and 1/10, 9/10."""
EQUAL_WEIGHTS = (0.5, 0.5)


def test_combine_probabilities_by_hand():
    result = combine_teachers(TWO_TEACHERS, EQUAL_WEIGHTS, "probabilities", temperature=1.0)
    expected = torch.tensor([[(0.75 + 0.1) / 2, (0.25 + 0.9) / 2]])
    assert torch.allclose(result.logits[:, 0].softmax(dim=1), expected)
    assert result.labels.tolist() == [[1]]


def test_combine_logits_by_hand():
    result = combine_teachers(TWO_TEACHERS, EQUAL_WEIGHTS, "logits", temperature=1.0)
    assert torch.allclose(result.logits, TWO_TEACHERS.mean(dim=1, keepdim=True))


def test_combine_with_unequal_weights_by_hand():
    weights = (0.9, 0.1)
    by_probabilities = combine_teachers(TWO_TEACHERS, weights, "probabilities", temperature=1.0)
    by_logits = combine_teachers(TWO_TEACHERS, weights, "logits", temperature=1.0)
    assert by_probabilities.labels.tolist() == [[0]]
    assert by_logits.labels.tolist() == [[0]]
    expected = torch.tensor([[0.9 * 0.75 + 0.1 * 0.1, 0.9 * 0.25 + 0.1 * 0.9]])
    assert torch.allclose(by_probabilities.logits[:, 0].softmax(dim=1), expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_combine_probabilities_at_a_temperature_keeps_labels_of_one(temperature):
    logits = 5 * torch.randn(20, 3, 7)
    weights = (0.5, 0.3, 0.2)
    result = combine_teachers(logits, weights, "probabilities", temperature=temperature)
    column = torch.tensor(weights)[:, None]
    mean = (column * (logits / temperature).softmax(dim=2)).sum(dim=1)
    assert torch.allclose((result.logits[:, 0] / temperature).softmax(dim=1), mean, atol=1e-6)
    mean_at_one = (column * logits.softmax(dim=2)).sum(dim=1)
    assert torch.equal(result.labels[:, 0], mean_at_one.argmax(dim=1))


def test_kl_to_the_mean_has_the_gradient_of_the_mean_kl():
    """The mean KL and the KL to the mean differ by a term without the student (Beyer et al.)."""
    logits, student = torch.randn(6, 2, 5), torch.randn(6, 5, requires_grad=True)
    combined = combine_teachers(logits, EQUAL_WEIGHTS, "probabilities", temperature=2.0)
    mean_of_losses = sum(soft_distillation_loss(student, logits[:, t], 2.0) for t in (0, 1)) / 2
    grad_combined, grad_mean = (
        torch.autograd.grad(loss, student)[0]
        for loss in (soft_distillation_loss(student, combined.logits[:, 0], 2.0), mean_of_losses)
    )
    assert torch.allclose(grad_combined, grad_mean, atol=1e-6)


def test_combine_tokens_keeps_the_logits_of_every_teacher():
    result = combine_teachers(TWO_TEACHERS, EQUAL_WEIGHTS, "tokens", temperature=3.0)
    assert torch.equal(result.logits, TWO_TEACHERS)
    assert result.labels.tolist() == [[0, 1]]


@pytest.mark.parametrize("mode", ["probabilities", "logits", "tokens"])
def test_combine_of_one_teacher_changes_nothing(mode):
    logits = torch.randn(4, 1, 6)
    assert torch.equal(combine_teachers(logits, (1.0,), mode, temperature=5.0).logits, logits)


def test_error_overlap_by_hand():
    labels = torch.tensor([0, 1, 2, 3, 4])
    first = torch.tensor([0, 0, 0, 0, 4])  # wrong at 1, 2, 3
    second = torch.tensor([1, 1, 2, 0, 0])  # wrong at 0, 3, 4
    assert error_overlap(first, second, labels) == pytest.approx(1 / 5)
    assert error_overlap(first, first, labels) == 1.0
    assert error_overlap(labels, labels, labels) is None
