"""The numbers of a search for tickets beside those of a sweep: masks and matching; no torch."""

import statistics
from typing import Any

from deit.viz.tables import final_top1, markdown_table


def matching(rows: dict[str, dict[str, Any]], tolerance: float) -> list[str]:
    """The points whose mean test top-1 is at most `tolerance` [percentage points] below that of the
    dense run, of those with as many seeds."""
    dense = next((row for row in rows.values() if row["values"].get("run") == "dense"), None)
    if dense is None or not dense["seeds"]:
        return []
    level = statistics.mean(final_top1(dense))
    return [
        name
        for name, row in rows.items()
        if row["values"].get("run", "dense") != "dense"
        and len(row["seeds"]) == len(dense["seeds"])
        # Without the last bits, which only the order of summing decides.
        and round(100 * (level - statistics.mean(final_top1(row))), 9) <= tolerance
    ]


def matching_line(result: dict[str, Any]) -> str:
    """Which points match the dense run, in a sentence."""
    told = result["tickets"]
    seeds = len(result["seeds"])
    of = f"the mean of {seeds} seeds" if seeds > 1 else "one seed"
    margin = f"{told['tolerance']:g} point{'s' * (told['tolerance'] != 1)}"
    what = f"at most {margin} below the dense run ({of}, test split)"
    return f"{what}: {'; '.join(told['matching']) or 'none'}"


def sparsest(result: dict[str, Any]) -> str:
    """The sparsity of the sparsest ticket that matches the dense run; none where none does."""
    rows = (result["rows"][name]["values"] for name in result["tickets"]["matching"])
    found = [float(row["sparsity %"]) for row in rows if row["run"] == "ticket"]
    return f"{max(found):.1f} %" if found else "none"


def mask_columns() -> tuple[str, ...]:
    """The heads of the table of what masks leave."""
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
    """What the masks of each level leave, of the first seed."""
    found = []
    for name, told in result["tickets"]["masks"].items():
        gone = told["total"] - told["kept"]
        dead = sum(layer["dead_rows"] for layer in told["layers"].values())
        sizes = (f"{told['bytes'][kind] / 1e3:,.0f}" for kind in ("file", "packed", "sparse"))
        shares = (f"{100 * gone / told[of]:.1f}" for of in ("total", "parameters"))
        found.append([name, f"{told['kept']:,}", f"{told['total']:,}", *shares, str(dead), *sizes])
    return found


def tickets_table(result: dict[str, Any]) -> str:
    """The same in Markdown, with what matches; "" where a sweep is no search for tickets."""
    if "tickets" not in result:
        return ""
    told = result["tickets"]
    return (
        f"Scope {told['scope']}, rewound to update {told['rewind']}. {NOTE}\n\n"
        f"{markdown_table(mask_columns(), mask_cells(result))}\n\n"
        f"Matching runs are {matching_line(result)}.\n\n"
    )


NOTE = (
    "Sparsity counts the prunable weights (not tokens, positions, patches, norms, biases, heads). "
    "A dead row is an output without any weight. Sizes: the file with its zeros; the file packed "
    "by zlib; sparse: the weights that are kept, plus one bit for each prunable weight."
)


def densities(result: dict[str, Any]) -> tuple[list[str], list[str], list[list[float]]]:
    """The share of each layer's weights [%] that each level keeps: the layers down, the points
    across, and the rows of shares."""
    masks = result["tickets"]["masks"]
    layers = list(next(iter(masks.values()))["layers"]) if masks else []
    rows = [
        [
            100 * told["layers"][layer]["kept"] / told["layers"][layer]["total"]
            for told in masks.values()
        ]
        for layer in layers
    ]
    return layers, list(masks), rows
