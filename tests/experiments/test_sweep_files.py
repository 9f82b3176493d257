"""Files and figures that a sweep's results give to a paper, from results written by hand."""

import pytest

import deit
from deit.experiments.sweep_tables import write_results


def test_figure_of_a_sweep_leaves_out_points_without_a_finished_run(results, tmp_path):
    """Point c has a failed seed, all seeds of d failed; the sweep is of no study."""
    pytest.importorskip("matplotlib")
    write_results(results, tmp_path)
    figure = deit.SweepResult(tmp_path).figure()
    (axes,) = figure.axes
    assert {label.get_text() for label in axes.get_yticklabels()} == {"a", "b", "c"}
    assert figure.get_suptitle().startswith("mine, digits")
