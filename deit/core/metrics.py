"""Metrics as pure functions: tensors in, numbers out."""

import math

import torch
from torch import Tensor


def topk_accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of samples whose label is among the k largest logits [number, classes]; in [0, 1].

    labels: int64 [number]; or bool [number, classes], where several answers are right. k is cut to
    the number of classes.
    """
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return is_correct(top, labels).any(dim=1).double().mean().item()


def is_correct(answers: Tensor, labels: Tensor) -> Tensor:
    """Which answers int64 [number, k] are right, bool [number, k]. labels: as in topk_accuracy."""
    return labels.gather(1, answers) if labels.dtype == torch.bool else answers == labels[:, None]


def agreement(first: Tensor, second: Tensor) -> float:
    """Share of samples on which two sets of answers [number] are equal, in [0, 1]."""
    return (first == second).double().mean().item()


def confusion(answers: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts [classes, classes]: row the truth, column the answer."""
    flat = torch.bincount(labels * num_classes + answers, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017): mean over samples of |confidence - accuracy|
    of their bin, bins of equal width; in [0, 1]. labels: as in topk_accuracy."""
    confidence, answers = logits.double().softmax(dim=1).max(dim=1)
    correct = is_correct(answers[:, None], labels)[:, 0].double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add(0, index, confidence - correct)
    return (gap.abs().sum() / len(labels)).item()


def majority_accuracy(labels: Tensor, num_classes: int) -> float:
    """Accuracy of always answering the most frequent class, in [0, 1]."""
    return torch.bincount(labels, minlength=num_classes).max().item() / len(labels)


def is_near_chance(accuracy: float, guess: float) -> bool:
    """Whether an accuracy is at most a tenth of the way from chance to perfection."""
    return accuracy <= guess + 0.1 * (1 - guess)


def could_be_chance(accuracy: float, guess: float, number: int) -> bool:
    """Whether guessing does as well over `number` samples in more than one of 100 cases (binomial
    tail): too few samples to tell, where the accuracy is above chance."""
    return binomial_tail(round(accuracy * number), number, guess) > 0.01


def binomial_tail(least: int, number: int, probability: float) -> float:
    """Probability of at least `least` successes in `number` trials."""
    if probability >= 1 or least <= 0:
        return 1.0
    k = torch.arange(least, number + 1, dtype=torch.float64)
    n = torch.tensor(float(number), dtype=torch.float64)
    choices = (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()
    terms = choices + k * math.log(probability) + (n - k) * math.log1p(-probability)
    return terms.logsumexp(dim=0).exp().item()
