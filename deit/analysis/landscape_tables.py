"""Tables and page of a landscape, from the values of landscape.json; no torch."""

import math
from pathlib import Path
from typing import Any

from deit.analysis.landscape_plots import (
    MAX_LABELED,
    eigenvalues_chart,
    lines_chart,
    path_chart,
    plane_chart,
    radii_chart,
    spectra_chart,
)
from deit.core.errors import SystemFault
from deit.core.filesystem import atomic_write
from deit.viz import charts, html
from deit.viz.tables import markdown_table

MANIFEST = "landscape.request.json"
PAGE = "index.html"

_NOTE = (
    "Limits of these measurements: Rescaling queries against keys, or values against the "
    "projection, leaves the outputs of a network unchanged but changes every eigenvalue, radius "
    "and volume. A volume relies on its effective rays; with only a few it is a lower bound. "
    "Volumes of different numbers of weights can only be compared per weight. Planes of two random "
    "directions predict generalization poorly. On a line between two levels the inner points are "
    "denser than the sparser end."
)


def columns(result: dict[str, Any]) -> tuple[str, ...]:
    """Return the column names of the table of runs."""
    names = ["", "free weights", "loss", "error %", "gradient norm"]
    parts = result["options"]["measure"]
    if "curvature" in parts:
        names += ["largest eigenvalue", "smallest eigenvalue", "trace"]
    if "volume" in parts:
        names += ["median radius", "log volume per weight", "effective rays", "censored rays"]
    return tuple(names)


def cells(result: dict[str, Any]) -> list[list[str]]:
    """Return the table of runs, a row per run."""
    num_rays = result["options"]["rays"]
    return [_row(name, values, num_rays) for name, values in result["points"].items()]


def _row(name: str, values: dict[str, Any], num_rays: int) -> list[str]:
    row = [
        name,
        f"{values['free_weights']:,}",
        f"{values['loss']:.4f}",
        f"{100 * values['error']:.1f}",
        f"{values['gradient_norm']:.3g}",
    ]
    if "curvature" in values:
        eigenvalues, trace = values["curvature"]["eigenvalues"], values["curvature"]["trace"]
        remark = "" if eigenvalues["converged"] else " (not converged)"
        row += [
            f"{eigenvalues['largest'][0]:.3g}{remark}",
            f"{eigenvalues['smallest'][0]:.3g}",
            f"{trace['value']:.3g} +- {trace['standard_error']:.2g}",
        ]
    if "volume" in values:
        volume = values["volume"]
        bound = ">= " if volume["censored"] or volume["effective_rays"] < 2 else ""
        row += [
            f"{math.exp(volume['log_radius_quantiles'][2]):.3g}",
            f"{bound}{volume['log_volume_per_weight']:.4f}",
            f"{volume['effective_rays']:.1f} of {num_rays}",
            str(volume["censored"]),
        ]
    return row


LINES = (
    "",
    "loss barrier",
    "error barrier, points",
    "class head, points",
    "distillation head, points",
)
"""The column names of the table of lines."""


def line_cells(result: dict[str, Any]) -> list[list[str]]:
    """Return the table of lines: the barriers of the loss and of the errors, a row per line."""
    rows = []
    for name, line in result["lines"].items():
        errors = [line["barrier"].get(f"error{head}") for head in ("", "_class", "_distillation")]
        points = ("-" if error is None else f"{100 * error:.1f}" for error in errors)
        rows.append([name, f"{line['barrier']['loss']:.4f}", *points])
    return rows


def write_page(result: dict[str, Any], out: Path) -> list[Path]:
    """Write landscape.md and, if matplotlib is installed, index.html with its charts and tables.

    The charts are also written as PNG, and the tables as CSV. Returns the two documents.
    """
    written = [out / "landscape.md"]
    atomic_write(written[0], _markdown(result).encode())
    try:
        charts.require_matplotlib()
    except SystemFault:
        return written
    atomic_write(out / PAGE, _page(result, out).encode())
    return [*written, out / PAGE]


def _markdown(result: dict[str, Any]) -> str:
    lines = ""
    if result["lines"]:
        lines = f"{markdown_table(LINES, line_cells(result))}\n\n"
    environment = result["environment"]
    return (
        f"# Loss landscape\n\nLoss on {result['images']} {result['options']['split']} images: "
        "cross-entropy of the fused heads (or the only head) with the labels, in nats.\n\n"
        f"{markdown_table(columns(result), cells(result))}\n\n{lines}{_NOTE}\n\n"
        f"`{result['command']}`\n\n{environment['device_name']}, commit {environment['commit']}\n"
    )


