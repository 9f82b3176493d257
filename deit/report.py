"""Numbers of finished comparisons as tables and pictures; reads plain values only, no torch."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deit.errors import EnvironmentFault

HEADS = ("class", "distillation", "fused")
_COLOURS = {"teacher": "#6b7280", "distilled": "#0f766e", "undistilled": "#c2410c"}


def summary(values: list[float | None], *, scale: float = 1, digits: int = 1) -> str:
    """`97.2`, or for several values `97.2 +- 0.3` (sample standard deviation); `-` for none."""
    if any(value is None for value in values):
        return "-"
    scaled = [scale * value for value in values]
    mean = f"{statistics.mean(scaled):.{digits}f}"
    return f"{mean} +- {statistics.stdev(scaled):.{digits}f}" if len(scaled) > 1 else mean


def comparison_cells(name: str, row: dict[str, Any]) -> list[str]:
    """A row of the comparison table: name, top-1 % by head, agreement with the teacher, seconds."""
    shares = [[top1[head] for top1 in row["top1"]] for head in HEADS] + [row["agreement"]]
    return [
        name,
        *(summary(values, scale=100) for values in shares),
        summary(row["seconds"], digits=0),
    ]


COLUMNS = ("", "class head", "distillation head", "fused", "= teacher", "seconds")


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, first column to the left, the others to the right."""
    columns = list(columns)
    lines = [columns, [":--", *["--:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw_comparison(result: dict[str, Any], path: Path) -> None:
    """Validation accuracy over the epochs, and final test accuracy by head, as a PNG.

    result: what deit.comparison.compare returns. Raises EnvironmentFault without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EnvironmentFault("drawing needs matplotlib; pip install 'deit[plot]'") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, heads = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_curves(curves, result)
    _draw_heads(heads, result)
    seeds = len(result["seeds"])
    figure.suptitle(
        f"{result['recipe']}: what the teacher is worth ({seeds} seed{'s' * (seeds > 1)})"
    )
    figure.savefig(path, dpi=150)


def _draw_curves(axes: Any, result: dict[str, Any]) -> None:
    """Validation accuracy over the epochs, one line a seed; the teacher as a level."""
    shown = []
    for name, row in result["rows"].items():
        colour = _COLOURS[name]
        if name == "teacher":
            level = 100 * statistics.mean(curve[-1][1] for curve in row["curves"])
            axes.axhline(level, color=colour, linestyle="--", label=f"teacher, {level:.1f}")
            shown.append(level)
            continue
        for index, curve in enumerate(row["curves"]):
            epochs, values = zip(*((epoch, 100 * top1) for epoch, top1 in curve))
            axes.plot(epochs, values, color=colour, alpha=0.8, label=None if index else name)
            shown += values
    axes.set(xlabel="epoch", ylabel="validation top-1 %", ylim=_limits(shown))
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", frameon=False)


def _draw_heads(axes: Any, result: dict[str, Any]) -> None:
    """Test accuracy by head: a dot a seed, the mean as a bar with its number."""
    ticks, labels, shown = [], [], []
    place = 0.0
    for name, row in result["rows"].items():
        for head in HEADS:
            values = [100 * top1[head] for top1 in row["top1"] if top1[head] is not None]
            if not values:
                continue
            mean = statistics.mean(values)
            axes.plot([place] * len(values), values, ".", color=_COLOURS[name], alpha=0.6)
            axes.plot([place - 0.35, place + 0.35], [mean, mean], color=_COLOURS[name], linewidth=3)
            axes.annotate(
                f"{mean:.1f}",
                (place, mean),
                textcoords="offset points",
                xytext=(0, 4),
                ha="center",
                fontsize=8,
                color=_COLOURS[name],
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            )
            ticks.append(place)
            labels.append(name if name == "teacher" else f"{name}, {head}")
            shown += values
            place += 1
        place += 0.5
    axes.set_xticks(ticks, labels, fontsize=7, rotation=40, ha="right", rotation_mode="anchor")
    axes.set(ylabel="test top-1 %", ylim=_limits(shown))
    axes.grid(axis="y", alpha=0.25)


def _limits(values: list[float]) -> tuple[float, float]:
    """Axis limits with room for the numbers above the highest value."""
    low, high = min(values), max(values)
    room = max(high - low, 1.0)
    return low - 0.1 * room, high + 0.15 * room
