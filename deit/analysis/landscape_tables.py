"""Landscapes as tables and a page; reads plain values only, no torch."""

import math
from pathlib import Path
from typing import Any

from deit.analysis.landscape_plots import (
    NAMED,
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
    "Read with care: rescaling queries against keys, or values against the projection, changes no "
    "answer and every eigenvalue, radius and volume; a volume rests on as many rays as are "
    "effective, and is a lower bound with few; volumes of different numbers of weights have no "
    "common unit but per weight; planes of two random directions say little of generalisation; "
    "between two levels the points of a line are denser than the sparser end."
)


def columns(result: dict[str, Any]) -> tuple[str, ...]:
    """The heads of the table's columns."""
    found = ["", "free weights", "loss", "error %", "gradient"]
    parts = result["asked"]["parts"]
    if "curvature" in parts:
        found += ["largest eigenvalue", "smallest eigenvalue", "trace"]
    if "volume" in parts:
        found += ["median radius", "log volume per weight", "effective rays", "censored"]
    return tuple(found)


def cells(result: dict[str, Any]) -> list[list[str]]:
    """A row a place."""
    return [_row(name, about, result["asked"]) for name, about in result["places"].items()]


def _row(name: str, about: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    found = [
        name,
        f"{about['free_weights']:,}",
        f"{about['loss']:.4f}",
        f"{100 * about['error']:.1f}",
        f"{about['gradient_norm']:.3g}",
    ]
    if "curvature" in about:
        ends, whole = about["curvature"]["eigenvalues"], about["curvature"]["trace"]
        unsure = "" if ends["converged"] else " (not converged)"
        found += [
            f"{ends['largest'][0]:.3g}{unsure}",
            f"{ends['smallest'][0]:.3g}",
            f"{whole['value']:.3g} +- {whole['standard_error']:.2g}",
        ]
    if "volume" in about:
        seen = about["volume"]
        bound = ">= " if seen["censored"] or seen["effective_rays"] < 2 else ""
        found += [
            f"{math.exp(seen['log_radius_quantiles'][2]):.3g}",
            f"{bound}{seen['log_volume_per_weight']:.4f}",
            f"{seen['effective_rays']:.1f} of {asked['rays']}",
            str(seen["censored"]),
        ]
    return found


LINES = ("", "loss barrier", "error barrier, points", "class head", "distillation head")


def line_cells(result: dict[str, Any]) -> list[list[str]]:
    """A row a line: how far loss and error rise above the straight line between its ends."""
    found = []
    for name, one in result["lines"].items():
        errors = [one["barrier"].get(f"error{of}") for of in ("", "_class", "_distillation")]
        shown = ("-" if error is None else f"{100 * error:.1f}" for error in errors)
        found.append([name, f"{one['barrier']['loss']:.4f}", *shown])
    return found


def write_page(result: dict[str, Any], out: Path) -> list[Path]:
    """landscape.md and, where matplotlib is, index.html with every chart as PNG and every table as
    CSV beside it. Returns what was written."""
    written = [out / "landscape.md"]
    atomic_write(written[0], _markdown(result).encode())
    try:
        charts.check()
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
        f"# Landscapes\n\nThe loss of {result['images']} {result['asked']['split']} images: "
        "cross-entropy of the fused answer (or the only head's) with the labels, in nats.\n\n"
        f"{markdown_table(columns(result), cells(result))}\n\n{lines}{_NOTE}\n\n"
        f"`{result['command']}`\n\n{environment['device_name']}, commit {environment['commit']}\n"
    )