def _page(result: dict[str, Any], out: Path) -> str:
    body = [
        html.table(columns(result), cells(result), csv_path=out / "points.csv"),
        html.paragraph(_NOTE, "note"),
        *_lines_section(result, out),
        *_curvature_section(result, out),
        *_volume_section(result, out),
        *_planes_section(result, out),
    ]
    environment = result["environment"]
    body.append(
        html.key_values(
            {
                "command": result["command"],
                "seed": str(result["options"]["seed"]),
                "device": environment["device_name"],
                "versions": f"torch {environment['packages']['torch']}, "
                f"commit {environment['commit']}",
            }
        )
    )
    images = f"{result['images']} {result['options']['split']} images"
    lead = f"{len(result['points'])} runs; cross-entropy on {images}"
    foot = (
        "Written by deit loss-landscape. The charts (PNG) and tables (CSV) are in the same folder."
    )
    return html.page("Loss landscape", lead, body, foot=foot)


def _lines_section(result: dict[str, Any], out: Path) -> list[str]:
    if not result["lines"]:
        return []
    caption = (
        "Barriers: the largest rise of loss and error above the linear interpolation between the "
        "ends. Lines go from run to run, or along the pruning step (pruned to)."
    )
    table = html.table(LINES, line_cells(result), caption=caption, csv_path=out / "lines.csv")
    svgs = [
        charts.chart(lines_chart(result["lines"], key, label), out / f"lines-{key}.png")
        for key, label in (("loss", "loss [nats]"), ("error", "error %"))
    ]
    many = ""
    if len(result["lines"]) > MAX_LABELED:
        many = " Each kind has a color; lines to sparser runs are more opaque."
    captions = (f"Loss along each line.{many}", "Error along each line.")
    figures = html.side_by_side(*map(html.figure, svgs, captions))
    return [html.subsection("Lines", [table, figures])]


def _part_of(result: dict[str, Any], part: str) -> dict[str, Any]:
    """Return the values of one part by the name of the run, of the runs that have it."""
    return {name: values[part] for name, values in result["points"].items() if part in values}


def _curvature_section(result: dict[str, Any], out: Path) -> list[str]:
    curvatures = _part_of(result, "curvature")
    if not curvatures:
        return []
    svgs = [
        charts.chart(spectra_chart(curvatures), out / "spectra.png"),
        charts.chart(eigenvalues_chart(curvatures), out / "eigenvalues.png"),
    ]
    captions = (
        "Spectral density of the Hessian, by stochastic Lanczos quadrature.",
        "Largest eigenvalues of the Hessian, and its trace with standard error.",
    )
    figures = html.side_by_side(*map(html.figure, svgs, captions))
    return [html.subsection("Curvature", [figures])]


def _volume_section(result: dict[str, Any], out: Path) -> list[str]:
    volumes = _part_of(result, "volume")
    if not volumes:
        return []
    svg = charts.chart(radii_chart(volumes), out / "radii.png", width=9.0)
    caption = (
        "Distance along random rays at which the loss has risen by "
        f"{result['options']['loss_rise']:g} nats: minimum, quartiles and maximum."
    )
    return [html.subsection("Basins", [html.figure(svg, caption)])]


def _planes_section(result: dict[str, Any], out: Path) -> list[str]:
    planes = _part_of(result, "planes")
    sections = []
    if planes:
        losses = [
            loss for plane in planes.values() for row in plane["values"]["loss"] for loss in row
        ]
        low, high = min(losses), sorted(losses)[int(0.9 * (len(losses) - 1))]
        figures = []
        for index, (name, plane) in enumerate(planes.items()):
            draw = plane_chart(plane, low, high)
            svg = charts.chart(draw, out / f"plane-{index}.png", width=5.6, height=4.6)
            figures.append(html.figure(svg, name))
        note = (
            "Loss on the plane of two filter-normalized random directions (Li et al. 2018). Seed, "
            "extent and color scale are equal in all planes."
        )
        content = [html.paragraph(note, "note"), html.side_by_side(*figures)]
        sections.append(html.subsection("Planes", content))
    if result["path"] is not None:
        svg = charts.chart(path_chart(result["path"]), out / "path.png", width=9.0, height=5.4)
        caption = (
            "The plane through the first, the middle and the last run, in the space of all "
            "weights. The other runs are projected onto it; their distances are in brackets."
        )
        sections.append(html.subsection("Path", [html.figure(svg, caption)]))
    return sections
