"""What scripts/compression_study.py measured, over seeds: a table, the goals, and a picture."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deit.deploy.prune_options import CONTROLS, PRUNED, RECOVERED
from deit.deploy.variants_tables import draw_variants
from deit.viz.tables import HEADS, final_head_top1, markdown_table, mean_std

_COLUMNS = (
    "",
    "class head",
    "distillation head",
    "fused",
    "agreement %",
    "parameters",
    "KB",
    "MMACs",
    "ms, batch 1",
    "ms, batch 64",
)


def smaller_table(result: dict[str, Any]) -> str:
    """Every version that all seeds have as a row: accuracy, size, arithmetic, time; what was cut
    before its recovery."""
    rows = []
    for name, of in _versions(result).items():
        size = [
            f"{_middle(one['parameters'] for one in of):,.0f}",
            f"{_middle(one['bytes'] for one in of) / 1e3:,.0f}",
            f"{1000 * _middle(one['gmacs'] for one in of):.1f}",
        ]
        if name == f"{PRUNED}, {RECOVERED}":
            cut = [seed["prune"]["rows"][PRUNED] for seed in result["seeds"].values()]
            rows.append([f"{PRUNED}, not recovered", *_accuracies(cut), "-", *size, "-", "-"])
        same = mean_std([one["same_answers"] for one in of], scale=100)
        times = [f"{_time(of, batch):.3g}" for batch in ("1", "64")]
        rows.append([name, *_accuracies(of), same, *size, *times])
    return markdown_table(_COLUMNS, rows)


def _versions(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Of each version of the first seed the rows of all; one that some seed left out is none."""
    ladders = [seed["variants"]["rows"] for seed in result["seeds"].values()]
    return {
        name: [rows[name] for rows in ladders]
        for name in ladders[0]
        if all(name in rows for rows in ladders)
    }


def _accuracies(rows: list[dict[str, Any]]) -> list[str]:
    return [mean_std([row["top1"][head] for row in rows], scale=100) for head in HEADS]


def _middle(values: Iterable[float]) -> float:
    return statistics.median(values)


def _time(rows: list[dict[str, Any]], batch: str) -> float:
    """The median over seeds of the medians over turns [ms]."""
    return _middle(row["latency"][batch]["median_ms"] for row in rows)


def goals(result: dict[str, Any]) -> str:
    """What came of the two goals: int8, and heads and hidden units that go."""
    seeds = list(result["seeds"].values())
    told = []
    for method in seeds[0]["quantize"]:
        of = [seed["quantize"][method] for seed in seeds]
        drops = ", ".join(f"{one['drop_points']:.2f}" for one in of)
        share = statistics.mean(one["int8"]["bytes"] / one["float"]["bytes"] for one in of)
        noise = mean_std([one["sqnr_db"].get("fused", one["sqnr_db"]["class"]) for one in of])
        told.append(f"{method} {drops} points, {share:.2f} of the float file's bytes, {noise} dB")
    rows = seeds[0]["prune"]["rows"]
    taught = (RECOVERED, *CONTROLS.values())
    epochs = ", ".join(f"{name} {rows[name]['epochs']}" for name in taught)
    return f"Top-1 lost by int8, by seed: {'; '.join(told)}. Epochs: {epochs}."


def draw_smaller(result: dict[str, Any], path: Path) -> None:
    """The ladder of the mean over seeds, as a PNG. Raises SystemFault without matplotlib."""
    rows = {
        name: {
            "top1": {
                "class": statistics.mean(final_head_top1(one["top1"]) for one in of),
                "fused": None,
            },
            "bytes": _middle(one["bytes"] for one in of),
            "latency": {"64": {"median_ms": _time(of, "64")}},
        }
        for name, of in _versions(result).items()
    }
    ladder = next(iter(result["seeds"].values()))["variants"]
    draw_variants(ladder | {"run": result["recipe"], "rows": rows}, path)
