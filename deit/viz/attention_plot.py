"""Pictures of what a network looks at; takes plain arrays, draws with matplotlib."""

from pathlib import Path
from typing import Any

from deit.core.errors import SystemFault, in_line
from deit.viz.plots import save_figure

GREY = "#808894"
"""Of letters that can be read on white and on black."""


def draw_attention(
    images: list[Any],
    maps: list[Any],
    names: tuple[str, ...],
    answers: list[dict[str, str]],
    captions: list[str],
    path: Path,
    *,
    clear: bool = False,
) -> None:
    """A row for each image: the image with the answers, then a token's map over it, as a PNG.

    images: [side, side, 3] in [0, 1]. maps: [tokens, patches, patches] of each image, coloured
    from its own least to its own most. names: of the tokens. answers: by head, of each image.
    captions: a line for each image. clear: whether whatever lies below shows through instead of
    white paper, under letters that can be read on white and on black.
    Raises SystemFault without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemFault("drawing needs matplotlib; pip install 'deit[plot]'") from None
    across = 1 + len(names)
    ink = {"color": GREY} if clear else {}
    figure = Figure(figsize=(2.6 * across, 2.9 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), across, squeeze=False)
    for row, (image, tokens, said, caption) in enumerate(zip(images, maps, answers, captions)):
        side = image.shape[0]
        extent = (-0.5, side - 0.5, side - 0.5, -0.5)
        _show(grid[row][0], image, side)
        text = f"{in_line(caption)}\n{_told(said)}"
        grid[row][0].set_title(text, fontsize=8, loc="left", **ink)
        for place, (name, values) in enumerate(zip(names, tokens), start=1):
            axes = grid[row][place]
            _show(axes, image.mean(axis=-1), side, cmap="gray", vmin=0, vmax=1)
            how = "bilinear" if side > 2 * len(values) else "nearest"
            axes.imshow(values, cmap="inferno", alpha=0.6, extent=extent, interpolation=how)
            most = 100 * values.max()
            axes.set_title(
                f"{name} token: up to {most:.1f} % a patch", fontsize=8, loc="left", **ink
            )
    save_figure(figure, path, dpi=120, transparent=clear)


def _show(axes: Any, image: Any, side: int, **settings: Any) -> None:
    axes.imshow(image, interpolation="nearest" if side < 64 else "antialiased", **settings)
    axes.set_axis_off()
    axes.set(xticks=(), yticks=())  # they would not be seen, and take most of the time


def _told(said: dict[str, str]) -> str:
    """The answers, heads that agree to the digit in one line."""
    lines: dict[str, list[str]] = {}
    for head, answer in said.items():
        lines.setdefault(answer, []).append(head)
    return "\n".join(f"{', '.join(heads)}: {answer}" for answer, heads in lines.items())
