"""What finished runs came to, as the rows of a table."""

from pathlib import Path
from typing import Any

from deit import checkpoint, journal
from deit.drawing import HEADS
from deit.saving import selected_top1

Row = dict[str, Any]


def new_row(*, epochs: int, teacher: bool) -> Row:
    """A row without runs: `top1` by head, `agreement` with the teacher, `seconds` of training,
    `images_per_s` of evaluation, `curves` of validation top-1 by epoch and `validation`, the one
    that selected the weights: each a list with a value a seed; `classes` too where some were held
    out. teacher: whether it is one.
    """
    lists = ("top1", "agreement", "seconds", "images_per_s", "curves", "validation")
    return {**{name: [] for name in lists}, "epochs": epochs, "teacher": teacher}


def note(row: Row, out: Path, found: dict[str, Any]) -> None:
    """Add a finished run to its row. found: what deit.evaluation.evaluate says of it."""
    result = checkpoint.result_of(out)
    row["top1"].append(top1_by_head(found))
    row["agreement"].append(_agreement(found))
    row["seconds"].append(result["seconds"])
    row["images_per_s"].append(found["throughput_img_s"])
    row["curves"].append(_curve(out))
    row["validation"].append(result["best"]["top1"])
    if "held_out" in found:
        row.setdefault("classes", []).append(_classes(found))


def _classes(found: dict[str, Any]) -> dict[str, Any]:
    """Where classes were held out: which, and the shares of right answers on the others, on these
    and on each, of the fused answer or the only head."""
    head = "fused" if "fused" in found["seen"] else "class"
    per_class = {name: row[head] for name, row in found["per_class"].items()}
    both = {group: found[group][head] for group in ("seen", "unseen")}
    return {"held_out": found["held_out"], **both, "per_class": per_class}


def top1_by_head(found: dict[str, Any]) -> dict[str, float | None]:
    """Top-1 in [0, 1] of class, distillation and fused head; None for heads that are not there."""
    two_heads = found["heads"]["distillation"] is not None
    names = HEADS if two_heads else ("class",)
    return {head: found["heads"][head]["top1"] if head in names else None for head in HEADS}


def _agreement(found: dict[str, Any]) -> float | None:
    return found["agreement"].get("fused", found["agreement"]["class"]).get("teacher")


def _curve(folder: Path) -> list[tuple[int, float]]:
    """Validation top-1 by epoch, of the weights and head that select the best checkpoint."""
    rows = journal.read(folder / journal.METRICS)
    return [(row["epoch"], selected_top1(row["validation"])) for row in rows if "validation" in row]
