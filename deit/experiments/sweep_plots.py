"""Pictures of a sweep: heat maps of two fields, curves of one, dots of runs; no torch."""

import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deit.core.console import count_noun
from deit.core.errors import SystemFault
from deit.experiments.sweep_spec import short_names
from deit.experiments.sweep_tables import points
from deit.viz.charts import SERIES, TEACHER, Draw
from deit.viz.plots import draw_comparison, legend, save_figure
from deit.viz.tables import final_top1


def draw_sweep(result: dict[str, Any], out: Path) -> list[Path]:
    """Test accuracy over what varies, as PNGs: of runs alone the picture of a comparison; of one
    field a curve for each run; of several a heat map of each two, averaged over the others.

    Returns their paths. Raises SystemFault without matplotlib.
    """
    if not any(row["seeds"] for row in points(result).values()):
        return []
    fields = [name for name in result["fields"] if name != "run"]
    if "tickets" in result:
        return [_save(result, out / "tickets.png", [ticket_curve(result)])]
    if result.get("search"):
        draws = [dots(result, field) for field in fields]
        return [_save(result, out / "search.png", draws, width=3.2 * len(fields), height=3.2)]
    if not fields:
        path = out / "runs.png"
        draw_comparison(finished_rows(result), path)
        return [path]
    if len(fields) == 1:
        return [_save(result, out / f"{fields[0]}.png", [curve(result, fields[0])])]
    pairs = itertools.combinations(fields, 2)
    paths = []
    for down, across in pairs:
        path = out / f"{down}-{across}.png"
        draw_heat_map(result, down, across, path)
        paths.append(path)
    return paths


def _save(
    result: dict[str, Any], path: Path, draws: list[Draw], *, width: float = 6.4, height: float = 4
) -> Path:
    """Charts beside each other under the sweep's title, as a PNG."""
    figure, places = _figure(width, height, len(draws))
    for draw, axes in zip(draws, places):
        draw(axes)
    figure.suptitle(_title(result))
    save_figure(figure, path, dpi=150)
    return path


def finished_rows(result: dict[str, Any]) -> dict[str, Any]:
    """The same as a comparison's result, without the points that have no finished run."""
    rows = {name: row for name, row in result["rows"].items() if row["seeds"]}
    title = {"study": result["study"] or "sweep"}
    return {**result, **title, "rows": rows, "recipe": f"{result['sweep']}, {result['recipe']}"}


def _figure(width: float, height: float, across: int = 1) -> tuple[Any, list[Any]]:
    """A figure with axes beside each other. Raises SystemFault without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemFault("drawing needs matplotlib; pip install 'deit[plot]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, across, squeeze=False)[0])


def _title(result: dict[str, Any]) -> str:
    number, of = len(result["seeds"]), "seed"
    if result.get("search"):
        number, of = result["search"]["trials"], "trial"
    return f"{result['sweep']}, {result['recipe']} ({count_noun(number, of)})"


def _values(result: dict[str, Any], field: str) -> list[str]:
    """The values of a field in the order of the file."""
    found = (row["values"].get(field) for row in points(result).values())
    return list(dict.fromkeys(value for value in found if value is not None))


def numbers_of(values: list[str]) -> list[float] | None:
    """Values as numbers; None where they are words."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def curve(result: dict[str, Any], field: str) -> Draw:
    """Test accuracy against one field: a dot a seed, a line through the means, one a run; a level
    for each teacher."""

    def draw(axes: Any) -> None:
        values = _values(result, field)
        numbers = numbers_of(values)
        place = dict(zip(values, numbers or range(len(values))))
        rows = [row for row in points(result).values() if row["seeds"]]
        runs = dict.fromkeys(row["values"].get("run", "") for row in rows)
        for run, colour in zip(runs, itertools.cycle(SERIES)):
            own = {
                place[row["values"][field]]: [100 * one for one in final_top1(row)]
                for row in rows
                if row["values"].get("run", "") == run
            }
            xs = sorted(own)
            axes.plot(xs, [statistics.mean(own[x]) for x in xs], color=colour, label=run or None)
            for x in xs:
                axes.plot([x] * len(own[x]), own[x], ".", color=colour, alpha=0.6)
        for name, row in result["rows"].items():
            if row["teacher"] and row["seeds"]:
                level = 100 * statistics.mean(final_top1(row))
                axes.axhline(level, color=TEACHER, linestyle="--", label=f"{name}, {level:.1f}")
        _scale(axes, numbers)
        axes.set_xticks(list(place.values()), list(place))
        axes.set(xlabel=short_names([field])[field], ylabel=f"{result['split']} top-1 %")
        axes.grid(alpha=0.25)
        legend(axes)

    return draw


