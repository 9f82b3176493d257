"""The results of structured pruning: a JSON record, a table and a Markdown page."""

from pathlib import Path
from typing import Any

from deit.core import run_folder
from deit.core.console import format_percent, table
from deit.core.json_io import load_json_as, translate_value_errors
from deit.deploy.prune_options import CONTROLS, MANIFEST, PRUNED, RECOVERED, SELECTION
from deit.evaluation.cache import EvaluationCache
from deit.evaluation.evaluate import evaluate
from deit.evaluation.load_run import resolve_run
from deit.evaluation.result_rows import teacher_agreement, top1_by_head
from deit.experiments.parallel_runs import RunSpec
from deit.models.saved_student import WEIGHTS
from deit.viz.tables import HEADS, markdown_table


def prune_result(
    run: Path, checkpoint: str, out: Path, runs: list[RunSpec], command: str
) -> dict[str, Any]:
    """Return the content of results.json: for each step its accuracy, agreement, MACs and size.

    Speed is missing on purpose, as the steps are evaluated at different times; `deit variants`
    measures it in interleaved turns.
    """
    rows = {}
    root = runs[0].config.data.root
    metrics = evaluate(run, checkpoint=checkpoint, root=root, cost=True).metrics
    rows[_label(run)] = _row(metrics, resolve_run(run, checkpoint)[1], 0)
    metrics = evaluate(out / PRUNED, root=root, cost=True).metrics
    rows[PRUNED] = _row(metrics, out / PRUNED / run_folder.BEST, 0)
    cache = EvaluationCache()
    for spec in runs:
        metrics = cache.get(spec.out, root=root, cost=True).metrics
        rows[spec.name] = _row(metrics, spec.out / run_folder.BEST, spec.config.optim.epochs)
    selection = out / PRUNED / SELECTION
    with translate_value_errors(selection):
        units = load_json_as(selection, dict[str, list[list[int]]])
        units = {name: units[name] for name in ("heads", "hidden")}
    return {
        "run": str(run),
        "split": metrics["split"],
        "num_samples": metrics["num_samples"],
        "rows": rows,
        "kept_units": units,
        "request": load_json_as(out / MANIFEST, dict[str, Any]),
        "command": command,
        "environment": metrics["environment"] | {"command": command},
    }


def _label(run: Path) -> str:
    name = run.resolve().name
    return f"{name} itself" if name in (PRUNED, RECOVERED, *CONTROLS.values()) else name


def _row(metrics: dict[str, Any], saved: Path, epochs: int) -> dict[str, Any]:
    return {
        "top1": top1_by_head(metrics),
        "agreement": teacher_agreement(metrics),
        "epochs": epochs,
        "bytes": (saved / WEIGHTS).stat().st_size,
        **{name: metrics["cost"][name] for name in ("parameters", "gmacs")},
    }


_COLUMNS = (
    "",
    "class head",
    "distillation head",
    "fused",
    "agreement with teacher %",
    "epochs",
    "parameters",
    "MMACs",
    "KB",
)


def _cells(result: dict[str, Any]) -> list[list[str]]:
    cells = []
    for name, row in result["rows"].items():
        shares = [*(row["top1"][head] for head in HEADS), row["agreement"]]
        cells.append(
            [
                name,
                *("-" if share is None else format_percent(share) for share in shares),
                str(row["epochs"] or "-"),
                f"{row['parameters']:,}",
                f"{1000 * row['gmacs']:.1f}",
                f"{row['bytes'] / 1e3:,.0f}",
            ]
        )
    return cells


def _title(result: dict[str, Any]) -> str:
    return f"{result['run']} pruned: top-1 % on {result['num_samples']} {result['split']} images"


def prune_page(result: dict[str, Any]) -> str:
    """Return the table, the units of each block and the environment as Markdown."""
    units = result["kept_units"]
    blocks = ", ".join(
        f"{len(heads)} heads and {len(hidden)} units"
        for heads, hidden in zip(units["heads"], units["hidden"])
    )
    environment = result["environment"]
    where = f"{environment['device_name']}, commit {environment['commit']}"
    return (
        f"# {_title(result)}\n\n{markdown_table(_COLUMNS, _cells(result))}\n\n"
        f"Kept in each block: {blocks}.\n\n`{result['command']}`\n\n{where}\n"
    )


def print_pruning(result: dict[str, Any]) -> None:
    """Print the table."""
    table(_title(result), _COLUMNS, _cells(result))
