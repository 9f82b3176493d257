"""The runs of a sweep trained, after what they build on and share; a failure bars whom it must."""

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
from deit.experiments.runner import (
    FailedRun,
    RunProgress,
    RunSpec,
    combined_error,
    is_retryable,
    run_parallel,
)
from deit.experiments.search import PrunedTrial, Search
from deit.experiments.sweep_grid import Point
from deit.experiments.sweep_plan import SweepPlan, trials_of
from deit.experiments.sweep_spec import Sweep


class SweepFailures(NamedTuple):
    """What went wrong. failed: runs, teachers and stores that could not be made. barred: by the
    folder of a run that could not even begin, the reason."""

    failed: list[FailedRun]
    blocked: dict[Path, str]

    def reasons(self) -> dict[Path, str]:
        """By the folder of each run that is not there, why."""
        return {one.run.out: one.reason for one in self.failed} | self.blocked


def train_all(
    work: SweepPlan,
    *,
    finished: FinishedRunChecker,
    parallel: int,
    retries: int,
    progress: RunProgress | None = None,
) -> SweepFailures:
    """Train what is not finished: what runs build on, then the answers they share, then the runs,
    so many at once; again, so often, where the reason may pass. progress: of these and what else
    there is; None: of these alone.

    What fails stops nothing but the runs that need it. Raises DataError where a teacher is trained
    anew and becomes another than the one that taught finished runs.
    """
    mishaps, gone = SweepFailures([], {}), dict[str, str]()
    left = unfinished(work.runs)
    if len(left) < len(work.runs) and progress is None:
        info(f"{len(work.runs) - len(left)} of {len(work.runs)} runs are finished already")
    if not left:
        return mishaps
    for data in dict.fromkeys(run.config.data for run in left if run.config.data.download):
        load_splits(data)  # fetched once, before runs beside each other all would
    anew = unfinished(work.base_runs)
    progress = progress or RunProgress(len(anew) + len(left))
    for one in anew:  # one may build on another
        for ready in _able([one], gone, mishaps, progress):
            failed = train_with_retries([ready], parallel=1, retries=retries, progress=progress)
            _note(failed, gone, mishaps)
        if one.out in mishaps.blocked:
            gone[str(one.out)] = mishaps.blocked[one.out]
    if anew:
        finished.check(work.runs)
    used = {target for run in left for target in run.config.teacher.target_stores}
    for store in work.stores:
        asking = RunSpec(store.path.name, store.config, store.path)
        if str(store.path) in used and _able([asking], gone, mishaps, None):
            info(f"answers that runs share: {store.path}")
            _note(_written(store, asking), gone, mishaps)
        if store.path in mishaps.blocked:
            gone[str(store.path)] = mishaps.blocked.pop(store.path)
    able = _able(left, gone, mishaps, progress)
    mishaps.failed.extend(
        train_with_retries(able, parallel=parallel, retries=retries, progress=progress)
    )
    return mishaps


def unfinished(runs: Iterable[RunSpec]) -> list[RunSpec]:
    """Those that are still to be trained, or to go on."""
    return [run for run in runs if run_folder.read_result(run.out) is None]


def _able(
    runs: list[RunSpec], gone: dict[str, str], mishaps: SweepFailures, progress: RunProgress | None
) -> list[RunSpec]:
    """The runs that lack nothing; the others are noted. gone: what could not be made, and why.
    progress: what counts them."""
    able = []
    for run in runs:
        teacher, start = run.config.teacher, run.config.init.weights
        needed = [*teacher.target_stores, *teacher.source, *([start] if start else [])]
        if run.config.loss.kind == "none":
            needed = [start] if start else []
        lacking = next((one for one in needed if one in gone), None)
        if lacking is None:
            able.append(run)
        else:
            if progress is not None:
                progress.total -= 1
            mishaps.blocked[run.out] = f"needs {lacking}, which failed: {gone[lacking]}"
    return able


def _note(failed: list[FailedRun], gone: dict[str, str], mishaps: SweepFailures) -> None:
    mishaps.failed.extend(failed)
    gone.update({str(one.run.out): one.reason for one in failed})


