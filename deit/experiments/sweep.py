"""Train and evaluate all runs of a sweep, and write one table; resumable run by run."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from deit.config.command_choices import RETRIES, TOP_POINTS, check_at_least
from deit.config.input_paths import with_missing_images
from deit.config.recipes import find_recipe
from deit.config.schema import Config
from deit.core import run_folder
from deit.core.console import format_percent, info, table
from deit.core.errors import ConfigError, SystemFault
from deit.core.filesystem import check_writable, lock_dir, write_json
from deit.core.json_io import load_json_as
from deit.distill.target_store import read_manifest
from deit.evaluation.cache import disagreement_matrix
from deit.experiments.arm_difference import difference_line
from deit.experiments.base_runs import NEEDED_FIRST, UNNAMED, Experiment
from deit.experiments.finished_runs import FinishedRunChecker
from deit.experiments.parallel_runs import RunSpec, check_num_parallel, combined_error
from deit.experiments.search import DATABASE, check_optuna
from deit.experiments.sweep_collect import collect_rows, environment_of, print_rows, write_plots
from deit.experiments.sweep_execute import (
    SearchResult,
    SweepFailures,
    search_all,
    train_all,
    unfinished,
)
from deit.experiments.sweep_grid import (
    boundary_points,
    check_code_teachers,
    find_sweep,
    points_of,
    trusted_code,
    with_command_line,
    with_fields,
    with_overrides,
)
from deit.experiments.sweep_plan import SweepPlan, SweepRun, duplicate_points, plan_sweep
from deit.experiments.sweep_spec import Fields, Sweep, sweep_from_dict
from deit.experiments.sweep_tables import (
    MANIFEST,
    best_lines,
    best_of,
    best_summary,
    write_results,
)
from deit.training.trackers import check_trackers
from deit.viz.tables import prediction_name


def sweep(
    spec: Sweep | dict[str, Any] | str | Path,
    out: str | Path,
    *,
    config: Config | None = None,
    overrides: Fields | None = None,
    parallel: int = 1,
    retries: int = RETRIES,
    top: int = TOP_POINTS,
    dry_run: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Train and evaluate every point of a sweep for each of its seeds.

    Writes results.json, tables (results.md, results.tex, results.csv, points.csv) and plots into
    `out`, and prints the table. A finished run is not trained again, even if its point has another
    name now: a hash of the configuration identifies it.

    spec: a sweep, its content as in a sweep file, the path of a sweep file, or the name of a
    built-in sweep. config: what the runs have in common; default: the recipe of the sweep.
    overrides: values by `section.field` that replace those of `config` and of the sweep in all
    runs. parallel: number of runs in parallel. retries: after a transient failure. top: number of
    best points to print. dry_run: only list the runs. command: recorded in the results.

    Returns the content of results.json. Raises the errors of deit.core.errors; one error for all
    failed runs, after the results of the others are written.

    >>> from deit.core.console import quiet
    >>> spec = {"recipe": "digits-teacher", "grid": {"optim.lr": [0.001, 0.003]},
    ...         "set": {"optim.epochs": 1, "optim.warmup_epochs": 0, "data.train_fraction": 0.1}}
    >>> with quiet():
    ...     result = sweep(spec, "checkpoints/lr")
    >>> list(result["rows"]), len(result["best"])
    (['lr 0.001', 'lr 0.003'], 2)
    """
    spec, recipe_config, config = _resolve(spec, config, overrides or {})
    out = Path(out)
    experiment = Experiment(spec.recipe, config, out, dry_run)
    _check(spec, experiment, recipe_config, parallel=parallel, retries=retries, top=top)
    if not dry_run:
        check_writable(out, name="out")
    plan = plan_sweep(spec, experiment, recipe_config=recipe_config)
    for message in duplicate_points(plan.sweep_runs):
        info(message)
    if dry_run:
        _list(spec, plan)
        return {}
    out.mkdir(parents=True, exist_ok=True)
    with lock_dir(out, name="out"):
        write_json(out / MANIFEST, {"sweep": spec.name, "recipe": spec.recipe})
        plan, search, failures = _train(spec, config, plan, parallel, retries, top)
        result = _result(spec, plan, failures, search=search, top=top, command=command)
        for path in write_results(result, out) + write_plots(result, out):
            info(f"wrote {path}")
    _print(result)
    if failures.failed:
        raise combined_error(failures.failed)
    return result


def _train(
    spec: Sweep, config: Config, plan: SweepPlan, parallel: int, retries: int, top: int
) -> tuple[SweepPlan, SearchResult | None, SweepFailures]:
    """Search if the sweep does, and train all runs; return the plan with the points of the search,
    its result and the failures."""
    finished, search = FinishedRunChecker(), None
    finished.check([*plan.base_runs, *(sweep_run.run for sweep_run in plan.sweep_runs)])
    if spec.search:
        search = search_all(
            spec, config, plan, finished=finished, parallel=parallel, retries=retries
        )
        plan = plan.with_search_results(spec, search.finished, top)
    failures = train_all(plan, finished=finished, parallel=parallel, retries=retries)
    for point, failed in search.failed if search else []:
        plan.sweep_runs.append(SweepRun(point, spec.seeds[0], failed.run))
        failures.failed.append(failed)
    return plan, search, failures


