"""Self-contained HTML pages: sections, sortable tables and embedded images; no network access."""

import base64
import csv
import html
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from deit.core.errors import printable

# With this policy the browser itself blocks every request to the network.
_CONTENT_SECURITY_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)
_MAX_NORMAL_COLUMNS = 8  # a table with more columns gets a smaller font
_MEDIA_TYPES = {".png": "image/png", ".webp": "image/webp", ".jpg": "image/jpeg"}


def page(title: str, lead: str, body: Iterable[str], *, foot: str) -> str:
    """Return a complete page. title, lead, foot: plain text; body: HTML."""
    style, script = (
        files("deit.viz").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js")
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_CONTENT_SECURITY_POLICY}">\n'
        f'<title>{text(title)}</title>\n<link rel="icon" href="data:,">\n<style>\n{style}</style>\n'
        f"</head>\n<body>\n<main>\n<header><h1>{text(title)}</h1>"
        '<button id="theme" type="button">light / dark</button></header>\n'
        f'<p class="lead">{text(lead)}</p>\n'
        + "\n".join(body)
        + f"\n<footer>{text(foot)}</footer>\n"
        f"</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Return any value as text, with everything escaped that HTML would interpret.

    >>> text("a < b & c")
    'a &lt; b &amp; c'
    """
    return html.escape(printable(str(value)))


def section(title: str, body: Iterable[str], *, anchor: str = "") -> str:
    """Return a section under a second-level heading. anchor: its id, for links to it."""
    identifier = f' id="{text(anchor)}"' if anchor else ""
    return f"<section{identifier}>\n<h2>{text(title)}</h2>\n" + "\n".join(body) + "\n</section>"


def subsection(title: str, body: Iterable[str]) -> str:
    """Return content under a third-level heading."""
    return f"<h3>{text(title)}</h3>\n" + "\n".join(body)


def details(title: str, body: Iterable[str], *, opened: bool) -> str:
    """Return content that the reader can expand and collapse."""
    state = " open" if opened else ""
    return f"<details{state}><summary>{text(title)}</summary>\n" + "\n".join(body) + "\n</details>"


def paragraph(content: str, css_class: str = "") -> str:
    """Return a paragraph of plain text. css_class: a class of page.css."""
    opening = f'<p class="{css_class}">' if css_class else "<p>"
    return f"{opening}{text(content)}</p>"


def links(anchors: dict[str, str]) -> str:
    """Return a navigation bar: a link to each anchor, by its label."""
    content = "".join(
        f'<a href="#{text(anchor)}">{text(label)}</a>' for label, anchor in anchors.items()
    )
    return f"<nav>{content}</nav>"


def stat_tiles(values: dict[str, str]) -> str:
    """Return a few large numbers, each with its label."""
    content = "".join(
        f'<div class="tile"><b>{text(value)}</b><span>{text(label)}</span></div>'
        for label, value in values.items()
    )
    return f'<div class="tiles">{content}</div>'


def key_values(values: dict[str, str]) -> str:
    """Return a list of names and their values, a line each."""
    content = "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in values.items())
    return f'<dl class="card">{content}</dl>'


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    best: int | None = None,
    csv_path: str | Path | None = None,
) -> str:
    """Return a table that can be sorted by each column.

    best: index of the row in bold. In a column called `gain`, a cell that begins with + or - and a
    digit is colored. csv_path: also write the table as CSV, with means and standard deviations in
    separate columns.
    """
    rows = list(rows)
    _write_csv(csv_path, *_split_measurements(columns, rows))
    header = "".join(f'<th scope="col">{text(name)}</th>' for name in columns)
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(_cell(value, column) for value, column in zip(row, columns, strict=True))
        lines.append(f'<tr class="best">{cells}</tr>' if index == best else f"<tr>{cells}</tr>")
    wide = " wide" if len(columns) > _MAX_NORMAL_COLUMNS else ""
    return _with_caption(
        caption,
        f'<table class="sortable{wide}"><thead>'
        f"<tr>{header}</tr></thead><tbody>{''.join(lines)}</tbody></table>",
    )


_MEASUREMENT = re.compile(
    r"(?P<value>[-+]?[\d.]+)(?: \+- (?P<std>[\d.]+))?(?: \((?P<remark>.+)\))?"
)


def _split_measurements(
    columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows with `97.2 +- 0.3 (a remark)` split into value, std and remark."""
    header: list[str] = []
    lines: list[list[str]] = [[] for _ in rows]
    for index, name in enumerate(columns):
        matches = [_MEASUREMENT.fullmatch(row[index]) for row in rows]
        extras = [
            part for part in ("std", "remark") if any(match and match[part] for match in matches)
        ]
        header += [name, *(f"{name} {part}" for part in extras)]
        for line, row, match in zip(lines, rows, matches):
            line.append(match["value"] if match and extras else row[index])
            line.extend((match[part] or "") if match else "" for part in extras)
    return header, lines


