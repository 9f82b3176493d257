"""Table, summary and plot of the results of scripts/compression_study.py, over seeds."""

import statistics
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


def compression_table(result: dict[str, Any]) -> str:
    """Return the variants as Markdown: accuracy, size, compute and latency, over seeds. The pruned
    student has a row before and after its recovery."""
    rows = []
    for name, seed_rows in _variant_rows(result).items():
        size = [
            f"{statistics.median(row['parameters'] for row in seed_rows):,.0f}",
            f"{statistics.median(row['bytes'] for row in seed_rows) / 1e3:,.0f}",
            f"{1000 * statistics.median(row['gmacs'] for row in seed_rows):.1f}",
        ]
        if name == f"{PRUNED}, {RECOVERED}":
            pruned = [seed["prune"]["rows"][PRUNED] for seed in result["seeds"].values()]
            rows.append([f"{PRUNED}, not recovered", *_accuracies(pruned), "-", *size, "-", "-"])
        agreement = mean_std([row["agreement"] for row in seed_rows], scale=100)
        times = [f"{_time(seed_rows, batch):.3g}" for batch in ("1", "64")]
        rows.append([name, *_accuracies(seed_rows), agreement, *size, *times])
    return markdown_table(_COLUMNS, rows)


def _variant_rows(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of all seeds for each variant that all seeds have."""
    tables = [seed["variants"]["rows"] for seed in result["seeds"].values()]
    return {
        name: [rows[name] for rows in tables]
        for name in tables[0]
        if all(name in rows for rows in tables)
    }


def _accuracies(rows: list[dict[str, Any]]) -> list[str]:
    return [mean_std([row["top1"][head] for row in rows], scale=100) for head in HEADS]


def _time(rows: list[dict[str, Any]], batch: str) -> float:
    """Return the median over seeds of the median latencies [ms]."""
    return statistics.median(row["latency"][batch]["median_ms"] for row in rows)


def compression_summary(result: dict[str, Any]) -> str:
    """Return the top-1 lost by int8, and the epochs of the pruned student and its controls."""
    seeds = list(result["seeds"].values())
    lines = []
    for method in seeds[0]["quantize"]:
        seed_rows = [seed["quantize"][method] for seed in seeds]
        drops = ", ".join(f"{row['drop_points']:.2f}" for row in seed_rows)
        share = statistics.mean(row["int8"]["bytes"] / row["float"]["bytes"] for row in seed_rows)
        noise = mean_std(
            [row["sqnr_db"].get("fused", row["sqnr_db"]["class"]) for row in seed_rows]
        )
        lines.append(f"{method} {drops} points, {share:.2f} of the float file's bytes, {noise} dB")
    rows = seeds[0]["prune"]["rows"]
    trained = (RECOVERED, *CONTROLS.values())
    epochs = ", ".join(f"{name} {rows[name]['epochs']}" for name in trained)
    return f"Top-1 lost by int8, by seed: {'; '.join(lines)}. Epochs: {epochs}."


def draw_compression(result: dict[str, Any], path: Path) -> None:
    """Plot the variants, averaged over seeds, as PNG. Raises SystemFault without matplotlib."""
    rows = {
        name: {
            "top1": {
                "class": statistics.mean(final_head_top1(row["top1"]) for row in seed_rows),
                "fused": None,
            },
            "bytes": statistics.median(row["bytes"] for row in seed_rows),
            "latency": {"64": {"median_ms": _time(seed_rows, "64")}},
        }
        for name, seed_rows in _variant_rows(result).items()
    }
    first = next(iter(result["seeds"].values()))["variants"]
    draw_variants(first | {"run": result["recipe"], "rows": rows}, path)