def _page(result: dict[str, Any], out: Path) -> str:
    asked = result["asked"]
    body = [
        html.table(columns(result), cells(result), file=out / "places.csv"),
        html.paragraph(_NOTE, "note"),
    ]
    body += _of_lines(result, out) + _of_curvature(result, out) + _of_volume(result, out)
    body += _of_planes(result, out)
    environment = result["environment"]
    body.append(
        html.key_values(
            {
                "command": result["command"],
                "drawn with": f"seed {asked['seed']}",
                "device": environment["device_name"],
                "versions": f"torch {environment['packages']['torch']}, "
                f"commit {environment['commit']}",
            }
        )
    )
    of = f"{result['images']} {asked['split']} images"
    lead = f"{len(result['places'])} places; cross-entropy of {of}"
    foot = "Written by deit loss-landscape. Charts (PNG) and tables (CSV) lie beside this page."
    return html.page("Landscapes", lead, body, foot=foot)


def _of_lines(result: dict[str, Any], out: Path) -> list[str]:
    if not result["lines"]:
        return []
    told = (
        "How far loss and error rise above the straight line between the ends, at most. Between "
        "levels, and along the step of pruning itself (cut)."
    )
    table = html.table(LINES, line_cells(result), caption=told, file=out / "lines.csv")
    drawn = [
        charts.chart(lines_chart(result["lines"], key, label), out / f"lines-{key}.png")
        for key, label in (("loss", "loss [nats]"), ("error", "wrong answers %"))
    ]
    many = ""
    if len(result["lines"]) > NAMED:
        many = " Each kind has a colour, the stronger the sparser."
    told = (f"Loss along each line.{many}", "Wrong answers along each line.")
    return [html.subsection("Lines", [table, html.side_by_side(*map(html.figure, drawn, told))])]


def _of_curvature(result: dict[str, Any], out: Path) -> list[str]:
    known = {name: one["curvature"] for name, one in result["places"].items() if "curvature" in one}
    if not known:
        return []
    drawn = [
        charts.chart(spectra_chart(known), out / "spectra.png"),
        charts.chart(eigenvalues_chart(known), out / "eigenvalues.png"),
    ]
    told = (
        "The density of eigenvalues of the Hessian, by stochastic Lanczos quadrature.",
        "The largest eigenvalues, and the trace with its standard error.",
    )
    return [html.subsection("Curvature", [html.side_by_side(*map(html.figure, drawn, told))])]


def _of_volume(result: dict[str, Any], out: Path) -> list[str]:
    known = {name: one["volume"] for name, one in result["places"].items() if "volume" in one}
    if not known:
        return []
    drawn = charts.chart(radii_chart(known), out / "radii.png", width=9.0)
    told = (
        f"How far the loss stays within {result['asked']['loss_rise']:g} nats along random rays: "
        "from "
        "the nearest rim to the farthest, the box half of them."
    )
    return [html.subsection("Basins", [html.figure(drawn, told)])]


def _of_planes(result: dict[str, Any], out: Path) -> list[str]:
    known = {name: one["planes"] for name, one in result["places"].items() if "planes" in one}
    drawn = []
    if known:
        losses = [loss for one in known.values() for row in one["values"]["loss"] for loss in row]
        low, high = min(losses), sorted(losses)[int(0.9 * (len(losses) - 1))]
        for place, (name, one) in enumerate(known.items()):
            draw = plane_chart(one, low, high)
            picture = charts.chart(draw, out / f"plane-{place}.png", width=5.6, height=4.6)
            drawn.append(html.figure(picture, name))
    parts = []
    if drawn:
        told = (
            "Loss on the plane of two random directions, every filter of them as long as the "
            "weights' (Li et al. 2018); the same seed, span and colours in all."
        )
        parts.append(
            html.subsection("Planes", [html.paragraph(told, "note"), html.side_by_side(*drawn)])
        )
    if result["path"] is not None:
        picture = charts.chart(path_chart(result["path"]), out / "path.png", width=9.0, height=5.4)
        told = (
            "The plane through the first place, the middle one and the last, in all weights; the "
            "others are where they lie nearest to it (in brackets how far off)."
        )
        parts.append(html.subsection("The path", [html.figure(picture, told)]))
    return parts
