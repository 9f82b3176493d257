"""Marks of the seeds of a run in a plot: a dot each, and the mean with its standard deviation."""

import statistics
from collections.abc import Iterable
from typing import Any

from deit.viz.tables import SAMPLE_STD, head_name

_DOT = 3.5  # diameter of a dot [points]
_MAX_WIDTH = 14.0  # of all dots side by side [points]


def draw_seeds(axes: Any, at: float, values: list[float], color: str, *, along: str) -> None:
    """Draw a dot for each value, side by side so that equal values are seen, and a whisker of one
    sample standard deviation in each direction of their mean.

    at: position on the other axis. along: `x` or `y`, the axis of the values.
    """
    from matplotlib.markers import MarkerStyle
    from matplotlib.transforms import Affine2D

    step = min(1, _MAX_WIDTH / _DOT / len(values))
    for index, value in enumerate(values):
        shift = step * (index - (len(values) - 1) / 2)
        moved = Affine2D().translate(*((0, shift) if along == "x" else (shift, 0)))
        dot = {"marker": MarkerStyle("o", transform=moved), "markersize": _DOT, "zorder": 3}
        edge = {"markeredgecolor": "white", "markeredgewidth": 0.4}
        point = ([value], [at]) if along == "x" else ([at], [value])
        axes.plot(*point, **dot, **edge, color=color, alpha=0.8, linestyle="")
    if len(values) > 1:
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        point = (mean, at) if along == "x" else (at, mean)
        whiskers = {f"{along}err": deviation, "capsize": 3, "linewidth": 1, "alpha": 0.8}
        axes.errorbar(*point, **whiskers, color=color, label="_nolegend_")


def accuracy_label(result: dict[str, Any]) -> str:
    """Return the label of an axis of test accuracy, with the head that it is of.

    >>> two_heads = {"teacher": False, "top1": [{"class": 0.9, "fused": 0.9}]}
    >>> accuracy_label({"split": "test", "rows": {"student": two_heads}})
    'test top-1 %, fused heads'
    """
    rows = (row for row in result["rows"].values() if not row["teacher"])
    fused = {top1["fused"] is not None for row in rows for top1 in row["top1"]}
    head = {(True,): "fused heads", (False,): head_name("class")}.get(
        tuple(fused), "fused heads or the only head"
    )
    return f"{result['split']} top-1 %, {head}"


def explain_marks(figure: Any, rows: Iterable[dict[str, Any]], marks: str) -> None:
    """Write below the charts of a figure what they show of the seeds, if a row has several.

    marks: what is drawn with the whiskers, such as `dots: seeds`.
    """
    if any(len(row["top1"]) > 1 for row in rows):
        figure.supxlabel(f"{marks}, whiskers: {SAMPLE_STD}", fontsize=8)


DOTS_AND_BAR, DOTS_AND_LINE = (f"dots: seeds, {mean}: mean" for mean in ("bar", "line"))
"""Marks that `explain_marks` explains."""
