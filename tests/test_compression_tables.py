"""The tables of scripts/compression_study.py, by hand."""

import re

import pytest

from scripts.compression_tables import draw_smaller, goals, smaller_table


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
        "variants": {
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
    assert "| 50.0 +- 0.0 | 50.0 +- 0.0 | 50.0 +- 0.0 | - | 500 | 2 | 2.0 |" in lines[1]
    assert lines[2].split("|")[2] == " 75.0 +- 7.1 "


def test_a_version_that_a_seed_left_out_is_no_row():
    table = smaller_table(result(seed(0.9, shared=version(0.7)), seed(0.8)))
    assert "shared" not in table
    assert "shared" in smaller_table(result(seed(0.9, shared=version(0.7))))


def test_the_goals_of_a_student_with_one_head():
    told = goals(result(seed(0.9)))
    assert re.search(r"\bstatic 0\.25 .*\b0\.25 .*\b40\.0 dB\b", told)  # points, share of bytes
    assert re.search(r"\brecovered 3\b.*\bshort-control 3\b.*\blong-control 3\b", told)


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    draw_smaller(result(seed(0.9), seed(0.8)), tmp_path / "variants.png")
    assert (tmp_path / "variants.png").stat().st_size > 20_000
