"""The versions of a run as a table and a picture; reads plain values only, no torch."""

from pathlib import Path
from typing import Any

from deit.core.console import count_noun, format_percent, info, table
from deit.viz import charts
from deit.viz.plots import save_figure
from deit.viz.tables import HEADS, final_head_top1, markdown_table

_COLUMNS = (
    "",
    "engine",
    "class head",
    "distillation head",
    "fused",
    "agreement %",
    "parameters",
    "not 0",
    "KB",
    "MMACs",
    "ms, batch 1",
    "ms, batch 64",
)
_NAMED = 6
_NOTE = (
    "Same answers: as the first. MMACs: of the network as it is computed in float; zeros of a mask "
    "and integers take as many. Times: median of turns, all versions in each; runs by PyTorch in "
    "eager mode, files by ONNX Runtime, so hold an int8 file against the float ONNX file (deit "
    "export --format onnx)."
)


def print_variants(result: dict[str, Any]) -> None:
    """The table, for a person."""
    title = f"{result['run']}: top-1 % on {result['num_samples']} {result['split']} images"
    zeros = any(row["nonzero"] != row["parameters"] for row in result["rows"].values())
    left_out = {"engine"} if zeros else {"engine", "not 0"}  # names and note tell as much
    shown = [place for place, head in enumerate(_COLUMNS) if head not in left_out]
    rows = [[cells[place] for place in shown] for cells in _cells(result)]
    table(title, [_COLUMNS[place] for place in shown], rows)
    info(_NOTE)


def _cells(result: dict[str, Any]) -> list[list[str]]:
    found = []
    for name, row in result["rows"].items():
        shares = [*(row["top1"][head] for head in HEADS), row["same_answers"]]
        found.append(
            [
                name,
                row["engine"],
                *("-" if one is None else format_percent(one) for one in shares),
                f"{row['parameters']:,}",
                f"{row['nonzero']:,}",
                f"{row['bytes'] / 1e3:,.0f}",
                f"{1000 * row['gmacs']:.1f}",
                *(f"{row['latency'][batch]['median_ms']:.3g}" for batch in ("1", "64")),
            ]
        )
    return found


def markdown(result: dict[str, Any]) -> str:
    """The table, and where the numbers come from."""
    environment = result["environment"]
    threads = environment["threads"]
    where = (
        f"{environment['device_name']}, {count_noun(threads, 'thread')}, torch "
        f"{environment['packages']['torch']}, commit {environment['commit']}"
    )
    return (
        f"# {result['run']} and what was made of it\n\nTop-1 % on {result['num_samples']} "
        f"{result['split']} images at {result['image_size']} px. {_NOTE}\n\n"
        f"{markdown_table(_COLUMNS, _cells(result))}\n\n`{result['command']}`\n\n{where}\n"
    )


def draw_variants(result: dict[str, Any], path: Path) -> None:
    """Accuracy against bytes and against the time of a batch of 64, a dot a version, as a PNG.

    Raises SystemFault without matplotlib.
    """
    charts.check()
    from matplotlib.figure import Figure

    rows = result["rows"]
    top1 = {name: 100 * final_head_top1(row["top1"]) for name, row in rows.items()}
    across = {
        "KB on disk": {name: row["bytes"] / 1e3 for name, row in rows.items()},
        "ms for a batch of 64": {
            name: row["latency"]["64"]["median_ms"] for name, row in rows.items()
        },
    }
    # Of many, numbers stand at the dots, and the names beside them.
    called = {name: str(place) for place, name in enumerate(rows, start=1)}
    many = len(rows) > _NAMED
    figure = Figure(figsize=(14 if many else 12, 4.4), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=(4, 4, 2)) if many else figure.subplots(1, 2)
    for axes, (label, values) in zip(panels, across.items()):
        points = {called[name] if many else name: (values[name], top1[name]) for name in rows}
        charts.scatter(points, label, f"{result['split']} top-1 %")(axes)
        axes.grid(alpha=0.25)
    if many:
        told = "\n".join(f"{number:>2}  {name}" for name, number in called.items())
        panels[2].text(0, 0.5, told, va="center", linespacing=1.5)
        panels[2].set_axis_off()
    figure.suptitle(f"{result['run']} and what was made of it")
    save_figure(figure, path, dpi=150)
