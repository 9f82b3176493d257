"""Tables and plots of loss landscapes over the levels of a lottery, for one seed and several."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deit.analysis.landscape_plots import eigenvalues_chart, lines_chart, path_chart
from deit.analysis.landscape_tables import LINES, cells, columns, line_cells
from deit.viz.charts import SERIES
from deit.viz.plots import save_figure
from deit.viz.tables import markdown_table, mean_std


def landscape_tables(result: dict[str, Any]) -> str:
    """Return the tables of points and lines as Markdown."""
    points = markdown_table(columns(result), cells(result))
    return f"{points}\n\n{markdown_table(LINES, line_cells(result))}"


def draw_landscape(result: dict[str, Any], path: Path) -> None:
    """Plot lines, eigenvalues and path side by side, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4), layout="constrained")
    curvatures = {name: point["curvature"] for name, point in result["points"].items()}
    draws = (
        lines_chart(result["lines"], "loss", "loss [nats]"),
        eigenvalues_chart(curvatures),
        path_chart(result["path"]),
    )
    for axes, draw in zip(figure.subplots(1, 3), draws):
        draw(axes)
    save_figure(figure, path, dpi=120)


Result = dict[str, Any]
Metrics = dict[str, Callable[[Result], float]]
_POINT_METRICS: Metrics = {
    "loss": lambda point: point["loss"],
    "largest eigenvalue": lambda point: point["curvature"]["eigenvalues"]["largest"][0],
    "trace": lambda point: point["curvature"]["trace"]["value"],
}
_LINE_METRICS: Metrics = {
    "loss barrier": lambda line: line["barrier"]["loss"],
    "error barrier, points": lambda line: 100 * line["barrier"]["error"],
}
_DIGITS = {"loss": 3, "trace": 0, "loss barrier": 3}


def seeds_tables(results: Sequence[Result]) -> str:
    """Return tables of the points and lines that the landscapes of several seeds share, as
    Markdown: mean and sample standard deviation."""
    tables = []
    for part, metrics in (("points", _POINT_METRICS), ("lines", _LINE_METRICS)):
        rows = [
            [name, *_mean_cells(metrics, [result[part][name] for result in results])]
            for name in _in_common(results, part)
        ]
        tables.append(markdown_table(("", *metrics), rows))
    tables.append(markdown_table(("control less its ticket", *_POINT_METRICS), _pairs(results)))
    return "\n\n".join(tables)


def _mean_cells(metrics: Metrics, items: Sequence[Result]) -> list[str]:
    return [
        mean_std([metric(item) for item in items], digits=_DIGITS.get(name, 1))
        for name, metric in metrics.items()
    ]


def _pairs(results: Sequence[Result]) -> list[list[str]]:
    """Return the differences between a control and the ticket of its level, over the seeds in which
    both exist."""
    rows = []
    for name in _in_common(results, "points"):
        kind, _, level = name.partition(", ")
        ticket = f"ticket, {level}"
        if kind != "ticket" and all(ticket in result["points"] for result in results):
            pairs = [(result["points"][name], result["points"][ticket]) for result in results]
            cells = [
                mean_std([metric(a) - metric(b) for a, b in pairs], digits=_DIGITS.get(key, 1))
                for key, metric in _POINT_METRICS.items()
            ]
            rows.append([name, *cells])
    return rows


def _in_common(results: Sequence[Result], part: str) -> list[str]:
    return [name for name in results[0][part] if all(name in result[part] for result in results)]


def draw_seeds(results: Sequence[Result], path: Path) -> None:
    """Plot over sparsity, for each kind of run: the barrier between a ticket and its control, the
    largest eigenvalue, and the trace; as PNG. Error bars are one standard deviation over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4), layout="constrained")
    all_axes = figure.subplots(1, 3)
    points = results[0]["points"]
    kinds = list(dict.fromkeys(point["kind"] for point in points.values()))
    colors = dict(zip([kind for kind in kinds if kind != "dense"], SERIES))
    for axes, name in zip(all_axes[1:], ("largest eigenvalue", "trace")):
        metric = _POINT_METRICS[name]
        dense = statistics.mean(metric(result["points"]["dense"]) for result in results)
        axes.axhline(dense, color="gray", linestyle="--", label="dense")
        for index, (kind, color) in enumerate(colors.items()):
            values = {
                _sparsity(point): [metric(result["points"][point]) for result in results]
                for point in _in_common(results, "points")
                if points[point]["kind"] == kind
            }
            _bars(axes, values, kind, color, index)
        axes.set_ylabel(name)
    barrier = _LINE_METRICS["loss barrier"]
    for index, (kind, color) in enumerate(colors.items()):
        values = {
            _sparsity(line): [barrier(result["lines"][line]) for result in results]
            for line in _in_common(results, "lines")
            if line.startswith("ticket") and f" to {kind}," in line
        }
        label = "ticket, from the level before" if kind == "ticket" else f"ticket to {kind}"
        _bars(all_axes[0], values, label, color, index)
    all_axes[0].set_ylabel("loss barrier [nats]")
    for axes in all_axes:
        axes.set_xlabel("sparsity % of the prunable weights; kinds are side by side")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    save_figure(figure, path, dpi=120)


def _sparsity(name: str) -> float:
    """Return the last sparsity of a name: 79.0 of `ticket, 67.2 % to ticket, 79.0 %`."""
    return float(name.removesuffix(" %").rpartition(", ")[2])


def _bars(axes: Any, values: dict[float, list[float]], label: str, color: str, index: int) -> None:
    """Plot the values of each sparsity. index: of the kind, which shifts its bars sideways."""
    axes.errorbar(
        [sparsity + 0.8 * (index - 1) for sparsity in values],
        [statistics.mean(seeds) for seeds in values.values()],
        [statistics.stdev(seeds) if len(seeds) > 1 else 0 for seeds in values.values()],
        color=color,
        label=label,
        marker="o",
        markersize=4.5,
        capsize=2.5,
        linewidth=1.5,
    )
