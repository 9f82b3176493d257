"""Table cells and Markdown tables of accuracies."""

import statistics
from collections.abc import Iterable
from typing import Any

from deit.core.errors import single_line

HEADS = ("class", "distillation", "fused")
SAMPLE_STD = "sample standard deviation (n - 1)"
"""What `+-` means, in captions."""


def head_name(name: str) -> str:
    """Return what a head is called in tables, figures and log lines. `class` alone could be a label
    or a class.

    >>> [head_name(name) for name in ("class", "distillation_2", "average_class", "fused")]
    ['class head', 'distillation head 2', 'average class head', 'fused']
    """
    parts = name.split("_")
    return " ".join(f"{part} head" if part in ("class", "distillation") else part for part in parts)


def prediction_name(name: str) -> str:
    """Return what a predictor of a table of disagreement is called.

    >>> prediction_name("distilled, class"), prediction_name("teacher")
    ('distilled, class head', 'teacher')
    """
    run, comma, head = name.rpartition(", ")
    return f"{run}{comma}{head_name(head)}" if head in HEADS else name


def mean_std(values: list[float | None], *, scale: float = 1, digits: int = 1) -> str:
    """Return `97.2`, or `97.2 +- 0.3` (sample standard deviation) for several values.

    Return `-` if any value is None.

    >>> mean_std([0.97, 0.98], scale=100), mean_std([0.5], scale=100)
    ('97.5 +- 0.7', '50.0')
    """
    if any(value is None for value in values):
        return "-"
    scaled = [scale * value for value in values]
    mean = f"{statistics.mean(scaled):.{digits}f}"
    return f"{mean} +- {statistics.stdev(scaled):.{digits}f}" if len(scaled) > 1 else mean


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; the first column is aligned left, the others right.

    >>> print(markdown_table(("head", "top-1 %"), [("class", "97.2")]))
    | head | top-1 % |
    | :-- | --: |
    | class | 97.2 |
    """
    columns = list(columns)
    lines = [columns, [":--", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(single_line, line)) + " |" for line in lines)


def final_top1(row: dict[str, Any]) -> list[float]:
    """Return the test top-1 in [0, 1] of each seed: of the fused heads, or of the only head."""
    return [final_head_top1(top1) for top1 in row["top1"]]


def final_head_top1(top1: dict[str, float | None]) -> float:
    """Return the top-1 of the fused heads, or of the only head, from the top-1 of each head."""
    return top1["class"] if top1["fused"] is None else top1["fused"]


def final_top1_percent(row: dict[str, Any]) -> list[float]:
    """Return the values of `final_top1` in %."""
    return [100 * top1 for top1 in final_top1(row)]


def short_names(names: list[str]) -> dict[str, str]:
    """Return a short name for each field: the last part of its name where that is unique."""
    leaves = [name.rpartition(".")[2] for name in names]
    return {
        name: leaf.replace("_", " ") if leaves.count(leaf) == 1 else name
        for name, leaf in zip(names, leaves)
    }
