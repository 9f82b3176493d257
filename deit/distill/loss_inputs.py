"""Inputs of the distillation loss in the forms that other libraries use."""

import functools
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from deit.config.sections.loss import LossConfig
from deit.config.validation import as_section
from deit.core.errors import NO_VALUE, ConfigError, ConfigProblem
from deit.core.tensors import has_values
from deit.core.types import StudentOutput, TeacherOutput

StudentLogits = StudentOutput | Sequence[Tensor] | Tensor
"""A student's output; (class logits [B, C], distillation logits [B, C] or [B, T, C]), as timm's
distilled networks return in training; or the logits [B, C] of the only head."""
TeacherTarget = TeacherOutput | Sequence[Tensor | None] | Tensor
"""A teacher's output; (labels, logits), as a TargetStore returns; logits [B, C], or [B, T, C] of T
teachers of equal weight; or labels, int64 [B]."""


def as_student_output(outputs: StudentLogits) -> StudentOutput:
    """Return the logits of a student's heads. Raises ConfigError for other types and shapes.

    >>> as_student_output((torch.zeros(4, 10), torch.zeros(4, 10))).distillation_logits.shape
    torch.Size([4, 1, 10])
    """
    heads = [outputs] if isinstance(outputs, Tensor) else outputs
    if isinstance(outputs, StudentOutput):
        heads = [head for head in outputs if head is not None]
    is_sequence = isinstance(heads, tuple | list) and 1 <= len(heads) <= 2
    if not is_sequence or not all(isinstance(head, Tensor) for head in heads):
        raise _error(
            "outputs",
            outputs,
            "should be logits, (class logits, distillation logits) or a StudentOutput",
        )
    class_logits, *tokens = heads
    if class_logits.ndim != 2:
        raise _error("outputs", class_logits, "class logits should be [batch, classes]")
    if not tokens:
        return StudentOutput(class_logits)
    distillation_logits = tokens[0] if tokens[0].ndim == 3 else tokens[0][:, None]
    if distillation_logits.shape[::2] != class_logits.shape:
        raise _error(
            "outputs",
            tokens[0],
            "distillation logits should be [batch, classes] or [batch, "
            f"tokens, classes], with class logits {tuple(class_logits.shape)}",
        )
    return StudentOutput(class_logits, distillation_logits)


def as_targets(labels: Tensor, class_logits: Tensor) -> Tensor:
    """Return label distributions, float [B, C], of these or of classes, int64 [B].

    class_logits: [B, C]. Raises ConfigError for other types, shapes and classes.

    >>> as_targets(torch.tensor([1]), torch.zeros(1, 2)).tolist()
    [[0.0, 1.0]]
    """
    batch, num_classes = class_logits.shape
    if isinstance(labels, Tensor):
        if labels.is_floating_point() and labels.shape == class_logits.shape:
            return labels
        if _is_labels(labels) and labels.shape == (batch,):
            _check_classes("targets", labels, num_classes)
            return one_hot(labels.long(), num_classes).float()
    raise _error(
        "targets",
        labels,
        f"should be classes, int64 [{batch}], or label distributions, float "
        f"[{batch}, {num_classes}], for class logits {tuple(class_logits.shape)}",
    )


def as_teacher_output(teacher: TeacherTarget, class_logits: Tensor) -> TeacherOutput:
    """Return a teacher's labels and logits. Raises ConfigError for other types, shapes and classes.

    class_logits: the student's, [B, C].

    >>> output = as_teacher_output(torch.tensor([[0.0, 3.0]]), torch.zeros(1, 2))
    >>> output.labels.tolist(), output.logits.shape
    ([[1]], torch.Size([1, 1, 2]))
    """
    labels, logits, weights = _parts(teacher)
    batch, num_classes = class_logits.shape
    if logits is not None:
        logits = logits[:, None] if isinstance(logits, Tensor) and logits.ndim == 2 else logits
        is_valid = isinstance(logits, Tensor) and logits.is_floating_point() and logits.ndim == 3
        if not is_valid or logits.shape[::2] != (batch, num_classes):
            raise _error(
                "teacher",
                logits,
                f"logits should be float [{batch}, {num_classes}], as the student's class logits",
            )
    if labels is None and logits is not None:
        labels = logits.argmax(dim=2)
    elif not _is_labels(labels) or len(labels) != batch:
        raise _error("teacher", labels, f"labels should be int64 [{batch}]")
    else:
        if not isinstance(teacher, TeacherOutput):  # see `check_teacher_labels`
            _check_classes("teacher", labels, num_classes)
        labels = labels[:, None] if labels.ndim == 1 else labels
    if logits is not None and labels.shape != logits.shape[:2]:
        raise _error("teacher", labels, f"labels should be int64 {list(logits.shape[:2])}")
    num_teachers = labels.shape[1]
    if weights is None:
        weights = (1 / num_teachers,) * num_teachers
    elif len(weights) != num_teachers:
        raise _error("teacher", weights, f"should have {num_teachers} weights, one per teacher")
    return TeacherOutput(labels.long(), logits, weights)


def check_teacher_labels(teacher: TeacherTarget | None, num_classes: int) -> None:
    """Raise ConfigError for a TeacherOutput with classes out of range, on the CPU.

    Not part of `as_teacher_output`: a training step reads nothing back, and its teachers are ours.
    """
    if isinstance(teacher, TeacherOutput) and _is_labels(teacher.labels):
        _check_classes("teacher", teacher.labels, num_classes)


def check_loss(loss: LossConfig, epoch: float) -> LossConfig:
    """Return the options of a loss after validating them, and check that the epoch is a number.

    Raises ConfigError with all problems.
    """
    if not isinstance(epoch, Real):
        raise ConfigError(f"epoch: should be a number; got {type(epoch).__name__}")
    if not isinstance(loss, LossConfig):
        raise ConfigError(
            f"loss: should be a LossConfig, such as LossConfig('soft'); got {type(loss).__name__}"
        )
    if torch.compiler.is_compiling():  # validation cannot be compiled
        return loss
    try:
        return _validated(loss)
    except TypeError:  # a field that cannot be hashed, such as a list
        return _validated.__wrapped__(loss)


@functools.lru_cache(maxsize=16)  # for a call in every step
def _validated(loss: LossConfig) -> LossConfig:
    return as_section(LossConfig, "loss", loss)


def _parts(teacher: TeacherTarget) -> tuple[Any, Any, tuple[float, ...] | None]:
    """Return labels, logits and weights; each may be None, and of a wrong type."""
    if isinstance(teacher, TeacherOutput):
        return teacher
    if isinstance(teacher, tuple | list) and len(teacher) == 2:
        return teacher[0], teacher[1], None
    is_labels = _is_labels(teacher) and teacher.ndim == 1
    return (teacher, None, None) if is_labels else (None, teacher, None)


def _is_labels(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.ndim in (1, 2)


def _check_classes(name: str, labels: Tensor, num_classes: int) -> None:
    """Raise ConfigError for a class out of range, which PyTorch would ignore (-100) or report as a
    failed assertion. On the CPU only: the comparison would synchronize a GPU."""
    if labels.device.type != "cpu" or not labels.numel() or not has_values():
        return
    for value in (int(labels.min()), int(labels.max())):
        if not 0 <= value < num_classes:
            problem = ConfigProblem(name, value, f"classes should be in 0 ... {num_classes - 1}")
            raise ConfigError(str(problem), [problem])


def _error(name: str, value: object, hint: str) -> ConfigError:
    shape = (
        f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    )
    problem = ConfigProblem(name, NO_VALUE, f"{hint}; got {shape}")
    raise ConfigError(str(problem), [problem])
