"""Tables and plots of landscapes over several seeds: means and deviations by hand."""

import pytest

from scripts.landscape_tables import draw_seeds, seeds_tables


def result_of(
    *,
    eigenvalue: float,
    trace: float,
    barrier: float,
    with_extra_run: bool = False,
    step: float = 1,
) -> dict:
    """A landscape of a dense run, a level and its random control; eigenvalues rise by `step`."""
    kinds = {"dense": "dense", "ticket, 20.0 %": "ticket", "random, 20.0 %": "random"}
    if with_extra_run:
        kinds["random, 36.0 %"] = "random"
    runs = {
        name: {
            "kind": kind,
            "loss": 0.25,
            "curvature": {
                "eigenvalues": {"largest": [eigenvalue + step * index, 1.0]},
                "trace": {"value": trace},
            },
        }
        for index, (name, kind) in enumerate(kinds.items())
    }
    line = {"barrier": {"loss": barrier, "error": barrier / 10}}
    names = ("dense to ticket, 20.0 %", "ticket, 20.0 % to random, 20.0 %")
    return {"points": runs, "lines": dict.fromkeys(names, line)}


RESULTS = (
    result_of(eigenvalue=10, trace=100, barrier=0.1),
    result_of(eigenvalue=12, trace=102, barrier=0.3, with_extra_run=True),
)


def test_seeds_tables_have_mean_and_std_of_the_common_runs():
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in seeds_tables(RESULTS).split("\n")
    ]
    runs, lines = rows[:5], rows[6:10]
    assert runs[0] == ["", "loss", "largest eigenvalue", "trace"]
    # sqrt(2) is the sample standard deviation of 10 and 12
    assert runs[2] == ["dense", "0.250 +- 0.000", "11.0 +- 1.4", "101 +- 1"]
    assert runs[4] == ["random, 20.0 %", "0.250 +- 0.000", "13.0 +- 1.4", "101 +- 1"]
    assert [row[0] for row in lines[2:]] == list(RESULTS[0]["lines"])
    assert lines[3][1:] == ["0.200 +- 0.141", "2.0 +- 1.4"]


def test_seeds_tables_compare_controls_with_their_tickets_by_seed():
    tables = seeds_tables([*RESULTS, result_of(eigenvalue=20, trace=1, barrier=0, step=4)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.split("\n")]
    # The differences are 1, 1 and 4; the eigenvalues themselves spread ten times as much.
    assert rows[-1] == ["random, 20.0 %", "0.000 +- 0.000", "2.0 +- 1.7", "0 +- 0"]


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_draw_seeds_plots_means_and_standard_deviations(num_seeds, monkeypatch, tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    figures = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: figures.append(self))
    draw_seeds(RESULTS[:num_seeds], tmp_path / "seeds.png")
    barrier, eigenvalue, trace = figures[0].axes
    bars = {
        (axes.get_ylabel(), container.get_label()): (
            *map(list, zip(*container.lines[0].get_xydata())),
            [top - bottom for ((_, bottom), (_, top)) in container.lines[2][0].get_segments()],
        )
        for axes in (barrier, eigenvalue, trace)
        for container in axes.containers
    }
    is_multi = num_seeds > 1
    x, y, length = bars["largest eigenvalue", "random"]
    assert (x, y) == ([pytest.approx(20)], [13 if is_multi else 12])
    assert length == [pytest.approx(2 * 2**0.5 if is_multi else 0)]
    x, y, _ = bars["largest eigenvalue", "ticket"]
    assert (x, y) == ([pytest.approx(19.2)], [12 if is_multi else 11])
    assert bars["trace", "ticket"][1] == [101 if is_multi else 100]
    x, y, _ = bars["loss barrier [nats]", "ticket to random"]
    assert (x, y) == ([pytest.approx(20)], [pytest.approx(0.2 if is_multi else 0.1)])
    assert eigenvalue.lines[0].get_ydata()[0] == (11 if is_multi else 10)
