"""`deit lottery`: iterative magnitude pruning with rewinding, compared with control runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deit.config.command_choices import RETRIES, check_at_least
from deit.config.input_paths import with_missing_images
from deit.config.schema import Config
from deit.config.validation import load_config, validate
from deit.core import run_folder
from deit.core.console import info, table, warn
from deit.core.errors import ConfigError, DeitError
from deit.core.filesystem import check_writable, lock_dir, write_json
from deit.core.json_io import check_same_request
from deit.datasets.splits import load_splits
from deit.datasets.view_batches import num_steps_per_epoch
from deit.distill.student_init import load_init_weights, with_init_normalization
from deit.experiments import shared_targets
from deit.experiments.base_runs import UNNAMED, BaseRuns, Experiment, slugify
from deit.experiments.finished_runs import FinishedRunChecker
from deit.experiments.lottery_masks import mask_report, write_masks
from deit.experiments.lottery_options import DENSE, RATE, TICKET, LotteryOptions, check_options
from deit.experiments.lottery_plan import (
    LotteryPlan,
    LotteryRun,
    log_plan,
    lottery_runs,
    plan_lottery,
    point_of,
    print_runs,
)
from deit.experiments.lottery_tables import mask_cells, mask_columns, matching, matching_line
from deit.experiments.parallel_runs import (
    FailedRun,
    RunProgress,
    RunSpec,
    check_num_parallel,
    combined_error,
)
from deit.experiments.sweep_collect import collect_rows, environment_of, print_rows, write_plots
from deit.experiments.sweep_execute import SweepFailures, train_all, unfinished
from deit.experiments.sweep_plan import SweepPlan, SweepRun, check_base_run, check_inputs_exist
from deit.experiments.sweep_tables import MANIFEST, write_results
from deit.models.registry import create_network
from deit.models.surgery.pruning_masks import all_ones, prunable, prune_in
from deit.training.trackers import check_trackers

NAME = "lottery"


def lottery(
    config: Config,
    out: str | Path,
    options: LotteryOptions = LotteryOptions(),
    *,
    recipe: str = UNNAMED,
    seeds: Sequence[int] = (0,),
    parallel: int = 1,
    retries: int = RETRIES,
    dry_run: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Train a configuration, prune it round by round with rewinding, and train its controls.

    Writes results.json, tables (results.md, results.tex, results.csv, points.csv) and a plot into
    `out`, and prints the table. The same call resumes; it may have more rounds, controls or seeds.

    recipe: of the configuration, for the results. Teachers that are runs of built-in recipes are
    trained first. seeds: each trains all runs. parallel: number of runs in parallel. retries: after
    a transient failure. dry_run: only list the runs. command: recorded in the results.

    Returns the content of results.json. Raises the errors of deit.core.errors; one error for all
    failed runs, after the results of the others are written.

    Source: Frankle and Carbin 2019, arXiv 1803.03635; rewinding to a later step: Frankle et al.
    2020, arXiv 1912.05671.

    >>> from deit.core.console import quiet
    >>> options = LotteryOptions(rounds=1, prune_rate=0.5, controls=())
    >>> with quiet():
    ...     result = lottery(load_config("checkpoints/digits/config.json"), "tickets", options)
    >>> {name: masks["kept"] for name, masks in result["lottery"]["masks"].items()}
    {'dense': 3072, 'ticket, 50.0 %': 1536}
    """
    config, out = validate(config, live_teacher=False), Path(out)
    _check(options, config, parallel=parallel, retries=retries)
    experiment = Experiment(recipe, config, out, dry_run)
    request = _identity(options, experiment)
    with with_missing_images(config.data):
        check_same_request(out, MANIFEST, request, what="lottery experiment")
    if not dry_run:
        check_writable(out, name="out")
    normalized, plan, steps_per_epoch = _plan(options, config)
    sources, base_runs, runs = _runs(plan, experiment, normalized, seeds)
    log_plan(plan, normalized, runs, steps_per_epoch)
    _warn_of_ignored_runs(out, runs)
    if dry_run:
        print_runs(plan, base_runs, runs)
        return {}
    out.mkdir(parents=True, exist_ok=True)
    with lock_dir(out, name="out"):
        write_json(out / MANIFEST, request)
        sweep_plan = _sweep_plan(sources, base_runs, plan, runs)
        failures = _train(plan, sweep_plan, runs, parallel=parallel, retries=retries)
        result = _result(options, plan, experiment, sweep_plan, failures, runs, command)
        _write(result, out)
    _print_result(result)
    if failures.failed:
        raise combined_error(failures.failed)
    return result


def _check(options: LotteryOptions, config: Config, *, parallel: int, retries: int) -> None:
    """Check the options before any image is read. Raises ConfigError and SystemFault."""
    check_options(options, config)
    check_num_parallel(parallel, name="parallel")
    check_at_least("retries", retries, 0)
    check_trackers(config.run.trackers)


