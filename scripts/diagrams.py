"""Draw the diagrams of the documentation as SVG, in docs/images/.

    python scripts/diagrams.py [--check]

An SVG image follows light and dark mode by itself: its background is transparent, and its colors
are set by a media query.
"""

import argparse
import sys
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
LIGHT = {
    "text": "#1f2430",
    "muted": "#5b6270",
    "line": "#6b7280",
    "plain": "#f3f4f6",
    "student": "#dbe7ff",
    "teacher": "#ffe6c7",
    "store": "#d9f2dd",
    "loss": "#fbdde3",
}
DARK = {
    "text": "#e6e8ee",
    "muted": "#a4abb8",
    "line": "#8b93a3",
    "plain": "#2c313c",
    "student": "#26406f",
    "teacher": "#64431b",
    "store": "#234d2d",
    "loss": "#64303c",
}
"""Colors by their role."""
_LINE_HEIGHT = 17


class Diagram:
    """An SVG image, drawn element by element; lengths in pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.elements: list[str] = []

    def box(
        self, x: int, y: int, width: int, height: int, text: str, role: str, *, dashed: bool = False
    ) -> None:
        """Draw a box with centered lines of text; the first one is bold if there are several."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.elements.append(
            f'<rect class="{role}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"{dash}/>'
        )
        lines = text.split("\n")
        top = y + height / 2 - (len(lines) - 1) * _LINE_HEIGHT / 2 + 5
        for index, line in enumerate(lines):
            css = "bold" if index == 0 and len(lines) > 1 else ""
            self.text(x + width / 2, top + index * _LINE_HEIGHT, line, css=css, anchor="middle")

    def text(self, x: float, y: float, text: str, *, css: str = "", anchor: str = "start") -> None:
        """Write one line of text; y is its baseline."""
        style = f' class="{css}"' if css else ""
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{style}>{escape(text)}</text>'
        )

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """Draw a line through points with a head at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.elements.append(f'<polyline class="arrow" points="{path}"{dash}/>')

    def svg(self) -> str:
        """Return the file."""
        body = "\n".join(self.elements)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img">\n'
            f"<title>{escape(self.title)}</title>\n<style>\n{_rules(LIGHT)}"
            f"@media (prefers-color-scheme: dark) {{\n{_rules(DARK)}}}\n</style>\n"
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            'markerHeight="7" orient="auto-start-reverse"><path class="head" d="M0,0 L10,5 L0,10 z"'
            f"/></marker></defs>\n{body}\n</svg>\n"
        )


def _rules(colors: dict[str, str]) -> str:
    """Return the style sheet of one mode."""
    roles = [name for name in colors if name not in ("text", "muted", "line")]
    fills = "".join(f".{name} {{ fill: {colors[name]}; }}\n" for name in roles)
    return (
        f"text {{ font: 13px sans-serif; fill: {colors['text']}; }}\n"
        ".bold { font-weight: bold; }\n"
        f".note {{ font-size: 12px; fill: {colors['muted']}; }}\n"
        f"rect {{ stroke: {colors['line']}; }}\n"
        f".arrow {{ fill: none; stroke: {colors['line']}; stroke-width: 1.5; "
        "marker-end: url(#head); }\n"
        f".head {{ fill: {colors['line']}; }}\n{fills}"
    )


def data_flow() -> Diagram:
    """Return the way from an image to the loss."""
    diagram = Diagram(820, 286, "From an image to the loss")
    diagram.box(8, 40, 110, 56, "image\nand its label", "plain")
    views = "views\ncrop, flip, RandAugment,\nerasing, mixup, cutmix"
    diagram.box(152, 30, 184, 76, views, "plain")
    diagram.text(244, 126, "a function of seed, epoch,", css="note", anchor="middle")
    diagram.text(244, 142, "sample and repeat", css="note", anchor="middle")
    diagram.box(392, 30, 164, 76, "student\na vision transformer,\nthe only one trained", "student")
    diagram.box(392, 132, 164, 60, "teacher\na frozen ConvNet", "teacher")
    diagram.box(392, 216, 164, 60, "stored targets\nits outputs, on disk", "store", dashed=True)
    diagram.box(640, 28, 172, 60, "label loss\nof the class head", "loss")
    diagram.box(640, 112, 172, 60, "teacher loss\nof the distillation head", "loss")
    diagram.arrow((118, 68), (152, 68))
    diagram.arrow((336, 68), (392, 68))
    diagram.arrow((336, 88), (364, 88), (364, 160), (392, 160))
    diagram.arrow((474, 192), (474, 216), dashed=True)
    diagram.text(482, 208, "written once", css="note")
    diagram.arrow((556, 54), (640, 54))
    diagram.arrow((556, 80), (598, 80), (598, 128), (640, 128))
    diagram.arrow((556, 156), (640, 156))
    diagram.arrow((556, 246), (726, 246), (726, 172), dashed=True)
    diagram.text(640, 238, "or these,", css="note", anchor="middle")
    diagram.text(640, 263, "by epoch and row", css="note", anchor="middle")
    diagram.arrow((63, 40), (63, 12), (726, 12), (726, 28))
    diagram.text(598, 27, "label", css="note", anchor="middle")
    return diagram


def student() -> Diagram:
    """Return the student with its two tokens and heads."""
    diagram = Diagram(760, 330, "The student with its class token and its distillation token")
    columns = [
        (20, "class\ntoken", "student"),
        (130, "distillation\ntoken", "teacher"),
        (260, "patch 1", "plain"),
        (350, "patch 2", "plain"),
        (440, "...", "plain"),
        (530, "patch N", "plain"),
    ]
    for x, text, role in columns:
        diagram.box(x, 262, 110 if role == "teacher" else 80, 48, text, role)
        center = x + (55 if role == "teacher" else 40)
        diagram.arrow((center, 262), (center, 224))
    blocks = "transformer blocks\nin each, all tokens exchange information by attention"
    diagram.box(10, 164, 610, 60, blocks, "plain")
    diagram.arrow((60, 164), (60, 132))
    diagram.arrow((185, 164), (185, 132))
    diagram.box(10, 84, 100, 48, "class head", "student")
    diagram.box(125, 84, 120, 48, "distillation head", "teacher")
    diagram.arrow((60, 84), (60, 46), (112, 46))
    diagram.arrow((185, 84), (185, 66))
    diagram.box(112, 26, 180, 40, "fused: mean of the logits", "plain")
    diagram.text(262, 103, "class head: learns the labels", css="note")
    diagram.text(262, 122, "distillation head: learns the teacher's predictions", css="note")
    diagram.text(304, 51, "the prediction of the student", css="note")
    diagram.text(630, 283, "an image,", css="note")
    diagram.text(630, 300, "cut into patches", css="note")
    return diagram


LABELS = ((3, 7, 1, 0, 4), (9, 0, 7, 0, 8), (0, 0, 0, 0, 0), (2, 5, 3, 0, 7))
"""Labels of the example, by epoch and row."""


def target_store() -> Diagram:
    """Return what a store of teacher outputs holds."""
    diagram = Diagram(760, 336, "What a target store holds")
    diagram.text(20, 26, "targets.bin: one record for each row of each epoch", css="bold")
    left, top, cell, rows = 90, 44, 56, ("epoch 0", "epoch 1", "...", "epoch E-1")
    columns = ("row 0", "row 1", "row 2", "...", "row R-1")
    for column, name in enumerate(columns):
        center = left + column * cell + cell / 2
        diagram.text(center, top + 10, name, css="note", anchor="middle")
    for index, name in enumerate(rows):
        y = top + 20 + index * 34
        diagram.text(left - 8, y + 20, name, css="note", anchor="end")
        for column in range(len(columns)):
            is_gap = name == "..." or columns[column] == "..."
            text = "..." if is_gap else str(LABELS[index][column])
            diagram.box(left + column * cell, y, cell, 30, text, "plain" if is_gap else "store")
    diagram.text(390, 82, "A record is the teacher's label (1 byte),", css="note")
    diagram.text(390, 100, "or also its log-probabilities (float16).", css="note")
    diagram.text(390, 128, "It has no key: record e x R + t belongs to row t", css="note")
    diagram.text(390, 146, "of epoch e. The view of that row is computed", css="note")
    diagram.text(390, 164, "again from (seed, epoch, sample, repeat).", css="note")
    checks = (
        "checks.bin",
        "a checksum of each shard of targets.bin",
        "a checksum of the pixels of every Nth view",
        "how often the teacher was right",
    )
    fingerprint = (
        "store.json",
        "fingerprint: images, classes, views, seed, sizes,",
        "weights of the teacher; a run compares it",
        "with its own, value by value",
    )
    diagram.box(20, 222, 350, 100, "\n".join(checks), "plain")
    diagram.box(390, 222, 350, 100, "\n".join(fingerprint), "plain")
    return diagram


DIAGRAMS = {"data-flow": data_flow, "student": student, "target-store": target_store}
"""The diagrams by the name of their file."""


def main() -> int:
    """Write the files; with --check return 1 if one is not up to date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    check, outdated = parser.parse_args().check, []
    for name, draw in DIAGRAMS.items():
        path, text = ROOT / "docs" / "images" / f"{name}.svg", draw().svg()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            outdated.append(name)
            if not check:
                path.write_text(text, encoding="utf-8")
    if check and outdated:
        print(f"not up to date: {', '.join(outdated)}; run: python scripts/diagrams.py")
    return int(check and bool(outdated))


if __name__ == "__main__":
    sys.exit(main())
