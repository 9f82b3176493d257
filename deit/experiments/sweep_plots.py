"""Plots of a sweep: heat maps, curves and scatter plots; no torch."""

import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deit.core.console import count_noun
from deit.core.errors import SystemFault
from deit.experiments.sweep_tables import points
from deit.viz.charts import SERIES, TEACHER, Draw
from deit.viz.plots import comparison_figure, legend, save_figure
from deit.viz.seed_marks import DOTS_AND_LINE, accuracy_label, draw_seeds, explain_marks
from deit.viz.tables import final_top1, short_names


def draw_sweep(result: dict[str, Any], out: str | Path) -> list[Path]:
    """Plot test accuracy over the fields that vary, as PNG and PDF files in a folder.

    Named runs without other fields make a comparison plot. One field makes a curve per run. Several
    fields make a heat map for each pair, averaged over the others. A search makes scatter plots, a
    lottery a curve over sparsity.

    Returns their paths; none without a finished run. Raises SystemFault without matplotlib.
    """
    out = Path(out)
    if not any(row["seeds"] for row in points(result).values()):
        return []
    fields = [name for name in result["fields"] if name != "run"]
    if "lottery" in result:
        return _save(result, out / "tickets", [ticket_curve(result)], marks="marks: means")
    if result.get("search"):
        draws = [scatter_trials(result, field) for field in fields]
        return _save(result, out / "search", draws, width=3.2 * len(fields), height=3.2)
    if not fields:
        return _save_figure(comparison_figure(finished_rows(result)), out / "runs")
    if len(fields) == 1:
        return _save(result, out / fields[0], [curve(result, fields[0])], marks=DOTS_AND_LINE)
    paths = []
    for down, across in itertools.combinations(fields, 2):
        paths += _save_figure(heat_map_figure(result, down, across), out / f"{down}-{across}")
    return paths


