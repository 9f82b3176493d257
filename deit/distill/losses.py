"""Distillation losses, as pure functions of logits and targets in float32.

Sources: DeiT (Touvron et al. 2021, arXiv 2012.12877), equations 2 and 3; knowledge distillation
(Hinton et al. 2015); label smoothing (Szegedy et al. 2016); decoupled knowledge distillation (Zhao
et al. 2022, arXiv 2203.08679), equation 7; logit standardization (Sun et al. 2024, arXiv
2403.01427).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from deit.config.cross_field_checks.teacher import check_loss_fields
from deit.config.field_types import LossKind
from deit.config.sections.loss import LossConfig
from deit.config.validation import section_from_dict
from deit.core.errors import ConfigError, config_error
from deit.core.types import StudentOutput, TeacherOutput
from deit.distill.loss_inputs import (
    StudentLogits,
    TeacherTarget,
    as_student_output,
    as_targets,
    as_teacher_output,
    check_loss,
    check_teacher_labels,
)

Losses = dict[str, Tensor]
"""The loss and its terms as scalars, by name: `loss`, `label_loss`, `distillation_loss` and others
that `distillation_loss` lists."""


def smooth_labels(targets: Tensor, smoothing: float) -> Tensor:
    """Return (1 - smoothing) * targets + smoothing / C, for label distributions [B, C].

    smoothing: in [0, 1]. Source: Szegedy et al. 2016, section 7.

    Example:
        >>> smooth_labels(torch.tensor([[1.0, 0.0]]), 0.5).tolist()
        [[0.75, 0.25]]
    """
    return (1 - smoothing) * targets + smoothing / targets.shape[1]


def label_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy of logits [B, C] with label distributions [B, C], a scalar.

    It is averaged over the batch, in float32, also for logits of lower precision. smoothing: as in
    `smooth_labels`.
    """
    return cross_entropy(logits.float(), smooth_labels(targets.float(), smoothing))


def hard_distillation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of logits [B, C] with the teacher's classes, int64 [B], a scalar.

    It is averaged over the batch, in float32. The teacher's labels are not smoothed. Source: DeiT,
    equation 3, second term.

    Example:
        >>> round(hard_distillation_loss(torch.zeros(1, 4), torch.tensor([2])).item(), 4)  # log 4
        1.3863
    """
    return cross_entropy(logits.float(), labels)


def soft_distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return temperature**2 * KL(teacher || student) of logits [B, C] at a temperature, a scalar.

    It is summed over classes and averaged over the batch, as in the paper. The published DeiT code
    also divides by the number of classes. The factor temperature**2 keeps the gradient's magnitude
    at higher temperatures. No gradient reaches the teacher. Source: DeiT, equation 2, second term.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> soft_distillation_loss(logits, logits, 3.0).item()
        0.0
    """
    student = log_softmax(logits.float() / temperature, dim=1)
    teacher = log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    return temperature**2 * kl_div(student, teacher, reduction="batchmean", log_target=True)


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return temperature**2 * cross-entropy with the teacher's distribution at a temperature.

    It is `soft_distillation_loss` plus temperature**2 * the teacher's entropy, so its gradient is
    the same. Logits: [B, C]. Source: Hinton et al. 2015, section 2.

    Example:
        >>> zeros = torch.zeros(1, 4)
        >>> round(soft_cross_entropy(zeros, zeros, 1.0).item(), 4)  # log 4, the entropy
        1.3863
    """
    teacher = (teacher_logits.detach().float() / temperature).softmax(dim=1)
    return temperature**2 * cross_entropy(logits.float() / temperature, teacher)


def dkd_losses(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the target-class and the non-target-class term of decoupled distillation, two scalars.

    Each is temperature**2 * KL, averaged over the batch. The first compares (p, 1 - p) of the true
    class, the second the distributions over the other classes. logits, teacher_logits: [B, C].
    labels: true classes, int64 [B]. Source: Zhao et al. 2022, equation 7.

    Weighted by 1 and by the teacher's probability of the other classes, they sum to the soft loss:

    Example:
        >>> student, teacher = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.0]])
        >>> target, others = dkd_losses(student, teacher, torch.tensor([0]), 1.0)
        >>> probability = 1 - teacher.softmax(dim=1)[0, 0]
        >>> soft = soft_distillation_loss(student, teacher, 1.0)
        >>> torch.allclose(target + probability * others, soft)
        True
    """
    student, student_others = _decoupled(logits.float() / temperature, labels)
    teacher, teacher_others = _decoupled(teacher_logits.detach().float() / temperature, labels)
    target = kl_div(student, teacher, reduction="batchmean", log_target=True)
    others = kl_div(student_others, teacher_others, reduction="batchmean", log_target=True)
    return temperature**2 * target, temperature**2 * others


