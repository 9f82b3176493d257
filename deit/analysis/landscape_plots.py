"""Charts of the lines, spectra, basins and planes of a landscape, from plain values."""

import math
import re
from typing import Any

from deit.experiments.lottery_options import DENSE, TICKET
from deit.viz.charts import FAINT, SERIES, Draw
from deit.viz.plots import legend

MAX_LABELED = 8


def kind_of(name: str) -> str:
    """Return the kind of a run by its name: `ticket` for `ticket, 20.0 %`.

    The dense run counts as the ticket of level 0. Any other name is its own kind.
    """
    kind = name.partition(", ")[0]
    return TICKET if kind == DENSE else kind


def _styles(kinds: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return color, opacity and label of each line. kinds: of the lines, by name.

    Up to MAX_LABELED lines have a color and label each. Otherwise each kind has a color and one
    label, and its lines become more opaque from the first to the last.
    """
    if len(kinds) <= MAX_LABELED:
        return {
            name: {"color": SERIES[index % len(SERIES)], "label": name}
            for index, name in enumerate(kinds)
        }
    styles = {}
    for index, kind in enumerate(dict.fromkeys(kinds.values())):
        names = [name for name in kinds if kinds[name] == kind]
        for rank, name in enumerate(names, start=1):
            styles[name] = {
                "color": SERIES[index % len(SERIES)],
                "alpha": 0.25 + 0.75 * rank / len(names),
                "label": kind if rank == len(names) else None,
            }
    return {name: styles[name] for name in kinds}


def lines_chart(lines: dict[str, Any], key: str, ylabel: str) -> Draw:
    """Plot a value along lines; lines along a pruning step are dotted.

    lines: as in landscape.json. key: of the value, `loss` or an error, which is shown in %.
    """

    def draw(axes: Any) -> None:
        scale = 100 if key.startswith("error") else 1
        ends = {name: re.split(" pruned to | to ", name)[1] for name in lines}
        styles = _styles({name: kind_of(end) for name, end in ends.items()})
        for name, line in lines.items():
            line_style = ":" if " pruned to " in name else "-"
            values = [scale * value for value in line["values"][key]]
            axes.plot(line["positions"], values, line_style, linewidth=1.4, **styles[name])
        axes.set(xlabel="position between the first (0) and the second (1)", ylabel=ylabel)
        legend(axes)

    return draw


def spectra_chart(curvatures: dict[str, Any]) -> Draw:
    """Plot spectral densities on a logarithmic axis. curvatures: by the name of the run."""

    def draw(axes: Any) -> None:
        styles = _styles({name: kind_of(name) for name in curvatures})
        for name, curvature in curvatures.items():
            spectrum = curvature["spectrum"]
            axes.plot(
                spectrum["grid"],
                [max(value, 1e-12) for value in spectrum["density"]],
                linewidth=1.1,
                **styles[name],
            )
        axes.set_yscale("log")
        axes.set_ylim(bottom=1e-6)
        axes.set(xlabel="eigenvalue", ylabel="density")
        legend(axes)

    return draw


def eigenvalues_chart(curvatures: dict[str, Any]) -> Draw:
    """Plot the largest eigenvalues of each run as dots, and its trace with error bars.

    curvatures: by the name of the run.
    """

    def draw(axes: Any) -> None:
        names = list(curvatures)
        for index, curvature in enumerate(curvatures.values()):
            values = curvature["eigenvalues"]["largest"]
            axes.plot([index] * len(values), values, "o", color=SERIES[0], alpha=0.6, markersize=4)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        axes.set_ylabel("largest eigenvalues", color=SERIES[0])
        trace_axes = axes.twinx()
        for kind in dict.fromkeys(map(kind_of, names)):  # a line connects runs of one kind only
            indices = [index for index, name in enumerate(names) if kind_of(name) == kind]
            traces = [curvatures[names[index]]["trace"] for index in indices]
            trace_axes.errorbar(
                indices,
                [trace["value"] for trace in traces],
                [trace["standard_error"] for trace in traces],
                color=SERIES[1],
                marker="s",
                markersize=4,
                capsize=2.5,
                linewidth=0.8,
            )
        trace_axes.set_ylabel("trace", color=SERIES[1])
        trace_axes.grid(visible=False)

    return draw


def radii_chart(volumes: dict[str, Any]) -> Draw:
    """Draw a box plot of the radii of each basin. volumes: by the name of the run."""

    def draw(axes: Any) -> None:
        boxes = []
        for name, volume in volumes.items():
            low, first, median, third, high = map(math.exp, volume["log_radius_quantiles"])
            box = {"med": median, "q1": first, "q3": third, "whislo": low, "whishi": high}
            boxes.append({**box, "label": name})
        axes.bxp(
            boxes,
            showfliers=False,
            medianprops={"color": SERIES[0], "linewidth": 1.8},
            **{f"{part}props": {"color": FAINT} for part in ("box", "whisker", "cap")},
        )
        axes.set_xticks(axes.get_xticks(), list(volumes), rotation=30, ha="right", fontsize=8)
        axes.set_ylabel("radius of the basin")

    return draw


def plane_chart(plane: dict[str, Any], low: float, high: float) -> Draw:
    """Plot the loss on a plane as filled contours from low to high, with the run at its center."""

    def draw(axes: Any) -> None:
        _contours(axes, plane, low, high)
        axes.plot([0], [0], "o", color="white", markeredgecolor="black", markersize=5)
        axes.set(xlabel="first direction", ylabel="second direction")

    return draw


def path_chart(path: dict[str, Any]) -> Draw:
    """Plot the loss on the plane of a path, with its runs connected in sequence."""

    def draw(axes: Any) -> None:
        losses = sorted(loss for row in path["values"]["loss"] for loss in row)
        _contours(axes, path, losses[0], losses[int(0.8 * (len(losses) - 1))])
        projections = path["points"]
        xs, ys = ([projection[axis] for projection in projections.values()] for axis in (0, 1))
        axes.plot(xs, ys, "-o", color="white", markeredgecolor="black", markersize=5, linewidth=1)
        for name, (x, y, distance) in projections.items():
            axes.annotate(
                f"{name} ({distance:.2g})" if distance > 1e-3 else name,
                (x, y),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=7,
                bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1},
            )
        axes.set(xlabel="distance in weight space", ylabel="distance in weight space")

    return draw


def _contours(axes: Any, plane: dict[str, Any], low: float, high: float) -> None:
    """Draw the contours of the loss at equal steps of its logarithm, to resolve the basins."""
    high = max(high, low * 1.001 + 1e-9)
    low = max(low, 1e-6)
    steps = 14
    levels = [low * (high / low) ** (step / steps) for step in range(steps + 1)]
    filled = axes.contourf(
        plane["xs"],
        plane["ys"],
        plane["values"]["loss"],
        levels=levels,
        cmap="viridis_r",
        extend="both",
    )
    axes.grid(visible=False)
    bar = axes.figure.colorbar(filled, ax=axes, format="{x:.3g}")
    bar.set_label("loss [nats]", fontsize=8)
    bar.ax.tick_params(labelsize=7)