def dots(result: dict[str, Any], field: str) -> Draw:
    """Validation accuracy over a searched field: a dot for each trial that ran to its end, a ring
    for each that was stopped, with what it had by then."""

    def draw(axes: Any) -> None:
        from matplotlib.ticker import LogLocator, MaxNLocator

        rows = [row for row in points(result).values() if row["seeds"]]
        ended = [(row["values"][field], row["validation"][0]) for row in rows]
        stopped = [
            (one["values"][field], one["top1"]) for one in result.get("stopped", {}).values()
        ]
        values = [value for value, _ in ended + stopped]
        known, numbers = sorted(set(values)), numbers_of(values)
        place = dict(zip(values, numbers or map(known.index, values)))
        for trials, filled in ((ended, True), (stopped, False)):
            axes.plot(
                [place[value] for value, _ in trials],
                [100 * top1 for _, top1 in trials],
                "o",
                color=SERIES[0],
                alpha=0.7,
                fillstyle="full" if filled else "none",
                label="at its end" if filled else "stopped",
            )
        if numbers is None:
            axes.set_xticks(range(len(known)), known)
        elif _scale(axes, numbers):
            decades = math.log10(max(numbers) / min(numbers))
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 1.7 else (1, 3)))
            axes.xaxis.set_major_formatter("{x:g}")
        else:
            whole = all(number == int(number) for number in numbers)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole, min_n_ticks=1))
        if stopped:
            legend(axes)
        axes.set(xlabel=short_names([field])[field], ylabel="validation top-1 %")
        axes.grid(alpha=0.25)

    return draw


def _scale(axes: Any, numbers: list[float] | None) -> bool:
    """Powers of ten where the values span about one or more; whether they do."""
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
    of: Callable[[dict[str, Any]], list[float]] = final_top1,
) -> tuple[list[str], list[str], list[list[float]]]:
    """Mean test top-1 in % for each two values of two fields, over all that varies beside them and
    over the seeds: the values down, those across, and the rows of means, NaN where none is.

    of: another share in [0, 1] of a row, a value a seed.
    """
    rows, columns = _values(result, down), _values(result, across)
    shares: dict[tuple[str, str], list[float]] = {}
    for row in points(result).values():
        key = row["values"].get(down), row["values"].get(across)
        shares.setdefault(key, []).extend(100 * one for one in of(row))
    nothing = [math.nan]
    means = [[statistics.mean(shares.get((a, b)) or nothing) for b in columns] for a in rows]
    return rows, columns, means


def draw_heat_map(result: dict[str, Any], down: str, across: str, path: Path) -> None:
    """The heat map of two fields, each cell with its number."""
    rows, columns, means = heat_map(result, down, across)
    figure, (axes,) = _figure(2.2 + 0.9 * len(columns), 1.6 + 0.5 * len(rows))
    image = axes.imshow(means, aspect="auto", cmap="viridis")
    low, high = image.get_clim()
    for place, line in enumerate(means):
        for at, mean in enumerate(line):
            if math.isnan(mean):
                continue
            bright = high > low and (mean - low) / (high - low) > 0.6
            colour = "black" if bright else "white"
            axes.text(at, place, f"{mean:.1f}", ha="center", va="center", color=colour, fontsize=9)
    short = short_names([down, across])
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns)
    axes.set(xlabel=short[across], ylabel=short[down])
    bar = figure.colorbar(image, ax=axes)
    bar.set_label(f"{result['split']} top-1 %")
    figure.suptitle(_title(result), fontsize=10)
    save_figure(figure, path, dpi=150)


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
