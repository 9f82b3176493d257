"""Numbers of finished comparisons as tables and pictures; reads plain values only, no torch."""

import io
import re
import statistics
import warnings
from pathlib import Path
from typing import IO, Any

from deit.core.console import count_noun
from deit.core.errors import SystemFault, printable
from deit.core.filesystem import atomic_write
from deit.viz.tables import HEADS, _final

_LEGEND_SIGNS = 84  # in a line of a legend
_COLOURS = {"teacher": "#6b7280", "distilled": "#0f766e", "undistilled": "#c2410c"}


def save_figure(figure: Any, file: Path | IO[str], **settings: Any) -> None:
    """Save a figure of matplotlib's in which names are no formulas (`$`), no line is broken by
    one, and signs that the font lacks are boxes without a warning. settings: as savefig takes."""
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter

    formulas = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = axis.get_ticklabels(which="both")  # made now, so that they are found below
            if isinstance(axis.get_major_formatter(), LogFormatter):
                formulas |= {id(one) for one in labels}
    for text in figure.findobj(Text):
        if id(text) not in formulas:
            text.set_parse_math(False)
            text.set_text(printable(text.get_text()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        if not isinstance(file, Path):
            figure.savefig(file, **settings)
            return
        content = io.BytesIO()  # atomic_write renames a finished file: none is ever half written
        figure.savefig(content, **{"format": file.suffix[1:] or "png", **settings})
        atomic_write(file, content.getvalue())


def draw_comparison(result: dict[str, Any], path: Path) -> None:
    """Validation accuracy over the epochs, and final test accuracy by head, as a PNG.

    Of other studies than `teacher` one accuracy of each arm. result: what
    deit.experiments.sweep.sweep returns. Raises SystemFault without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemFault("drawing needs matplotlib; pip install 'deit[plot]'") from None
    seeds = len(result["seeds"])
    study = result.get("study", "teacher")
    title = f"{result['recipe']}: {_TITLES[study]} ({count_noun(seeds, 'seed')})"
    if study == "teacher" and set(result["rows"]) <= set(_COLOURS):
        figure = Figure(figsize=(10, 4), layout="constrained")
        curves, heads = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_curves(curves, result)
        _draw_heads(heads, result)
    elif study == "epochs":
        figure = Figure(figsize=(6, 4), layout="constrained")
        draw_epoch_scaling(figure.subplots(), result)
    else:
        figure = Figure(figsize=(7, 1.2 + 0.32 * len(result["rows"])), layout="constrained")
        draw_arms(figure.subplots(), result)
    figure.suptitle(title)
    save_figure(figure, path, dpi=150)


_TITLES = {
    "teacher": "what the teacher is worth",
    "view-modes": "what teacher and student see",
    "epochs": "accuracy against epochs",
    "ensemble": "teachers together and alone",
    "resolution": "fine-tuning at another resolution",
    "table-2": "what each teacher is worth",
    "table-3": "ways of distilling",
    "table-4": "who decides like whom",
    "table-8": "what each part is worth",
    "sweep": "its runs",
}


def name_all(axes: Any) -> None:
    """Let names that begin with an underscore into the legend, which leaves them out."""
    for artist in (*axes.get_children(), *axes.containers):
        label = str(artist.get_label())
        if label.startswith("_") and not re.fullmatch(r"_child\d+|_nolegend_", label):
            artist.set_label(f" {label}")


def legend(axes: Any) -> None:
    """Names of what is drawn, above the axes, where they cover nothing."""
    name_all(axes)
    names = axes.get_legend_handles_labels()[1]
    if names:
        across = min(max(_LEGEND_SIGNS // (max(map(len, names)) + 5), 1), len(names))
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=across,
            borderaxespad=0.2,
            frameon=False,
            fontsize=8,
        )


def draw_arms(axes: Any, result: dict[str, Any]) -> None:
    """Test accuracy of each arm: a dot a seed, the mean as a bar with its number; the best on top,
    teachers as dashed lines."""
    arms = {name: _final(row) for name, row in result["rows"].items() if not row["teacher"]}
    order = sorted(arms, key=lambda name: statistics.mean(arms[name]))
    for place, name in enumerate(order):
        mean = statistics.mean(arms[name])
        colour = _COLOURS["undistilled" if name == "none" else "distilled"]
        axes.plot(arms[name], [place] * len(arms[name]), ".", color=colour, alpha=0.6)
        axes.plot([mean, mean], [place - 0.3, place + 0.3], color=colour, linewidth=3)
        axes.annotate(
            f"{mean:.1f}",
            (1.01, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color=colour,
        )
    styles = ("--", ":", "-.")
    for style, (name, row) in zip(styles * 9, result["rows"].items()):
        if row["teacher"]:
            mean = statistics.mean(_final(row))
            axes.axvline(
                mean, color=_COLOURS["teacher"], linestyle=style, label=f"{name}, {mean:.1f}"
            )
    axes.set_yticks(range(len(order)), order)
    axes.set(xlabel="test top-1 %")
    axes.grid(axis="x", alpha=0.25)
    legend(axes)


def draw_epoch_scaling(axes: Any, result: dict[str, Any]) -> None:
    """Test accuracy against the epochs of training, with the teacher and without."""
    for kind in ("distilled", "undistilled"):
        rows = [row for name, row in result["rows"].items() if name.startswith(f"{kind}-")]
        if not rows:
            continue
        epochs = [row["epochs"] for row in rows]
        means = [statistics.mean(_final(row)) for row in rows]
        axes.plot(epochs, means, color=_COLOURS[kind], label=kind)
        for row in rows:
            values = _final(row)
            scatter_trials = [row["epochs"]] * len(values)
            axes.plot(scatter_trials, values, ".", color=_COLOURS[kind], alpha=0.6)
    for name, row in result["rows"].items():
        if row["teacher"]:
            mean = statistics.mean(_final(row))
            axes.axhline(
                mean, color=_COLOURS["teacher"], linestyle="--", label=f"{name}, {mean:.1f}"
            )
    ticks = sorted({row["epochs"] for row in result["rows"].values() if not row["teacher"]})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="epochs", ylabel="test top-1 %")
    axes.grid(alpha=0.25)
    legend(axes)


def draw_throughput(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Accuracy against images/s, a point a row (the figure of the DeiT paper), as a PNG.

    rows: by name, what deit.evaluation.evaluate.evaluate returns, with `cost`; bars go from the
    slowest to the fastest round. Raises SystemFault without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemFault("drawing needs matplotlib; pip install 'deit[plot]'") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    runs = list(dict.fromkeys(row["run"] for row in rows.values()))
    palette = ("#0f766e", "#c2410c", "#6b7280", "#1d4ed8", "#a21caf", "#4d7c0f")
    for run, colour in zip(runs, palette * len(runs)):
        own = {name: row for name, row in rows.items() if row["run"] == run}
        speeds = [row["cost"]["images_per_s"] for row in own.values()]
        shares = [100 * row["heads"]["fused"]["top1"] for row in own.values()]
        spread = [row["cost"]["spread"] for row in own.values()]
        errors = [
            [speed - low for speed, (low, _) in zip(speeds, spread)],
            [high - speed for speed, (_, high) in zip(speeds, spread)],
        ]
        label, *_ = next(iter(own)).split(", ")
        axes.errorbar(
            speeds, shares, xerr=errors, fmt="o", color=colour, alpha=0.8, capsize=2, label=label
        )
        # A line goes through what differs in one thing: the tokens merged, else the resolution.
        merging = len({row.get("merge") for row in own.values()}) > 1
        fixed = ("eval_crop_pct", "image_size") if merging else ("eval_crop_pct",)
        settings = [tuple(row[key] for key in fixed) for row in own.values()]
        for setting in dict.fromkeys(settings):
            same = [one == setting for one in settings]
            line = [[x for x, here in zip(xs, same) if here] for xs in (speeds, shares)]
            axes.plot(*line, color=colour, alpha=0.5)
        for name, speed, share in zip(own, speeds, shares):
            _, _, changed = name.partition(", ")  # the run itself is in the legend
            axes.annotate(
                changed,
                (speed, share),
                textcoords="offset points",
                xytext=(5, 5),
                fontsize=8,
                color=colour,
            )
    first = next(iter(rows.values()))
    axes.set_xscale("log")
    axes.margins(x=0.2, y=0.15)
    axes.set(
        xlabel=f"images/s ({first['environment']['device_name']})",
        ylabel=f"{first['split']} top-1 %",
    )
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("{x:,.0f}")
    axes.tick_params(axis="x", which="both", labelsize=7, labelrotation=30)
    axes.grid(alpha=0.25, which="both")
    name_all(axes)
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path, dpi=150)


def _draw_curves(axes: Any, result: dict[str, Any]) -> None:
    """Validation accuracy over the epochs, one line a seed; the teacher as a level."""
    shown = []
    for name, row in result["rows"].items():
        colour = _COLOURS[name]
        if name == "teacher":
            # The weights of its best epoch are what the students learn from.
            best = [max(top1 for _, top1 in curve) for curve in row["curves"]]
            level = 100 * statistics.mean(best)
            axes.axhline(level, color=colour, linestyle="--", label=f"teacher, {level:.1f}")
            shown.append(level)
            continue
        for index, curve in enumerate(row["curves"]):
            epochs, values = zip(*((epoch, 100 * top1) for epoch, top1 in curve))
            marker = "o" if len(epochs) == 1 else None
            label = None if index else name
            axes.plot(epochs, values, color=colour, alpha=0.8, label=label, marker=marker)
            shown += values
    axes.set(xlabel="epoch", ylabel="validation top-1 %", ylim=_limits(shown))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    name_all(axes)
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
