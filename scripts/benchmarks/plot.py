"""A benchmark as a picture: how many times as fast ours is in each row, with its range."""

from pathlib import Path
from typing import Any

from deit.core.errors import SystemFault

_OURS, _PEER = "#0072b2", "#b0b0b0"


def draw_benchmark(result: dict[str, Any], path: Path) -> None:
    """The median ratio of each row of a benchmark's file as a bar, with the range of its turns and
    both sides' images/s, as a PNG. Raises SystemFault without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemFault("drawing needs matplotlib; pip install 'deit[plot]'") from None
    rows = result["rows"]
    figure = Figure(figsize=(11, 1.3 + 0.55 * len(rows)), layout="constrained")
    axes = figure.subplots()
    most = max(row["ratio_max"] for row in rows)
    for place, row in enumerate(reversed(rows)):
        ratio = row["ratio"]
        spread = [[ratio - row["ratio_min"]], [row["ratio_max"] - ratio]]
        axes.barh(place, ratio, 0.6, color=_OURS, xerr=spread, ecolor="#333333", capsize=3)
        told = f"{ratio:.2f}: {row['ours_images_per_s']:,.0f} and {row['peer_images_per_s']:,.0f}"
        axes.text(row["ratio_max"] + 0.02 * most, place, told, va="center", fontsize=9)
    axes.axvline(1, color=_PEER, linewidth=2)
    axes.set_yticks(range(len(rows)), [_label(row) for row in reversed(rows)], fontsize=9)
    axes.set_xlim(0, 1.5 * most)
    axes.set_xlabel("ratio of images/s (grey: as fast); both beside the bars")
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
    """The row's name on two lines: what, and beside whom."""
    return f"{row['name'].partition(', compared with ')[0]}\ncompared with {row['peer']}"
