"""The tables of scripts/smaller.py, by hand."""

import pytest

from scripts.smaller_tables import draw_smaller, goals, smaller_table


def version(top1, *, size=1000, milliseconds=2.0, heads=True):
    fused = top1 if heads else None
    return {
        "top1": {"class": top1, "distillation": fused, "fused": fused},
        "same_answers": 1.0,
        "parameters": size,
        "bytes": 4 * size,
        "gmacs": 0.002,
        "latency": {batch: {"median_ms": milliseconds} for batch in ("1", "64")},
    }


def seed(top1, **more):
    steps = ("pruned", "recovered", "short-control", "long-control")
    number = {"bytes": 100.0}
    method = {
        "drop_points": 0.25,
        "float": {"bytes": 400.0},
        "int8": number,
        "sqnr_db": {"class": 40.0},
    }
    return {
        "ladder": {
            "run": "run",
            "split": "test",
            "rows": {
                "run": version(top1),
                **more,
                "pruned, recovered": version(top1 - 0.1, size=500),
            },
        },
        "prune": {"rows": {name: version(0.5) | {"epochs": 3} for name in steps}},
        "quantize": {"static": method},
    }


def result(*seeds):
    return {"recipe": "digits", "seeds": {str(place): one for place, one in enumerate(seeds)}}


def test_means_over_seeds_and_what_was_cut_before_its_recovery():
    lines = smaller_table(result(seed(0.9), seed(0.8))).splitlines()[2:]
    assert lines[0].startswith("| run | 85.0 +- 7.1 | 85.0 +- 7.1 | 85.0 +- 7.1 | 100.0 +- 0.0 |")
    assert lines[0].endswith("| 1,000 | 4 | 2.0 | 2 | 2 |")
    cut = "| pruned, not recovered | 50.0 +- 0.0 | 50.0 +- 0.0 | 50.0 +- 0.0 | - | 500 | 2 | 2.0 |"
    assert lines[1].startswith(cut)
    assert lines[2].startswith("| pruned, recovered | 75.0 +- 7.1 |")


def test_a_version_that_a_seed_left_out_is_no_row():
    table = smaller_table(result(seed(0.9, shared=version(0.7)), seed(0.8)))
    assert "shared" not in table
    assert "shared" in smaller_table(result(seed(0.9, shared=version(0.7))))


def test_the_goals_of_a_student_with_one_head():
    assert goals(result(seed(0.9))) == (
        "Lost by int8, seed by seed: static 0.25 points, 0.25 of the float file's bytes, 40.0 dB. "
        "Epochs: recovered 3, short-control 3, long-control 3."
    )


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    draw_smaller(result(seed(0.9), seed(0.8)), tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").stat().st_size > 20_000
