"""A page of HTML that stands alone: sections, tables that sort, pictures inside; no network."""

import base64
import csv
import html
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from deit.core.errors import printable

# The browser itself refuses whatever would leave the file.
_ALONE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_MANY = 8  # columns, from which on a table is set smaller
_TYPES = {".png": "image/png", ".webp": "image/webp", ".jpg": "image/jpeg"}


def page(title: str, lead: str, body: Iterable[str], *, foot: str) -> str:
    """The whole page. title, lead, foot: text; body: HTML."""
    style, script = (
        files("deit.viz").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js")
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_ALONE}">\n'
        f'<title>{text(title)}</title>\n<link rel="icon" href="data:,">\n<style>\n{style}</style>\n'
        f"</head>\n<body>\n<main>\n<header><h1>{text(title)}</h1>"
        '<button id="theme" type="button">light / dark</button></header>\n'
        f'<p class="lead">{text(lead)}</p>\n'
        + "\n".join(body)
        + f"\n<footer>{text(foot)}</footer>\n"
        f"</main>\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def text(value: object) -> str:
    """Any value as text of a page: nothing in it is taken for HTML."""
    return html.escape(printable(str(value)))


def section(title: str, body: Iterable[str], *, anchor: str = "") -> str:
    """A part of the page under a heading. anchor: a name that links lead to."""
    named = f' id="{text(anchor)}"' if anchor else ""
    return f"<section{named}>\n<h2>{text(title)}</h2>\n" + "\n".join(body) + "\n</section>"


def subsection(title: str, body: Iterable[str]) -> str:
    """A smaller part."""
    return f"<h3>{text(title)}</h3>\n" + "\n".join(body)


def details(title: str, body: Iterable[str], *, opened: bool) -> str:
    """A part that can be folded away."""
    state = " open" if opened else ""
    return f"<details{state}><summary>{text(title)}</summary>\n" + "\n".join(body) + "\n</details>"


def paragraph(words: str, kind: str = "") -> str:
    """A paragraph of text. kind: a class of the style sheet."""
    return f'<p class="{kind}">{text(words)}</p>' if kind else f"<p>{text(words)}</p>"


def links(places: dict[str, str]) -> str:
    """Links to anchors, by their names."""
    inside = "".join(f'<a href="#{text(to)}">{text(name)}</a>' for name, to in places.items())
    return f"<nav>{inside}</nav>"


def stat_tiles(values: dict[str, str]) -> str:
    """A few numbers, large, each with what it is."""
    inside = "".join(
        f'<div class="tile"><b>{text(value)}</b><span>{text(name)}</span></div>'
        for name, value in values.items()
    )
    return f'<div class="tiles">{inside}</div>'


def key_values(values: dict[str, str]) -> str:
    """Facts by name, a line each."""
    inside = "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in values.items())
    return f'<dl class="card">{inside}</dl>'


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    best: int | None = None,
    file: Path | None = None,
) -> str:
    """A table whose columns sort. best: the row, from 0, that is set apart. A cell that begins with
    + or - and a digit is coloured as gain or loss in a column called gain. file: where it is
    written as CSV as well, means and deviations in columns of their own."""
    rows = list(rows)
    _write(file, *_parted(columns, rows))
    heads = "".join(f'<th scope="col">{text(name)}</th>' for name in columns)
    lines = []
    for place, row in enumerate(rows):
        cells = "".join(_cell(value, columns[at]) for at, value in enumerate(row))
        lines.append(f'<tr class="best">{cells}</tr>' if place == best else f"<tr>{cells}</tr>")
    wide = " wide" if len(columns) > _MANY else ""
    return _captioned(
        caption,
        f'<table class="sortable{wide}"><thead>'
        f"<tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>",
    )


_MEASURED = re.compile(r"([-+]?[\d.]+)(?: \+- ([\d.]+))?(?: \((.+)\))?")


