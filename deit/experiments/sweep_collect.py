"""Collect the results of the finished runs of a sweep, and the reasons of missing ones, in rows."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deit.config.validation import load_config
from deit.core import run_folder
from deit.core.console import info, table
from deit.core.errors import DeitError, SystemFault
from deit.core.json_io import load_json_as
from deit.evaluation import result_rows
from deit.evaluation.cache import CachedEvaluation, EvaluationCache
from deit.experiments.parallel_runs import FailedRun, RunSpec, combined_error
from deit.experiments.sweep_execute import SweepFailures
from deit.experiments.sweep_plan import SweepPlan
from deit.experiments.sweep_plots import draw_sweep
from deit.experiments.sweep_tables import cells, columns
from deit.viz.tables import SAMPLE_STD


def collect_rows(
    plan: SweepPlan, failures: SweepFailures
) -> tuple[dict[str, result_rows.Row], dict[str, Any], dict[str, CachedEvaluation]]:
    """Evaluate the finished runs of a sweep.

    Returns a row for each base run and point, by name; the last evaluation; and the evaluations of
    the first seed by point. A failed evaluation is added to the failures. Raises DeitError if no
    point was evaluated.
    """
    evaluations = EvaluationCache()
    classes = any(sweep_run.run.config.data.unseen_classes for sweep_run in plan.sweep_runs)
    first: dict[str, CachedEvaluation] = {}
    rows: dict[str, result_rows.Row] = {}
    last: dict[str, Any] = {}
    reasons = failures.reasons()

    def evaluation_of(run: RunSpec) -> CachedEvaluation | None:
        if run.out in reasons:
            return None
        # Run a teacher's code only if this command was allowed to, not because a run names it.
        teacher = ",".join(run.config.teacher.source) if run.config.teacher.code_sources else None
        try:
            return evaluations.get(run.out, root=run.config.data.root, teacher=teacher)
        except DeitError as error:
            reasons[run.out] = f"not evaluated: {error}"
            log = run.out.with_name(f"{run.out.name}.log")
            failures.failed.append(FailedRun(run, error.exit_code, reasons[run.out], log))
            return None

    for run in plan.base_runs:
        if run_folder.read_result(run.out) is None:
            continue  # removed since, or never trained: the runs that need it have their own rows
        row = result_rows.new_row(
            epochs=run.config.optim.epochs, teacher=run.name in plan.sources.teachers
        )
        rows[run.name] = {**row, "values": {}, "seeds": [], "folders": [], "failed": {}}
        # It can be the run of an earlier command with other seeds.
        seed = load_config(run.out / run_folder.CONFIG).run.seed
        if (evaluation := evaluation_of(run)) is None:
            rows[run.name]["failed"][str(seed)] = reasons[run.out]
        else:
            last = evaluation.metrics
            _add_run(rows[run.name], seed, run.out, last, classes)
    for sweep_run in plan.sweep_runs:
        epochs = sweep_run.run.config.optim.epochs
        row = result_rows.new_row(epochs=epochs, teacher=False)
        more = {"values": sweep_run.point.values, "seeds": [], "folders": [], "failed": {}}
        more["sets"] = sweep_run.point.changes
        row = rows.setdefault(sweep_run.point.name, {**row, **more})
        if (evaluation := evaluation_of(sweep_run.run)) is None:
            row["failed"][str(sweep_run.seed)] = reasons[sweep_run.run.out]
            continue
        if sweep_run.seed == plan.sweep_runs[0].seed:
            first[sweep_run.point.name] = evaluation
        last = evaluation.metrics
        _add_run(row, sweep_run.seed, sweep_run.run.out, last, classes)
    if not any(row["values"] and row["seeds"] for row in rows.values()):
        raise combined_error(failures.failed)
    return rows, last, first


def environment_of(rows: dict[str, result_rows.Row]) -> dict[str, Any]:
    """Return the environment of the first run, with the devices, commits and package versions of
    all runs, since a sweep can be resumed on another machine."""
    folders = [Path(folder) for row in rows.values() if row["values"] for folder in row["folders"]]
    environments = []
    for folder in folders:
        run_folder.read_environment(folder)  # raises if a field that is read below is missing
        environments.append(load_json_as(folder / run_folder.ENVIRONMENT, dict[str, Any]))
    of_all = {
        name: _distinct(environment[name] for environment in environments)
        for name in ("device_name", "commit")
    }
    packages = {
        name: _distinct(environment["packages"].get(name) for environment in environments)
        for name in environments[0]["packages"]
    }
    first = {name: value for name, value in environments[0].items() if name != "directory"}
    return {**first, **of_all, "packages": packages}


def _distinct(values: Iterable[Any]) -> str:
    """Join the distinct values, in the order of the runs."""
    return "; ".join(dict.fromkeys(map(str, values)))


def _add_run(
    row: result_rows.Row, seed: int, out: Path, evaluation: dict[str, Any], classes: bool
) -> None:
    result_rows.add_run(row, out, evaluation, classes=classes)
    row["seeds"].append(seed)
    row["folders"].append(str(out))


def write_plots(result: dict[str, Any], out: str | Path) -> list[Path]:
    """Write the plots of a sweep; return their paths. Without matplotlib, log that and return an
    empty list."""
    try:
        return draw_sweep(result, out)
    except SystemFault as error:
        info(f"no plots written: {error}")
        return []


def print_rows(result: dict[str, Any]) -> None:
    """Print the table of a sweep."""
    num_seeds = len(result["seeds"])
    title = f"{result['sweep']}: top-1 % on {result['num_samples']} {result['split']} images" + (
        f", mean +- {SAMPLE_STD} of {num_seeds} seeds" if num_seeds > 1 else ""
    )
    table(title, columns(result), cells(result))
