"""What a structured pruning came to: its steps as numbers, a table and a page."""

from pathlib import Path
from typing import Any

from deit.core import run_folder
from deit.core.console import format_percent, table
from deit.core.json_io import load_json_as, translate_value_errors
from deit.deploy.prune_options import CONTROLS, KEPT, MANIFEST, PRUNED, RECOVERED
from deit.evaluation.cache import EvaluationCache
from deit.evaluation.evaluate import evaluate
from deit.evaluation.load_run import resolve_run
from deit.evaluation.result_rows import top1_by_head
from deit.experiments.runner import RunSpec
from deit.models.saved import WEIGHTS
from deit.viz.tables import HEADS, markdown_table


def prune_result(
    run: Path, name: str, out: Path, runs: list[RunSpec], command: str
) -> dict[str, Any]:
    """What results.json holds: of each step top-1 by head, agreement, arithmetic and bytes. No
    speeds: each was evaluated at a time of its own, and `deit variants` measures in turns."""
    rows = {}
    root = runs[0].config.data.root
    found = evaluate(run, checkpoint=name, root=root, cost=True)
    rows[_called(run)] = _row(found, resolve_run(run, name)[1], 0)
    found = evaluate(out / PRUNED, root=root, cost=True)
    rows[PRUNED] = _row(found, out / PRUNED / run_folder.BEST, 0)
    evaluations = EvaluationCache()
    for one in runs:
        found = evaluations.get(one.out, root=root, cost=True).metrics
        rows[one.name] = _row(found, one.out / run_folder.BEST, one.config.optim.epochs)
    with translate_value_errors(out / PRUNED / KEPT):
        kept = load_json_as(out / PRUNED / KEPT, dict[str, list[list[int]]])
        kept = {name: kept[name] for name in ("heads", "hidden")}
    return {
        "run": str(run),
        "split": found["split"],
        "num_samples": found["num_samples"],
        "rows": rows,
        "kept": kept,
        "asked": load_json_as(out / MANIFEST, dict[str, Any]),
        "command": command,
        "environment": found["environment"] | {"command": command},
    }


def _called(run: Path) -> str:
    name = run.resolve().name
    return f"{name} itself" if name in (PRUNED, RECOVERED, *CONTROLS.values()) else name


def _row(found: dict[str, Any], saved: Path, epochs: int) -> dict[str, Any]:
    agreed = found["agreement"].get("fused", found["agreement"]["class"]).get("teacher")
    return {
        "top1": top1_by_head(found),
        "agreement": agreed,
        "epochs": epochs,
        "bytes": (saved / WEIGHTS).stat().st_size,
        **{name: found["cost"][name] for name in ("parameters", "gmacs")},
    }


_COLUMNS = (
    "",
    "class head",
    "distillation head",
    "fused",
    "agrees with teacher %",
    "epochs",
    "parameters",
    "MMACs",
    "KB",
)


def _cells(result: dict[str, Any]) -> list[list[str]]:
    found = []
    for name, row in result["rows"].items():
        shares = [*(row["top1"][head] for head in HEADS), row["agreement"]]
        found.append(
            [
                name,
                *("-" if one is None else format_percent(one) for one in shares),
                str(row["epochs"] or "-"),
                f"{row['parameters']:,}",
                f"{1000 * row['gmacs']:.1f}",
                f"{row['bytes'] / 1e3:,.0f}",
            ]
        )
    return found


def _title(result: dict[str, Any]) -> str:
    return f"{result['run']} pruned: top-1 % on {result['num_samples']} {result['split']} images"


def prune_page(result: dict[str, Any]) -> str:
    """The table as Markdown, what stayed in each block, and where the numbers come from."""
    kept = result["kept"]
    blocks = ", ".join(
        f"{len(heads)} heads and {len(hidden)} units"
        for heads, hidden in zip(kept["heads"], kept["hidden"])
    )
    environment = result["environment"]
    where = f"{environment['device_name']}, commit {environment['commit']}"
    return (
        f"# {_title(result)}\n\n{markdown_table(_COLUMNS, _cells(result))}\n\n"
        f"Kept, block by block: {blocks}.\n\n`{result['command']}`\n\n{where}\n"
    )


def print_pruning(result: dict[str, Any]) -> None:
    """The table, for a person."""
    table(_title(result), _COLUMNS, _cells(result))
