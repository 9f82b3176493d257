"""The runs of a sweep: each point with each seed, in a folder known by content; none mixed up."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from deit.config.schema import Config
from deit.config.validation import load_config
from deit.core import run_folder
from deit.core.errors import ConfigError
from deit.distill.run_teachers import check_inputs
from deit.distill.target_checks import check_records
from deit.experiments import shared_targets
from deit.experiments.base_runs import BaseRuns, Experiment, slugify
from deit.experiments.runner import RunSpec
from deit.experiments.sweep_grid import Point, boundary_points, differing, points_of
from deit.experiments.sweep_spec import Sweep


class SweepRun(NamedTuple):
    """A point with one seed."""

    point: Point
    seed: int
    run: RunSpec


def trials_of(
    points: list[Point],
    seeds: tuple[int, ...],
    out: Path,
    laid: Callable[[Config], Config],
) -> list[SweepRun]:
    """Every point with every seed, each in a folder that ends in the hash of its configuration; in
    that of an earlier name, where a run of that hash is there. laid: puts the teachers of a
    configuration where they are trained."""
    there = {
        path.name[-shared_targets.DIGITS :]: path
        for path in (out / "runs").glob("*")
        if path.is_dir()
    }
    trials = []
    for seed in seeds:
        for point in points:
            config = point.config.replace(run={"seed": seed})
            key = shared_targets.content_hash(shared_targets.result_fields(config))
            folder = there.setdefault(
                key, out / "runs" / f"{slugify(point.name)[:80]}-seed-{seed}-{key}"
            )
            planned = RunSpec(f"{point.name}, seed {seed}", laid(config), folder)
            trials.append(SweepRun(point, seed, planned))
    return trials


class SweepPlan(NamedTuple):
    """What a sweep is to train. ground: knows its teachers and starts; below: these, in the order
    in which they build on each other. stores: of answers that runs share. runs: those of the
    trials, each once, taught by them."""

    ground: BaseRuns
    base_runs: list[RunSpec]
    trials: list[SweepRun]
    stores: list[shared_targets.TargetStorePlan]
    runs: list[RunSpec]

    def of_search(self, plan: Sweep, points: list[Point], top: int) -> "SweepPlan":
        """The same for the points that a search came to, the best first: each with the first seed,
        so many of them with the others too."""
        out, laid = self.ground.folder, self.ground.with_local_paths
        trials = trials_of(points, plan.seeds[:1], out, laid)
        trials += trials_of(points[:top], plan.seeds[1:], out, laid)
        return SweepPlan(self.ground, self.base_runs, trials, *_shared(plan, trials, out))


def duplicate_points(trials: list[SweepRun]) -> list[str]:
    """What is told of points that are the same run by another name."""
    first: dict[Path, str] = {}
    return [
        f"{trial.point.name}: is the same run as {first[trial.run.out]}, trained once"
        for trial in trials
        if trial.seed == trials[0].seed
        and first.setdefault(trial.run.out, trial.point.name) != trial.point.name
    ]


def work_of(plan: Sweep, run: Experiment, *, asked: Config) -> SweepPlan:
    """All that a sweep is to train; of a search what is known before its first trial.

    asked: the recipe with what the file sets for all, before the command line. Raises ConfigError
    for what cannot be, or would be mixed up.
    """
    points = [] if plan.search else points_of(plan, run.config)
    known = boundary_points(plan, run.config) if plan.search else points
    _check_distinct(points)
    _check_splits(known)
    _check_answers(plan, known)
    first = run.config.replace(run={"seed": plan.seeds[0]})
    ground = BaseRuns(
        run, first, run.out, recipe_config=asked, arms=[point.config for point in known]
    )
    for point in known:
        ground.with_local_paths(point.config)  # now it knows its teachers
    below = [RunSpec(name, config, run.out / slugify(name)) for name, config in ground.runs.items()]
    for one in below:
        check_base_run(one)
    for point in points:
        if point.name in ground.runs:
            raise ConfigError(f"sweep {plan.name}, {point.name}: is what a teacher is called here")
    trained = {str(one.out) for one in below}
    for point in known:
        check_inputs_exist(ground.with_local_paths(point.config), trained)
    trials = trials_of(points, plan.seeds, run.out, ground.with_local_paths)
    return SweepPlan(ground, below, trials, *_shared(plan, trials, run.out))


def _shared(
    plan: Sweep, trials: list[SweepRun], out: Path
) -> tuple[list[shared_targets.TargetStorePlan], list[RunSpec]]:
    """The stores that the runs share, and each run once, taught by them. Raises ConfigError."""
    unique = list({trial.run.out: trial.run for trial in trials}.values())
    if not plan.share_targets:
        return [], unique
    return shared_targets.plan_shared_stores(unique, out / "targets", content=plan.content)


def check_inputs_exist(config: Config, trained: set[str]) -> None:
    """Refuse teachers and images that are not there. trained: teachers that will be. Raises
    DataError."""
    asked = config.loss.kind != "none" and not config.teacher.target_stores
    check_inputs([one for one in config.teacher.source if asked and one not in trained], config)


def check_base_run(one: RunSpec) -> None:
    """Refuse a teacher or start that lies here and was trained on other images: it may have seen
    what others are tested on. Raises ConfigError."""
    saved = one.out / run_folder.CONFIG
    if not saved.is_file():
        return
    before, now = (
        shared_targets.result_fields(config) for config in (load_config(saved), one.config)
    )
    for name in sorted(before.keys() | now.keys()):
        decisive = name.startswith("data.") or name == "run.precision"
        if decisive and before.get(name) != now.get(name):
            raise ConfigError(
                f"{one.out}: was trained with another {name} ({before.get(name)!r} before, "
                f"{now.get(name)!r} now); give another --out"
            )


def _check_distinct(points: list[Point]) -> None:
    """Refuse points that would be the same run. Raises ConfigError."""
    known: dict[str, Point] = {}
    for point in points:
        key = shared_targets.content_hash(shared_targets.result_fields(point.config))
        other = known.setdefault(key, point)
        if other.config != point.config:
            raise ConfigError(
                f"{other.name} and {point.name} differ only in "
                f"{', '.join(differing(other.config, point.config))}, which decides no result, and "
                "would be the same run; give each a sweep of its own"
            )


_OF_SPLITS = ("source", "root", "classes", "exclude_list", "split_seed")
_OF_SPLITS += ("validation_fraction", "test_fraction")


def _check_splits(points: list[Point]) -> None:
    """Refuse points that would be taught by one that has seen their test images. Raises
    ConfigError."""
    for point in points:
        for leaf in _OF_SPLITS:
            first = getattr(points[0].config.data, leaf)
            if getattr(point.config.data, leaf) != first and point.config.teacher.source:
                raise ConfigError(
                    f"{point.name}: data.{leaf} varies, and one teacher would have seen images "
                    "that others test on; a sweep for each value trains a teacher for each"
                )


def _check_answers(plan: Sweep, points: list[Point]) -> None:
    """Refuse what no store of this sweep could answer. Raises ConfigError."""
    first = shared_targets.teacher_query_key(points[0].config) if plan.search else None
    for point in points:
        config = point.config
        if config.loss.kind == "none" or config.teacher.target_stores or not config.teacher.source:
            continue
        asks = plan.share_targets
        if plan.search:  # one store, of what the recipe asks
            asks = asks and shared_targets.teacher_query_key(config) == first
        if config.views.teacher_view == "crops" and not asks:
            raise ConfigError(
                f"sweep {plan.name}, {point.name}: the mean over crops is answered from a store "
                "alone, and none is shared here; write one and name it (deit targets write, "
                "--teacher.target_stores)"
            )
        if plan.content and asks:
            check_records(
                plan.content, config, None, where=f"{point.name}, content: {plan.content}"
            )
