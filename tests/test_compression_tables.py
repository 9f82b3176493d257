"""Tables and plots of scripts/compression_study.py, from results written by hand."""

import re

import pytest

from scripts.compression_tables import compression_summary, compression_table, draw_compression


def variant(top1, *, size=1000, milliseconds=2.0, heads=True):
    fused = top1 if heads else None
    return {
        "top1": {"class": top1, "distillation": fused, "fused": fused},
        "agreement": 1.0,
        "parameters": size,
        "bytes": 4 * size,
        "gmacs": 0.002,
        "latency": {batch: {"median_ms": milliseconds} for batch in ("1", "64")},
    }


def seed(top1, **variants):
    steps = ("pruned", "recovered", "short-control", "long-control")
    int8 = {"bytes": 100.0}
    method = {
        "drop_points": 0.25,
        "float": {"bytes": 400.0},
        "int8": int8,
        "sqnr_db": {"class": 40.0},
    }
    return {
        "variants": {
            "run": "run",
            "split": "test",
            "rows": {
                "run": variant(top1),
                **variants,
                "pruned, recovered": variant(top1 - 0.1, size=500),
            },
        },
        "prune": {"rows": {name: variant(0.5) | {"epochs": 3} for name in steps}},
        "quantize": {"static": method},
    }


def result(*seeds):
    return {"recipe": "digits", "seeds": {str(index): item for index, item in enumerate(seeds)}}


def test_compression_table_has_means_and_the_pruned_student():
    lines = compression_table(result(seed(0.9), seed(0.8))).splitlines()[2:]
    assert lines[0].startswith("| run | 85.0 +- 7.1 | 85.0 +- 7.1 | 85.0 +- 7.1 | 100.0 +- 0.0 |")
    assert lines[0].endswith("| 1,000 | 4 | 2.0 | 2 | 2 |")
    assert "| 50.0 +- 0.0 | 50.0 +- 0.0 | 50.0 +- 0.0 | - | 500 | 2 | 2.0 |" in lines[1]
    assert lines[2].split("|")[2] == " 75.0 +- 7.1 "


def test_compression_table_skips_variants_that_a_seed_lacks():
    table = compression_table(result(seed(0.9, shared=variant(0.7)), seed(0.8)))
    assert "shared" not in table
    assert "shared" in compression_table(result(seed(0.9, shared=variant(0.7))))


def test_compression_summary_of_a_student_with_one_head():
    summary = compression_summary(result(seed(0.9)))
    assert re.search(r"\bstatic 0\.25 .*\b0\.25 .*\b40\.0 dB\b", summary)  # points, share of bytes
    assert re.search(r"\brecovered 3\b.*\bshort-control 3\b.*\blong-control 3\b", summary)


def test_draw_compression_writes_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    draw_compression(result(seed(0.9), seed(0.8)), tmp_path / "variants.png")
    assert (tmp_path / "variants.png").stat().st_size > 20_000
