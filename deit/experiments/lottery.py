"""`deit lottery`: iterative magnitude pruning with rewinding, beside its controls."""

import json
from pathlib import Path
from typing import Any

from deit.config.schema import Config
from deit.config.validation import load_config
from deit.core import run_folder
from deit.core.console import format_duration, info, table, warn
from deit.core.errors import ConfigError, DeitError
from deit.core.filesystem import check_writable, lock_dir, write_json
from deit.core.json_io import check_same_request
from deit.datasets.loader import updates_of_epoch
from deit.datasets.splits import load_splits
from deit.distill.student_init import load_init_weights, with_init_normalization
from deit.experiments import shared_targets
from deit.experiments.base_runs import BaseRuns, Experiment, slugify
from deit.experiments.finished_runs import FinishedRunChecker
from deit.experiments.lottery_masks import mask_report, write_masks
from deit.experiments.lottery_options import DENSE, RATE, TICKET, LotteryOptions, check_asked
from deit.experiments.lottery_plan import LotteryPlan, LotteryRun, lottery_runs, plan_of
from deit.experiments.lottery_tables import mask_cells, mask_columns, matching, matching_line
from deit.experiments.runner import (
    FailedRun,
    RunProgress,
    RunSpec,
    check_num_parallel,
    combined_error,
)
from deit.experiments.sweep_collect import environment_of, print_rows, rows_of, write_plots
from deit.experiments.sweep_execute import SweepFailures, train_all, unfinished
from deit.experiments.sweep_grid import Point
from deit.experiments.sweep_plan import SweepPlan, SweepRun, check_base_run, check_inputs_exist
from deit.experiments.sweep_tables import MANIFEST, write_results
from deit.models.networks import create_network
from deit.models.surgery.pruning_masks import all_ones, prunable, prune_in
from deit.training.trackers import check_trackers

NAME = "lottery"


def lottery(
    asked: LotteryOptions,
    config: Config,
    out: Path,
    *,
    recipe: str,
    dry_run: bool = False,
    seeds: tuple[int, ...],
    parallel: int,
    retries: int,
    command: str = "",
) -> dict[str, Any]:
    """Train a recipe, prune it level by level with rewinding, train its controls; write
    results.json, results.csv, results.md and a picture into the folder, and print the table.

    parallel: how many runs share the machine. retries: how often a run that failed is tried again.
    The same command goes on with what is not finished, and with more levels, controls or seeds.
    Returns what results.json holds. Raises the errors of deit.core.errors; one for all runs that
    failed, once everything else is written.

    Source: Frankle and Carbin 2019, "The Lottery Ticket Hypothesis"; Frankle et al. 2020, "Linear
    Mode Connectivity and the Lottery Ticket Hypothesis", for going back to an update.
    """
    run = Experiment(recipe, config, out, dry_run)
    check_asked(asked, config)
    check_num_parallel(parallel, option="--parallel")
    if retries < 0:
        raise ConfigError(f"--retries {retries}: should be at least 0")
    check_trackers(run.config)
    manifest = _asked_in_all(asked, run)
    check_same_request(run.out, MANIFEST, manifest, what="search")
    if not run.dry_run:
        check_writable(run.out, option="--out")
    base, plan, updates = _with_normalization(run, asked)
    ground, below, found = _runs(plan, run, base, seeds)
    _announce(plan, base, found, updates)
    _warn_of_ignored_runs(run.out, found)
    if run.dry_run:
        _list(plan, below, found)
        return {}
    run.out.mkdir(parents=True, exist_ok=True)
    with lock_dir(run.out, option="--out"):
        write_json(run.out / MANIFEST, manifest)
        trials = [SweepRun(_point(one, plan), one.seed, one.run) for one in found]
        stores, runs = shared_targets.plan_shared_stores(
            [one.run for one in found], run.out / "targets", content=None
        )
        work = SweepPlan(ground, below, trials, stores, runs)
        mishaps = _train(plan, work, found, parallel=parallel, retries=retries)
        result = _result(asked, plan, run, work, mishaps, found, command)
        for path in write_results(result, run.out) + write_plots(result, run.out):
            info(f"wrote {path}")
    _print(result)
    if mishaps.failed:
        raise combined_error(mishaps.failed)
    return result


def _asked_in_all(asked: LotteryOptions, run: Experiment) -> dict[str, str]:
    """What every call in a folder must have in common: what levels follow from, and all that
    decides the result of a run. As text, as in the folder of any sweep."""
    rewind = "the end of warm-up" if asked.rewind is None else f"{asked.rewind:g}"
    rate = f"{RATE if asked.rate is None else asked.rate:g}"
    fields = shared_targets.result_fields(run.config)
    fields.pop("run.seed", None)
    told = {"sweep": NAME, "recipe": run.recipe, "scope": asked.scope, "rate": rate}
    return {**told, "rewind": rewind, **{name: json.dumps(one) for name, one in fields.items()}}


