"""Records shared by packages: a batch, the outputs of a student and of its teachers."""

from typing import NamedTuple

import torch
from torch import Tensor

from deit.core.errors import ConfigError


class Batch(NamedTuple):
    """A batch of training views.

    images: float32 [B, 3, H, W] in [0, 1]; each network normalizes its own input.
    teacher_images: the teacher's view at its size, float32 [B, 3, h, w]; the same tensor as
        `images` if the views are equal; None if no teacher network is run.
    targets: float32 [B, C], the label distribution after mixing, before label smoothing.
    sample_ids: int64 [B], index of each image in its training split.
    epoch: the epoch of the views.
    target_rows: int64 [B], on the CPU: rows of the stored targets. The row in the epoch, or the
        index of the image if the teacher's view of it is the same in every epoch.
    """

    images: Tensor
    teacher_images: Tensor | None
    targets: Tensor
    sample_ids: Tensor
    epoch: int
    target_rows: Tensor


class StudentOutput(NamedTuple):
    """The outputs of a student, in training and in evaluation.

    class_logits: [B, C], of the class token (or the only head).
    distillation_logits: [B, T, C], a head for each of T distillation tokens; None without one.
    """

    class_logits: Tensor
    distillation_logits: Tensor | None = None


class TeacherOutput(NamedTuple):
    """The outputs of T teachers for a batch: one combined, or one for each distillation token.

    labels: int64 [B, T], the most likely class of each.
    logits: float32 [B, T, C]; the softmax at the temperature of the loss is the student's target.
        None if only labels are stored.
    weights: T weights of the teachers in the distillation term; their sum is 1.
    """

    labels: Tensor
    logits: Tensor | None
    weights: tuple[float, ...] = (1.0,)


def logits_by_head(outputs: StudentOutput) -> dict[str, Tensor]:
    """Return the logits by name of head, each float32 [B, C].

    `class`: the class token. With a distillation token also `distillation`, `fused` (mean of the
    two logits, as in DeiT's code) and `fused_softmax` (mean of the two softmax outputs, as in
    section 5.2 of the paper; returned as log-probabilities).

    With several tokens, `distillation` is the mean of their logits, `distillation_1` and so on are
    the single ones, and the fused heads are means over all heads (Ren et al. 2022).
    Raises ConfigError for another type.

    >>> output = StudentOutput(torch.tensor([[2.0, 0.0]]), torch.tensor([[[0.0, 4.0]]]))
    >>> heads = logits_by_head(output)
    >>> list(heads), heads["fused"].tolist()
    (['class', 'distillation', 'fused', 'fused_softmax'], [[1.0, 2.0]])
    """
    if not isinstance(outputs, StudentOutput):
        raise ConfigError(
            f"outputs: should be a StudentOutput, as students return; got {type(outputs).__name__}"
        )
    class_logits = outputs.class_logits.float()
    heads = {"class": class_logits}
    if outputs.distillation_logits is not None:
        tokens = outputs.distillation_logits.float()
        all_heads = torch.cat([class_logits[:, None], tokens], dim=1)
        heads["distillation"] = tokens.mean(dim=1)
        heads["fused"] = all_heads.mean(dim=1)
        heads["fused_softmax"] = all_heads.softmax(dim=-1).mean(dim=1).clamp_min(1e-38).log()
        if tokens.shape[1] > 1:
            for index, logits in enumerate(tokens.unbind(dim=1), start=1):
                heads[f"distillation_{index}"] = logits
    return heads