def train_with_retries(
    runs: list[RunSpec], *, parallel: int, retries: int, progress: RunProgress
) -> list[FailedRun]:
    """Train runs, those that fail again so often. Returns those that failed each time."""
    failed = run_parallel(runs, number=parallel, progress=progress) if runs else []
    for _ in range(retries):
        again = [one for one in failed if is_retryable(one.code)]
        if not again:
            break
        for one in again:
            info(f"{one.run.name}: once more ({one.reason.splitlines()[0]})")
        kept = [one for one in failed if not is_retryable(one.code)]
        progress.total += len(again)
        failed = kept + run_parallel([one.run for one in again], number=parallel, progress=progress)
    return failed


def _written(store: shared_targets.TargetStorePlan, asking: RunSpec) -> list[FailedRun]:
    try:
        shared_targets.write(store)
    except DeitError as error:
        return [FailedRun(asking, error.exit_code, str(error), store.path)]
    return []


class SearchResult(NamedTuple):
    """What a search came to. finished: the points of the trials that ran to their end, the best
    first. stopped: those that lay below the median. counts: how many trials ended how. failed: the
    points of the trials that failed, each with how."""

    finished: list[Point]
    stopped: list[PrunedTrial]
    counts: dict[str, int]
    failed: list[tuple[Point, FailedRun]]


def search_all(
    plan: Sweep,
    config: Config,
    work: SweepPlan,
    *,
    finished: FinishedRunChecker,
    parallel: int,
    retries: int,
) -> SearchResult:
    """Run the search of a sweep to its end, from wherever it is.

    config: the recipe with what is set for all. Raises DeitError where a teacher or start fails, or
    no trial finished; DataError where finished trials had other images or teachers.
    """
    ground, out, seed = work.ground, work.ground.folder, plan.seeds[0]
    first = config.replace(run={"seed": seed})
    base = ground.with_local_paths(first)
    question = shared_targets.teacher_query_key(base)
    targets: tuple[str, ...] = ()

    def planned(point: Point) -> RunSpec:
        (trial,) = trials_of([point], (seed,), out, ground.with_local_paths)
        own = trial.run.config
        same = own.loss.kind != "none" and shared_targets.teacher_query_key(own) == question
        if not (targets and same and own.optim.epochs <= base.optim.epochs):
            return trial.run
        return trial.run._replace(config=own.replace(teacher={"target_stores": targets}))

    fields = {name: repr(one) for name, one in plan.search.fields.items()}
    of = shared_targets.content_hash(
        {**shared_targets.result_fields(first), **fields, "seed": seed}
    )
    search = Search(
        plan.search, config, out, name=plan.name, seed=seed, of=of, plan=planned, retries=retries
    )
    finished.check(map(planned, search.finished()))
    if over := search.done():
        info(f"{min(over, plan.search.trials)} of {plan.search.trials} trials are over already")
    failed: dict[Path, FailedRun] = {}
    if search.left():
        anew = unfinished(work.base_runs)
        search.progress.total = len(anew) + search.left()
        for one in anew:
            if wrong := train_with_retries(
                [one], parallel=1, retries=retries, progress=search.progress
            ):
                raise combined_error(wrong)
        finished.check(map(planned, search.finished()))  # a teacher may be another than it was
        targets = _stored(plan, base, out)
    while search.left():
        # Once more: a trial that fails when no other is to be begun is proposed anew.
        ended = run_parallel(search.runs(), number=parallel, progress=search.progress, watch=search)
        failed |= {one.run.out: one for one in ended}
    lost = [(point, failed[planned(point).out]) for point in search.failed()]
    points = search.finished()
    if not points:
        if lost:
            raise combined_error([one for _, one in lost])
        raise ConfigError(f"--out {out}: no trial ran to its end")
    return SearchResult(points, search.stopped(), search.counts(), lost)


def _stored(plan: Sweep, base: Config, out: Path) -> tuple[str, ...]:
    """The stores of what the recipe asks, written; none where nothing is shared."""
    if not plan.share_targets:
        return ()
    # As if there were two of them: which trials ask the same shows when they are proposed.
    twice = [RunSpec(str(place), base, out / str(place)) for place in range(2)]
    content = plan.content or "full"
    stores, (shared, _) = shared_targets.plan_shared_stores(twice, out / "targets", content=content)
    for store in stores:
        shared_targets.write(store)
    return shared.config.teacher.target_stores
