"""The marks of several seeds in a plot."""

import statistics

import pytest

from deit.viz.plots import comparison_figure
from deit.viz.seed_marks import accuracy_label, draw_seeds
from deit.viz.tables import SAMPLE_STD

figure_module = pytest.importorskip("matplotlib.figure")


def row(*top1, fused=True, teacher=False):
    heads = [
        {"class": share, "distillation": None, "fused": share * fused or None} for share in top1
    ]
    return {"top1": heads, "teacher": teacher, "epochs": 1, "curves": []}


@pytest.mark.parametrize("along", ["x", "y"])
@pytest.mark.parametrize("num_seeds", [2, 3, 40])
def test_equal_values_are_dots_side_by_side(along, num_seeds):
    axes = figure_module.Figure().subplots()
    draw_seeds(axes, 7, [50.0] * num_seeds, "black", along=along)
    dots = axes.get_lines()[:num_seeds]
    markers = [line._marker for line in dots]
    centers = [marker.get_transform().transform((0, 0)) for marker in markers]
    across, same = (1, 0) if along == "x" else (0, 1)
    assert len({round(center[across], 6) for center in centers}) == num_seeds
    assert {center[same] for center in centers} == {0}
    # The data stay true: the axis limits follow them, also with a logarithmic scale.
    assert {tuple(line.get_xydata()[0]) for line in dots} == {(50, 7) if along == "x" else (7, 50)}


def test_whiskers_are_one_sample_standard_deviation():
    axes = figure_module.Figure().subplots()
    draw_seeds(axes, 0, [50.0, 70.0, 90.0], "black", along="x")
    (container,) = axes.containers
    ((start, end),) = container[2][0].get_segments()
    assert end[0] - start[0] == pytest.approx(2 * statistics.stdev([50, 70, 90]))
    axes = figure_module.Figure().subplots()
    draw_seeds(axes, 0, [50.0], "black", along="x")
    assert not axes.containers  # no deviation of one seed


@pytest.mark.parametrize(
    ("fused", "head"),
    [((True, True), "fused heads"), ((False, False), "class head"), ((True, False), "only head")],
)
def test_axis_names_the_head(fused, head):
    rows = {str(index): row(0.5, fused=has) for index, has in enumerate(fused)}
    rows["teacher"] = row(0.5, fused=False, teacher=True)
    assert head in accuracy_label({"split": "test", "rows": rows})


@pytest.mark.parametrize("study", ["sweep", "epochs"])
def test_figure_says_what_the_whiskers_are(study):
    rows = {"distilled-1": row(0.5, 0.7), "teacher": row(0.9, teacher=True)}
    result = {"study": study, "recipe": "r", "split": "test", "seeds": [0, 1], "rows": rows}
    figure = comparison_figure(result)
    assert SAMPLE_STD in figure.get_supxlabel()
    (axes,) = figure.axes
    assert "fused heads" in axes.get_xlabel() + axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()][-1] == "teacher, 90.0"
    one_seed = {**result, "rows": {"distilled-1": row(0.5)}, "seeds": [0]}
    assert comparison_figure(one_seed).get_supxlabel() == ""
