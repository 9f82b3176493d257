"""Lines, spectra, basins and planes of a landscape as pictures; reads plain values only."""

import math
import re
from typing import Any

from deit.experiments.lottery_options import DENSE, TICKET
from deit.viz.charts import FAINT, SERIES, Draw
from deit.viz.plots import legend

NAMED = 8


def kind_of(name: str) -> str:
    """What of a search a place is, without its sparsity: `ticket` of `ticket, 20.0 %`; the dense
    run is the ticket of level 0. Any other name is a kind of its own."""
    kind = name.partition(", ")[0]
    return TICKET if kind == DENSE else kind


def _looks(kinds: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Colour, strength and label of each name. Few names are told apart by colour; of many each
    kind has a colour, which grows stronger from its first to its last, and one label."""
    if len(kinds) <= NAMED:
        return {
            name: {"color": SERIES[place % len(SERIES)], "label": name}
            for place, name in enumerate(kinds)
        }
    found = {}
    for place, kind in enumerate(dict.fromkeys(kinds.values())):
        names = [name for name in kinds if kinds[name] == kind]
        for rank, name in enumerate(names, start=1):
            strength = 0.25 + 0.75 * rank / len(names)
            look = {"color": SERIES[place % len(SERIES)], "alpha": strength}
            found[name] = look | {"label": kind if rank == len(names) else None}
    return {name: found[name] for name in kinds}


def lines_chart(lines: dict[str, Any], key: str, label: str) -> Draw:
    """A value along lines; those of a step of pruning are dotted."""

    def draw(axes: Any) -> None:
        scale = 100 if key.startswith("error") else 1
        ends = {name: re.split(" cut to | to ", name)[1] for name in lines}
        looks = _looks({name: kind_of(end) for name, end in ends.items()})
        for name, one in lines.items():
            style = ":" if " cut to " in name else "-"
            values = [scale * value for value in one["values"][key]]
            axes.plot(one["places"], values, style, linewidth=1.4, **looks[name])
        axes.set(xlabel="from the first (0) to the second (1)", ylabel=label)
        legend(axes)

    return draw


def spectra_chart(known: dict[str, Any]) -> Draw:
    """Spectral densities on a logarithmic axis."""

    def draw(axes: Any) -> None:
        looks = _looks({name: kind_of(name) for name in known})
        for name, one in known.items():
            spectrum = one["spectrum"]
            axes.plot(
                spectrum["grid"],
                [max(value, 1e-12) for value in spectrum["density"]],
                linewidth=1.1,
                **looks[name],
            )
        axes.set_yscale("log")
        axes.set_ylim(bottom=1e-6)
        axes.set(xlabel="eigenvalue", ylabel="density")
        legend(axes)

    return draw


def eigenvalues_chart(known: dict[str, Any]) -> Draw:
    """The largest eigenvalues of each place as dots, and its trace with a bar."""

    def draw(axes: Any) -> None:
        names = list(known)
        for place, one in enumerate(known.values()):
            values = one["eigenvalues"]["largest"]
            axes.plot([place] * len(values), values, "o", color=SERIES[0], alpha=0.6, markersize=4)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        axes.set_ylabel("largest eigenvalues", color=SERIES[0])
        beside = axes.twinx()
        for kind in dict.fromkeys(map(kind_of, names)):  # joined within a kind alone
            places = [place for place, name in enumerate(names) if kind_of(name) == kind]
            traces = [known[names[place]]["trace"] for place in places]
            beside.errorbar(
                places,
                [one["value"] for one in traces],
                [one["standard_error"] for one in traces],
                color=SERIES[1],
                marker="s",
                markersize=4,
                capsize=2.5,
                linewidth=0.8,
            )
        beside.set_ylabel("trace", color=SERIES[1])
        beside.grid(visible=False)

    return draw


def radii_chart(known: dict[str, Any]) -> Draw:
    """The radii of each basin as a box from quarter to quarter, with its ends."""

    def draw(axes: Any) -> None:
        boxes = []
        for name, one in known.items():
            low, first, middle, third, high = map(math.exp, one["log_radius_quantiles"])
            box = {"med": middle, "q1": first, "q3": third, "whislo": low, "whishi": high}
            boxes.append({**box, "label": name})
        axes.bxp(
            boxes,
            showfliers=False,
            medianprops={"color": SERIES[0], "linewidth": 1.8},
            **{f"{part}props": {"color": FAINT} for part in ("box", "whisker", "cap")},
        )
        axes.set_xticks(axes.get_xticks(), list(known), rotation=30, ha="right", fontsize=8)
        axes.set_ylabel("distance to the rim")

    return draw


def plane_chart(one: dict[str, Any], low: float, high: float) -> Draw:
    """Loss on a plane as filled contours between two values, the place in its middle."""

    def draw(axes: Any) -> None:
        _contours(axes, one, low, high)
        axes.plot([0], [0], "o", color="white", markeredgecolor="black", markersize=5)
        axes.set(xlabel="first direction", ylabel="second")

    return draw


def path_chart(one: dict[str, Any]) -> Draw:
    """Loss on the plane of a path, with its places joined in their order."""

    def draw(axes: Any) -> None:
        losses = sorted(loss for row in one["values"]["loss"] for loss in row)
        _contours(axes, one, losses[0], losses[int(0.8 * (len(losses) - 1))])
        spots = one["places"]
        xs, ys = ([spot[axis] for spot in spots.values()] for axis in (0, 1))
        axes.plot(xs, ys, "-o", color="white", markeredgecolor="black", markersize=5, linewidth=1)
        for name, (x, y, off) in spots.items():
            told = f"{name} ({off:.2g})" if off > 1e-3 else name
            axes.annotate(
                told,
                (x, y),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=7,
                bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1},
            )
        axes.set(xlabel="distance in weights", ylabel="distance in weights")

    return draw


def _contours(axes: Any, one: dict[str, Any], low: float, high: float) -> None:
    """Loss on a plane, in equal steps of its logarithm, which shows basins beside walls."""
    high = max(high, low * 1.001 + 1e-9)
    low = max(low, 1e-6)
    steps = 14
    levels = [low * (high / low) ** (step / steps) for step in range(steps + 1)]
    filled = axes.contourf(
        one["xs"], one["ys"], one["values"]["loss"], levels=levels, cmap="viridis_r", extend="both"
    )
    axes.grid(visible=False)
    bar = axes.figure.colorbar(filled, ax=axes, format="{x:.3g}")
    bar.set_label("loss [nats]", fontsize=8)
    bar.ax.tick_params(labelsize=7)
