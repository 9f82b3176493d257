"""A landscape over the levels of a search, of one seed and of several: its tables and pictures."""

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
    """Places and lines as Markdown."""
    places = markdown_table(columns(result), cells(result))
    return f"{places}\n\n{markdown_table(LINES, line_cells(result))}"


def draw_landscape(result: dict[str, Any], path: Path) -> None:
    """Its lines, eigenvalues and path side by side, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4), layout="constrained")
    known = {name: one["curvature"] for name, one in result["places"].items()}
    draws = (
        lines_chart(result["lines"], "loss", "loss [nats]"),
        eigenvalues_chart(known),
        path_chart(result["path"]),
    )
    for axes, draw in zip(figure.subplots(1, 3), draws):
        draw(axes)
    save_figure(figure, path, dpi=120)


_Result = dict[str, Any]
_PLACES: dict[str, Callable[[_Result], float]] = {
    "loss": lambda place: place["loss"],
    "largest eigenvalue": lambda place: place["curvature"]["eigenvalues"]["largest"][0],
    "trace": lambda place: place["curvature"]["trace"]["value"],
}
_LINES: dict[str, Callable[[_Result], float]] = {
    "loss barrier": lambda line: line["barrier"]["loss"],
    "error barrier, points": lambda line: 100 * line["barrier"]["error"],
}
_DIGITS = {"loss": 3, "trace": 0, "loss barrier": 3}


def seeds_tables(results: Sequence[_Result]) -> str:
    """The places and the lines that landscapes of several seeds have in common: mean and sample
    standard deviation."""
    tables = []
    for part, read in (("places", _PLACES), ("lines", _LINES)):
        rows = [
            [
                name,
                *(
                    mean_std([told(result[part][name]) for result in results], digits=digits)
                    for told, digits in ((told, _DIGITS.get(of, 1)) for of, told in read.items())
                ),
            ]
            for name in _in_common(results, part)
        ]
        tables.append(markdown_table(("", *read), rows))
    tables.append(markdown_table(("control less its ticket", *_PLACES), _pairs(results)))
    return "\n\n".join(tables)


def _pairs(results: Sequence[_Result]) -> list[list[str]]:
    """How much more a control has than the ticket of its level: of each seed, for both share it."""
    rows = []
    for name in _in_common(results, "places"):
        kind, _, level = name.partition(", ")
        ticket = f"ticket, {level}"
        if kind != "ticket" and all(ticket in one["places"] for one in results):
            more = {
                of: [told(one["places"][name]) - told(one["places"][ticket]) for one in results]
                for of, told in _PLACES.items()
            }
            cells = (mean_std(of, digits=_DIGITS.get(key, 1)) for key, of in more.items())
            rows.append([name, *cells])
    return rows


def _in_common(results: Sequence[_Result], part: str) -> list[str]:
    return [name for name in results[0][part] if all(name in one[part] for one in results)]


def draw_seeds(results: Sequence[_Result], path: Path) -> None:
    """Against sparsity, of each kind: the barrier between a ticket and its control, the largest
    eigenvalue and the trace; means with the standard deviation of the seeds each way, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4), layout="constrained")
    panels = figure.subplots(1, 3)
    kinds = list(dict.fromkeys(place["kind"] for place in results[0]["places"].values()))
    colours = dict(zip([kind for kind in kinds if kind != "dense"], SERIES))
    for axes, name in zip(panels[1:], ("largest eigenvalue", "trace")):
        dense = statistics.mean(_PLACES[name](one["places"]["dense"]) for one in results)
        axes.axhline(dense, color="gray", linestyle="--", label="dense")
        for kind, colour in colours.items():
            found = {
                _sparsity(place): [_PLACES[name](one["places"][place]) for one in results]
                for place in _in_common(results, "places")
                if results[0]["places"][place]["kind"] == kind
            }
            _bars(axes, found, kind, colour, list(colours).index(kind))
        axes.set_ylabel(name)
    for kind, colour in colours.items():
        found = {
            _sparsity(line): [_LINES["loss barrier"](one["lines"][line]) for one in results]
            for line in _in_common(results, "lines")
            if line.startswith("ticket") and f" to {kind}," in line
        }
        label = "ticket, from the level before" if kind == "ticket" else f"ticket to {kind}"
        _bars(panels[0], found, label, colour, list(colours).index(kind))
    panels[0].set_ylabel("loss barrier [nats]")
    for axes in panels:
        axes.set_xlabel("sparsity % of the prunable weights; kinds stand side by side")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    save_figure(figure, path, dpi=120)


def _sparsity(name: str) -> float:
    """79.0 of `ticket, 67.2 % to ticket, 79.0 %`."""
    return float(name.removesuffix(" %").rpartition(", ")[2])


def _bars(axes: Any, found: dict[float, list[float]], label: str, colour: str, place: int) -> None:
    """place: of the kind among the others, beside which it stands."""
    axes.errorbar(
        [sparsity + 0.8 * (place - 1) for sparsity in found],
        [statistics.mean(values) for values in found.values()],
        [statistics.stdev(values) if len(values) > 1 else 0 for values in found.values()],
        color=colour,
        label=label,
        marker="o",
        markersize=4.5,
        capsize=2.5,
        linewidth=1.5,
    )
