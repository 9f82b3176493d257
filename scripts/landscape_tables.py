"""A landscape over the levels of a search for tickets: its tables, and one picture."""

from pathlib import Path
from typing import Any

from deit.drawing import markdown_table
from deit.landscape_charts import eigenvalues_chart, lines_chart, path_chart
from deit.landscape_page import LINES, cells, columns, line_cells


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
    figure.savefig(path, dpi=120)