def _parted(
    columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """The same for a program: of `97.2 +- 0.3 (a remark)` the deviation and the remark are in
    columns of their own, `std` and `remark`, where any cell has them."""
    heads: list[str] = []
    lines: list[list[str]] = [[] for _ in rows]
    for at, name in enumerate(columns):
        found = [_MEASURED.fullmatch(row[at]) for row in rows]
        more = [place for place in (2, 3) if any(one and one[place] for one in found)]
        names = ("", name, f"{name} std", f"{name} remark")
        heads += [name, *(names[place] for place in more)]
        for line, row, one in zip(lines, rows, found):
            line.append(one[1] if one and more else row[at])
            line.extend((one[place] or "") if one else "" for place in more)
    return heads, lines


def _cell(value: str, column: str) -> str:
    kind = ""
    if column == "gain" and value[:1] in "+-" and value[1:2].isdigit() and float(value) != 0:
        kind = ' class="gain"' if value[0] == "+" else ' class="loss"'
    return f"<td{kind}>{text(value)}</td>"


def heat_table(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    shown: str = "{:.1f}",
    corner: str = "",
    caption: str = "",
    signed: bool = False,
    marks: Sequence[Sequence[str]] = (),
    file: Path | None = None,
) -> str:
    """A table whose cells are the deeper the larger their value, from the least to the largest;
    signed: from 0, in one colour above it and another below. None: an empty cell. marks: what
    stands behind each number, of the shape of the values. file: where it is written as CSV."""
    known = [one for row in values for one in row if one is not None]
    low = 0.0 if signed else min(known, default=0.0)
    span = max((abs(one - low) for one in known), default=0.0) or 1.0
    lines = []
    plain = [["" if one is None else f"{one:.6g}" for one in row] for row in values]
    _write(file, [corner, *columns], [[name, *row] for name, row in zip(rows, plain)])
    marks = marks or [[""] * len(row) for row in values]
    for name, row, behind in zip(rows, values, marks, strict=True):
        cells = "".join(
            "<td></td>" if one is None else _heat(one, (one - low) / span, shown + text(mark))
            for one, mark in zip(row, behind, strict=True)
        )
        lines.append(f'<tr><th scope="row">{text(name)}</th>{cells}</tr>')
    heads = "".join(f'<th scope="col">{text(name)}</th>' for name in columns)
    many = " many" if len(columns) > 6 and max(map(len, columns)) > 3 else ""
    return _captioned(
        caption,
        f'<table class="heat{many}"><thead><tr><th>{text(corner)}</th>'
        f"{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>",
    )


def _captioned(caption: str, table: str) -> str:
    """A table that scrolls where it is too wide, and its caption, which does not, as one block."""
    above = f'<p class="caption">{text(caption)}</p>' if caption else ""
    return f'<div class="table">{above}<div class="scroll">{table}</div></div>'


def _write(file: Path | None, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    if file is not None:
        with file.open("w", newline="", encoding="utf-8") as written:
            lines = csv.writer(written, lineterminator="\n")
            lines.writerows([map(printable, map(str, row)) for row in (columns, *rows)])


def _heat(value: float, share: float, shown: str) -> str:
    tone = ";--tone:var(--c2)" if share < 0 else ""
    return f'<td class="cell" style="--v:{abs(share):.3f}{tone}">{shown.format(value)}</td>'


def figure(inside: str, caption: str) -> str:
    """A picture, HTML or SVG, with what it shows."""
    return f"<figure>{inside}<figcaption>{text(caption)}</figcaption></figure>"


def picture(path: Path, name: str) -> str:
    """A picture file inside the page. name: what is told where it cannot be seen."""
    kind = _TYPES[path.suffix]
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{text(name)}" src="data:{kind};base64,{data}">'


def side_by_side(*figures: str) -> str:
    """Pictures beside each other where there is room."""
    return f'<div class="pair">{"".join(figures)}</div>'


def gallery(figures: Iterable[str]) -> str:
    """Many small pictures."""
    return f'<div class="gallery">{"".join(figures)}</div>'
