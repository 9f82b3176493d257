"""Plots of finished comparisons, drawn with matplotlib from plain values; no torch."""

import io
import itertools
import re
import statistics
import warnings
from pathlib import Path
from typing import IO, Any

from deit.core.console import count_noun
from deit.core.errors import SystemFault, printable
from deit.core.filesystem import atomic_write
from deit.viz.seed_marks import (
    DOTS_AND_BAR,
    DOTS_AND_LINE,
    accuracy_label,
    draw_seeds,
    explain_marks,
)
from deit.viz.tables import HEADS, final_top1_percent, head_name, mean_std

_LEGEND_WIDTH = 84  # of a line of a legend, in characters
_COLOR_OF = {"teacher": "#6b7280", "distilled": "#0f766e", "undistilled": "#c2410c"}


def save_figure(figure: Any, file: str | Path | IO[str], **settings: Any) -> None:
    """Save a matplotlib figure whose texts may hold any name.

    `$` is not read as a formula, control characters are escaped, and characters that the font lacks
    become boxes without a warning. settings: as `savefig` takes them. A path is written atomically.
    """
    from matplotlib import rc_context
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter

    formulas = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            # This call creates the tick labels, so that findobj below finds them.
            labels = axis.get_ticklabels(which="both")
            if isinstance(axis.get_major_formatter(), LogFormatter):
                formulas |= {id(label) for label in labels}
    for text in figure.findobj(Text):
        if id(text) not in formulas:
            text.set_parse_math(False)
            text.set_text(printable(text.get_text()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        if not isinstance(file, str | Path):
            figure.savefig(file, **settings)
            return
        path, content = Path(file), io.BytesIO()
        with rc_context({"pdf.fonttype": 42}):  # TrueType: journals reject the fonts of type 3
            figure.savefig(content, **{"format": path.suffix[1:] or "png", **settings})
        atomic_write(path, content.getvalue())


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure, of a size [inch], that a notebook shows as an image.

    Raises SystemFault if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemFault("drawing needs matplotlib; pip install 'deit[plot]'") from None

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            content = io.BytesIO()
            save_figure(self, content, format="png", dpi=100)
            return content.getvalue()

    return NotebookFigure(figsize=(width, height), layout="constrained")


def draw_comparison(result: dict[str, Any], path: str | Path) -> None:
    """Save `comparison_figure` in the format that the ending of the path names. Raises SystemFault
    if matplotlib is missing."""
    save_figure(comparison_figure(result), path, dpi=150)


def comparison_figure(result: dict[str, Any]) -> Any:
    """Return a matplotlib figure of a finished study.

    The study `teacher` shows validation accuracy over the epochs and test accuracy by head; other
    studies show one test accuracy per arm. result: as deit.experiments.sweep.sweep returns it.
    Raises SystemFault if matplotlib is missing.
    """
    num_seeds = len(result["seeds"])
    study = result.get("study", "teacher")
    title = f"{result['recipe']}: {_TITLES[study]} ({count_noun(num_seeds, 'seed')})"
    if study == "teacher" and set(result["rows"]) <= set(_COLOR_OF):
        figure = new_figure(10, 4)
        curves, heads = figure.subplots(1, 2, width_ratios=(5, 4))
        _draw_curves(curves, result)
        _draw_heads(heads, result)
    elif study == "epochs":
        figure = new_figure(6, 4)
        draw_epoch_scaling(figure.subplots(), result)
    else:
        figure = new_figure(7, 1.2 + 0.32 * len(result["rows"]))
        draw_arms(figure.subplots(), result)
    figure.suptitle(title)
    marks = DOTS_AND_LINE if study == "epochs" else DOTS_AND_BAR
    explain_marks(figure, result["rows"].values(), marks)
    return figure


_TITLES = {
    "teacher": "with and without the teacher",
    "view-modes": "view modes of student and teacher",
    "epochs": "accuracy against epochs",
    "ensemble": "single teachers and their ensemble",
    "resolution": "fine-tuning at another resolution",
    "table-2": "comparison of teachers",
    "table-3": "distillation methods",
    "table-4": "disagreement of the classifiers",
    "table-8": "ablation of the training",
    "sweep": "all runs",
}


def show_underscored_labels(axes: Any) -> None:
    """Make labels that begin with an underscore appear in the legend; matplotlib hides them."""
    for artist in (*axes.get_children(), *axes.containers):
        label = str(artist.get_label())
        if label.startswith("_") and not re.fullmatch(r"_child\d+|_nolegend_", label):
            artist.set_label(f" {label}")


def legend(axes: Any) -> None:
    """Draw a legend above the axes, where it covers nothing."""
    show_underscored_labels(axes)
    names = axes.get_legend_handles_labels()[1]
    if names:
        num_columns = min(max(_LEGEND_WIDTH // (max(map(len, names)) + 5), 1), len(names))
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=num_columns,
            borderaxespad=0.2,
            frameon=False,
            fontsize=8,
        )


def draw_arms(axes: Any, result: dict[str, Any]) -> None:
    """Plot the test accuracy of each arm: a dot per seed, the mean as a bar, the standard deviation
    as whiskers, and both as numbers.

    The best arm is on top; teachers are dashed lines. result: as in `draw_comparison`.
    """
    arms = {
        name: final_top1_percent(row) for name, row in result["rows"].items() if not row["teacher"]
    }
    order = sorted(arms, key=lambda name: statistics.mean(arms[name]))
    for rank, name in enumerate(order):
        mean = statistics.mean(arms[name])
        arm_color = _COLOR_OF["undistilled" if name == "none" else "distilled"]
        draw_seeds(axes, rank, arms[name], arm_color, along="x")
        axes.plot([mean, mean], [rank - 0.3, rank + 0.3], color=arm_color, linewidth=3)
        axes.annotate(
            _mean_std(arms[name]),
            (1.01, rank),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color=arm_color,
        )
    styles = ("--", ":", "-.")
    for style, (name, row) in zip(styles * 9, result["rows"].items()):
        if row["teacher"]:
            mean = statistics.mean(final_top1_percent(row))
            axes.axvline(
                mean, color=_COLOR_OF["teacher"], linestyle=style, label=f"{name}, {mean:.1f}"
            )
    axes.set_yticks(range(len(order)), order)
    axes.set(xlabel=accuracy_label(result))
    axes.grid(axis="x", alpha=0.25)
    legend(axes)


def draw_epoch_scaling(axes: Any, result: dict[str, Any]) -> None:
    """Plot test accuracy against training epochs, with and without the teacher.

    result: as in `draw_comparison`.
    """
    for kind in ("distilled", "undistilled"):
        rows = [row for name, row in result["rows"].items() if name.startswith(f"{kind}-")]
        if not rows:
            continue
        epochs = [row["epochs"] for row in rows]
        means = [statistics.mean(final_top1_percent(row)) for row in rows]
        axes.plot(epochs, means, color=_COLOR_OF[kind], label=kind)
        for row in rows:
            draw_seeds(axes, row["epochs"], final_top1_percent(row), _COLOR_OF[kind], along="y")
    for name, row in result["rows"].items():
        if row["teacher"]:
            mean = statistics.mean(final_top1_percent(row))
            axes.axhline(
                mean, color=_COLOR_OF["teacher"], linestyle="--", label=f"{name}, {mean:.1f}"
            )
    ticks = sorted({row["epochs"] for row in result["rows"].values() if not row["teacher"]})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="epochs", ylabel=accuracy_label(result))
    axes.grid(alpha=0.25)
    legend(axes)


def draw_throughput(rows: dict[str, dict[str, Any]], path: str | Path) -> None:
    """Plot accuracy against throughput as a PNG, a point per row (Figure 1 of the DeiT paper).

    rows: by name the results of deit.evaluation.evaluate.evaluate with `cost`. Error bars span the
    slowest and the fastest round. Raises SystemFault if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemFault("drawing needs matplotlib; pip install 'deit[plot]'") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    runs = list(dict.fromkeys(row["run"] for row in rows.values()))
    palette = ("#0f766e", "#c2410c", "#6b7280", "#1d4ed8", "#a21caf", "#4d7c0f")
    for run, run_color in zip(runs, palette * len(runs)):
        run_rows = {name: row for name, row in rows.items() if row["run"] == run}
        speeds = [row["cost"]["images_per_s"] for row in run_rows.values()]
        top1 = [100 * row["heads"]["fused"]["top1"] for row in run_rows.values()]
        spread = [row["cost"]["spread"] for row in run_rows.values()]
        errors = [
            [speed - low for speed, (low, _) in zip(speeds, spread)],
            [high - speed for speed, (_, high) in zip(speeds, spread)],
        ]
        label, *_ = next(iter(run_rows)).split(", ")
        axes.errorbar(
            speeds, top1, xerr=errors, fmt="o", color=run_color, alpha=0.8, capsize=2, label=label
        )
        _connect_points(axes, list(run_rows.values()), speeds, top1, run_color)
        for name, speed, accuracy in zip(run_rows, speeds, top1):
            _, _, variant = name.partition(", ")  # the name of the run is in the legend
            axes.annotate(
                variant,
                (speed, accuracy),
                textcoords="offset points",
                xytext=(5, 5),
                fontsize=8,
                color=run_color,
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
    show_underscored_labels(axes)
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path, dpi=150)


def _connect_points(
    axes: Any, rows: list[dict[str, Any]], speeds: list[float], top1: list[float], run_color: str
) -> None:
    """Connect the points that differ only in the number of merged tokens, or in resolution."""
    merging = len({row.get("merge") for row in rows}) > 1
    fixed = ("eval_crop_pct", "image_size") if merging else ("eval_crop_pct",)
    settings = [tuple(row[key] for key in fixed) for row in rows]
    for setting in dict.fromkeys(settings):
        on_line = [row_setting == setting for row_setting in settings]
        line = [list(itertools.compress(values, on_line)) for values in (speeds, top1)]
        axes.plot(*line, color=run_color, alpha=0.5)


def _draw_curves(axes: Any, result: dict[str, Any]) -> None:
    """Plot validation accuracy over the epochs: a thin line per seed, their mean, and the teacher
    as a level. Students on different numbers of images share an axis in % of their training."""
    num_epochs = {row.get("epochs") for name, row in result["rows"].items() if name != "teacher"}
    visible = []
    for name, row in result["rows"].items():
        color = _COLOR_OF[name]
        if name == "teacher":
            # Students are distilled from the weights of its best epoch.
            best = [max(top1 for _, top1 in curve) for curve in row["curves"]]
            level = 100 * statistics.mean(best)
            axes.axhline(level, color=color, linestyle="--", label=f"teacher, {level:.1f}")
            visible.append(level)
            continue
        scale = 1 if len(num_epochs) == 1 else 100 / row["epochs"]
        curves = [{scale * epoch: 100 * top1 for epoch, top1 in curve} for curve in row["curves"]]
        shared = sorted(set.intersection(*map(set, curves)))
        means = [statistics.mean(curve[x] for curve in curves) for x in shared]
        marker = "o" if len(shared) == 1 else None
        axes.plot(shared, means, color=color, linewidth=2, label=name, marker=marker)
        for curve in curves:
            axes.plot(curve.keys(), curve.values(), color=color, alpha=0.4, linewidth=0.8)
            visible += curve.values()
    xlabel = "epoch" if len(num_epochs) == 1 else "training steps, % of all"
    axes.set(xlabel=xlabel, ylabel="validation top-1 %", ylim=_limits(visible))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    show_underscored_labels(axes)
    axes.legend(loc="lower right", frameon=False)


def _draw_heads(axes: Any, result: dict[str, Any]) -> None:
    """Plot test accuracy by head: a dot per seed, the mean as a bar, the standard deviation as
    whiskers, and both as numbers."""
    labels: list[tuple[float, str, str]] = []
    y = 0.0
    for name, row in result["rows"].items():
        for head in HEADS:
            values = [100 * top1[head] for top1 in row["top1"] if top1[head] is not None]
            if not values:
                continue
            mean, color = statistics.mean(values), _COLOR_OF[name]
            draw_seeds(axes, y, values, color, along="x")
            axes.plot([mean, mean], [y - 0.35, y + 0.35], color=color, linewidth=3)
            axes.annotate(
                _mean_std(values),
                (1.02, y),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=9,
                color=color,
            )
            labels.append((y, name if name == "teacher" else f"{name}, {head_name(head)}", color))
            y += 1
        y += 0.5
    axes.set_yticks([y for y, _, _ in labels], [text for _, text, _ in labels], fontsize=9)
    for tick, (_, _, color) in zip(axes.get_yticklabels(), labels):
        tick.set_color(color)
    axes.invert_yaxis()
    axes.set(xlabel=f"{result['split']} top-1 %")
    axes.grid(axis="x", alpha=0.25)


def _mean_std(values: list[float]) -> str:
    return mean_std(values).replace("+-", "\u00b1")


def _limits(values: list[float]) -> tuple[float, float]:
    """Return axis limits with space for the text above the highest value."""
    low, high = min(values), max(values)
    span = max(high - low, 1.0)
    return low - 0.1 * span, high + 0.15 * span
