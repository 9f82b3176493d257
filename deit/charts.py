"""Charts for pages and as files: drawn once, as SVG whose colours follow the page, and as PNG."""

import io
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deit.errors import EnvironmentFault

INK, FAINT, GRID, TEACHER = "#1c2430", "#5b6472", "#dfe3e9", "#6b7280"
SERIES = ("#0f766e", "#c2410c", "#1d4ed8", "#a21caf", "#4d7c0f", "#b45309")
# The names of these colours in deit/page.css, which has others for a dark page.
_NAMES = {INK: "ink", FAINT: "faint", GRID: "grid", TEACHER: "teacher"}
_NAMES |= {colour: f"c{place}" for place, colour in enumerate(SERIES, start=1)}

Draw = Callable[[Any], None]
"""Draws on matplotlib's axes."""


def check() -> None:
    """Raises EnvironmentFault without matplotlib."""
    if find_spec("matplotlib") is None:
        raise EnvironmentFault("a report needs matplotlib; pip install 'deit[plot]'")


def chart(draw: Draw, path: Path, *, width: float = 6.0, height: float = 3.4) -> str:
    """A chart as a PNG at `path`, and as an SVG for a page, which it returns.

    width, height: [inch]. Raises EnvironmentFault without matplotlib.
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
        "legend.frameon": False,
        "legend.fontsize": 8,
        "lines.linewidth": 1.8,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        axes.grid(linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        figure.savefig(path, dpi=150)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
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


def curves(lines: dict[str, list[tuple[float, float]]], levels: dict[str, float]) -> Draw:
    """Validation accuracy in % over the epochs: a line for each name, and levels across; averages
    of weights are dashed."""

    def draw(axes: Any) -> None:
        for (name, points), colour in zip(lines.items(), SERIES * len(lines)):
            style = "--" if "average" in name else "-"
            xs, ys = zip(*points)
            marker = "." if len(points) < 25 else None
            axes.plot(xs, [100 * y for y in ys], style, color=colour, label=name, marker=marker)
        for name, level in levels.items():
            axes.axhline(100 * level, color=TEACHER, linestyle=":", label=name)
        axes.set(xlabel="epoch", ylabel="validation top-1 %")
        axes.legend(loc="lower right")

    return draw


def over_epochs(
    lines: dict[str, list[tuple[float, float]]], label: str, *, named: bool = False
) -> Draw:
    """Values over the epochs, a line for each name. label: of the values. named: whether a line
    that is alone has its name beside it."""

    def draw(axes: Any) -> None:
        for (name, points), colour in zip(lines.items(), SERIES * len(lines)):
            xs, ys = zip(*points)
            axes.plot(xs, ys, color=colour, label=name)
        axes.set(xlabel="epoch", ylabel=label)
        if len(lines) > 1 or named:
            axes.legend()

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
        axes.legend(loc="upper left", bbox_to_anchor=(0, 1.0), ncols=2, mode=None)
        axes.margins(y=0.12 if len(order) < 12 else 0.06)

    return draw


def _short(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def reliability(voices: dict[str, list[tuple[float, float, int]]]) -> Draw:
    """Accuracy against confidence (Guo et al. 2017): a point for each bin that has samples, larger
    the more it has; on the diagonal confidence is deserved.

    voices: of each, (confidence, accuracy, samples) of its bins.
    """

    def draw(axes: Any) -> None:
        axes.plot([0, 100], [0, 100], color=GRID, linewidth=1.2)
        for (name, bins), colour in zip(voices.items(), (SERIES[0], TEACHER, *SERIES[1:])):
            total = sum(number for _, _, number in bins) or 1
            xs = [100 * confidence for confidence, _, _ in bins]
            ys = [100 * accuracy for _, accuracy, _ in bins]
            sizes = [12 + 220 * number / total for _, _, number in bins]
            axes.plot(xs, ys, color=colour, linewidth=1, alpha=0.7)
            axes.scatter(xs, ys, s=sizes, color=colour, alpha=0.75, label=name, linewidths=0)
        axes.set(xlabel="confidence %", ylabel="right answers %", xlim=(0, 103), ylim=(0, 103))
        axes.legend(loc="upper left", markerscale=0.6)

    return draw


def over_depth(values: list[float]) -> Draw:
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
        for (name, (x, y)), colour in zip(points.items(), SERIES * len(points)):
            axes.scatter([x], [y], color=colour, s=28)
            axes.annotate(
                _short(name, 32),
                (x, y),
                textcoords="offset points",
                xytext=(6, 4),
                fontsize=8,
                color=colour,
                parse_math=False,
            )
        xs = [x for x, _ in points.values()]
        if max(xs) > 10 * min(xs) > 0:
            axes.set_xscale("log")
        axes.margins(x=0.25, y=0.15)
        axes.set(xlabel=across, ylabel=up)

    return draw