def _decoupled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return log (p, 1 - p) of the true class [B, 2] and the log-distribution over the others
    [B, C - 1]. Both stay finite for p = 1, because everything is computed in logarithms."""
    # Gathered by index: selecting by a mask would synchronize a GPU.
    columns = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    others = logits.gather(1, columns + (columns >= labels[:, None]).long())
    true = logits.gather(1, labels[:, None])[:, 0]
    both = torch.stack([true, others.logsumexp(dim=1)], dim=1)
    return log_softmax(both, dim=1), log_softmax(others, dim=1)


def standardize_logits(logits: Tensor) -> Tensor:
    """Return logits [B, C] with mean 0 and standard deviation 1 in each row; equal logits become 0.

    The result is float32. The standard deviation divides by C. Source: Sun et al. 2024,
    algorithm 1.

    Example:
        >>> standardize_logits(torch.tensor([[3.0, 1.0]])).tolist()
        [[1.0, -1.0]]
    """
    logits = logits.float()
    centered = logits - logits.mean(dim=1, keepdim=True)
    # Inside the root, because a head initialized to zero has equal logits: sqrt(0) has no gradient.
    return centered / (centered.square().mean(dim=1, keepdim=True) + 1e-12).sqrt()


def _hard(logits: Tensor, teacher: TeacherOutput, targets: Tensor, loss: LossConfig) -> Tensor:
    """Hard-label distillation (DeiT eq. 3)."""
    return hard_distillation_loss(logits, teacher.labels)


def _soft(logits: Tensor, teacher: TeacherOutput, targets: Tensor, loss: LossConfig) -> Tensor:
    """Soft distillation (DeiT eq. 2)."""
    return soft_distillation_loss(*_both(logits, teacher, loss), loss.temperature)


def _cross_entropy(
    logits: Tensor, teacher: TeacherOutput, targets: Tensor, loss: LossConfig
) -> Tensor:
    """Cross-entropy with the teacher's distribution."""
    return soft_cross_entropy(*_both(logits, teacher, loss), loss.temperature)


def _dkd(logits: Tensor, teacher: TeacherOutput, targets: Tensor, loss: LossConfig) -> Tensor:
    """Decoupled distillation: alpha * target-class term + beta * non-target-class term."""
    labels = targets.argmax(dim=1)
    target, others = dkd_losses(*_both(logits, teacher, loss), labels, loss.temperature)
    return loss.dkd_alpha * target + loss.dkd_beta * others


def _both(logits: Tensor, teacher: TeacherOutput, loss: LossConfig) -> tuple[Tensor, Tensor]:
    """Return the student's and the teacher's logits, standardized if configured."""
    if loss.standardize_logits:
        return standardize_logits(logits), standardize_logits(teacher.logits)
    return logits, teacher.logits


DISTILLATION_LOSSES: dict[str, Callable[[Tensor, TeacherOutput, Tensor, LossConfig], Tensor]] = {
    "hard": _hard,
    "soft": _soft,
    "cross_entropy": _cross_entropy,
    "dkd": _dkd,
}
"""The teacher term by loss.kind: a function of a head's logits [B, C], the output of one teacher
(labels [B], logits [B, C]), label targets [B, C] and the loss section; it returns a scalar."""


def needs_logits(loss: LossConfig) -> bool:
    """Return whether the loss needs more than the teachers' labels."""
    return loss.kind not in ("none", "hard")


