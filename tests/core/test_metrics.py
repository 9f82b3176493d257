"""Metrics against hand arithmetic and scikit-learn."""

import pytest
import torch

from deit.core.metrics import (
    agreement,
    binomial_tail,
    calibration_error,
    confusion,
    could_be_chance,
    is_near_chance,
    majority_accuracy,
    topk_accuracy,
    wilson_interval,
)
from deit.core.types import StudentOutput, logits_by_head
from deit.viz.tables import mean_std

LOGITS = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [1, 3, 2, 0], [2, 0, 1, 3]])


def test_topk_accuracy_by_hand():
    labels = torch.tensor([0, 2, 2, 1])
    assert topk_accuracy(LOGITS, labels) == 0.25
    assert topk_accuracy(LOGITS, labels, k=2) == 0.75
    assert topk_accuracy(LOGITS, labels, k=99) == 1.0


def test_confusion_matches_scikit_learn():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    predictions, labels = torch.randint(5, (200,)), torch.randint(5, (200,))
    expected = sklearn_metrics.confusion_matrix(labels, predictions, labels=range(5))
    assert confusion(predictions, labels, 5).tolist() == expected.tolist()


def test_agreement_by_hand():
    assert agreement(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 0, 3, 0])) == 0.5


def test_calibration_error_by_hand():
    # Two samples of confidence 0.8 (one right), two of 0.6 (both right): in their bins the gaps
    # are |0.8 - 0.5| and |0.6 - 1|, each for half of the samples.
    logits = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.6, 0.4], [0.6, 0.4]]).log()
    labels = torch.tensor([0, 1, 0, 0])
    assert calibration_error(logits, labels) == pytest.approx(0.5 * 0.3 + 0.5 * 0.4, abs=1e-6)


def test_majority_accuracy_by_hand():
    assert majority_accuracy(torch.tensor([0, 0, 0, 1]), 3) == 0.75


@pytest.mark.fault("D2")
@pytest.mark.parametrize(
    ("accuracy", "chance", "num_samples", "is_near", "could_be"),
    [
        (0.12, 0.1, 1000, True, True),
        (0.30, 0.1, 1000, False, False),
        (0.25, 0.1, 20, False, True),
        (0.6, 0.5, 40, False, True),
        (4 / 6, 1 / 3, 6, False, True),
        (1.0, 1 / 3, 6, False, False),
        (1.0, 0.5, 9, False, False),  # 1 in 512 by guessing
        (1.0, 0.5, 2, False, True),  # 1 in 4 by guessing
        (0.75, 1 / 3, 4, False, True),
        (0.5, 0.5, 2, True, True),
        (0.001, 0.001, 50_000, True, True),
    ],
)
def test_near_chance_and_could_be_chance(accuracy, chance, num_samples, is_near, could_be):
    assert is_near_chance(accuracy, chance) is is_near
    assert could_be_chance(accuracy, chance, num_samples) is could_be


@pytest.mark.parametrize(
    ("least", "num_samples", "probability"), [(3, 10, 0.2), (0, 5, 0.5), (700, 1000, 0.65)]
)
def test_binomial_tail_matches_scipy(least, num_samples, probability):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binom.sf(least - 1, num_samples, probability)
    assert binomial_tail(least, num_samples, probability) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("correct", "total", "interval"),
    [
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_interval_matches_published_values(correct, total, interval):
    """The examples of Newcombe, Statistics in Medicine 17, 1998, table I, method 3."""
    assert wilson_interval(correct, total) == pytest.approx(interval, abs=5e-5)
    low, high = wilson_interval(total - correct, total)
    assert (1 - high, 1 - low) == pytest.approx(interval, abs=5e-5)
    assert low >= 0
    assert high <= 1


def test_fused_heads_are_means_of_logits_and_of_softmax():
    class_logits, token_logits = torch.tensor([[2.0, 0.0, 1.9]]), torch.tensor([[0.0, 4.0, 2.2]])
    heads = logits_by_head(StudentOutput(class_logits, token_logits[:, None]))
    assert torch.allclose(heads["fused"], (class_logits + token_logits) / 2)
    mean_softmax = (class_logits.softmax(1) + token_logits.softmax(1)) / 2
    assert torch.allclose(heads["fused_softmax"].exp(), mean_softmax)
    # The two rules differ here.
    assert heads["fused"].argmax() == 2
    assert heads["fused_softmax"].argmax() == 1
    assert list(logits_by_head(StudentOutput(class_logits))) == ["class"]


def test_summary_of_seeds_is_mean_and_sample_standard_deviation():
    assert mean_std([0.97], scale=100) == "97.0"
    assert mean_std([0.96, 0.98], scale=100) == "97.0 +- 1.4"
    assert mean_std([None, None]) == "-"
