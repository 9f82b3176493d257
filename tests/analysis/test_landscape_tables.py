"""Landscapes of several seeds told together: means and deviations by hand, what all have."""

import pytest

from scripts.landscape_tables import draw_seeds, seeds_tables


def result_of(
    *, eigenvalue: float, trace: float, barrier: float, more: bool = False, ahead: float = 1
) -> dict:
    """A landscape of a dense run, a level and its random control. ahead: of each kind before."""
    kinds = {"dense": "dense", "ticket, 20.0 %": "ticket", "random, 20.0 %": "random"}
    if more:
        kinds["random, 36.0 %"] = "random"
    places = {
        name: {
            "kind": kind,
            "loss": 0.25,
            "curvature": {
                "eigenvalues": {"largest": [eigenvalue + ahead * place, 1.0]},
                "trace": {"value": trace},
            },
        }
        for place, (name, kind) in enumerate(kinds.items())
    }
    line = {"barrier": {"loss": barrier, "error": barrier / 10}}
    names = ("dense to ticket, 20.0 %", "ticket, 20.0 % to random, 20.0 %")
    return {"places": places, "lines": dict.fromkeys(names, line)}


RESULTS = (
    result_of(eigenvalue=10, trace=100, barrier=0.1),
    result_of(eigenvalue=12, trace=102, barrier=0.3, more=True),
)


def test_means_and_deviations_of_what_all_seeds_have():
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in seeds_tables(RESULTS).split("\n")
    ]
    places, lines = rows[:5], rows[6:10]
    assert places[0] == ["", "loss", "largest eigenvalue", "trace"]
    # sqrt(2) is the sample standard deviation of 10 and 12
    assert places[2] == ["dense", "0.250 +- 0.000", "11.0 +- 1.4", "101 +- 1"]
    assert places[4] == ["random, 20.0 %", "0.250 +- 0.000", "13.0 +- 1.4", "101 +- 1"]
    assert [row[0] for row in lines[2:]] == list(RESULTS[0]["lines"])
    assert lines[3][1:] == ["0.200 +- 0.141", "2.0 +- 1.4"]


def test_what_a_control_has_more_than_its_ticket_is_told_pair_by_pair():
    told = seeds_tables([*RESULTS, result_of(eigenvalue=20, trace=1, barrier=0, ahead=4)])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.split("\n")]
    # 1, 1 and 4 more: the eigenvalues themselves are ten times as far apart.
    assert rows[-1] == ["random, 20.0 %", "0.000 +- 0.000", "2.0 +- 1.7", "0 +- 0"]


@pytest.mark.parametrize("number", [1, 2])
def test_what_is_drawn_are_the_means_and_deviations(number, monkeypatch, tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    draw_seeds(RESULTS[:number], tmp_path / "seeds.png")
    barrier, eigenvalue, trace = drawn[0].axes
    found = {
        (axes.get_ylabel(), bars.get_label()): (
            *map(list, zip(*bars.lines[0].get_xydata())),
            [top - bottom for ((_, bottom), (_, top)) in bars.lines[2][0].get_segments()],
        )
        for axes in (barrier, eigenvalue, trace)
        for bars in axes.containers
    }
    several = number > 1
    x, y, length = found["largest eigenvalue", "random"]
    assert (x, y) == ([pytest.approx(20)], [13 if several else 12])
    assert length == [pytest.approx(2 * 2**0.5 if several else 0)]
    x, y, _ = found["largest eigenvalue", "ticket"]
    assert (x, y) == ([pytest.approx(19.2)], [12 if several else 11])
    assert found["trace", "ticket"][1] == [101 if several else 100]
    x, y, _ = found["loss barrier [nats]", "ticket to random"]
    assert (x, y) == ([pytest.approx(20)], [pytest.approx(0.2 if several else 0.1)])
    assert eigenvalue.lines[0].get_ydata()[0] == (11 if several else 10)
