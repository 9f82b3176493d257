"""Train the runs of a sweep after their base runs and target stores; a failure stops only the runs
that depend on it."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from deit.config.schema import Config
from deit.core import run_folder
from deit.core.console import info
from deit.core.errors import ConfigError, DeitError
from deit.datasets.splits import load_splits
from deit.experiments import shared_targets
from deit.experiments.finished_runs import FinishedRunChecker
from deit.experiments.parallel_runs import (
    FailedRun,
    RunProgress,
    RunSpec,
    combined_error,
    is_retryable,
    run_parallel,
)
from deit.experiments.search import PrunedTrial, Search
from deit.experiments.sweep_grid import Point
from deit.experiments.sweep_plan import SweepPlan, make_sweep_runs
from deit.experiments.sweep_spec import Sweep


class SweepFailures(NamedTuple):
    """The failures of a sweep.

    failed: runs, base runs and target stores that failed. blocked: the reason for each run that
    could not start, by its folder.
    """

    failed: list[FailedRun]
    blocked: dict[Path, str]

    def reasons(self) -> dict[Path, str]:
        """Return the reason for each missing run, by its folder."""
        return {failure.run.out: failure.reason for failure in self.failed} | self.blocked


def train_all(
    plan: SweepPlan,
    *,
    finished: FinishedRunChecker,
    parallel: int,
    retries: int,
    progress: RunProgress | None = None,
) -> SweepFailures:
    """Train what is unfinished: the base runs, then the shared stores, then the runs.

    parallel: number of runs in parallel. retries: number of retries after a transient failure.
    progress: counts these runs. Default: a new counter.

    A failure stops only the runs that depend on it. Raises DataError if a teacher is trained again
    and differs from the teacher of finished runs.
    """
    failures, missing = SweepFailures([], {}), dict[str, str]()
    left = unfinished(plan.runs)
    if len(left) < len(plan.runs) and progress is None:
        info(f"{len(plan.runs) - len(left)} of {len(plan.runs)} runs are finished already")
    if not left:
        return failures
    for data in dict.fromkeys(run.config.data for run in left if run.config.data.download):
        load_splits(data)  # downloads here, so that parallel runs do not
    base_runs = unfinished(plan.base_runs)
    progress = progress or RunProgress(len(base_runs) + len(left))
    for base_run in base_runs:  # one at a time, since one can depend on another
        for ready in _ready([base_run], missing, failures, progress):
            failed = train_with_retries([ready], parallel=1, retries=retries, progress=progress)
            _add_failures(failed, missing, failures)
        if base_run.out in failures.blocked:
            missing[str(base_run.out)] = failures.blocked[base_run.out]
    if base_runs:
        finished.check(plan.runs)
    used = {target for run in left for target in run.config.teacher.target_stores}
    for store in plan.stores:
        # The store as a run, so that its failure is handled as a run's.
        run = RunSpec(store.path.name, store.config, store.path)
        if str(store.path) in used and _ready([run], missing, failures, None):
            info(f"targets shared by several runs: {store.path}")
            _add_failures(_write_store(store, run), missing, failures)
        if store.path in failures.blocked:
            missing[str(store.path)] = failures.blocked.pop(store.path)
    ready = _ready(left, missing, failures, progress)
    failures.failed.extend(
        train_with_retries(ready, parallel=parallel, retries=retries, progress=progress)
    )
    return failures


def unfinished(runs: Iterable[RunSpec]) -> list[RunSpec]:
    """Return the runs that are not finished."""
    return [run for run in runs if run_folder.read_result(run.out) is None]


def _ready(
    runs: list[RunSpec],
    missing: dict[str, str],
    failures: SweepFailures,
    progress: RunProgress | None,
) -> list[RunSpec]:
    """Return the runs whose inputs exist; add the others to the failures. missing: inputs that
    failed, with the reason. progress: counts the runs."""
    ready = []
    for run in runs:
        teacher, weights = run.config.teacher, run.config.init.weights
        inputs = [*teacher.target_stores, *teacher.source, *([weights] if weights else [])]
        if run.config.loss.kind == "none":
            inputs = [weights] if weights else []
        failed_input = next((source for source in inputs if source in missing), None)
        if failed_input is None:
            ready.append(run)
        else:
            if progress is not None:
                progress.total -= 1
            failures.blocked[run.out] = (
                f"needs {failed_input}, which failed: {missing[failed_input]}"
            )
    return ready


def _add_failures(
    failed: list[FailedRun], missing: dict[str, str], failures: SweepFailures
) -> None:
    failures.failed.extend(failed)
    missing.update({str(failure.run.out): failure.reason for failure in failed})


def train_with_retries(
    runs: list[RunSpec], *, parallel: int, retries: int, progress: RunProgress
) -> list[FailedRun]:
    """Train runs and retry transient failures. Return the runs that failed each time."""
    failed = run_parallel(runs, num_parallel=parallel, progress=progress) if runs else []
    for _ in range(retries):
        retryable = [failure for failure in failed if is_retryable(failure.code)]
        if not retryable:
            break
        for failure in retryable:
            info(f"{failure.run.name}: retrying ({failure.reason.splitlines()[0]})")
        permanent = [failure for failure in failed if not is_retryable(failure.code)]
        progress.total += len(retryable)
        failed = permanent + run_parallel(
            [failure.run for failure in retryable], num_parallel=parallel, progress=progress
        )
    return failed


def _write_store(store: shared_targets.TargetStorePlan, run: RunSpec) -> list[FailedRun]:
    try:
        shared_targets.write(store)
    except DeitError as error:
        return [FailedRun(run, error.exit_code, str(error), store.path)]
    return []


class SearchResult(NamedTuple):
    """The result of a search.

    finished: the points of finished trials, the best first. stopped: the trials stopped below the
    median. counts: the number of trials by outcome. failed: the points of failed trials with their
    failures.
    """

    finished: list[Point]
    stopped: list[PrunedTrial]
    counts: dict[str, int]
    failed: list[tuple[Point, FailedRun]]


def search_all(
    sweep: Sweep,
    config: Config,
    plan: SweepPlan,
    *,
    finished: FinishedRunChecker,
    parallel: int,
    retries: int,
) -> SearchResult:
    """Run, or resume, the search of a sweep until all its trials have ended.

    config: the recipe with the fields that are set in all trials. Raises DeitError if a base run
    fails or no trial finishes; DataError if finished trials had other images or teachers.
    """
    sources, out, seed = plan.sources, plan.sources.folder, sweep.seeds[0]
    first = config.replace(run={"seed": seed})
    base = sources.with_local_paths(first)
    base_key = shared_targets.teacher_query_key(base)
    targets: tuple[str, ...] = ()

    def run_of(point: Point) -> RunSpec:
        (sweep_run,) = make_sweep_runs([point], (seed,), out, sources.with_local_paths)
        trial_config = sweep_run.run.config
        has_teacher = trial_config.loss.kind != "none"
        matches = has_teacher and shared_targets.teacher_query_key(trial_config) == base_key
        if not (targets and matches and trial_config.optim.epochs <= base.optim.epochs):
            return sweep_run.run
        return sweep_run.run._replace(
            config=trial_config.replace(teacher={"target_stores": targets})
        )

    options = {"name": sweep.name, "seed": seed, "search_hash": _search_hash(sweep, first)}
    search = Search(sweep.search, config, out, **options, run_of=run_of, retries=retries)
    finished.check(map(run_of, search.finished()))
    if num_done := search.num_done():
        num_trials = sweep.search.trials
        info(f"{min(num_done, num_trials)} of {num_trials} trials have ended already")
    failed: dict[Path, FailedRun] = {}
    if search.num_left():
        _train_base_runs(plan, search, retries)
        finished.check(map(run_of, search.finished()))  # a new teacher may differ
        targets = _write_targets(sweep, base, out)
    while search.num_left():
        # Repeated, since a trial that fails last is proposed again only after the loop below ends.
        ended = run_parallel(
            search.runs(), num_parallel=parallel, progress=search.progress, observer=search
        )
        failed |= {failure.run.out: failure for failure in ended}
    failed_trials = [(point, failed[run_of(point).out]) for point in search.failed()]
    points = search.finished()
    if not points:
        if failed_trials:
            raise combined_error([failure for _, failure in failed_trials])
        raise ConfigError(f"out = {out}: no trial finished; see the logs of its runs")
    return SearchResult(points, search.stopped(), search.counts(), failed_trials)


def _search_hash(sweep: Sweep, first: Config) -> str:
    """Return a hash of all that decides the results of a search. first: the recipe with the seed of
    the search."""
    fields = {name: repr(values) for name, values in sweep.search.fields.items()}
    return shared_targets.content_hash(
        {**shared_targets.result_fields(first), **fields, "seed": sweep.seeds[0]}
    )


def _train_base_runs(plan: SweepPlan, search: Search, retries: int) -> None:
    """Train the base runs of a search one after another. Raises DeitError if one fails."""
    base_runs = unfinished(plan.base_runs)
    search.progress.total = len(base_runs) + search.num_left()
    for run in base_runs:
        failed = train_with_retries([run], parallel=1, retries=retries, progress=search.progress)
        if failed:
            raise combined_error(failed)


def _write_targets(sweep: Sweep, base: Config, out: Path) -> tuple[str, ...]:
    """Write the stores of the recipe's teacher outputs; return their paths. Returns none if the
    sweep shares no targets."""
    if not sweep.share_targets:
        return ()
    # Two runs stand for the trials, which are not known yet: a store is shared by at least two.
    twice = [RunSpec(str(index), base, out / str(index)) for index in range(2)]
    content = sweep.content or "full"
    stores, (shared, _) = shared_targets.plan_shared_stores(twice, out / "targets", content=content)
    for store in stores:
        shared_targets.write(store)
    return shared.config.teacher.target_stores
