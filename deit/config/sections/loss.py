"""The section `loss`: the training objective."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from deit.config.field_types import (
    STRICT,
    DistillationHead,
    LossKind,
    NonNegative,
    OptionalNonNegative,
    Positive,
)


@dataclass(frozen=True)
class LossConfig:
    """The loss: label term, teacher term, and which head each applies to."""

    __pydantic_config__ = STRICT
    kind: LossKind = "hard"
    """hard: cross-entropy with the teacher's argmax (DeiT eq. 3); soft: KL divergence from its
    distribution (eq. 2); cross_entropy: soft without the teacher's entropy; dkd: decoupled (Zhao et
    al. 2022); none: labels only."""
    head: DistillationHead = "distillation"
    """Head that learns from the teacher; all: every head of the student."""
    distillation_weight: NonNegative = 0.5
    """Weight of the teacher term."""
    label_weight: OptionalNonNegative = None
    """Weight of the label term. Default: 1 - distillation_weight."""
    distillation_warmup_epochs: NonNegative = 0.0
    """Epochs over which the weight of the teacher term rises linearly from 0."""
    temperature: Positive = 1.0
    """Temperature of the soft losses, applied to both logits."""
    standardize_logits: bool = False
    """Standardize each row of logits (mean 0, standard deviation 1) before the temperature (Sun et
    al. 2024)."""
    dkd_alpha: NonNegative = 1.0
    """dkd: weight of the target-class term (alpha)."""
    dkd_beta: NonNegative = 8.0
    """dkd: weight of the non-target-class term (beta)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Smoothing of the true labels; the teacher's labels are never smoothed."""

    @property
    def effective_label_weight(self) -> float:
        """The weight of the label term: label_weight, or 1 - distillation_weight."""
        return 1 - self.distillation_weight if self.label_weight is None else self.label_weight

    @property
    def uses_labels(self) -> bool:
        """Whether any term needs the true labels."""
        return self.kind in ("none", "dkd") or self.effective_label_weight > 0
