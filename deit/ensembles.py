"""Several teachers as one: their combined answer, and how their mistakes overlap."""

import torch
from torch import Tensor

from deit.config import EnsembleMode
from deit.records import TeacherOutput
from deit.transfer import device_constant


def combine_teachers(
    logits: Tensor, weights: tuple[float, ...], mode: EnsembleMode, *, temperature: float
) -> TeacherOutput:
    """What a student hears of teachers.

    logits: float32 [batch, teachers, classes]. weights: one a teacher, of sum 1.
    temperature: of the objective. A mean of probabilities depends on it, so the logits returned are
    those whose softmax at this temperature is that mean; the labels are those of the mean at 1.
    tokens: nothing is combined, a voice for each teacher.
    """
    if mode == "tokens" or logits.shape[1] == 1:
        return TeacherOutput(logits.argmax(dim=2), logits, weights)
    shares = device_constant(weights, logits.device)[:, None]
    if mode == "logits":
        mean = (shares * logits).sum(dim=1, keepdim=True)
        return TeacherOutput(mean.argmax(dim=2), mean)
    labels = _log_mean(logits, shares).argmax(dim=2)
    return TeacherOutput(labels, temperature * _log_mean(logits / temperature, shares))


def _log_mean(logits: Tensor, shares: Tensor) -> Tensor:
    """log of the weighted mean of softmaxes, [batch, 1, classes]."""
    return (logits.log_softmax(dim=2) + shares.log()).logsumexp(dim=1, keepdim=True)


def error_overlap(first: Tensor, second: Tensor, labels: Tensor) -> float | None:
    """Of the samples that either of two answers [number] gets wrong, the share that both do; in
    [0, 1], None where neither errs. Teachers of one kind err together."""
    wrong = torch.stack([first != labels, second != labels])
    either = int(wrong.any(dim=0).sum())
    return int(wrong.all(dim=0).sum()) / either if either else None
