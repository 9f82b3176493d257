"""What scripts/smaller.py measured, over seeds: a table, the goals, and a picture."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deit.drawing import HEADS, final_of, markdown_table, summary
from deit.ladder_page import draw_ladder
from deit.prune_options import CONTROLS, PRUNED, RECOVERED

_COLUMNS = (
    "",
    "class head",
    "distillation head",
    "fused",
    "same answers %",
    "parameters",
    "KB",
    "MMACs",
    "ms, batch 1",
    "ms, batch 64",
)


def smaller_table(result: dict[str, Any]) -> str:
    """Every version as a row: accuracy over the seeds, size, arithmetic, time."""
    seeds = list(result["seeds"].values())
    rows = []
    for name in seeds[0]["ladder"]["rows"]:
        of = [seed["ladder"]["rows"][name] for seed in seeds]
        rows.append(
            [
                name,
                *_shares([*([one["top1"][head] for one in of] for head in HEADS)]),
                summary([one["same_answers"] for one in of], scale=100),
                f"{_middle(one['parameters'] for one in of):,.0f}",
                f"{_middle(one['bytes'] for one in of) / 1e3:,.0f}",
                f"{1000 * _middle(one['gmacs'] for one in of):.1f}",
                *(
                    f"{_middle(one['latency'][batch]['median_ms'] for one in of):.3g}"
                    for batch in ("1", "64")
                ),
            ]
        )
        if name == next(iter(seeds[0]["ladder"]["rows"])):
            cut = [seed["prune"]["rows"][PRUNED] for seed in seeds]
            shares = _shares([*([one["top1"][head] for one in cut] for head in HEADS)])
            after = [f"{PRUNED}, not recovered", *shares, "-"]
    after += [*rows[_place(rows, f"{PRUNED}, {RECOVERED}")][5:8], "-", "-"]
    rows.insert(_place(rows, f"{PRUNED}, {RECOVERED}"), after)
    return markdown_table(_COLUMNS, rows)


def _place(rows: list[list[str]], name: str) -> int:
    return next(place for place, row in enumerate(rows) if row[0] == name)


def _shares(values: Iterable[list[float | None]]) -> list[str]:
    return [summary(one, scale=100) for one in values]


def _middle(values: Iterable[float]) -> float:
    return statistics.median(values)


def goals(result: dict[str, Any]) -> str:
    """What came of the two goals: int8, and heads and hidden units that go."""
    seeds = list(result["seeds"].values())
    told = []
    for method in seeds[0]["quantize"]:
        of = [seed["quantize"][method] for seed in seeds]
        drops = ", ".join(f"{one['drop_points']:.2f}" for one in of)
        share = statistics.mean(one["int8"]["bytes"] / one["float"]["bytes"] for one in of)
        told.append(
            f"{method}: {drops} points lost, {share:.2f} of the float file, "
            f"{summary([one['sqnr_db']['fused'] for one in of])} dB"
        )
    epochs = {name: seeds[0]["prune"]["rows"][name]["epochs"] for name in _taught(seeds[0])}
    trained = ", ".join(f"{name} {number}" for name, number in epochs.items())
    return f"Int8, fused, seed by seed: {'; '.join(told)}. Epochs: {trained}."


def _taught(seed: dict[str, Any]) -> list[str]:
    return [RECOVERED, *CONTROLS.values()]


def draw_smaller(result: dict[str, Any], path: Path) -> None:
    """The ladder of the mean over seeds, as a PNG. Raises EnvironmentFault without matplotlib."""
    ladders = [seed["ladder"] for seed in result["seeds"].values()]
    rows = {}
    for name in ladders[0]["rows"]:
        of = [one["rows"][name] for one in ladders]
        middle = _middle(one["latency"]["64"]["median_ms"] for one in of)
        rows[name] = {
            "top1": {"class": statistics.mean(final_of(one["top1"]) for one in of)},
            "bytes": _middle(one["bytes"] for one in of),
            "latency": {"64": {"median_ms": middle}},
        }
    draw_ladder(ladders[0] | {"run": result["recipe"], "rows": rows}, path)
