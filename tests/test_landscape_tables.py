"""Landscapes of several seeds told together: means and deviations by hand, what all have."""

import pytest
from PIL import Image

from scripts.landscape_tables import draw_seeds, seeds_tables


def result_of(*, eigenvalue: float, trace: float, barrier: float, more: bool = False) -> dict:
    """A landscape of a dense run, a level and its random control."""
    kinds = {"dense": "dense", "ticket, 20.0 %": "ticket", "random, 20.0 %": "random"}
    if more:
        kinds["random, 36.0 %"] = "random"
    places = {
        name: {
            "kind": kind,
            "loss": 0.25,
            "curvature": {
                "eigenvalues": {"largest": [eigenvalue + place, 1.0]},
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
    places, lines = rows[:5], rows[6:]
    assert places[0] == ["", "loss", "largest eigenvalue", "trace"]
    # sqrt(2) is the sample standard deviation of 10 and 12
    assert places[2] == ["dense", "0.250 +- 0.000", "11.0 +- 1.4", "101 +- 1"]
    assert places[4] == ["random, 20.0 %", "0.250 +- 0.000", "13.0 +- 1.4", "101 +- 1"]
    assert [row[0] for row in lines[2:]] == list(RESULTS[0]["lines"])
    assert lines[3][1:] == ["0.200 +- 0.141", "2.0 +- 1.4"]


@pytest.mark.parametrize("number", [1, 2])
def test_one_seed_or_several_are_drawn(number, tmp_path):
    pytest.importorskip("matplotlib")
    draw_seeds(RESULTS[:number], tmp_path / "seeds.png")
    with Image.open(tmp_path / "seeds.png") as drawn:
        assert drawn.width > 2 * drawn.height
        assert len(drawn.convert("RGB").getcolors(2**24)) > 20
