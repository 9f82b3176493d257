"""The variants of a run as a table and a plot, from plain values; without torch."""

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
    "nonzero",
    "KB",
    "MMACs",
    "ms, batch 1",
    "ms, batch 64",
)
_MAX_NAMED_POINTS = 6
_NOTE = (
    "Agreement: with the predictions of the first row. MMACs: of the float network; masks and int8 "
    "do not lower them. Latency: median over interleaved turns; runs are computed by PyTorch in "
    "eager mode, files by ONNX Runtime, so compare an int8 file with the float ONNX file (deit "
    "export --format onnx)."
)


def print_variants(result: dict[str, Any]) -> None:
    """Print the table; columns without information are omitted."""
    title = f"{result['run']}: top-1 % on {result['num_samples']} {result['split']} images"
    zeros = any(row["nonzero"] != row["parameters"] for row in result["rows"].values())
    omitted = {"engine"} if zeros else {"engine", "nonzero"}  # both follow from names and note
    columns = [index for index, name in enumerate(_COLUMNS) if name not in omitted]
    rows = [[cells[index] for index in columns] for cells in _cells(result)]
    table(title, [_COLUMNS[index] for index in columns], rows)
    info(_NOTE)


def _cells(result: dict[str, Any]) -> list[list[str]]:
    cells = []
    for name, row in result["rows"].items():
        shares = [*(row["top1"][head] for head in HEADS), row["agreement"]]
        cells.append(
            [
                name,
                row["engine"],
                *("-" if share is None else format_percent(share) for share in shares),
                f"{row['parameters']:,}",
                f"{row['nonzero']:,}",
                f"{row['bytes'] / 1e3:,.0f}",
                f"{1000 * row['gmacs']:.1f}",
                *(f"{row['latency'][batch]['median_ms']:.3g}" for batch in ("1", "64")),
            ]
        )
    return cells


def markdown(result: dict[str, Any]) -> str:
    """Return the table and its environment as Markdown."""
    environment = result["environment"]
    threads = environment["threads"]
    where = (
        f"{environment['device_name']}, {count_noun(threads, 'thread')}, torch "
        f"{environment['packages']['torch']}, commit {environment['commit']}"
    )
    return (
        f"# {result['run']} and its variants\n\nTop-1 % on {result['num_samples']} "
        f"{result['split']} images at {result['image_size']} px. {_NOTE}\n\n"
        f"{markdown_table(_COLUMNS, _cells(result))}\n\n`{result['command']}`\n\n{where}\n"
    )


def draw_variants(result: dict[str, Any], path: Path) -> None:
    """Draw accuracy against file size and against latency (batch of 64), a point per variant.

    result: the content of variants.json. path: a PNG file. Raises SystemFault without
    matplotlib.
    """
    charts.require_matplotlib()
    from matplotlib.figure import Figure

    rows = result["rows"]
    top1 = {name: 100 * final_head_top1(row["top1"]) for name, row in rows.items()}
    x_values = {
        "KB on disk": {name: row["bytes"] / 1e3 for name, row in rows.items()},
        "ms for a batch of 64": {
            name: row["latency"]["64"]["median_ms"] for name, row in rows.items()
        },
    }
    # Many points are numbered, with a legend of the names.
    numbers = {name: str(index) for index, name in enumerate(rows, start=1)}
    is_numbered = len(rows) > _MAX_NAMED_POINTS
    figure = Figure(figsize=(14 if is_numbered else 12, 4.4), layout="constrained")
    if is_numbered:
        all_axes = figure.subplots(1, 3, width_ratios=(4, 4, 2))
    else:
        all_axes = figure.subplots(1, 2)
    for axes, (label, values) in zip(all_axes, x_values.items()):
        points = {
            numbers[name] if is_numbered else name: (values[name], top1[name]) for name in rows
        }
        charts.scatter(points, label, f"{result['split']} top-1 %")(axes)
        axes.grid(alpha=0.25)
    if is_numbered:
        legend = "\n".join(f"{index:>2}  {name}" for name, index in numbers.items())
        all_axes[2].text(0, 0.5, legend, va="center", linespacing=1.5)
        all_axes[2].set_axis_off()
    figure.suptitle(f"{result['run']} and its variants")
    save_figure(figure, path, dpi=150)
