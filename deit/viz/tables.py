"""Cells and Markdown tables of accuracies."""

import statistics
from collections.abc import Iterable
from typing import Any

from deit.core.errors import in_line

HEADS = ("class", "distillation", "fused")


def mean_std(values: list[float | None], *, scale: float = 1, digits: int = 1) -> str:
    """`97.2`, or for several values `97.2 +- 0.3` (sample standard deviation); `-` for none."""
    if any(value is None for value in values):
        return "-"
    scaled = [scale * value for value in values]
    mean = f"{statistics.mean(scaled):.{digits}f}"
    return f"{mean} +- {statistics.stdev(scaled):.{digits}f}" if len(scaled) > 1 else mean


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, first column to the left, the others to the right."""
    columns = list(columns)
    lines = [columns, [":--", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(in_line, line)) + " |" for line in lines)


def final_top1(row: dict[str, Any]) -> list[float]:
    """Test top-1 in [0, 1], a value a seed, of the fused answer or the only head."""
    return [final_head_top1(top1) for top1 in row["top1"]]


def final_head_top1(top1: dict[str, float | None]) -> float:
    """Of top-1 by head that of the fused answer, or of the only head."""
    return top1["class"] if top1["fused"] is None else top1["fused"]


def _final(row: dict[str, Any]) -> list[float]:
    """The same in %."""
    return [100 * one for one in final_top1(row)]
