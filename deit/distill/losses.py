"""The objectives of distillation, as pure functions of logits and targets, in float32.

Sources: DeiT (Touvron et al. 2021, arXiv 2012.12877), equations 2 and 3; knowledge distillation
(Hinton et al. 2015); label smoothing (Szegedy et al. 2016); decoupled distillation (Zhao et al.
2022, arXiv 2203.08679), equation 7; logit standardisation (Sun et al. 2024, arXiv 2403.01427).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from deit.config.schema import LossConfig
from deit.core.types import StudentOutput, TeacherOutput

Losses = dict[str, Tensor]


def smooth_labels(targets: Tensor, smoothing: float) -> Tensor:
    """(1 - smoothing) * targets + smoothing / classes, for distributions [batch, classes]."""
    return (1 - smoothing) * targets + smoothing / targets.shape[1]


def label_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with label distributions [batch, classes], mean over the batch, a scalar."""
    return cross_entropy(logits.float(), smooth_labels(targets.float(), smoothing))


def hard_distillation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with the teacher's classes, int64 [batch], never smoothed (DeiT eq. 3)."""
    return cross_entropy(logits.float(), labels)


def soft_distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """temperature**2 * KL(teacher || student) at that temperature (DeiT eq. 2), a scalar.

    The sum over classes, the mean over the batch: the published DeiT code also divides by the
    number of classes, which makes its term that much smaller than the paper's formula. The
    temperature squared keeps the size of the gradient as the temperature grows.
    """
    student = log_softmax(logits.float() / temperature, dim=1)
    teacher = log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    return temperature**2 * kl_div(student, teacher, reduction="batchmean", log_target=True)


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """temperature**2 * cross-entropy with the teacher's distribution at that temperature.

    `soft_distillation_loss` plus the teacher's entropy: another number, the same gradient.
    """
    teacher = (teacher_logits.detach().float() / temperature).softmax(dim=1)
    return temperature**2 * cross_entropy(logits.float() / temperature, teacher)