def _resolve(
    spec: Sweep | dict[str, Any] | str | Path, config: Config | None, overrides: Fields
) -> tuple[Sweep, Config, Config]:
    """Return the sweep without the fields that are overridden, the configuration with the fields
    that the sweep sets in all runs, and the same with the overrides. Raises ConfigError."""
    is_file = isinstance(spec, str | Path)
    if not isinstance(spec, Sweep):
        spec = find_sweep(spec) if is_file else sweep_from_dict(spec)
        if config is not None:  # instead of the recipe
            spec = dataclasses.replace(spec, recipe=UNNAMED)
    recipe = find_recipe(spec.recipe) if config is None else config
    base = recipe
    if spec.set or not overrides:  # without its overrides a configuration can be invalid
        base = with_fields(recipe, spec.set, where=f"sweep {spec.name}, set")
    resolved = with_overrides(base, overrides)
    spec = with_command_line(spec, base, resolved)
    if is_file:  # a file must not run code that the caller has not named
        points = boundary_points(spec, resolved) if spec.search else points_of(spec, resolved)
        trusted = trusted_code(spec, recipe)
        if "teacher.source" in overrides:
            trusted |= {*resolved.teacher.code_sources}
        check_code_teachers(spec, points, trusted)
    return spec, base, resolved


def _check(
    spec: Sweep,
    experiment: Experiment,
    recipe_config: Config,
    *,
    parallel: int,
    retries: int,
    top: int,
) -> None:
    """Check the options before anything is planned. Raises ConfigError and SystemFault."""
    check_num_parallel(parallel, name="parallel")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a sweep starts one process per run: start it without torchrun (use parallel for runs "
            "in parallel)"
        )
    seed = experiment.config.run.seed
    if seed != recipe_config.run.seed:
        raise ConfigError(f"run.seed = {seed}: has no effect on a sweep; give seeds")
    check_at_least("retries", retries, 0)
    check_at_least("top", top, 1)
    check_trackers(experiment.config.run.trackers)
    with with_missing_images(experiment.config.data):
        _check_folder(experiment.out, spec, experiment.recipe)
    if spec.search:
        check_optuna()


def _check_folder(out: Path, spec: Sweep, recipe: str) -> None:
    """Raise ConfigError or SystemFault if `out` has other content than this sweep."""
    if out.exists() and not out.is_dir():
        raise SystemFault(f"out = {out}: is a file, not a folder")
    manifest = out / MANIFEST
    if manifest.is_file():
        existing = load_json_as(manifest, dict[str, str])
        name, of = existing.get("sweep"), existing.get("recipe")
        if (name, of) != (spec.name, recipe):
            raise ConfigError(
                f"out = {out}: holds the sweep {name} of the recipe {of}, and this is the sweep "
                f"{spec.name} of the recipe {recipe}; give another folder, or the sweep and recipe "
                "that this one was started with"
            )
    elif out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise ConfigError(
            f"out = {out}: is not empty and holds no sweep (no {MANIFEST}); give another folder"
        )


def _list(spec: Sweep, plan: SweepPlan) -> None:
    """Print the runs and stores of a sweep with their states."""
    rows = [(run.name, NEEDED_FIRST, _state(run), str(run.out)) for run in plan.base_runs]
    rows += [
        (store.path.name, "stored targets", _store_state(store.path), str(store.path))
        for store in plan.stores
    ]
    rows += [(run.name, "run", _state(run), str(run.out)) for run in plan.runs]
    title = "dry run: nothing is trained or written"
    table(title, ("name", "kind", "state", "folder"), rows, text=True)
    if spec.search:
        info(f"{spec.search.trials} trials, proposed one after another; stored in {DATABASE}")
        return
    num_left = len(unfinished(plan.runs))
    info(f"{len(plan.runs)} runs, {len(plan.runs) - num_left} of them finished")


def _state(run: RunSpec) -> str:
    if run_folder.read_result(run.out) is not None:
        return "finished"
    return "to resume" if run_folder.list_checkpoints(run.out) else "to train"


def _store_state(path: Path) -> str:
    """Return the state of a store of targets. Raises CheckpointError if it is damaged."""
    try:
        return "finished" if read_manifest(path)["complete"] else "to resume"
    except FileNotFoundError:
        return "to write"


def _result(
    spec: Sweep,
    plan: SweepPlan,
    failures: SweepFailures,
    *,
    search: SearchResult | None,
    top: int,
    command: str,
) -> dict[str, Any]:
    """Return the content of results.json."""
    rows, evaluation, first = collect_rows(plan, failures)
    fields = (name for sweep_run in plan.sweep_runs for name in sweep_run.point.values)
    return {
        "sweep": spec.name,
        "recipe": spec.recipe,
        "study": spec.study,
        "fields": list(dict.fromkeys(fields)),
        "split": evaluation["split"],
        "num_samples": evaluation["num_samples"],
        "seeds": list(spec.seeds),
        "rows": rows,
        "best": best_of(rows, top),
        "disagreement": disagreement_matrix(first),
        "search": search and search.counts,
        "stopped": {
            trial.point.name: {
                "values": trial.point.values,
                "epoch": trial.epoch,
                "top1": trial.top1,
            }
            for trial in (search.stopped if search else [])
        },
        "command": command,
        "environment": environment_of(rows),
    }


def _print(result: dict[str, Any]) -> None:
    """Print the table and the best points."""
    print_rows(result)
    if result["search"]:
        info(", ".join(f"{count} {name}" for name, count in result["search"].items()))
    info(best_summary(result))
    for line in best_lines(result):
        info(f"  {line}")
    if difference := difference_line(result):
        info(difference)
    shares = result["disagreement"]
    if result["study"] == "table-4" and len(shares) <= 8:  # larger ones are in the files only
        rows = [
            (prediction_name(name), *(format_percent(share) for share in row.values()))
            for name, row in shares.items()
        ]
        header = ("", *(row[0] for row in rows))
        table("disagreement, % of the images, first seed", header, rows)