def _identity(options: LotteryOptions, experiment: Experiment) -> dict[str, str]:
    """Return what identifies an experiment, as text: all calls for one folder have it in common.

    It is the options that determine the levels, and the fields that determine the result of a run.
    """
    rewind = "the end of warm-up" if options.rewind_epoch is None else f"{options.rewind_epoch:g}"
    rate = f"{RATE if options.prune_rate is None else options.prune_rate:g}"
    fields = shared_targets.result_fields(experiment.config)
    fields.pop("run.seed", None)
    return {
        "sweep": NAME,
        "recipe": experiment.recipe,
        "scope": options.scope,
        "prune_rate": rate,
        "rewind_epoch": rewind,
        **{name: json.dumps(value) for name, value in fields.items()},
    }


def _plan(options: LotteryOptions, config: Config) -> tuple[Config, LotteryPlan, int]:
    """Return the configuration with the normalization of all runs, the plan, and the steps per
    epoch.

    The normalization is set here because it can follow from the initial weights, and a rewound run
    has other initial weights than the dense run. Raises ConfigError if the weights cannot be pruned
    in this way.
    """
    config = with_init_normalization(config, load_init_weights(config.init))
    splits = load_splits(config.data)
    mean, std = config.views.mean or splits.mean, config.views.std or splits.std
    config = config.replace(views={"mean": mean, "std": std})
    steps_per_epoch = num_steps_per_epoch(len(splits.train.labels), config.optim.batch_size)
    plan = plan_lottery(options, config, steps_per_epoch=steps_per_epoch)
    num_steps = config.optim.epochs * steps_per_epoch
    if plan.rewind_step >= num_steps:
        raise ConfigError(
            f"rewind_epoch = {plan.rewind_step / steps_per_epoch:g}: rewinds to step "
            f"{plan.rewind_step}, but a run has {num_steps} steps only"
        )
    weights = prunable(create_network(config.student, len(splits.class_names)))
    if not weights:
        raise ConfigError(f"student.name = {config.student.name!r}: has no prunable weights")
    prune = prune_in(plan.scope)
    prune(weights, all_ones(weights), plan.densities[0])  # raises ConfigError if it cannot
    return config, plan, steps_per_epoch


def _runs(
    plan: LotteryPlan, experiment: Experiment, config: Config, seeds: Sequence[int]
) -> tuple[BaseRuns, list[RunSpec], list[LotteryRun]]:
    """Return the base runs and the runs of all seeds. config: from `_plan`.

    Raises ConfigError and DataError.
    """
    out = experiment.out
    first = experiment.config.replace(run={"seed": seeds[0]})
    recipe_config = experiment.config if experiment.recipe == UNNAMED else None
    sources = BaseRuns(experiment, first, out, recipe_config=recipe_config, arms=[first])
    # Initial weights are never trained as a base run: they must exist, since they set the
    # normalization. So their path stays as it is.
    with_paths = sources.with_local_paths(config.replace(init={"weights": None}))
    with_paths = with_paths.replace(init={"weights": config.init.weights})
    base_runs = [
        RunSpec(name, base_config, out / slugify(name))
        for name, base_config in sources.runs.items()
    ]
    for run in base_runs:
        check_base_run(run)
    check_inputs_exist(with_paths, {str(run.out) for run in base_runs})
    runs = [run for seed in seeds for run in lottery_runs(plan, with_paths, seed, out)]
    runs = [run._replace(spec=_with_recorded_paths(run.spec)) for run in runs]
    return sources, base_runs, runs


def _with_recorded_paths(run: RunSpec) -> RunSpec:
    """Return a run with the paths of initial weights and masks that it was started with.

    From another working directory, or after a move, the same files have other paths, and a run
    whose paths differ could not be resumed. A resumed run does not read the files themselves.
    """
    if not run_folder.list_checkpoints(run.out) or not (run.out / run_folder.CONFIG).is_file():
        return run
    recorded, planned = load_config(run.out / run_folder.CONFIG).init, run.config.init
    recorded_paths = {
        field: getattr(recorded, field)
        for field in ("weights", "pruning_masks")
        if Path(getattr(recorded, field) or "").name == Path(getattr(planned, field) or "").name
    }
    return run._replace(config=run.config.replace(init=recorded_paths))


def _warn_of_ignored_runs(out: Path, runs: list[LotteryRun]) -> None:
    """Warn of finished runs in the folder whose levels, controls or seeds were not requested."""
    requested = {run.spec.out for run in runs}
    ignored = {path.parent for path in out.glob(f"seed-*/*/{run_folder.RESULT}")} - requested
    if ignored:
        warn(
            f"{len(ignored)} finished runs in {out} are not in these results, for example "
            f"{min(ignored)}; add their rounds, controls and seeds to include them"
        )


