"""The records that pass between rooms: what a batch is and what a network answers."""

from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """A batch of training views.

    images: float32 [batch, 3, height, width] in [0, 1]; each network normalises for itself.
    teacher_images: the same views at the teacher's size; the same tensor where the sizes agree.
    targets: float32 [batch, classes], the label distribution after mixing, before smoothing.
    samples: int64 [batch], index of each image within its training split.
    """

    images: Tensor
    teacher_images: Tensor
    targets: Tensor
    samples: Tensor


class Outputs(NamedTuple):
    """What a network answers, in training as in evaluation.

    class_logits: [batch, classes], read from the class token (or the only head).
    distillation_logits: [batch, classes], read from the distillation token; None without one.
    """

    class_logits: Tensor
    distillation_logits: Tensor | None = None


def head_logits(outputs: Outputs) -> dict[str, Tensor]:
    """Logits by name of head: `class`, and with a distillation token `distillation`,
    `fused` (mean of the two logits, as in the DeiT code) and `fused_softmax` (mean of the two
    softmax outputs, as section 5.2 of the paper describes; returned as log-probabilities).

    Each value has the shape [batch, classes] and is float32.
    """
    class_logits = outputs.class_logits.float()
    heads = {"class": class_logits}
    if outputs.distillation_logits is not None:
        distillation_logits = outputs.distillation_logits.float()
        heads["distillation"] = distillation_logits
        heads["fused"] = (class_logits + distillation_logits) / 2
        both = torch.stack([class_logits, distillation_logits]).softmax(dim=-1)
        heads["fused_softmax"] = both.mean(dim=0).clamp_min(1e-38).log()
    return heads
