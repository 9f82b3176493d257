"""The objectives of distillation, as pure functions of logits and targets, in float32.

Sources: DeiT (Touvron et al. 2021, arXiv 2012.12877), equations 2 and 3; knowledge distillation
(Hinton et al. 2015); label smoothing (Szegedy et al. 2016).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from deit.config import LossConfig
from deit.records import Outputs

Losses = dict[str, Tensor]


def smooth(targets: Tensor, smoothing: float) -> Tensor:
    """(1 - smoothing) * targets + smoothing / classes, for distributions [batch, classes]."""
    return (1 - smoothing) * targets + smoothing / targets.shape[1]


def label_loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with label distributions [batch, classes], mean over the batch, a scalar."""
    return cross_entropy(logits.float(), smooth(targets.float(), smoothing))


def hard_teacher_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy with the teacher's argmax, never smoothed (DeiT eq. 3), a scalar.

    Both logits are [batch, classes]; no gradient reaches the teacher's.
    """
    return cross_entropy(logits.float(), teacher_logits.argmax(dim=1))


def soft_teacher_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """temperature**2 * KL(teacher || student) at that temperature (DeiT eq. 2), a scalar.

    The sum over classes, the mean over the batch: the published DeiT code also divides by the
    number of classes, which makes its term that much smaller than the paper's formula. The
    temperature squared keeps the size of the gradient as the temperature grows.
    """
    student = log_softmax(logits.float() / temperature, dim=1)
    teacher = log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    return temperature**2 * kl_div(student, teacher, reduction="batchmean", log_target=True)


def no_teacher(
    outputs: Outputs, targets: Tensor, teacher_logits: Tensor | None, loss: LossConfig
) -> Losses:
    """Labels alone. With two heads each learns from the label, with half the weight, so that
    both stay classifiers and every parameter has a gradient."""
    losses = {"class": label_loss(outputs.class_logits, targets, loss.label_smoothing)}
    if outputs.distillation_logits is None:
        return {"total": losses["class"], **losses}
    losses["distillation"] = label_loss(outputs.distillation_logits, targets, loss.label_smoothing)
    return {"total": (losses["class"] + losses["distillation"]) / 2, **losses}


def _with_teacher(
    outputs: Outputs,
    targets: Tensor,
    loss: LossConfig,
    teacher_loss: Callable[[Tensor], Tensor],
) -> Losses:
    student_logits = (
        outputs.distillation_logits if loss.through == "distillation" else outputs.class_logits
    )
    label = label_loss(outputs.class_logits, targets, loss.label_smoothing)
    teacher = teacher_loss(student_logits)
    weight = loss.distillation_weight
    return {"total": (1 - weight) * label + weight * teacher, "class": label, "teacher": teacher}


def hard(outputs: Outputs, targets: Tensor, teacher_logits: Tensor, loss: LossConfig) -> Losses:
    """Hard-label distillation (DeiT eq. 3): (1 - w) CE(label) + w CE(teacher's argmax)."""
    return _with_teacher(
        outputs, targets, loss, lambda logits: hard_teacher_loss(logits, teacher_logits)
    )


def soft(outputs: Outputs, targets: Tensor, teacher_logits: Tensor, loss: LossConfig) -> Losses:
    """Soft distillation (DeiT eq. 2): (1 - w) CE(label) + w T**2 KL(teacher || student)."""
    return _with_teacher(
        outputs,
        targets,
        loss,
        lambda logits: soft_teacher_loss(logits, teacher_logits, loss.temperature),
    )


KINDS: dict[str, Callable[[Outputs, Tensor, Tensor | None, LossConfig], Losses]] = {
    "hard": hard,
    "soft": soft,
    "none": no_teacher,
}
"""Every objective by its name in loss.kind. Each returns scalars by name, `total` to be derived:
(outputs, targets [batch, classes], teacher logits [batch, classes] or None, section) -> losses."""


def objective(
    outputs: Outputs, targets: Tensor, teacher_logits: Tensor | None, loss: LossConfig
) -> Losses:
    """The configured objective, outside autocast: scalars by name, of which `total` is derived."""
    with torch.autocast(outputs.class_logits.device.type, enabled=False):
        return KINDS[loss.kind](outputs, targets, teacher_logits, loss)
