"""Charts, drawn once and written both as SVG that follows the theme of a page and as PNG."""

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
# The CSS variable of each color in deit/viz/page.css, which has a second set for dark pages.
_CSS_VARIABLES = {INK: "ink", FAINT: "faint", GRID: "grid", TEACHER: "teacher"}
_CSS_VARIABLES |= {hex_code: f"c{index}" for index, hex_code in enumerate(SERIES, start=1)}

Points = list[tuple[float, float]]
"""(x, y) of each point of a line."""
Draw = Callable[[Any], None]
"""Draws on the axes of matplotlib that it gets."""


def require_matplotlib() -> None:
    """Raise SystemFault if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise SystemFault("drawing needs matplotlib; pip install 'deit[plot]'")


def chart(draw: Draw, path: str | Path, *, width: float = 6.0, height: float = 3.4) -> str:
    """Write a chart as PNG to `path` and return it as SVG to embed in a page.

    width, height: [inch]. Raises SystemFault if matplotlib is missing.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    path = Path(path)
    settings = {
        "svg.fonttype": "none",  # text stays text: small, and in the font of the page
        "svg.hashsalt": path.stem,  # equal data produce an identical file
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
        svg = io.StringIO()
        save_figure(figure, svg, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(svg.getvalue(), re.sub(r"[^\w.-]", "-", path.stem))


def _for_page(svg: str, name: str) -> str:
    """Return an SVG with CSS variables as colors and `name` as the prefix of its identifiers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([^;\"']*?)'[^;\"]*", r"font: \1system-ui, sans-serif", svg)
    for hex_code, variable in _CSS_VARIABLES.items():
        svg = svg.replace(hex_code, f"var(--{variable})")
    return svg


def _integer_ticks(axes: Any) -> None:
    """Use integer ticks on the x axis, at least one."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def curves(lines: dict[str, Points], levels: dict[str, float]) -> Draw:
    """Plot validation accuracy in [0, 1] over the epochs, in %.

    lines: (epoch, accuracy) by name; weight averages are dashed. levels: horizontal lines.
    """

    def draw(axes: Any) -> None:
        for (name, points), line_color in zip(lines.items(), SERIES * len(lines)):
            style = "--" if "average" in name else "-"
            xs, ys = zip(*points)
            marker = None if len(points) >= 25 else "." if len(points) > 1 else "o"
            axes.plot(xs, [100 * y for y in ys], style, color=line_color, label=name, marker=marker)
        for name, level in levels.items():
            axes.axhline(100 * level, color=TEACHER, linestyle=":", label=name)
        axes.set(xlabel="epoch", ylabel="validation top-1 %")
        if lines and all(len(points) == 1 for points in lines.values()):
            last = max(points[0][0] for points in lines.values())
            axes.set_xlim(0, 1.05 * last)
        _integer_ticks(axes)
        legend(axes)

    return draw


def over_epochs(lines: dict[str, Points], ylabel: str, *, always_legend: bool = False) -> Draw:
    """Plot values over the epochs.

    lines: (epoch, value) by name. always_legend: show a legend for a single line as well.
    """

    def draw(axes: Any) -> None:
        for (name, points), line_color in zip(lines.items(), SERIES * len(lines)):
            xs, ys = zip(*points)
            marker = "o" if len(points) == 1 else None
            axes.plot(xs, ys, color=line_color, label=name, marker=marker)
        axes.set(xlabel="epoch", ylabel=ylabel)
        _integer_ticks(axes)
        if len(lines) > 1 or always_legend:
            legend(axes)

    return draw


def per_class(class_names: list[str], series: dict[str, list[float]]) -> Draw:
    """Plot the accuracy of each class in %, with the weakest class of the first series on top.

    series: by name (`student`, `teacher`) an accuracy in [0, 1] per class.
    """

    def draw(axes: Any) -> None:
        first, *_ = series.values()
        order = sorted(range(len(class_names)), key=lambda index: -first[index])
        thickness = 0.8 / len(series)
        bars = zip(series.items(), (SERIES[0], TEACHER))
        for rank, ((name, values), bar_color) in enumerate(bars):
            offset = (rank - (len(series) - 1) / 2) * -thickness
            axes.barh(
                [row + offset for row in range(len(order))],
                [100 * values[index] for index in order],
                thickness,
                color=bar_color,
                label=name,
            )
        axes.set_yticks(range(len(order)), [_shortened(class_names[index]) for index in order])
        axes.set(xlabel="accuracy %", xlim=(0, 100))
        axes.grid(axis="y", visible=False)
        axes.margins(y=0.02)
        legend(axes)

    return draw


def _shortened(name: str, max_length: int = 24) -> str:
    return name if len(name) <= max_length else f"{name[: max_length - 1]}…"


def reliability(series: dict[str, list[tuple[float, float, int]]]) -> Draw:
    """Plot a reliability diagram: accuracy against confidence (Guo et al. 2017).

    series: by name the (confidence, accuracy, samples) of each bin that has samples. The area of a
    point grows with its samples. On the diagonal confidence equals accuracy.
    """

    def draw(axes: Any) -> None:
        axes.plot([0, 100], [0, 100], color=GRID, linewidth=1.2)
        for (name, bins), line_color in zip(series.items(), (SERIES[0], TEACHER, *SERIES[1:])):
            total = sum(samples for _, _, samples in bins) or 1
            xs = [100 * confidence for confidence, _, _ in bins]
            ys = [100 * accuracy for _, accuracy, _ in bins]
            sizes = [12 + 220 * samples / total for _, _, samples in bins]
            axes.plot(xs, ys, color=line_color, linewidth=1, alpha=0.7)
            axes.scatter(xs, ys, s=sizes, color=line_color, alpha=0.75, label=name, linewidths=0)
        axes.set(xlabel="confidence %", ylabel="accuracy %", xlim=(0, 103), ylim=(0, 103))
        legend(axes)
        for handle in axes.get_legend().legend_handles:
            handle.set_sizes([24])

    return draw


def token_cosine_chart(values: list[float]) -> Draw:
    """Plot the cosine similarity of class and distillation token, [blocks + 1].

    values: before the first block and after each block.
    """

    def draw(axes: Any) -> None:
        axes.plot(range(len(values)), values, color=SERIES[0], marker="o", markersize=4)
        axes.set(xlabel="block (0: the input)", ylabel="cosine of the two tokens")
        axes.set_xticks(range(0, len(values), max(len(values) // 12, 1)))
        axes.set_ylim(min(0.0, *values), 1.02)

    return draw


def scatter(points: dict[str, tuple[float, float]], xlabel: str, ylabel: str) -> Draw:
    """Plot (x, y) points with their names next to them.

    The x axis is logarithmic if the values span more than a power of ten.
    """

    def draw(axes: Any) -> None:
        names = [_shortened(name, 32) for name in points]
        xs, ys = ([point[axis] for point in points.values()] for axis in (0, 1))
        wide = max(xs) > 10 * min(xs) > 0
        across = _axis_fractions([math.log(x) for x in xs] if wide else xs)
        labels = _place_labels(list(zip(names, zip(across, _axis_fractions(ys)))))
        if wide:
            axes.set_xscale("log")
        for name, x, y, label, point_color in zip(names, xs, ys, labels, SERIES * len(xs)):
            axes.scatter([x], [y], color=point_color, s=28)
            axes.annotate(
                name,
                (x, y),
                xytext=(label.edge, label.height),
                textcoords="axes fraction",
                ha=label.side,
                va="center",
                fontsize=8,
                color=point_color,
                arrowprops={
                    "arrowstyle": "-",
                    "color": point_color,
                    "linewidth": 0.5,
                    "shrinkB": 3,
                },
            )
        axes.set_xlim(*_axis_limits(xs, wide))
        axes.set_ylim(*_axis_limits(ys, False))
        axes.set(xlabel=xlabel, ylabel=ylabel)

    return draw


_MARGIN = 0.12  # at both ends of an axis, as a fraction of its length
_CHARACTER_WIDTH, _LINE_HEIGHT = 0.0135, 0.062  # as fractions of the axes


def _axis_fractions(values: list[float]) -> list[float]:
    """Return the position of each value on its axis, in [0, 1]."""
    low, span = min(values), max(values) - min(values)
    inner = 1 - 2 * _MARGIN
    return [_MARGIN + inner * ((value - low) / span if span else 0.5) for value in values]


def _axis_limits(values: list[float], log: bool) -> tuple[float, float]:
    """Return the axis limits that put values at the positions from `_axis_fractions`."""
    scaled = [math.log(value) for value in values] if log else values
    low, high = min(scaled), max(scaled)
    half = (high - low) / (1 - 2 * _MARGIN) / 2 or abs(low) * 0.1 or 1.0
    limits = ((low + high) / 2 - half, (low + high) / 2 + half)
    return tuple(map(math.exp, limits)) if log else limits


class _Label(NamedTuple):
    """The position of a point's name. side: which end of the text is at `edge`, left or right."""

    edge: float
    height: float
    side: str

    def extent(self, name: str) -> tuple[float, float]:
        """Return the left and right end of a name, assuming wide characters."""
        width = _CHARACTER_WIDTH * len(name)
        if self.side == "left":
            return self.edge, self.edge + width
        return self.edge - width, self.edge


def _place_labels(named_points: list[tuple[str, tuple[float, float]]]) -> list[_Label]:
    """Place each name close to its point, without covering other names or points.

    named_points: names and (x, y) in [0, 1] of the axes.
    """
    occupied = [(x - 0.012, x + 0.012, y) for _, (x, y) in named_points]
    placed: dict[int, _Label] = {}
    from_the_bottom = sorted(enumerate(named_points), key=lambda item: item[1][1][1])
    for index, (name, (x, y)) in from_the_bottom:
        candidates = [
            label
            for half_lines in sorted(range(-24, 25), key=abs)
            for label in (
                _Label(x + 0.025, y + half_lines * _LINE_HEIGHT / 2, "left"),
                _Label(x - 0.025, y + half_lines * _LINE_HEIGHT / 2, "right"),
            )
        ]
        free = [label for label in candidates if _is_free(label, name, occupied)]
        placed[index] = (free or candidates)[0]
        occupied.append((*placed[index].extent(name), placed[index].height))
    return [placed[index] for index in range(len(named_points))]


def _is_free(label: _Label, name: str, occupied: list[tuple[float, float, float]]) -> bool:
    """Return whether a name at this position is inside the axes and covers nothing."""
    left, right = label.extent(name)
    inside = left >= 0 and right <= 1 and 0 <= label.height <= 1
    return inside and all(
        right < low or high < left or abs(label.height - height) >= _LINE_HEIGHT
        for low, high, height in occupied
    )
