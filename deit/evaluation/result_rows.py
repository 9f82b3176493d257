"""What finished runs came to, as the rows of a table."""

from pathlib import Path
from typing import Any

from deit.core import run_folder, run_log
from deit.training.save import selection_metric
from deit.viz.tables import HEADS

Row = dict[str, Any]


def new_row(*, epochs: int, teacher: bool) -> Row:
    """A row without runs: `top1` by head, `agreement` with the teacher, `seconds` of training,
    `images_per_s` of evaluation, `curves` of validation top-1 by epoch and `validation`, the one
    that selected the weights: each a list with a value a seed; `classes` too where that is asked.
    teacher: whether it is one.
    """
    lists = ("top1", "agreement", "seconds", "images_per_s", "curves", "validation")
    return {**{name: [] for name in lists}, "epochs": epochs, "teacher": teacher}


def add_run(row: Row, out: Path, found: dict[str, Any], *, classes: bool = False) -> None:
    """Add a finished run to its row. found: what deit.evaluation.evaluate.evaluate says of it.
    classes: whether it is told class by class as well, as where one of several runs did not see
    some."""
    result = run_folder.read_result(out)
    row["top1"].append(top1_by_head(found))
    row["agreement"].append(_agreement(found))
    row["seconds"].append(result["seconds"])
    row["images_per_s"].append(found["throughput_img_s"])
    row["curves"].append(_curve(out))
    row["validation"].append(result["best"]["top1"])
    if classes:
        row.setdefault("classes", []).append(_classes(found))


def _classes(found: dict[str, Any]) -> dict[str, Any]:
    """Which classes were held out, and the shares of right answers on the others, on these (None
    where there are none) and on each, of the fused answer or the only head."""
    head = "class" if found["heads"]["distillation"] is None else "fused"
    per_class = {name: row[head] for name, row in found["per_class"].items()}
    seen = found["seen"][head] if "held_out" in found else found["heads"][head]["top1"]
    unseen = found["unseen"][head] if "held_out" in found else None
    held = found.get("held_out", [])
    return {"held_out": held, "seen": seen, "unseen": unseen, "per_class": per_class}


def top1_by_head(found: dict[str, Any]) -> dict[str, float | None]:
    """Top-1 in [0, 1] of class, distillation and fused head; None for heads that are not there."""
    two_heads = found["heads"]["distillation"] is not None
    names = HEADS if two_heads else ("class",)
    return {head: found["heads"][head]["top1"] if head in names else None for head in HEADS}


def _agreement(found: dict[str, Any]) -> float | None:
    return found["agreement"].get("fused", found["agreement"]["class"]).get("teacher")


def _curve(folder: Path) -> list[tuple[int, float]]:
    """Validation top-1 by epoch, of the weights and head that select the best checkpoint."""
    rows = run_log.read_metrics(folder)
    return [
        (row["epoch"], selection_metric(row["validation"])) for row in rows if "validation" in row
    ]
