"""The figure of a comparison, from results written by hand."""

import pytest

from deit.viz.plots import comparison_figure
from deit.viz.tables import HEADS, head_name

pytest.importorskip("matplotlib")


def row(*top1, epochs, curves, teacher=False):
    """Return a row of results with a final top-1 and a curve [(epoch, top1)] for each seed."""
    heads = [dict.fromkeys(HEADS, share) for share in top1]
    if teacher:
        heads = [dict.fromkeys(HEADS) | {"class": share} for share in top1]
    return {"top1": heads, "epochs": epochs, "curves": curves, "teacher": teacher}


def figure(undistilled_epochs):
    """Return the two axes of a comparison with two seeds. The undistilled student has this number
    of epochs, the other one 4."""
    middle, end = undistilled_epochs // 2, undistilled_epochs
    rows = {
        "teacher": row(0.9, epochs=9, curves=[[(3, 0.5), (9, 0.95)]], teacher=True),
        "distilled": row(0.8, 0.9, epochs=4, curves=[[(2, 0.2), (4, 0.8)], [(2, 0.4), (4, 0.9)]]),
        "undistilled": row(
            0.5, 0.7, epochs=end, curves=[[(middle, 0.1), (end, 0.5)], [(middle, 0.3), (end, 0.7)]]
        ),
    }
    result = {"recipe": "digits", "study": "teacher", "split": "test", "seeds": [0, 1]}
    return comparison_figure({**result, "rows": rows}).axes


def lines_of(axes):
    """Return the points of the lines with a name in the legend, by name."""
    handles, names = axes.get_legend_handles_labels()
    return {
        name: [tuple(map(float, point)) for point in handle.get_xydata()]
        for handle, name in zip(handles, names)
    }


def test_comparison_figure_shows_the_mean_of_the_seeds_over_epochs():
    curves, _ = figure(undistilled_epochs=4)
    lines = lines_of(curves)
    assert lines["distilled"] == [(2, pytest.approx(30)), (4, pytest.approx(85))]
    assert lines["undistilled"] == [(2, pytest.approx(20)), (4, pytest.approx(60))]
    assert {y for _, y in lines["teacher, 95.0"]} == {95}
    assert curves.get_xlabel() == "epoch"


def test_comparison_figure_of_other_numbers_of_epochs_has_an_axis_in_percent():
    """Epochs of students with different numbers of images are not comparable, their steps are."""
    curves, _ = figure(undistilled_epochs=80)
    lines = lines_of(curves)
    assert [x for x, _ in lines["distilled"]] == [50, 100]
    assert [x for x, _ in lines["undistilled"]] == [50, 100]
    assert "%" in curves.get_xlabel()


def test_comparison_figure_names_every_head_with_mean_and_deviation():
    _, heads = figure(undistilled_epochs=4)
    names = [label.get_text() for label in heads.get_yticklabels()]
    assert names == [
        "teacher",
        *(
            f"{arm}, {head}"
            for arm in ("distilled", "undistilled")
            for head in map(head_name, HEADS)
        ),
    ]
    # Deviations of 80 and 90, and of 50 and 70: 10 / sqrt(2) and 20 / sqrt(2).
    texts = [text.get_text() for text in heads.texts]
    assert texts == ["90.0"] + ["85.0 \u00b1 7.1"] * 3 + ["60.0 \u00b1 14.1"] * 3
