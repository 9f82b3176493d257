"""Metrics as pure functions of logits, predictions and labels."""

import math
from statistics import NormalDist

import torch
from torch import Tensor


def topk_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Return the fraction of samples whose label is among the k largest logits [N, C].

    labels: int64 [N]; or bool [N, C] if a sample can have several correct classes.
    k: at most C is used.

    >>> logits = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]])
    >>> labels = torch.tensor([1, 1])
    >>> topk_accuracy(logits, labels), topk_accuracy(logits, labels, k=2)
    (0.5, 1.0)
    """
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return is_correct(top, labels).any(dim=1).double().mean().item()


def is_correct(predictions: Tensor, labels: Tensor) -> Tensor:
    """Return which predictions int64 [N, k] are correct, bool [N, k].

    labels: as in `topk_accuracy`.
    """
    if labels.dtype == torch.bool:
        return labels.gather(1, predictions)
    return predictions == labels[:, None]


def agreement(first: Tensor, second: Tensor) -> float:
    """Return the fraction of samples with equal predictions, int64 [N] each.

    >>> agreement(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 0]))
    0.75
    """
    return (first == second).double().mean().item()


def confusion(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Return the confusion matrix, counts int64 [C, C]: rows are labels, columns predictions.

    predictions, labels: int64 [N].

    >>> confusion(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    flat = torch.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Return the expected calibration error (Guo et al. 2017), with bins of equal width.

    It is the mean over samples of |confidence - accuracy| of their bin, in [0, 1].
    logits: [N, C]. labels: as in `topk_accuracy`.

    >>> certain = torch.tensor([[100.0, 0.0], [100.0, 0.0]])
    >>> calibration_error(certain, torch.tensor([0, 1]))  # confidence 1, accuracy 1/2
    0.5
    """
    confidence, predictions = logits.double().softmax(dim=1).max(dim=1)
    correct = is_correct(predictions[:, None], labels)[:, 0].double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, index, confidence - correct)
    return (gap.abs().sum() / len(labels)).item()


def majority_accuracy(labels: Tensor, num_classes: int) -> float:
    """Return the accuracy of always predicting the most frequent class, in [0, 1].

    >>> majority_accuracy(torch.tensor([0, 0, 0, 1]), num_classes=2)
    0.75
    """
    return torch.bincount(labels, minlength=num_classes).max().item() / len(labels)


def is_near_chance(accuracy: float, chance: float) -> bool:
    """Return whether an accuracy is at most 10 % of the way from chance to 1."""
    return accuracy <= chance + 0.1 * (1 - chance)


def could_be_chance(accuracy: float, chance: float, num_samples: int) -> bool:
    """Return whether guessing reaches the accuracy with a probability above 1 % (binomial tail).

    If so, there are too few samples to show that the accuracy is above chance.
    """
    return binomial_tail(round(accuracy * num_samples), num_samples, chance) > 0.01


def binomial_tail(min_successes: int, num_trials: int, probability: float) -> float:
    """Return the probability of at least `min_successes` successes in `num_trials` trials."""
    if probability >= 1 or min_successes <= 0:
        return 1.0
    k = torch.arange(min_successes, num_trials + 1, dtype=torch.float64)
    n = torch.tensor(float(num_trials), dtype=torch.float64)
    choices = (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()
    terms = choices + k * math.log(probability) + (n - k) * math.log1p(-probability)
    return terms.logsumexp(dim=0).exp().item()


SMALL_SPLIT = 1000
"""Below this number of images, accuracies are shown with their margin."""


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson, J. Am. Stat. Assoc. 22, 1927).

    >>> [round(bound, 3) for bound in wilson_interval(38, 60)]
    [0.507, 0.744]
    """
    z, share = NormalDist().inv_cdf(0.975), correct / total
    center = share + z**2 / (2 * total)
    margin = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    scale = 1 + z**2 / total
    return max((center - margin) / scale, 0.0), min((center + margin) / scale, 1.0)


def format_margin(accuracy: float, total: int) -> tuple[str, str]:
    """Return the number of correct images and the 95 % interval in %, as text.

    >>> format_margin(38 / 60, 60)
    ('38 of 60', '50.7 to 74.4')
    """
    correct = round(accuracy * total)
    low, high = wilson_interval(correct, total)
    return f"{correct} of {total}", f"{100 * low:.1f} to {100 * high:.1f}"
