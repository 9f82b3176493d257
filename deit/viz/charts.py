"""Charts for pages and as files: drawn once, as SVG whose colours follow the page, and as PNG."""

import io
import math
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from deit.core.errors import SystemFault
from deit.viz.plots import legend, save_figure

INK, FAINT, GRID, TEACHER = "#1c2430", "#5b6472", "#dfe3e9", "#6b7280"
SERIES = ("#0f766e", "#c2410c", "#1d4ed8", "#a21caf", "#4d7c0f", "#b45309")
# The names of these colours in deit/viz/page.css, which has others for a dark page.
_NAMES = {INK: "ink", FAINT: "faint", GRID: "grid", TEACHER: "teacher"}
_NAMES |= {colour: f"c{place}" for place, colour in enumerate(SERIES, start=1)}

Draw = Callable[[Any], None]
"""Draws on matplotlib's axes."""


def check() -> None:
    """Raises SystemFault without matplotlib."""
    if find_spec("matplotlib") is None:
        raise SystemFault("a report needs matplotlib; pip install 'deit[plot]'")


def chart(draw: Draw, path: Path, *, width: float = 6.0, height: float = 3.4) -> str:
    """A chart as a PNG at `path`, and as an SVG for a page, which it returns.

    width, height: [inch]. Raises SystemFault without matplotlib.
    """
    check()
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",  # text stays text: small, and in the font of the page
        "svg.hashsalt": path.stem,  # the same numbers draw the same file
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": GRID,
        "axes.labelcolor": FAINT,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "grid.color": GRID,
        "lines.linewidth": 1.8,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        save_figure(figure, path, dpi=150)
        drawn = io.StringIO()
        save_figure(figure, drawn, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(drawn.getvalue(), re.sub(r"[^\w.-]", "-", path.stem))


def _for_page(svg: str, name: str) -> str:
    """An SVG as part of a page: its colours by name, its identifiers of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([^;\"']*?)'[^;\"]*", r"font: \1system-ui, sans-serif", svg)
    for colour, variable in _NAMES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg


def _whole(axes: Any) -> None:
    """Whole numbers along the first axis, one at least."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def curves(lines: dict[str, list[tuple[float, float]]], levels: dict[str, float]) -> Draw:
    """Validation accuracy in % over the epochs: a line for each name, and levels across; averages
    of weights are dashed."""

    def draw(axes: Any) -> None:
        for (name, points), colour in zip(lines.items(), SERIES * len(lines)):
            style = "--" if "average" in name else "-"
            xs, ys = zip(*points)
            marker = None if len(points) >= 25 else "." if len(points) > 1 else "o"
            axes.plot(xs, [100 * y for y in ys], style, color=colour, label=name, marker=marker)
        for name, level in levels.items():
            axes.axhline(100 * level, color=TEACHER, linestyle=":", label=name)
        axes.set(xlabel="epoch", ylabel="validation top-1 %")
        if lines and all(len(points) == 1 for points in lines.values()):
            last = max(points[0][0] for points in lines.values())
            axes.set_xlim(0, 1.05 * last)
        _whole(axes)
        legend(axes)

    return draw


def over_epochs(
    lines: dict[str, list[tuple[float, float]]], label: str, *, named: bool = False
) -> Draw:
    """Values over the epochs, a line for each name. label: of the values. named: whether a line
    that is alone has its name beside it."""

    def draw(axes: Any) -> None:
        for (name, points), colour in zip(lines.items(), SERIES * len(lines)):
            xs, ys = zip(*points)
            marker = "o" if len(points) == 1 else None
            axes.plot(xs, ys, color=colour, label=name, marker=marker)
        axes.set(xlabel="epoch", ylabel=label)
        _whole(axes)
        if len(lines) > 1 or named:
            legend(axes)

    return draw


def per_class(names: list[str], bars: dict[str, list[float]]) -> Draw:
    """Right answers in % of each class, a bar for each voice; the weakest class on top."""

    def draw(axes: Any) -> None:
        first, *_ = bars.values()
        order = sorted(range(len(names)), key=lambda place: -first[place])
        thick = 0.8 / len(bars)
        for at, ((voice, values), colour) in enumerate(zip(bars.items(), (SERIES[0], TEACHER))):
            places = [place + (at - (len(bars) - 1) / 2) * -thick for place in range(len(order))]
            axes.barh(
                places, [100 * values[one] for one in order], thick, color=colour, label=voice
            )
        axes.set_yticks(range(len(order)), [_short(names[one]) for one in order])
        axes.set(xlabel="right answers %", xlim=(0, 100))
        axes.grid(axis="y", visible=False)
        axes.margins(y=0.02)
        legend(axes)

    return draw


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def reliability(series: dict[str, list[tuple[float, float, int]]]) -> Draw:
    """Accuracy against confidence (Guo et al. 2017): a point for each bin that has samples, larger
    the more it has; on the diagonal confidence is deserved.

    voices: of each, (confidence, accuracy, samples) of its bins.
    """

    def draw(axes: Any) -> None:
        axes.plot([0, 100], [0, 100], color=GRID, linewidth=1.2)
        for (name, bins), colour in zip(series.items(), (SERIES[0], TEACHER, *SERIES[1:])):
            total = sum(number for _, _, number in bins) or 1
            xs = [100 * confidence for confidence, _, _ in bins]
            ys = [100 * accuracy for _, accuracy, _ in bins]
            sizes = [12 + 220 * number / total for _, _, number in bins]
            axes.plot(xs, ys, color=colour, linewidth=1, alpha=0.7)
            axes.scatter(xs, ys, s=sizes, color=colour, alpha=0.75, label=name, linewidths=0)
        axes.set(xlabel="confidence %", ylabel="right answers %", xlim=(0, 103), ylim=(0, 103))
        legend(axes)
        for handle in axes.get_legend().legend_handles:
            handle.set_sizes([24])

    return draw


def token_cosine_chart(values: list[float]) -> Draw:
    """The cosine of class and distillation token before the first block and after each."""

    def draw(axes: Any) -> None:
        axes.plot(range(len(values)), values, color=SERIES[0], marker="o", markersize=4)
        axes.set(xlabel="block (0: the input)", ylabel="cosine of the two tokens")
        axes.set_xticks(range(0, len(values), max(len(values) // 12, 1)))
        axes.set_ylim(min(0.0, *values), 1.02)

    return draw


def scatter(points: dict[str, tuple[float, float]], across: str, up: str) -> Draw:
    """A named point for each; the first axis in powers of ten where it spans more than one."""

    def draw(axes: Any) -> None:
        names = [_short(name, 32) for name in points]
        xs, ys = ([one[axis] for one in points.values()] for axis in (0, 1))
        wide = max(xs) > 10 * min(xs) > 0
        places = zip(_shares([math.log(x) for x in xs] if wide else xs), _shares(ys))
        labels = _apart(list(zip(names, places)))
        if wide:
            axes.set_xscale("log")
        for name, x, y, near, colour in zip(names, xs, ys, labels, SERIES * len(xs)):
            axes.scatter([x], [y], color=colour, s=28)
            axes.annotate(
                name,
                (x, y),
                xytext=(near.edge, near.height),
                textcoords="axes fraction",
                ha=near.side,
                va="center",
                fontsize=8,
                color=colour,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkB": 3},
            )
        axes.set_xlim(*_span(xs, wide))
        axes.set_ylim(*_span(ys, False))
        axes.set(xlabel=across, ylabel=up)

    return draw


_MARGIN = 0.12  # of an axis, on each side of the points
_LABEL = (0.0135, 0.062)  # a sign's width and a line's height, of the axes


def _shares(values: list[float]) -> list[float]:
    """Where values are on their axis, in [0, 1]."""
    low, span = min(values), max(values) - min(values)
    inner = 1 - 2 * _MARGIN
    return [_MARGIN + inner * ((one - low) / span if span else 0.5) for one in values]


def _span(values: list[float], log: bool) -> tuple[float, float]:
    """The limits of an axis on which values are where `_shares` says."""
    found = [math.log(one) for one in values] if log else values
    low, high = min(found), max(found)
    half = (high - low) / (1 - 2 * _MARGIN) / 2 or abs(low) * 0.1 or 1.0
    limits = ((low + high) / 2 - half, (low + high) / 2 + half)
    return tuple(map(math.exp, limits)) if log else limits


class _Near(NamedTuple):
    """Where the name of a point goes: its edge at the point's side, which is its left or right."""

    edge: float
    height: float
    side: str

    def ends(self, name: str) -> tuple[float, float]:
        """From where to where it goes, if its signs are as wide as they may be."""
        long = _LABEL[0] * len(name)
        return (
            (self.edge, self.edge + long) if self.side == "left" else (self.edge - long, self.edge)
        )


def _apart(named: list[tuple[str, tuple[float, float]]]) -> list[_Near]:
    """Where the names of points go so that none covers another or a point: beside its own, as near
    as may be. All in [0, 1] of the axes."""
    high = _LABEL[1]
    taken = [(x - 0.012, x + 0.012, y) for _, (x, y) in named]
    found: dict[int, _Near] = {}
    for place, (name, (x, y)) in sorted(enumerate(named), key=lambda one: one[1][1][1]):
        tried = [
            near
            for move in sorted(range(-24, 25), key=abs)
            for near in (
                _Near(x + 0.025, y + move * high / 2, "left"),
                _Near(x - 0.025, y + move * high / 2, "right"),
            )
        ]
        free = [one for one in tried if _is_free(one, name, taken)]
        found[place] = (free or tried)[0]
        taken.append((*found[place].ends(name), found[place].height))
    return [found[place] for place in range(len(named))]


def _is_free(near: _Near, name: str, taken: list[tuple[float, float, float]]) -> bool:
    """Whether a name that goes there is inside the axes and covers nothing."""
    left, right = near.ends(name)
    inside = left >= 0 and right <= 1 and 0 <= near.height <= 1
    return inside and all(
        right < low or high < left or abs(near.height - other) >= _LABEL[1]
        for low, high, other in taken
    )
