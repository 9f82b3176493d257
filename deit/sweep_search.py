"""The search of a sweep: its trials trained, taught by one store where they ask alike."""

from pathlib import Path
from typing import NamedTuple

from deit import shared_targets
from deit.at_once import FailedRun, RunSpec, combined_error, run_parallel
from deit.config import Config
from deit.console import info
from deit.errors import ConfigError
from deit.finished import FinishedRunChecker
from deit.search import PrunedTrial, Search
from deit.sweep_file import Point, Sweep
from deit.sweep_runs import SweepPlan, trials_of
from deit.sweep_training import train_with_retries, unfinished


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
    no trial finished; DataError where trials that are over had other
    images or teachers.
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
