"""The records that pass between rooms: a batch, what a network answers, what teachers say."""

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """A batch of training views.

    images: float32 [batch, 3, height, width] in [0, 1]; each network normalises for itself.
    teacher_images: what the teacher sees, at its size; the same tensor where it is the same; None
    where no network of a teacher will look.
    targets: float32 [batch, classes], the label distribution after mixing, before smoothing.
    samples: int64 [batch], index of each image within its training split.
    epoch: of the views. places: int64 [batch], on the CPU: where a store of targets keeps the
    answers, the row of the epoch, or the image where the teacher's view of it is always the same.
    """

    images: Tensor
    teacher_images: Tensor | None
    targets: Tensor
    sample_ids: Tensor
    epoch: int
    target_rows: Tensor


class StudentOutput(NamedTuple):
    """What a network answers, in training as in evaluation.

    class_logits: [batch, classes], read from the class token (or the only head).
    distillation_logits: [batch, tokens, classes], one head for each distillation token; None
    without one.
    """

    class_logits: Tensor
    distillation_logits: Tensor | None = None


class TeacherOutput(NamedTuple):
    """What the teachers say of a batch: one voice, or one for each distillation token.

    labels: int64 [batch, voices], the class each holds most likely.
    logits: float32 [batch, voices, classes]; their softmax at the temperature of the objective is
    what the student learns. None where only labels were stored.
    weights: one a voice, of sum 1: how much each counts in the teacher's term.
    """

    labels: Tensor
    logits: Tensor | None
    weights: tuple[float, ...] = (1.0,)


def logits_by_head(outputs: StudentOutput) -> dict[str, Tensor]:
    """Logits by name of head: `class`, and with a distillation token `distillation`,
    `fused` (mean of the two logits, as in the DeiT code) and `fused_softmax` (mean of the two
    softmax outputs, as section 5.2 of the paper describes; returned as log-probabilities).

    With several tokens `distillation` is the mean of their logits, `distillation_1` and so on are
    the single ones, and the fused are means over all heads (Ren et al. 2022).
    Each value has the shape [batch, classes] and is float32.
    """
    class_logits = outputs.class_logits.float()
    heads = {"class": class_logits}
    if outputs.distillation_logits is not None:
        tokens = outputs.distillation_logits.float()
        everyone = torch.cat([class_logits[:, None], tokens], dim=1)
        heads["distillation"] = tokens.mean(dim=1)
        heads["fused"] = everyone.mean(dim=1)
        heads["fused_softmax"] = everyone.softmax(dim=-1).mean(dim=1).clamp_min(1e-38).log()
        if tokens.shape[1] > 1:
            for number, logits in enumerate(tokens.unbind(dim=1), start=1):
                heads[f"distillation_{number}"] = logits
    return heads
