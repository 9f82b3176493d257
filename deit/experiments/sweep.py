"""Every run of a sweep trained, evaluated and put into one table: resumable run by run."""

import os
from pathlib import Path
from typing import Any

from deit.config.schema import Config
from deit.core import run_folder
from deit.core.console import format_percent, info, table
from deit.core.errors import ConfigError, SystemFault
from deit.core.filesystem import check_writable, lock_dir, write_json
from deit.core.json_io import load_json_as
from deit.evaluation.cache import disagreement_matrix
from deit.experiments.base_runs import Experiment
from deit.experiments.finished_runs import FinishedRunChecker
from deit.experiments.runner import RunSpec, check_num_parallel, combined_error
from deit.experiments.search import DATABASE, check_optuna
from deit.experiments.sweep_collect import environment_of, print_rows, rows_of, write_plots
from deit.experiments.sweep_execute import (
    SearchResult,
    SweepFailures,
    search_all,
    train_all,
    unfinished,
)
from deit.experiments.sweep_plan import SweepPlan, SweepRun, duplicate_points, work_of
from deit.experiments.sweep_spec import Sweep
from deit.experiments.sweep_tables import (
    MANIFEST,
    best_lines,
    best_of,
    best_summary,
    write_results,
)
from deit.training.trackers import check_trackers


def sweep(
    plan: Sweep,
    config: Config,
    out: Path,
    *,
    asked: Config,
    dry_run: bool = False,
    parallel: int,
    retries: int,
    top: int,
    command: str = "",
) -> dict[str, Any]:
    """Train and evaluate every point of a sweep for each of its seeds; write results.json,
    results.csv, results.md and pictures into the folder, and print the table.

    asked: the recipe with what the file sets for all, before the command line. parallel: how many
    runs share the machine. retries: how often a run that failed is tried again. top: how many
    points are named in the end. A run finished before is kept, whatever it is called: it is known
    by a hash of its configuration. Returns what results.json holds. Raises the errors of
    deit.core.errors; one for all runs that failed, once everything else is written.
    """
    run = Experiment(plan.recipe, config, out, dry_run)
    _check(plan, run, asked=asked, parallel=parallel, retries=retries, top=top)
    if not run.dry_run:
        check_writable(out, option="--out")
    work = work_of(plan, run, asked=asked)
    for told in duplicate_points(work.trials):
        info(told)
    if run.dry_run:
        _list(plan, work)
        return {}
    out.mkdir(parents=True, exist_ok=True)
    with lock_dir(out, option="--out"):
        write_json(out / MANIFEST, {"sweep": plan.name, "recipe": run.recipe})
        finished, searched = FinishedRunChecker(), None
        finished.check([*work.base_runs, *(trial.run for trial in work.trials)])
        if plan.search:
            searched = search_all(
                plan, run.config, work, finished=finished, parallel=parallel, retries=retries
            )
            work = work.of_search(plan, searched.finished, top)
        mishaps = train_all(work, finished=finished, parallel=parallel, retries=retries)
        for point, failed in searched.failed if searched else []:
            work.trials.append(SweepRun(point, plan.seeds[0], failed.run))
            mishaps.failed.append(failed)
        result = _result(plan, run, work, mishaps, searched=searched, top=top, command=command)
        for path in write_results(result, out) + write_plots(result, out):
            info(f"wrote {path}")
    _print(result)
    if mishaps.failed:
        raise combined_error(mishaps.failed)
    return result


def _check(
    plan: Sweep, run: Experiment, *, asked: Config, parallel: int, retries: int, top: int
) -> None:
    """Refuse what cannot be, before anything is planned. Raises ConfigError, SystemFault."""
    check_num_parallel(parallel, option="--parallel")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a sweep starts a process for each run: start it without torchrun (--parallel N for "
            "several at a time)"
        )
    if run.config.run.seed != asked.run.seed:
        raise ConfigError(f"--run.seed {run.config.run.seed}: a sweep takes --seeds A,B")
    for option, number, least in (("--retries", retries, 0), ("--top", top, 1)):
        if number < least:
            raise ConfigError(f"{option} {number}: should be at least {least}")
    check_trackers(run.config)
    _check_folder(run.out, plan, run.recipe)
    if plan.search:
        check_optuna()


def _check_folder(out: Path, plan: Sweep, recipe: str) -> None:
    """Refuse a folder that holds something else. Raises ConfigError and SystemFault."""
    if out.exists() and not out.is_dir():
        raise SystemFault(f"--out {out}: is a file, not a folder")
    before = out / MANIFEST
    if before.is_file():
        there = load_json_as(before, dict[str, str])
        for key, mine in (("sweep", plan.name), ("recipe", recipe)):
            if there.get(key) != mine:
                raise ConfigError(
                    f"--out {out}: holds a sweep whose {key} is {there.get(key)}, not {mine}; give "
                    "another --out"
                )
    elif out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise ConfigError(
            f"--out {out}: holds something, but no sweep (no {MANIFEST}); give another --out"
        )


def _list(plan: Sweep, work: SweepPlan) -> None:
    """Say what would be done."""
    rows = [(one.name, "teacher or start", _state(one), str(one.out)) for one in work.base_runs]
    rows += [(store.path.name, "answers to share", "", str(store.path)) for store in work.stores]
    rows += [(one.name, "run", _state(one), str(one.out)) for one in work.runs]
    table(
        "dry run: nothing is trained or written", ("", "what", "state", "folder"), rows, text=True
    )
    if plan.search:
        info(f"{plan.search.trials} trials, proposed one after the other; {DATABASE} keeps them")
        return
    left = len(unfinished(work.runs))
    info(f"{len(work.runs)} runs, {len(work.runs) - left} of them finished")


def _state(run: RunSpec) -> str:
    if run_folder.read_result(run.out) is not None:
        return "finished"
    return "begun" if run_folder.list_checkpoints(run.out) else "new"


def _result(
    plan: Sweep,
    run: Experiment,
    work: SweepPlan,
    mishaps: SweepFailures,
    *,
    searched: SearchResult | None,
    top: int,
    command: str,
) -> dict[str, Any]:
    """What results.json holds."""
    rows, found, first = rows_of(work, mishaps)
    fields = (name for trial in work.trials for name in trial.point.values)
    return {
        "sweep": plan.name,
        "recipe": run.recipe,
        "study": plan.study,
        "fields": list(dict.fromkeys(fields)),
        "split": found["split"],
        "num_samples": found["num_samples"],
        "seeds": list(plan.seeds),
        "rows": rows,
        "best": best_of(rows, top),
        "disagreement": disagreement_matrix(first),
        "search": searched and searched.counts,
        "stopped": {
            one.point.name: {"values": one.point.values, "epoch": one.epoch, "top1": one.top1}
            for one in (searched.stopped if searched else [])
        },
        "command": command,
        "environment": environment_of(rows),
    }


def _print(result: dict[str, Any]) -> None:
    """The table, and the best points."""
    print_rows(result)
    shares = result["disagreement"]
    if result["study"] == "table-4" and len(shares) <= 8:  # the files have it in any case
        rows = [
            (one, *(format_percent(share) for share in row.values())) for one, row in shares.items()
        ]
        table("disagreement, % of the images, first seed", ("", *shares), rows)
    if result["search"]:
        info(", ".join(f"{number} {name}" for name, number in result["search"].items()))
    info(best_summary(result))
    for line in best_lines(result):
        info(f"  {line}")
