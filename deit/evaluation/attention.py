"""The attention of a student on images, with its predictions, as a figure."""

from pathlib import Path
from typing import Any

from torch import Tensor

from deit.core.console import format_percent
from deit.evaluation.predictions import to_predictions
from deit.models.attention_rollout import rollout
from deit.models.student import Student
from deit.viz.attention_plot import attention_figure


def plot_attention(
    student: Student,
    views: Tensor,
    heads: dict[str, Tensor],
    class_names: tuple[str, ...],
    files: list[str | None],
) -> Any:
    """Return a matplotlib figure of the attention rollout of each token.

    views, files: of `image_batches`. heads: logits of the views by head, as `image_logits` returns
    them. Raises ConfigError for a network without attention.
    """
    views = views.to(student.mean.device)
    maps = rollout(student.network, (views - student.mean) / student.std)
    top_classes: list[dict[str, str]] = [{} for _ in files]
    for head, logits in heads.items():
        if head != "fused_softmax":
            predictions = to_predictions(logits, class_names, files, top_k=1)
            for texts, top in zip(top_classes, predictions, strict=True):
                texts[head] = f"{top.class_name} {format_percent(top.probability)} %"
    return attention_figure(
        [image.permute(1, 2, 0).cpu().numpy() for image in views],
        [values.numpy() for values in maps.maps],
        maps.names,
        top_classes,
        [f"image {index}" if file is None else Path(file).name for index, file in enumerate(files)],
    )