def _sweep_plan(
    sources: BaseRuns, base_runs: list[RunSpec], plan: LotteryPlan, runs: list[LotteryRun]
) -> SweepPlan:
    """Return the runs as those of a sweep over kind and sparsity, with the stores they share."""
    stores, specs_with_stores = shared_targets.plan_shared_stores(
        [run.spec for run in runs], sources.folder / "targets", content=None
    )
    return SweepPlan(
        sources=sources,
        base_runs=base_runs,
        sweep_runs=[SweepRun(point_of(run, plan), run.seed, run.spec) for run in runs],
        stores=stores,
        runs=specs_with_stores,
    )


def _train(
    plan: LotteryPlan,
    sweep_plan: SweepPlan,
    runs: list[LotteryRun],
    *,
    parallel: int,
    retries: int,
) -> SweepFailures:
    """Train level by level, each level of all seeds with its controls. A failed level blocks the
    later levels of its seed."""
    finished, failures = FinishedRunChecker(), SweepFailures([], {})
    finished.check([*sweep_plan.base_runs, *sweep_plan.runs])
    spec_of = {spec.out: spec for spec in sweep_plan.runs}  # with the stores that runs share
    progress = RunProgress(len(unfinished(sweep_plan.base_runs)) + len(unfinished(sweep_plan.runs)))
    stores_of_earlier_levels: set[str] = set()  # which wrote them, or failed
    for level in range(len(plan.densities) + 1):
        ready = []
        for run in (run for run in runs if run.level == level):
            if _has_inputs(run, failures) and _write_masks(run, plan, failures):
                ready.append(spec_of[run.spec.out])
            else:
                progress.total -= 1
        stores = [
            store for store in sweep_plan.stores if str(store.path) not in stores_of_earlier_levels
        ]
        for spec in unfinished(ready):
            stores_of_earlier_levels.update(spec.config.teacher.target_stores)
        level_failures = train_all(
            sweep_plan._replace(runs=ready, stores=stores),
            finished=finished,
            parallel=parallel,
            retries=retries,
            progress=progress,
        )
        failures.failed.extend(level_failures.failed)
        failures.blocked.update(level_failures.blocked)
    return failures


def _has_inputs(run: LotteryRun, failures: SweepFailures) -> bool:
    """Return whether the runs that a run depends on have finished; if not, add it to `failures`.

    A run needs the level before it. A control also needs the masks of its ticket.
    """
    if run.level == 0:
        return True
    needed = [run.spec.out.with_name(f"level-{run.level - 1}")]
    if run.kind != TICKET:
        needed.insert(0, run.spec.out.with_name(f"level-{run.level}"))
    failed = [folder for folder in needed if folder in failures.reasons()]
    if failed:
        failures.blocked[run.spec.out] = f"needs {failed[0]}, which did not finish"
    return not failed


def _write_masks(run: LotteryRun, plan: LotteryPlan, failures: SweepFailures) -> bool:
    """Write the masks of a run; return whether that succeeded, and if not, add it to `failures`."""
    try:
        write_masks(run, plan)
    except DeitError as error:
        log = run.spec.out.with_name(f"{run.spec.out.name}.log")
        failures.failed.append(FailedRun(run.spec, error.exit_code, str(error), log))
        return False
    return True


def _result(
    options: LotteryOptions,
    plan: LotteryPlan,
    experiment: Experiment,
    sweep_plan: SweepPlan,
    failures: SweepFailures,
    runs: list[LotteryRun],
    command: str,
) -> dict[str, Any]:
    """Return the content of results.json: that of a sweep over kind and sparsity, with a report of
    the masks of the first seed."""
    rows, evaluation, _ = collect_rows(sweep_plan, failures)
    for run in runs:
        rows[point_of(run, plan).name]["level"] = run.level
    masks = {
        point_of(run, plan).name: mask_report(run)
        for run in runs
        if run.seed == runs[0].seed
        and run.kind in (DENSE, TICKET)
        and run_folder.read_result(run.spec.out) is not None
    }
    return {
        "sweep": NAME,
        "recipe": experiment.recipe,
        "study": NAME,
        "fields": ["run", "sparsity %"],
        "split": evaluation["split"],
        "num_samples": evaluation["num_samples"],
        "seeds": list(dict.fromkeys(run.seed for run in runs)),
        "rows": rows,
        "best": [],
        "disagreement": {},
        "search": None,
        "stopped": {},
        "lottery": {
            "scope": plan.scope,
            "rewind": plan.rewind_step,
            "tolerance": options.tolerance,
            "matching": matching(rows, options.tolerance),
            "masks": masks,
        },
        "command": command,
        "environment": environment_of(rows),
    }


def _write(result: dict[str, Any], out: Path) -> None:
    for path in write_results(result, out) + write_plots(result, out):
        info(f"wrote {path}")


def _print_result(result: dict[str, Any]) -> None:
    print_rows(result)
    table(f"pruning masks, seed {result['seeds'][0]}", mask_columns(), mask_cells(result))
    info(f"matching runs are {matching_line(result)}")
