"""The picture of a search for tickets: accuracy against sparsity, with its controls; no torch."""

import statistics
from typing import Any

from deit.charts import SERIES, TEACHER, Draw
from deit.drawing import final_top1, legend

_MARKS = "osD^v"


def ticket_curve(result: dict[str, Any]) -> Draw:
    """Test accuracy against sparsity: a line a kind through the means, with the standard deviation
    of the seeds each way, side by side so that none covers another; across, the dense run's mean,
    and below it a band of what is still within the tolerance."""

    def draw(axes: Any) -> None:
        rows = [row for row in result["rows"].values() if row["values"] and row["seeds"]]
        dense = next((row for row in rows if row["values"]["run"] == "dense"), None)
        if dense is not None:
            level, tolerance = (
                100 * statistics.mean(final_top1(dense)),
                result["tickets"]["tolerance"],
            )
            axes.axhline(level, color=TEACHER, linestyle="--", label=f"dense, {level:.1f}")
            axes.axhspan(level - tolerance, level, color=TEACHER, alpha=0.12, linewidth=0)
        kinds = list(dict.fromkeys(row["values"]["run"] for row in rows if row is not dense))
        for place, (kind, colour, mark) in enumerate(zip(kinds, SERIES, _MARKS)):
            own = [row for row in rows if row["values"]["run"] == kind]
            shares = [[100 * one for one in final_top1(row)] for row in own]
            aside = 0.6 * (place - (len(kinds) - 1) / 2)
            axes.errorbar(
                [float(row["values"]["sparsity %"]) + aside for row in own],
                [statistics.mean(one) for one in shares],
                [statistics.stdev(one) if len(one) > 1 else 0 for one in shares],
                color=colour,
                marker=mark,
                markersize=4.5,
                capsize=2.5,
                linewidth=1.5,
                label=kind,
            )
        ticks = dict.fromkeys(row["values"]["sparsity %"] for row in rows)
        axes.set_xticks([float(tick) for tick in ticks], [f"{float(tick):.0f}" for tick in ticks])
        note = "; kinds of one sparsity stand side by side" if len(kinds) > 1 else ""
        axes.set(
            xlabel=f"sparsity % of the prunable weights{note}",
            ylabel=f"{result['split']} top-1 %",
        )
        axes.grid(alpha=0.25)
        legend(axes)

    return draw
