"""The search of a sweep: its trials trained, taught by one store where they ask alike."""

from pathlib import Path
from typing import NamedTuple

from deit import shared_targets
from deit.at_once import Failed, Planned, failure_of, train_beside
from deit.config import Config
from deit.console import say
from deit.errors import ConfigError
from deit.finished import Finished
from deit.search import Search, Stopped
from deit.sweep_file import Point, Sweep
from deit.sweep_runs import Work, trials_of
from deit.sweep_training import trained, unfinished


class Searched(NamedTuple):
    """What a search came to. finished: the points of the trials that ran to their end, the best
    first. stopped: those that lay below the median. counts: how many trials ended how. failed: the
    points of the trials that failed, each with how."""

    finished: list[Point]
    stopped: list[Stopped]
    counts: dict[str, int]
    failed: list[tuple[Point, Failed]]


def search_all(
    plan: Sweep,
    config: Config,
    work: Work,
    *,
    finished: Finished,
    at_once: int,
    retries: int,
) -> Searched:
    """Run the search of a sweep to its end, from wherever it is.

    config: the recipe with what is set for all. Raises DeitError where a teacher or start fails, or
    no trial finished; DataError where trials that are over had other
    images or teachers.
    """
    ground, out, seed = work.ground, work.ground.folder, plan.seeds[0]
    first = config.replace(run={"seed": seed})
    base = ground.laid(first)
    question = shared_targets.question_of(base)
    targets: tuple[str, ...] = ()

    def planned(point: Point) -> Planned:
        (trial,) = trials_of([point], (seed,), out, ground.laid)
        own = trial.run.config
        same = own.loss.kind != "none" and shared_targets.question_of(own) == question
        if not (targets and same and own.optim.epochs <= base.optim.epochs):
            return trial.run
        return trial.run._replace(config=own.replace(teacher={"targets": targets}))

    fields = {name: repr(one) for name, one in plan.search.fields.items()}
    of = shared_targets.content_hash({**shared_targets.identity(first), **fields, "seed": seed})
    search = Search(
        plan.search, config, out, name=plan.name, seed=seed, of=of, plan=planned, retries=retries
    )
    finished.check(map(planned, search.finished()))
    if over := search.done():
        say(f"{min(over, plan.search.trials)} of {plan.search.trials} trials are over already")
    failed: dict[Path, Failed] = {}
    if search.left():
        anew = unfinished(work.below)
        search.progress.total = len(anew) + search.left()
        for one in anew:
            if wrong := trained([one], at_once=1, retries=retries, progress=search.progress):
                raise failure_of(wrong)
        finished.check(map(planned, search.finished()))  # a teacher may be another than it was
        targets = _stored(plan, base, out)
    while search.left():
        # Once more: a trial that fails when no other is to be begun is proposed anew.
        ended = train_beside(search.runs(), number=at_once, progress=search.progress, watch=search)
        failed |= {one.run.out: one for one in ended}
    lost = [(point, failed[planned(point).out]) for point in search.failed()]
    points = search.finished()
    if not points:
        if lost:
            raise failure_of([one for _, one in lost])
        raise ConfigError(f"--out {out}: no trial ran to its end")
    return Searched(points, search.stopped(), search.counts(), lost)


def _stored(plan: Sweep, base: Config, out: Path) -> tuple[str, ...]:
    """The stores of what the recipe asks, written; none where nothing is shared."""
    if not plan.share_targets:
        return ()
    # As if there were two of them: which trials ask the same shows when they are proposed.
    twice = [Planned(str(place), base, out / str(place)) for place in range(2)]
    records = plan.records or "full"
    stores, (shared, _) = shared_targets.share(twice, out / "targets", records=records)
    for store in stores:
        shared_targets.write(store)
    return shared.config.teacher.targets