def _with_normalization(run: Experiment, asked: LotteryOptions) -> tuple[Config, LotteryPlan, int]:
    """The configuration with what all runs must have in common, the plan, and the updates of an
    epoch.

    In common is the normalization, which follows from the initial weights: a rewound run has others
    than the dense one. Raises ConfigError where nothing can be pruned, or not so.
    """
    config = with_init_normalization(run.config, load_init_weights(run.config))
    splits = load_splits(config.data)
    mean, std = config.views.mean or splits.mean, config.views.std or splits.std
    config = config.replace(views={"mean": mean, "std": std})
    updates = updates_of_epoch(len(splits.train.labels), config.optim.batch_size)
    plan = plan_of(asked, config, updates=updates)
    if plan.rewind >= config.optim.epochs * updates:
        raise ConfigError(
            f"--rewind-epoch: goes back to update {plan.rewind}, and a run has "
            f"{config.optim.epochs * updates}"
        )
    weights = prunable(create_network(config.student, len(splits.class_names)))
    if not weights:
        raise ConfigError(f"student.name = {config.student.name!r}: none of its weights can go")
    prune_in(plan.scope)(weights, all_ones(weights), plan.densities[0])  # refuses what does not fit
    return config, plan, updates


def _runs(
    plan: LotteryPlan, run: Experiment, base: Config, seeds: tuple[int, ...]
) -> tuple[BaseRuns, list[RunSpec], list[LotteryRun]]:
    """The teachers and the runs of all seeds. Raises ConfigError and DataError."""
    first = run.config.replace(run={"seed": seeds[0]})
    ground = BaseRuns(run, first, run.out, arms=[first])
    # What it starts from has to be there: it says how images are normalised in all runs.
    laid = ground.with_local_paths(base.replace(init={"weights": None}))
    laid = laid.replace(init={"weights": base.init.weights})
    below = [RunSpec(name, config, run.out / slugify(name)) for name, config in ground.runs.items()]
    for one in below:
        check_base_run(one)
    check_inputs_exist(laid, {str(one.out) for one in below})
    found = [one for seed in seeds for one in lottery_runs(plan, laid, seed, run.out)]
    found = [one._replace(run=_as_begun(one.run)) for one in found]
    return ground, below, found


def _as_begun(run: RunSpec) -> RunSpec:
    """A run with the start and the masks by the paths with which it was begun: from another
    directory, or after a move, they are spelled otherwise. (A run that goes on reads neither.)"""
    if not run_folder.list_checkpoints(run.out) or not (run.out / run_folder.CONFIG).is_file():
        return run
    before, now = load_config(run.out / run_folder.CONFIG).init, run.config.init
    kept = {
        leaf: getattr(before, leaf)
        for leaf in ("weights", "pruning_masks")
        if Path(getattr(before, leaf) or "").name == Path(getattr(now, leaf) or "").name
    }
    return run._replace(config=run.config.replace(init=kept))


def _announce(plan: LotteryPlan, base: Config, found: list[LotteryRun], updates: int) -> None:
    """What it will cost, before anything is trained."""
    sparse = ", ".join(f"{100 * (1 - density):.1f}" for density in plan.densities)
    info(f"levels    {sparse} % of the prunable weights gone (scope {plan.scope})")
    epoch = f" (epoch {plan.rewind / updates:g})" if plan.rewind else ""
    info(f"rewind    to the weights, schedule, order and views of update {plan.rewind}{epoch}")
    left = len(unfinished([one.run for one in found]))
    info(
        f"runs      {len(found)} of {base.optim.epochs} epochs, {len(found) - left} of them "
        "finished; each level waits for the one before"
    )
    info(f"time      {_time([one.run for one in found], updates)}")


def _warn_of_ignored_runs(out: Path, found: list[LotteryRun]) -> None:
    """Runs that are there and not in these results: fewer levels, controls or seeds were named."""
    asked = {ticket.run.out for ticket in found}
    there = {file.parent for file in out.glob(f"seed-*/*/{run_folder.RESULT}")} - asked
    if there:
        warn(
            f"{len(there)} finished runs in {out} are left out of these results, as {min(there)}: "
            "name their levels, controls and seeds to have them in"
        )


def _time(runs: list[RunSpec], updates: int) -> str:
    """How many updates are left, without the teachers', and how long they will take, as far as runs
    that are finished tell. updates: of an epoch."""
    left = sum(
        one.config.optim.epochs * updates - max(one.config.init.start_step, _num_steps_done(one))
        for one in unfinished(runs)
    )
    ended = [result for one in runs if (result := run_folder.read_result(one.out)) is not None]
    made = sum(result["samples_seen"] for result in ended) / runs[0].config.optim.batch_size
    if not left or not made:
        later = "; how long they take is told once a run is finished"
        return f"{left:,} updates, teachers' aside{later if left else ''}"
    each = sum(result["seconds"] for result in ended) / made
    return (
        f"{left:,} updates, teachers' aside; {format_duration(left * each)} one run after another, "
        "if each "
        f"takes {each:.3g} s as in the runs that are finished"
    )


def _num_steps_done(run: RunSpec) -> int:
    """The updates of which a run has a checkpoint."""
    return max((step for step, _ in run_folder.list_checkpoints(run.out)), default=0)


