"""The figure of a run for notebooks: curves over the epochs."""

from typing import Any

from deit.viz import charts
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
