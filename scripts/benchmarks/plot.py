"""Plot a benchmark: the speed ratio of each row with its range."""

from pathlib import Path
from typing import Any

from deit.core.errors import SystemFault

_BAR, _LINE = "#0072b2", "#b0b0b0"


def draw_benchmark(result: dict[str, Any], path: Path) -> None:
    """Plot the median ratio of each row as a bar, with the range of its turns and the images/s of
    both sides, as PNG. Raises SystemFault without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemFault("drawing needs matplotlib; pip install 'deit[plot]'") from None
    rows = result["rows"]
    figure = Figure(figsize=(11, 1.3 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    highest = max(row["ratio_max"] for row in rows)
    for y, row in enumerate(reversed(rows)):
        ratio = row["ratio"]
        spread = [[ratio - row["ratio_min"]], [row["ratio_max"] - ratio]]
        axes.barh(y, ratio, 0.6, color=_BAR, xerr=spread, ecolor="#333333", capsize=3)
        label = f"{ratio:.2f}: {row['ours_images_per_s']:,.0f} and {row['peer_images_per_s']:,.0f}"
        axes.text(row["ratio_max"] + 0.02 * highest, y, label, va="center", fontsize=9)
    axes.axvline(1, color=_LINE, linewidth=2)
    axes.set_yticks(range(len(rows)), [_label(row) for row in reversed(rows)], fontsize=9)
    axes.set_xlim(0, 1.5 * highest)
    axes.set_xlabel(
        "ratio of images/s (gray line: equal); next to the bars: images/s of both sides"
    )
    axes.spines[["top", "right"]].set_visible(False)
    environment = result["environment"]
    axes.set_title(
        f"median of {result['rounds']} turns of {result['seconds']:g} s in alternation\n"
        f"{environment['device_name']}, torch {environment['packages']['torch']}, "
        f"commit {environment['commit']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def _label(row: dict[str, Any]) -> str:
    """Return the name of a row on two lines, the second with its baseline."""
    return f"{row['name'].partition(', compared with ')[0]}\ncompared with {row['peer']}"
