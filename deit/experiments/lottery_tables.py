"""Tables of a lottery experiment: its pruning masks, and the tickets that match the dense run; no
torch."""

import statistics
from typing import Any

from deit.viz.tables import final_top1, markdown_table


def matching(rows: dict[str, dict[str, Any]], tolerance: float) -> list[str]:
    """Return the points whose mean test top-1 is at most `tolerance` [percentage points] below that
    of the dense run. Points with another number of seeds are left out."""
    dense = next((row for row in rows.values() if row["values"].get("run") == "dense"), None)
    if dense is None or not dense["seeds"]:
        return []
    dense_top1 = statistics.mean(final_top1(dense))
    return [
        name
        for name, row in rows.items()
        if row["values"].get("run", "dense") != "dense"
        and len(row["seeds"]) == len(dense["seeds"])
        # Rounded, so that the order of the sum does not matter.
        and round(100 * (dense_top1 - statistics.mean(final_top1(row))), 9) <= tolerance
    ]


def matching_line(result: dict[str, Any]) -> str:
    """Return the points that match the dense run, with the criterion."""
    lottery = result["lottery"]
    seeds = len(result["seeds"])
    mean = f"the mean of {seeds} seeds" if seeds > 1 else "one seed"
    margin = f"{lottery['tolerance']:g} point{'s' * (lottery['tolerance'] != 1)}"
    criterion = f"at most {margin} below the dense run ({mean}, test split)"
    return f"{criterion}: {'; '.join(lottery['matching']) or 'none'}"


def sparsest(result: dict[str, Any]) -> str:
    """Return the highest sparsity of a ticket that matches the dense run; `none` if none does."""
    rows = (result["rows"][name]["values"] for name in result["lottery"]["matching"])
    sparsities = [float(row["sparsity %"]) for row in rows if row["run"] == "ticket"]
    return f"{max(sparsities):.1f} %" if sparsities else "none"


def mask_columns() -> tuple[str, ...]:
    """Return the column names of the table of masks."""
    return (
        "",
        "weights kept",
        "of",
        "sparsity %",
        "of all parameters %",
        "dead rows",
        "file KB",
        "packed KB",
        "sparse KB",
    )


def mask_cells(result: dict[str, Any]) -> list[list[str]]:
    """Return the table of the masks of each level, for the first seed."""
    lines = []
    for name, masks in result["lottery"]["masks"].items():
        pruned = masks["total"] - masks["kept"]
        dead = sum(layer["dead_rows"] for layer in masks["layers"].values())
        sizes = (f"{masks['bytes'][kind] / 1e3:,.0f}" for kind in ("file", "packed", "sparse"))
        shares = (f"{100 * pruned / masks[whole]:.1f}" for whole in ("total", "parameters"))
        counts = (f"{masks[key]:,}" for key in ("kept", "total"))
        lines.append([name, *counts, *shares, str(dead), *sizes])
    return lines


def lottery_table(result: dict[str, Any]) -> str:
    """Return the table of masks as Markdown, with the matching points; "" for other sweeps."""
    if "lottery" not in result:
        return ""
    lottery = result["lottery"]
    return (
        f"Scope {lottery['scope']}, rewound to step {lottery['rewind']}. {MASKS_NOTE}\n\n"
        f"{markdown_table(mask_columns(), mask_cells(result))}\n\n"
        f"Matching runs are {matching_line(result)}.\n\n"
    )


MASKS_NOTE = (
    "Sparsity counts the prunable weights (not tokens, positions, patches, norms, biases, heads). "
    "A dead row is an output without any weight. Sizes: the file with its zeros; the file packed "
    "by zlib; sparse: the weights that are kept, plus one bit for each prunable weight."
)


def layer_densities(result: dict[str, Any]) -> tuple[list[str], list[str], list[list[float]]]:
    """Return the share of each layer's weights that each point keeps [%]: the layers, the points,
    and the shares by layer and point."""
    masks = result["lottery"]["masks"]
    layers = list(next(iter(masks.values()))["layers"]) if masks else []
    rows = [
        [
            100 * point["layers"][layer]["kept"] / point["layers"][layer]["total"]
            for point in masks.values()
        ]
        for layer in layers
    ]
    return layers, list(masks), rows