def _cell(value: str, column: str) -> str:
    css = ""
    if column == "gain" and value[:1] in "+-" and value[1:2].isdigit() and float(value) != 0:
        css = ' class="gain"' if value[0] == "+" else ' class="loss"'
    return f"<td{css}>{text(value)}</td>"


def heat_table(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    cell_format: str = "{:.1f}",
    corner: str = "",
    caption: str = "",
    signed: bool = False,
    marks: Sequence[Sequence[str]] = (),
    csv_path: str | Path | None = None,
) -> str:
    """Return a table whose cells are darker the larger their value, from minimum to maximum.

    values: [rows][columns]; None leaves a cell empty. signed: scale from 0, with one color for
    positive and another for negative values. marks: text after each number, [rows][columns].
    csv_path: also write the table as CSV.
    """
    known = [value for row in values for value in row if value is not None]
    low = 0.0 if signed else min(known, default=0.0)
    span = max((abs(value - low) for value in known), default=0.0) or 1.0
    lines = []
    plain = [["" if value is None else f"{value:.6g}" for value in row] for row in values]
    _write_csv(csv_path, [corner, *columns], [[name, *row] for name, row in zip(rows, plain)])
    marks = marks or [[""] * len(row) for row in values]
    for name, row, row_marks in zip(rows, values, marks, strict=True):
        cells = "".join(
            "<td></td>"
            if value is None
            else _heat_cell(value, (value - low) / span, cell_format + text(mark))
            for value, mark in zip(row, row_marks, strict=True)
        )
        lines.append(f'<tr><th scope="row">{text(name)}</th>{cells}</tr>')
    header = "".join(f'<th scope="col">{text(name)}</th>' for name in columns)
    many = " many" if len(columns) > 6 and max(map(len, columns)) > 3 else ""
    return _with_caption(
        caption,
        f'<table class="heat{many}"><thead><tr><th>{text(corner)}</th>'
        f"{header}</tr></thead><tbody>{''.join(lines)}</tbody></table>",
    )


def _with_caption(caption: str, table: str) -> str:
    """Return a table and its caption as one block; a table that is too wide scrolls."""
    above = f'<p class="caption">{text(caption)}</p>' if caption else ""
    return f'<div class="table">{above}<div class="scroll">{table}</div></div>'


def _write_csv(
    path: str | Path | None, columns: Sequence[str], rows: Iterable[Sequence[str]]
) -> None:
    if path is not None:
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([map(printable, map(str, row)) for row in (columns, *rows)])


def _heat_cell(value: float, share: float, cell_format: str) -> str:
    tone = ";--tone:var(--c2)" if share < 0 else ""
    return f'<td class="cell" style="--v:{abs(share):.3f}{tone}">{cell_format.format(value)}</td>'


def figure(content: str, caption: str) -> str:
    """Return an image, HTML or SVG with its caption."""
    return f"<figure>{content}<figcaption>{text(caption)}</figcaption></figure>"


def image(path: str | Path, alt: str) -> str:
    """Return an image file embedded in the page. alt: text for readers who cannot see it."""
    path = Path(path)
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{text(alt)}" src="data:{_MEDIA_TYPES[path.suffix]};base64,{data}">'


def side_by_side(*figures: str) -> str:
    """Return figures next to each other, or below each other on a narrow screen."""
    return f'<div class="pair">{"".join(figures)}</div>'


def gallery(figures: Iterable[str]) -> str:
    """Return a grid of many small figures."""
    return f'<div class="gallery">{"".join(figures)}</div>'
