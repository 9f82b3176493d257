"""Figures of a run for notebooks: curves over the epochs, and attention maps."""

from typing import Any

import torch
from torch import Tensor

from deit.core.console import format_percent
from deit.core.types import logits_by_head
from deit.models.attention_rollout import check_attention, rollout
from deit.models.metadata import ModelInfo
from deit.models.student import Student
from deit.viz import charts
from deit.viz.attention_plot import attention_figure
from deit.viz.plots import new_figure
from deit.viz.tables import head_name


def plot_curves(metrics: list[dict[str, Any]], result: dict[str, Any] | None) -> Any:
    """Return a figure of training loss and validation accuracy over the epochs.

    metrics: rows of metrics.jsonl, at least one. result: of result.json, for the teacher.
    """
    losses = {
        name.replace("_", " "): [(row["epoch"], row["train"][name]) for row in metrics]
        for name in metrics[-1]["train"]
        if "loss" in name and all(row["train"].get(name) is not None for row in metrics)
    }
    accuracies: dict[str, charts.Points] = {}
    for row in metrics:
        for name, value in row.get("validation", {}).items():
            if name.endswith("_top1") and value is not None:
                label = head_name(name.removesuffix("_top1"))
                accuracies.setdefault(label, []).append((row["epoch"], value))
    teacher = None if result is None else result.get("teacher_top1")
    figure = new_figure(9, 3.4)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    charts.over_epochs(losses, "training loss")(loss_axes)
    charts.curves(accuracies, {} if teacher is None else {"teacher": teacher})(accuracy_axes)
    return figure


@torch.no_grad()
def plot_attention(
    student: Student, model_info: ModelInfo, inputs: Tensor, names: list[str | None]
) -> Any:
    """Return a figure of the attention rollout of each token.

    inputs: float [B, 3, side, side] in [0, 1]. names: of the images; None for the position.
    """
    check_attention(student.network)
    inputs = inputs.to(student.mean.device)
    maps = rollout(student.network, (inputs - student.mean) / student.std)
    heads = {
        name: logits.softmax(dim=1).max(dim=1)
        for name, logits in logits_by_head(student(inputs)).items()
        if name != "fused_softmax"
    }
    top_classes = [
        {
            name: f"{model_info.class_names[int(top.indices[row])]} "
            f"{format_percent(float(top.values[row]))} %"
            for name, top in heads.items()
        }
        for row in range(len(inputs))
    ]
    return attention_figure(
        [image.permute(1, 2, 0).cpu().numpy() for image in inputs],
        [values.cpu().numpy() for values in maps.maps],
        maps.names,
        top_classes,
        [name or f"image {index}" for index, name in enumerate(names[: len(inputs)])],
    )