def _list(plan: LotteryPlan, below: list[RunSpec], found: list[LotteryRun]) -> None:
    rows = [("teacher or start", "", one.name, str(one.out)) for one in below]
    rows += [(one.kind, _sparsity(one, plan), str(one.seed), str(one.run.out)) for one in found]
    title = "dry run: nothing is trained or written"
    table(title, ("", "sparsity %", "seed", "folder"), rows, text=True)


def _sparsity(ticket: LotteryRun, plan: LotteryPlan) -> str:
    """In %, with as many digits as tell the levels apart."""
    for digits in range(1, 9):
        told = [f"{100 * (1 - density):.{digits}f}" for density in (1.0, *plan.densities)]
        if len(set(told)) == len(told):
            break
    return told[ticket.level]


def _point(ticket: LotteryRun, plan: LotteryPlan) -> Point:
    """A run as a point of a sweep over its kind and sparsity."""
    sparsity = _sparsity(ticket, plan)
    name = DENSE if ticket.kind == DENSE else f"{ticket.kind}, {sparsity} %"
    return Point(name, {"run": ticket.kind, "sparsity %": sparsity}, ticket.run.config)


def _train(
    plan: LotteryPlan, work: SweepPlan, found: list[LotteryRun], *, parallel: int, retries: int
) -> SweepFailures:
    """Train level by level, of all seeds together, each with its controls; a level that fails bars
    those behind it, of its seed."""
    finished, mishaps = FinishedRunChecker(), SweepFailures([], {})
    finished.check([*work.base_runs, *work.runs])
    taught = {run.out: run for run in work.runs}
    progress = RunProgress(len(unfinished(work.base_runs)) + len(unfinished(work.runs)))
    told: set[str] = set()  # the stores that are complete
    for level in range(len(plan.densities) + 1):
        ready = []
        for ticket in (one for one in found if one.level == level):
            reason = _missing_input(ticket, mishaps)
            if reason is None:
                reason = _write_masks_or_reason(ticket, plan, mishaps)
            if reason is None:
                ready.append(taught[ticket.run.out])
            else:
                progress.total -= 1
        stores = [store for store in work.stores if str(store.path) not in told]
        told |= {target for run in unfinished(ready) for target in run.config.teacher.target_stores}
        now = train_all(
            work._replace(runs=ready, stores=stores),
            finished=finished,
            parallel=parallel,
            retries=retries,
            progress=progress,
        )
        mishaps.failed.extend(now.failed)
        mishaps.blocked.update(now.blocked)
    return mishaps


def _missing_input(ticket: LotteryRun, mishaps: SweepFailures) -> str | None:
    """What a run needs and does not have; noted. None where nothing is lacking. Of a control that
    is the ticket's masks, too."""
    if ticket.level == 0:
        return None
    needed = ticket.run.out.with_name(f"level-{ticket.level - 1}")
    own = ticket.run.out.with_name(f"level-{ticket.level}")
    if ticket.kind != TICKET and own in mishaps.reasons():
        needed = own
    if needed not in mishaps.reasons():
        return None
    mishaps.blocked[ticket.run.out] = f"needs {needed}, which is not there"
    return mishaps.blocked[ticket.run.out]


def _write_masks_or_reason(
    ticket: LotteryRun, plan: LotteryPlan, mishaps: SweepFailures
) -> str | None:
    """Write the masks of a run; the reason where they cannot be, noted."""
    try:
        write_masks(ticket, plan)
    except DeitError as error:
        log = ticket.run.out.with_name(f"{ticket.run.out.name}.log")
        mishaps.failed.append(FailedRun(ticket.run, error.exit_code, str(error), log))
        return str(error)
    return None


def _result(
    asked: LotteryOptions,
    plan: LotteryPlan,
    run: Experiment,
    work: SweepPlan,
    mishaps: SweepFailures,
    found: list[LotteryRun],
    command: str,
) -> dict[str, Any]:
    """What results.json holds: that of a sweep over kind and sparsity, with the facts of the masks
    of the first seed."""
    rows, last, _ = rows_of(work, mishaps)
    for one in found:
        rows[_point(one, plan).name]["level"] = one.level
    masks = {
        _point(one, plan).name: mask_report(one)
        for one in found
        if one.seed == found[0].seed
        and one.kind in (DENSE, TICKET)
        and run_folder.read_result(one.run.out) is not None
    }
    return {
        "sweep": NAME,
        "recipe": run.recipe,
        "study": NAME,
        "fields": ["run", "sparsity %"],
        "split": last["split"],
        "num_samples": last["num_samples"],
        "seeds": list(dict.fromkeys(one.seed for one in found)),
        "rows": rows,
        "best": [],
        "disagreement": {},
        "search": None,
        "stopped": {},
        "tickets": {
            "scope": plan.scope,
            "rewind": plan.rewind,
            "tolerance": asked.tolerance,
            "matching": matching(rows, asked.tolerance),
            "masks": masks,
        },
        "command": command,
        "environment": environment_of(rows),
    }


def _print(result: dict[str, Any]) -> None:
    print_rows(result)
    table(f"what is left, seed {result['seeds'][0]}", mask_columns(), mask_cells(result))
    info(matching_line(result))
