"""The rows of a sweep: what its finished runs came to, and why others did not."""

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
from deit.experiments.runner import FailedRun, RunSpec, combined_error
from deit.experiments.sweep_execute import SweepFailures
from deit.experiments.sweep_plan import SweepPlan
from deit.experiments.sweep_plots import draw_sweep
from deit.experiments.sweep_tables import cells, columns


def rows_of(
    work: SweepPlan, mishaps: SweepFailures
) -> tuple[dict[str, result_rows.Row], dict[str, Any], dict[str, CachedEvaluation]]:
    """A row for each teacher and point, the last evaluation, and those with the first seed by
    point. An evaluation that fails is one more mishap. Raises DeitError where none is left."""
    evaluations = EvaluationCache()
    classes = any(trial.run.config.data.unseen_classes for trial in work.trials)
    first: dict[str, CachedEvaluation] = {}
    rows: dict[str, result_rows.Row] = {}
    found: dict[str, Any] = {}
    reasons = mishaps.reasons()

    def said(run: RunSpec) -> CachedEvaluation | None:
        if run.out in reasons:
            return None
        # Code that teaches was named to us, not by somebody's saved run.
        teacher = ",".join(run.config.teacher.source) if run.config.teacher.code_sources else None
        try:
            return evaluations.get(run.out, root=run.config.data.root, teacher=teacher)
        except DeitError as error:
            reasons[run.out] = f"not evaluated: {error}"
            log = run.out.with_name(f"{run.out.name}.log")
            mishaps.failed.append(FailedRun(run, error.exit_code, reasons[run.out], log))
            return None

    for one in work.base_runs:
        if run_folder.read_result(one.out) is None:
            continue  # gone since, or never trained: its runs have a row of their own
        row = result_rows.new_row(
            epochs=one.config.optim.epochs, teacher=one.name in work.ground.teachers
        )
        rows[one.name] = {**row, "values": {}, "seeds": [], "folders": [], "failed": {}}
        seed = load_config(
            one.out / run_folder.CONFIG
        ).run.seed  # it may be of a call with other seeds
        if (evaluated := said(one)) is None:
            rows[one.name]["failed"][str(seed)] = reasons[one.out]
        else:
            found = evaluated.metrics
            _note(rows[one.name], seed, one.out, found, classes)
    for trial in work.trials:
        epochs = trial.run.config.optim.epochs
        row = result_rows.new_row(epochs=epochs, teacher=False)
        more = {"values": trial.point.values, "seeds": [], "folders": [], "failed": {}}
        more["sets"] = trial.point.own
        row = rows.setdefault(trial.point.name, {**row, **more})
        if (evaluated := said(trial.run)) is None:
            row["failed"][str(trial.seed)] = reasons[trial.run.out]
            continue
        if trial.seed == work.trials[0].seed:
            first[trial.point.name] = evaluated
        found = evaluated.metrics
        _note(row, trial.seed, trial.run.out, found, classes)
    if not any(row["values"] and row["seeds"] for row in rows.values()):
        raise combined_error(mishaps.failed)
    return rows, found, first


def environment_of(rows: dict[str, result_rows.Row]) -> dict[str, Any]:
    """Where the runs were trained: that of the first, with the devices, commits and versions of
    all, as a sweep may have been begun on one machine and finished on another."""
    folders = [Path(folder) for row in rows.values() if row["values"] for folder in row["folders"]]
    found = []
    for folder in folders:
        run_folder.read_environment(folder)  # raises where a field that is read below is missing
        found.append(load_json_as(folder / run_folder.ENVIRONMENT, dict[str, Any]))
    every = {name: _each(one[name] for one in found) for name in ("device_name", "commit")}
    packages = {
        name: _each(one["packages"].get(name) for one in found) for name in found[0]["packages"]
    }
    first = {name: value for name, value in found[0].items() if name != "directory"}
    return {**first, **every, "packages": packages}


def _each(values: Iterable[Any]) -> str:
    """The different ones, in the order of the runs."""
    return "; ".join(dict.fromkeys(map(str, values)))


def _note(row: result_rows.Row, seed: int, out: Path, found: dict[str, Any], classes: bool) -> None:
    result_rows.add_run(row, out, found, classes=classes)
    row["seeds"].append(seed)
    row["folders"].append(str(out))


def write_plots(result: dict[str, Any], out: Path) -> list[Path]:
    """The pictures of a sweep; without matplotlib none, and that is told."""
    try:
        return draw_sweep(result, out)
    except SystemFault as error:
        info(f"no picture: {error}")
        return []


def print_rows(result: dict[str, Any]) -> None:
    """The table of a sweep, for a person."""
    number = len(result["seeds"])
    title = f"{result['sweep']}: top-1 % on {result['num_samples']} {result['split']} images" + (
        f", mean and standard deviation of {number} seeds" if number > 1 else ""
    )
    table(title, columns(result), cells(result))
