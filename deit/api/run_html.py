"""A run as HTML for notebooks: what it is, validation accuracy by head, and curves."""

import base64
from pathlib import Path
from typing import Any

from deit.api.figures import plot_curves
from deit.config.schema import Config
from deit.core.console import format_duration, format_percent
from deit.core.errors import SystemFault
from deit.viz import html
from deit.viz.tables import head_name

_HEADS = (
    "class",
    "distillation",
    "fused",
    "average_class",
    "average_distillation",
    "average_fused",
)


def run_html(
    path: Path, config: Config, result: dict[str, Any] | None, metrics: list[dict[str, Any]]
) -> str:
    """Return a table of validation accuracies and, where matplotlib is installed, curves.

    result: of result.json; None for a run that is not finished. metrics: rows of metrics.jsonl.
    """
    parts = [f"<b>{html.text(path)}</b>: {html.text(_summary(config, result, metrics))}"]
    evaluated = [row for row in metrics if "validation" in row]
    best = result["best"] if result else evaluated[-1]["validation"] if evaluated else {}
    values = {name: best[f"{name}_top1"] for name in _HEADS if best.get(f"{name}_top1") is not None}
    if values:
        epoch = result["best"]["epoch"] if result else evaluated[-1]["epoch"]
        teacher = None if result is None else result.get("teacher_top1")
        rows = [(head_name(name), format_percent(value)) for name, value in values.items()]
        rows += [("teacher", format_percent(teacher))] if teacher is not None else []
        parts.append(_table(("head", f"validation top-1 % (epoch {epoch})"), rows))
    if metrics:
        try:
            figure = plot_curves(metrics, result)
        except SystemFault as error:  # without matplotlib
            parts.append(f"<p>{html.text(error)}</p>")
        else:
            png = base64.b64encode(figure._repr_png_()).decode()
            parts.append(f'<img alt="loss and accuracy" src="data:image/png;base64,{png}">')
    return "<div>" + "\n".join(parts) + "</div>"


def _summary(config: Config, result: dict[str, Any] | None, metrics: list[dict[str, Any]]) -> str:
    student = f"{config.student.name} {config.student.image_size} px on {config.data.source}"
    teacher = ", ".join(source or "stored targets" for source in config.teacher.source)
    taught = f"{config.loss.kind} distillation from {teacher or 'stored targets'}"
    loss = "labels only" if config.loss.kind == "none" else taught
    done = f"{len(metrics)} of {config.optim.epochs} epochs"
    time = format_duration(metrics[-1]["seconds"]) if metrics else "0 s"
    return f"{student}, {loss}; {done}{'' if result else ', not finished'}, {time}"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{html.text(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