def label_only_loss(outputs: StudentOutput, targets: Tensor, loss: LossConfig) -> Losses:
    """Return the loss without a teacher: cross-entropy with the labels, averaged over all heads.

    targets: label distributions [B, C]. The scalars are `loss`, `class_head_loss` and, with
    distillation tokens, `distillation_head_loss`, the mean over the tokens. Training every head
    keeps all of them classifiers, and gives every parameter a gradient.
    """
    class_head_loss = label_loss(outputs.class_logits, targets, loss.label_smoothing)
    if outputs.distillation_logits is None:
        return {"loss": class_head_loss, "class_head_loss": class_head_loss}
    tokens = outputs.distillation_logits.unbind(dim=1)
    by_token = [label_loss(logits, targets, loss.label_smoothing) for logits in tokens]
    return {
        "loss": (class_head_loss + sum(by_token)) / (1 + len(by_token)),
        "class_head_loss": class_head_loss,
        "distillation_head_loss": torch.stack(by_token).mean(),
    }


def distillation_loss(
    outputs: StudentLogits,
    targets: Tensor,
    teacher: TeacherTarget | None,
    loss: LossConfig = LossConfig(),
    *,
    epoch: float = math.inf,
) -> Losses:
    """Return the configured loss as scalars: `loss`, and its terms `label_loss` and, if there is a
    teacher, `distillation_loss`.

    loss = label_weight * cross-entropy of the class head with the label + distillation_weight *
    mean over heads of the teacher term. If each head has its own teacher, the teachers' weights are
    used, and `distillation_loss_1`, `distillation_loss_2`, ... are the terms of each. Computed in
    float32, also within autocast.

    outputs: logits of the student's heads (see `StudentLogits`). targets: classes, int64 [B], or
    label distributions, float [B, C]. teacher: see `TeacherTarget`; it gets no gradient. None, or
    loss.kind none: the loss of all heads with the labels (`label_only_loss`). loss: the options.
    epoch: number of epochs trained so far, for loss.distillation_warmup_epochs.

    Raises ConfigError for other types, shapes and (on the CPU) classes; for options of other types
    or out of range; if the loss needs logits of the teacher and gets labels only; and if no head
    learns from a teacher, or each of several teachers has no head of its own.

    Example:
        >>> class_logits = distillation_logits = torch.zeros(1, 2)
        >>> losses = distillation_loss(
        ...     (class_logits, distillation_logits), targets=torch.tensor([0]),
        ...     teacher=torch.tensor([[-1.0, 2.0]]), loss=LossConfig("hard"))
        >>> {name: round(value.item(), 4) for name, value in losses.items()}
        {'loss': 0.6931, 'label_loss': 0.6931, 'distillation_loss': 0.6931}
    """
    loss = check_loss(loss, epoch)
    outputs = as_student_output(outputs)
    targets = as_targets(targets, outputs.class_logits)
    check_teacher_labels(teacher, outputs.class_logits.shape[1])
    return losses_of_step(outputs, targets, teacher, loss, epoch=epoch)


def losses_of_step(
    outputs: StudentOutput,
    targets: Tensor,
    teacher: TeacherTarget | None,
    loss: LossConfig,
    *,
    epoch: float,
) -> Losses:
    """Return `distillation_loss` without the checks that read numbers back, for valid options.

    targets: label distributions, float [B, C].
    """
    with torch.autocast(outputs.class_logits.device.type, enabled=False):
        if teacher is None or loss.kind == "none":
            return label_only_loss(outputs, targets, loss)
        teacher = as_teacher_output(teacher, outputs.class_logits)
        if teacher.logits is None and needs_logits(loss):
            raise ConfigError(
                f"loss.kind = {loss.kind!r}: needs the teacher's logits, but got labels only; use "
                "kind hard, or targets with content full"
            )
        terms = [
            DISTILLATION_LOSSES[loss.kind](logits, one_teacher, targets, loss)
            for logits, one_teacher in _pair_heads_with_teachers(outputs, teacher, loss)
        ]
        is_multi = len(teacher.weights) > 1
        weights = teacher.weights if is_multi else (1 / len(terms),) * len(terms)
        losses = {
            "label_loss": label_loss(outputs.class_logits, targets, loss.label_smoothing),
            "distillation_loss": sum(weight * term for weight, term in zip(weights, terms)),
        }
        if is_multi:
            losses |= {f"distillation_loss_{index}": term for index, term in enumerate(terms, 1)}
        weight = loss.distillation_weight * teacher_weight_ramp(loss, epoch)
        total = loss.effective_label_weight * losses["label_loss"]
        return {"loss": total + weight * losses["distillation_loss"], **losses}


