"""Attention maps over images; takes plain arrays and draws with matplotlib."""

from pathlib import Path
from typing import Any

from deit.core.errors import single_line
from deit.viz.plots import new_figure, save_figure
from deit.viz.tables import head_name

TEXT_ON_ANY_BACKGROUND = "#808894"
"""A text color that can be read on white and on black."""


def draw_attention(
    images: list[Any],
    maps: list[Any],
    token_names: tuple[str, ...],
    predictions: list[dict[str, str]],
    captions: list[str],
    path: str | Path,
    *,
    transparent: bool = False,
) -> None:
    """Save `attention_figure` as a PNG. transparent: leave its background transparent.

    Raises SystemFault if matplotlib is missing.
    """
    figure = attention_figure(
        images, maps, token_names, predictions, captions, transparent=transparent
    )
    save_figure(figure, path, dpi=120, transparent=transparent)


def attention_figure(
    images: list[Any],
    maps: list[Any],
    token_names: tuple[str, ...],
    predictions: list[dict[str, str]],
    captions: list[str],
    *,
    transparent: bool = False,
) -> Any:
    """Return a figure with a row per image: the image, then it under the attention map of each
    token.

    images: [side, side, 3] in [0, 1]. maps: [tokens, patches, patches] per image; the color scale
    of each map spans its own minimum and maximum. token_names: a name per token. predictions: text
    by head, per image. captions: a line per image. transparent: use a text color that can be read
    on white and on black.
    Raises SystemFault if matplotlib is missing.
    """
    num_columns = 1 + len(token_names)
    text_color = {"color": TEXT_ON_ANY_BACKGROUND} if transparent else {}
    figure = new_figure(2.6 * num_columns, 2.9 * len(images))
    grid = figure.subplots(len(images), num_columns, squeeze=False)
    rows = zip(images, maps, predictions, captions)
    for row, (image, token_maps, by_head, caption) in enumerate(rows):
        side = image.shape[0]
        extent = (-0.5, side - 0.5, side - 0.5, -0.5)
        _show(grid[row][0], image, side)
        text = f"{single_line(caption)}\n{_prediction_lines(by_head)}"
        grid[row][0].set_title(text, fontsize=8, loc="left", **text_color)
        for column, (name, values) in enumerate(zip(token_names, token_maps), start=1):
            axes = grid[row][column]
            _show(axes, image.mean(axis=-1), side, cmap="gray", vmin=0, vmax=1)
            interpolation = "bilinear" if side > 2 * len(values) else "nearest"
            axes.imshow(
                values, cmap="inferno", alpha=0.6, extent=extent, interpolation=interpolation
            )
            peak = 100 * values.max()
            axes.set_title(
                f"{name} token: up to {peak:.1f} % a patch", fontsize=8, loc="left", **text_color
            )
    return figure


def _show(axes: Any, image: Any, side: int, **settings: Any) -> None:
    axes.imshow(image, interpolation="nearest" if side < 64 else "antialiased", **settings)
    axes.set_axis_off()
    axes.set(xticks=(), yticks=())  # invisible ticks would take most of the drawing time


def _prediction_lines(by_head: dict[str, str]) -> str:
    """Return a line per prediction; heads with the same text share a line."""
    lines: dict[str, list[str]] = {}
    for head, prediction in by_head.items():
        lines.setdefault(prediction, []).append(head_name(head))
    return "\n".join(f"{', '.join(heads)}: {prediction}" for prediction, heads in lines.items())