def _save_figure(figure: Any, stem: Path) -> list[Path]:
    """Save a figure as PNG to look at and as PDF for a paper; return the paths."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf")]
    for path in paths:
        save_figure(figure, path, dpi=150)
    return paths


def _save(
    result: dict[str, Any],
    stem: Path,
    draws: list[Draw],
    *,
    width: float = 6.4,
    height: float = 4,
    marks: str = "",
) -> list[Path]:
    """Save charts in a row with the title of the sweep, as `_save_figure` does. marks: of the
    charts, as `explain_marks` takes them; "" for charts without whiskers."""
    figure, all_axes = _figure(width, height, len(draws))
    for draw, axes in zip(draws, all_axes):
        draw(axes)
    figure.suptitle(_title(result))
    if marks:
        explain_marks(figure, result["rows"].values(), marks)
    return _save_figure(figure, stem)


def finished_rows(result: dict[str, Any]) -> dict[str, Any]:
    """Return the result as `draw_comparison` takes it, without points that have no finished run."""
    rows = {name: row for name, row in result["rows"].items() if row["seeds"]}
    recipe = result["recipe"]
    if result["study"] != result["sweep"]:  # the title names the study
        recipe = f"{result['sweep']}, {recipe}"
    return {**result, "study": result["study"] or "sweep", "rows": rows, "recipe": recipe}


def _figure(width: float, height: float, num_axes: int = 1) -> tuple[Any, list[Any]]:
    """Return a figure and its axes in a row. Raises SystemFault without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemFault("drawing needs matplotlib; pip install 'deit[plot]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, num_axes, squeeze=False)[0])


def _title(result: dict[str, Any]) -> str:
    count, noun = len(result["seeds"]), "seed"
    if result.get("search"):
        count, noun = result["search"]["trials"], "trial"
    return f"{result['sweep']}, {result['recipe']} ({count_noun(count, noun)})"


def _values(result: dict[str, Any], field: str) -> list[str]:
    """Return the distinct values of a field in the order of the sweep file."""
    values = (row["values"].get(field) for row in points(result).values())
    return list(dict.fromkeys(value for value in values if value is not None))


def numbers_of(values: list[str]) -> list[float] | None:
    """Return values as numbers; None if one of them is no finite number."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def curve(result: dict[str, Any], field: str) -> Draw:
    """Return a chart of test accuracy over one field: a line of means per run with whiskers of one
    standard deviation, a dot per seed, and a horizontal line per teacher."""

    def draw(axes: Any) -> None:
        values = _values(result, field)
        numbers = numbers_of(values)
        x_of = dict(zip(values, numbers or range(len(values))))
        rows = [row for row in points(result).values() if row["seeds"]]
        runs = dict.fromkeys(row["values"].get("run", "") for row in rows)
        for run, color in zip(runs, itertools.cycle(SERIES)):
            top1 = {
                x_of[row["values"][field]]: [100 * share for share in final_top1(row)]
                for row in rows
                if row["values"].get("run", "") == run
            }
            xs = sorted(top1)
            axes.plot(xs, [statistics.mean(top1[x]) for x in xs], color=color, label=run or None)
            for x in xs:
                draw_seeds(axes, x, top1[x], color, along="y")
        for name, row in result["rows"].items():
            if row["teacher"] and row["seeds"]:
                level = 100 * statistics.mean(final_top1(row))
                axes.axhline(level, color=TEACHER, linestyle="--", label=f"{name}, {level:.1f}")
        _use_log_scale(axes, numbers)
        axes.set_xticks(list(x_of.values()), list(x_of))
        axes.set(xlabel=short_names([field])[field], ylabel=accuracy_label(result))
        axes.grid(alpha=0.25)
        legend(axes)

    return draw


def scatter_trials(result: dict[str, Any], field: str) -> Draw:
    """Return a chart of validation accuracy over a searched field: a dot per finished trial, and a
    ring per stopped trial with its last accuracy."""

    def draw(axes: Any) -> None:
        from matplotlib.ticker import LogLocator, MaxNLocator

        rows = [row for row in points(result).values() if row["seeds"]]
        ended = [(row["values"][field], row["validation"][0]) for row in rows]
        stopped = [
            (trial["values"][field], trial["top1"]) for trial in result.get("stopped", {}).values()
        ]
        values = [value for value, _ in ended + stopped]
        known, numbers = sorted(set(values)), numbers_of(values)
        x_of = dict(zip(values, numbers or map(known.index, values)))
        for trials, filled in ((ended, True), (stopped, False)):
            axes.plot(
                [x_of[value] for value, _ in trials],
                [100 * top1 for _, top1 in trials],
                "o",
                color=SERIES[0],
                alpha=0.7,
                fillstyle="full" if filled else "none",
                label="finished" if filled else "stopped",
            )
        if numbers is None:
            axes.set_xticks(range(len(known)), known)
        elif _use_log_scale(axes, numbers):
            decades = math.log10(max(numbers) / min(numbers))
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.7 else (1, 3)))
            axes.xaxis.set_major_formatter("{x:g}")
        else:
            whole = all(x == int(x) for x in numbers)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole, min_n_ticks=1))
        if stopped:
            legend(axes)
        axes.set(xlabel=short_names([field])[field], ylabel="validation top-1 %")
        axes.grid(alpha=0.25)

    return draw


def _use_log_scale(axes: Any, numbers: list[float] | None) -> bool:
    """Set a logarithmic x axis if the values span about a decade or more; return whether they
    do."""
    wide = bool(numbers) and min(numbers) > 0 and max(numbers) >= 8 * min(numbers)
    if wide:
        axes.set_xscale("log")
        axes.minorticks_off()
    return wide


def heat_map(
    result: dict[str, Any],
    down: str,
    across: str,
    *,
    metric: Callable[[dict[str, Any]], list[float]] = final_top1,
) -> tuple[list[str], list[str], list[list[float]]]:
    """Return the mean test top-1 in % by the values of two fields, over the seeds and all other
    fields.

    Returns the values of the field `down`, those of the field `across`, and the means by row and
    column, NaN for a missing point. metric: another metric in [0, 1] of a row, one value per seed.
    """
    rows, columns = _values(result, down), _values(result, across)
    shares: dict[tuple[str, str], list[float]] = {}
    for row in points(result).values():
        key = row["values"].get(down), row["values"].get(across)
        shares.setdefault(key, []).extend(100 * share for share in metric(row))
    missing = [math.nan]
    means = [[statistics.mean(shares.get((a, b)) or missing) for b in columns] for a in rows]
    return rows, columns, means


def heat_map_figure(result: dict[str, Any], down: str, across: str) -> Any:
    """Return a matplotlib figure of the heat map of two fields with the number in each cell. Raises
    SystemFault without matplotlib."""
    rows, columns, means = heat_map(result, down, across)
    figure, (axes,) = _figure(2.2 + 0.9 * len(columns), 1.6 + 0.5 * len(rows))
    image = axes.imshow(means, aspect="auto", cmap="viridis")
    low, high = image.get_clim()
    for y, line in enumerate(means):
        for x, mean in enumerate(line):
            if math.isnan(mean):
                continue
            bright = high > low and (mean - low) / (high - low) > 0.6
            color = "black" if bright else "white"
            axes.text(x, y, f"{mean:.1f}", ha="center", va="center", color=color, fontsize=9)
    short = short_names([down, across])
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns)
    axes.set(xlabel=short[across], ylabel=short[down])
    bar = figure.colorbar(image, ax=axes)
    means = ", mean of the seeds" if len(result["seeds"]) > 1 else ""
    axes.set_title(f"{accuracy_label(result)}{means}", fontsize=8)
    bar.set_label("top-1 %")
    figure.suptitle(_title(result), fontsize=10)
    return figure


_MARKERS = "osD^v"


def ticket_curve(result: dict[str, Any]) -> Draw:
    """Return a chart of test accuracy over sparsity.

    Each kind of run has a line of means with error bars of one standard deviation. The kinds are
    shifted sideways so that the bars do not overlap. A horizontal line is the mean of the dense
    run, with the band of the tolerance below it.
    """

    def draw(axes: Any) -> None:
        rows = [row for row in result["rows"].values() if row["values"] and row["seeds"]]
        dense = next((row for row in rows if row["values"]["run"] == "dense"), None)
        if dense is not None:
            level, tolerance = (
                100 * statistics.mean(final_top1(dense)),
                result["lottery"]["tolerance"],
            )
            axes.axhline(level, color=TEACHER, linestyle="--", label=f"dense, {level:.1f}")
            axes.axhspan(level - tolerance, level, color=TEACHER, alpha=0.12, linewidth=0)
        kinds = list(dict.fromkeys(row["values"]["run"] for row in rows if row is not dense))
        for index, (kind, color, marker) in enumerate(zip(kinds, SERIES, _MARKERS)):
            kind_rows = [row for row in rows if row["values"]["run"] == kind]
            top1 = [[100 * share for share in final_top1(row)] for row in kind_rows]
            shift = 0.6 * (index - (len(kinds) - 1) / 2)
            axes.errorbar(
                [float(row["values"]["sparsity %"]) + shift for row in kind_rows],
                [statistics.mean(seeds) for seeds in top1],
                [statistics.stdev(seeds) if len(seeds) > 1 else 0 for seeds in top1],
                color=color,
                marker=marker,
                markersize=4.5,
                capsize=2.5,
                linewidth=1.5,
                label=kind,
            )
        ticks = dict.fromkeys(row["values"]["sparsity %"] for row in rows)
        axes.set_xticks([float(tick) for tick in ticks], [f"{float(tick):.0f}" for tick in ticks])
        note = "; kinds at the same sparsity are side by side" if len(kinds) > 1 else ""
        label = f"sparsity % of the prunable weights{note}"
        axes.set(xlabel=label, ylabel=accuracy_label(result))
        axes.grid(alpha=0.25)
        legend(axes)

    return draw