def dkd_losses(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Target-class and other-class distillation, each temperature**2 * KL, means over the batch.

    labels: int64 [batch], the one true class. The first compares (p, 1 - p) of the true class, the
    second the distributions over the other classes alone (Zhao et al. 2022, eq. 7).
    """
    student, s_others = _decoupled(logits.float() / temperature, labels)
    teacher, t_others = _decoupled(teacher_logits.detach().float() / temperature, labels)
    target = kl_div(student, teacher, reduction="batchmean", log_target=True)
    others = kl_div(s_others, t_others, reduction="batchmean", log_target=True)
    return temperature**2 * target, temperature**2 * others


def _decoupled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """log (p, 1 - p) of the true class [batch, 2], and the log-distribution over the others [batch,
    classes - 1]; in logarithms throughout, so that a sure answer stays finite."""
    # By place, not by a mask: how many a mask picks, a GPU would have to tell first.
    places = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    others = logits.gather(1, places + (places >= labels[:, None]).long())
    true = logits.gather(1, labels[:, None])[:, 0]
    both = torch.stack([true, others.logsumexp(dim=1)], dim=1)
    return log_softmax(both, dim=1), log_softmax(others, dim=1)


def standardize_logits(logits: Tensor) -> Tensor:
    """Logits [batch, classes] with mean 0 and deviation 1 in each row (Sun et al. 2024, algorithm
    1; the deviation of all classes, not of a sample of them). Equal logits become zeros."""
    logits = logits.float()
    centred = logits - logits.mean(dim=1, keepdim=True)
    # Within the root: a head that begins at zero has equal logits, and a root of zero no gradient.
    return centred / (centred.square().mean(dim=1, keepdim=True) + 1e-12).sqrt()


def _hard(logits: Tensor, teacher: TeacherOutput, targets: Tensor, loss: LossConfig) -> Tensor:
    """Hard-label distillation (DeiT eq. 3)."""
    return hard_distillation_loss(logits, teacher.labels)


def _soft(logits: Tensor, teacher: TeacherOutput, targets: Tensor, loss: LossConfig) -> Tensor:
    """Soft distillation (DeiT eq. 2)."""
    return soft_distillation_loss(*_both(logits, teacher, loss), loss.temperature)


def _cross_entropy(
    logits: Tensor, teacher: TeacherOutput, targets: Tensor, loss: LossConfig
) -> Tensor:
    """Soft labels without the teacher's entropy."""
    return soft_cross_entropy(*_both(logits, teacher, loss), loss.temperature)


def _dkd(logits: Tensor, teacher: TeacherOutput, targets: Tensor, loss: LossConfig) -> Tensor:
    """Decoupled distillation: alpha * target class + beta * other classes."""
    labels = targets.argmax(dim=1)
    target, others = dkd_losses(*_both(logits, teacher, loss), labels, loss.temperature)
    return loss.dkd_alpha * target + loss.dkd_beta * others


def _both(logits: Tensor, teacher: TeacherOutput, loss: LossConfig) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's logits, standardised if that is asked for."""
    both = (logits, teacher.logits)
    return tuple(map(standardize_logits, both)) if loss.standardize_logits else both


DISTILLATION_LOSSES: dict[str, Callable[[Tensor, TeacherOutput, Tensor, LossConfig], Tensor]] = {
    "hard": _hard,
    "soft": _soft,
    "cross_entropy": _cross_entropy,
    "dkd": _dkd,
}
"""What a head learns from a teacher, by loss.kind: (its logits [batch, classes], one voice with
labels [batch] and logits [batch, classes], targets [batch, classes], section) -> a scalar."""


def needs_logits(loss: LossConfig) -> bool:
    """Whether the objective asks the teachers for more than a label."""
    return loss.kind not in ("none", "hard")


def label_only_loss(outputs: StudentOutput, targets: Tensor, loss: LossConfig) -> Losses:
    """Labels alone. With several heads each learns from the label, with an equal share of the
    weight, so that all stay classifiers and every parameter has a gradient."""
    losses = {"class": label_loss(outputs.class_logits, targets, loss.label_smoothing)}
    if outputs.distillation_logits is None:
        return {"total": losses["class"], **losses}
    tokens = outputs.distillation_logits.unbind(dim=1)
    each = [label_loss(logits, targets, loss.label_smoothing) for logits in tokens]
    losses["distillation"] = torch.stack(each).mean()
    total = (losses["class"] + sum(each)) / (1 + len(each))
    return {"total": total, **losses}


def distillation_loss(
    outputs: StudentOutput,
    targets: Tensor,
    answers: TeacherOutput | None,
    loss: LossConfig,
    *,
    epoch: float = math.inf,
) -> Losses:
    """The configured objective, outside autocast: scalars by name, of which `total` is derived.

    label weight * CE(label) + distillation weight * mean over the taught heads of the teacher's
    term, weighted by their teachers where each head has its own. targets: [batch, classes].
    answers: None without a teacher; no gradient reaches them.
    epoch: how many have passed, for loss.distillation_warmup_epochs.
    """
    with torch.autocast(outputs.class_logits.device.type, enabled=False):
        if answers is None:
            return label_only_loss(outputs, targets, loss)
        terms = [
            DISTILLATION_LOSSES[loss.kind](logits, voice, targets, loss)
            for logits, voice in _pair_heads_with_teachers(outputs, answers, loss)
        ]
        several = len(answers.weights) > 1
        shares = answers.weights if several else (1 / len(terms),) * len(terms)
        losses = {
            "class": label_loss(outputs.class_logits, targets, loss.label_smoothing),
            "teacher": sum(share * term for share, term in zip(shares, terms)),
        }
        if several:
            losses |= {f"teacher_{number}": term for number, term in enumerate(terms, start=1)}
        weight = loss.distillation_weight * teacher_weight_ramp(loss, epoch)
        total = loss.effective_label_weight * losses["class"] + weight * losses["teacher"]
        return {"total": total, **losses}


def teacher_weight_ramp(loss: LossConfig, epoch: float) -> float:
    """The share of its weight that the teacher's term has at an epoch."""
    return (
        min(1.0, epoch / loss.distillation_warmup_epochs)
        if loss.distillation_warmup_epochs > 0
        else 1.0
    )


def _pair_heads_with_teachers(
    outputs: StudentOutput, answers: TeacherOutput, loss: LossConfig
) -> list[tuple[Tensor, TeacherOutput]]:
    """Which head hears which voice: each token its own where there are several voices."""
    voices = [
        TeacherOutput(answers.labels[:, voice], None if answers.logits is None else logits)
        for voice, logits in enumerate(_unbound(answers))
    ]
    tokens = outputs.distillation_logits
    heads = [] if loss.head == "distillation" else [outputs.class_logits]
    if loss.head != "class" and tokens is not None:
        heads += tokens.unbind(dim=1)
    return list(zip(heads, voices if len(voices) > 1 else voices * len(heads), strict=True))


def _unbound(answers: TeacherOutput) -> tuple[Tensor | None, ...]:
    number = answers.labels.shape[1]
    return (None,) * number if answers.logits is None else answers.logits.unbind(dim=1)
