"""Collect the results of finished runs as the rows of a table."""

from pathlib import Path
from typing import Any

from deit.core import run_folder, run_log
from deit.training.save import selection_metric
from deit.viz.tables import HEADS

Row = dict[str, Any]


def new_row(*, epochs: int, teacher: bool) -> Row:
    """Return a row without runs. Each of its lists takes one value per run (seed).

    `top1` by head; `agreement` with the teacher; `seconds` of training; `images_per_s` of
    evaluation; `curves`, validation top-1 by epoch; `validation`, the top-1 that selected the best
    checkpoint. `add_run` adds `classes` on request. teacher: whether the runs are of a teacher.
    """
    lists = ("top1", "agreement", "seconds", "images_per_s", "curves", "validation")
    return {**{name: [] for name in lists}, "epochs": epochs, "teacher": teacher}


def add_run(row: Row, run: Path, metrics: dict[str, Any], *, classes: bool = False) -> None:
    """Add a finished run to its row.

    metrics: as deit.evaluation.evaluate.evaluate returns them. classes: whether to add the accuracy
    of each class, for tables in which some runs were trained without some classes.
    """
    result = run_folder.read_result(run)
    row["top1"].append(top1_by_head(metrics))
    row["agreement"].append(teacher_agreement(metrics))
    row["seconds"].append(result["seconds"])
    row["images_per_s"].append(metrics["throughput_img_s"])
    row["curves"].append(_validation_curve(run))
    row["validation"].append(result["best"]["top1"])
    if classes:
        row.setdefault("classes", []).append(_by_class(metrics))


def _by_class(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the held-out classes, and the accuracy on seen, on unseen and on each class.

    Of the fused head, or of the only head. `unseen` is None without held-out classes.
    """
    head = "class" if metrics["heads"]["distillation"] is None else "fused"
    per_class = {name: row[head] for name, row in metrics["per_class"].items()}
    if "held_out" in metrics:
        seen, unseen = metrics["seen"][head], metrics["unseen"][head]
    else:
        seen, unseen = metrics["heads"][head]["top1"], None
    held_out = metrics.get("held_out", [])
    return {"held_out": held_out, "seen": seen, "unseen": unseen, "per_class": per_class}


def top1_by_head(metrics: dict[str, Any]) -> dict[str, float | None]:
    """Return top-1 in [0, 1] of class, distillation and fused head; None for missing heads."""
    two_heads = metrics["heads"]["distillation"] is not None
    names = HEADS if two_heads else ("class",)
    return {head: metrics["heads"][head]["top1"] if head in names else None for head in HEADS}


def teacher_agreement(metrics: dict[str, Any]) -> float | None:
    """Return the share of images on which the student predicts the teacher's class.

    None without a teacher.
    """
    agreement = metrics["agreement"]
    return agreement.get("fused", agreement["class"]).get("teacher")


def _validation_curve(run: Path) -> list[tuple[int, float]]:
    """Return validation top-1 by epoch, of the weights and head that select the best checkpoint."""
    rows = run_log.read_metrics(run)
    return [
        (row["epoch"], selection_metric(row["validation"])) for row in rows if "validation" in row
    ]