class DistillationLoss(nn.Module):
    """`distillation_loss` as a module, for a training loop of your own.

    kind: hard, soft, cross_entropy, dkd or none. options: the other fields of `LossConfig`, such as
    distillation_weight, temperature or head. Raises ConfigError with all problems, also for an
    option that has no effect with this kind, such as a temperature with hard labels.

    The label term is the cross-entropy with (1 - s) * targets + s / C, where s is label_smoothing
    and C the number of classes (`smooth_labels`). So give targets that are not smoothed, as those
    of a TrainLoader, or label_smoothing=0. Mixed targets are smoothed after mixing. The teacher's
    labels and logits are never smoothed.

    Example:
        >>> loss_fn = DistillationLoss("soft", temperature=3.0, distillation_weight=0.9)
        >>> student, labels = torch.zeros(4, 10, requires_grad=True), torch.arange(4)
        >>> losses = loss_fn((student, student), labels, teacher=torch.rand(4, 10))
        >>> losses["loss"].backward()
        >>> sorted(losses)
        ['distillation_loss', 'label_loss', 'loss']
    """

    def __init__(self, kind: LossKind = "hard", **options: Any) -> None:
        super().__init__()
        self.config = section_from_dict(LossConfig, "loss", {"kind": kind, **options})
        if problems := check_loss_fields(self.config):
            raise config_error(problems)

    def forward(
        self,
        outputs: StudentLogits,
        targets: Tensor,
        teacher: TeacherTarget | None = None,
        *,
        epoch: float = math.inf,
    ) -> Losses:
        """Return the losses as `distillation_loss` does. Raises ConfigError as it does."""
        return distillation_loss(outputs, targets, teacher, self.config, epoch=epoch)

    def extra_repr(self) -> str:
        """Return the options that differ from their defaults, for `print`."""
        values, defaults = dataclasses.asdict(self.config), dataclasses.asdict(LossConfig())
        changed = [name for name in values if name == "kind" or values[name] != defaults[name]]
        return ", ".join(f"{name}={values[name]!r}" for name in changed)


def teacher_weight_ramp(loss: LossConfig, epoch: float) -> float:
    """Return the factor of the teacher term's weight at an epoch, in [0, 1]: a linear warm-up.

    epoch: number of epochs trained so far, may be a fraction.

    Example:
        >>> teacher_weight_ramp(LossConfig(distillation_warmup_epochs=4), epoch=1.0)
        0.25
    """
    return (
        min(1.0, epoch / loss.distillation_warmup_epochs)
        if loss.distillation_warmup_epochs > 0
        else 1.0
    )


def _pair_heads_with_teachers(
    outputs: StudentOutput, teacher: TeacherOutput, loss: LossConfig
) -> list[tuple[Tensor, TeacherOutput]]:
    """Return the logits of each head that learns from a teacher, with the output it learns from.

    With several teachers, each distillation token has its own. Raises ConfigError without a head,
    and for another number of heads.
    """
    num_teachers = teacher.labels.shape[1]
    by_teacher = [
        TeacherOutput(
            teacher.labels[:, index], None if teacher.logits is None else teacher.logits[:, index]
        )
        for index in range(num_teachers)
    ]
    tokens = outputs.distillation_logits
    heads = [] if loss.head == "distillation" else [outputs.class_logits]
    if loss.head != "class" and tokens is not None:
        heads += tokens.unbind(dim=1)
    if not heads:
        raise ConfigError(
            f"loss.head = {loss.head!r}: the student has the class head only; use head='class'"
        )
    if num_teachers not in (1, len(heads)):
        raise ConfigError(
            f"teacher: has the outputs of {num_teachers} teachers, for {len(heads)} heads "
            f"(loss.head {loss.head!r}); combine them with TeacherEnsemble, or use a student with "
            f"num_distillation_tokens={num_teachers}"
        )
    teachers = by_teacher if num_teachers > 1 else by_teacher * len(heads)
    return list(zip(heads, teachers, strict=True))
