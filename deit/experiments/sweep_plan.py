"""Plan the runs of a sweep: each point with each seed, in a folder named by a hash of its
configuration."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from deit.config.schema import Config
from deit.config.validation import load_config
from deit.core import run_folder
from deit.core.errors import ConfigError
from deit.distill.run_teachers import check_inputs
from deit.distill.target_content import check_content
from deit.experiments import shared_targets
from deit.experiments.base_runs import BaseRuns, Experiment, slugify
from deit.experiments.parallel_runs import RunSpec
from deit.experiments.sweep_grid import Point, boundary_points, differing, points_of
from deit.experiments.sweep_spec import Sweep


class SweepRun(NamedTuple):
    """A point with a seed."""

    point: Point
    seed: int
    run: RunSpec


def make_sweep_runs(
    points: list[Point],
    seeds: tuple[int, ...],
    out: str | Path,
    with_local_paths: Callable[[Config], Config],
) -> list[SweepRun]:
    """Return every point with every seed.

    The name of a run's folder ends in the hash of its configuration. A folder with the same hash
    and another name is reused. with_local_paths: replaces the sources of a configuration by the
    folders in which they are trained.
    """
    runs = Path(out) / "runs"
    folders = {
        path.name[-shared_targets.HASH_LENGTH :]: path for path in runs.glob("*") if path.is_dir()
    }
    sweep_runs = []
    for seed in seeds:
        for point in points:
            config = point.config.replace(run={"seed": seed})
            key = shared_targets.content_hash(shared_targets.result_fields(config))
            folder = folders.setdefault(key, runs / f"{slugify(point.name)[:80]}-seed-{seed}-{key}")
            run = RunSpec(f"{point.name}, seed {seed}", with_local_paths(config), folder)
            sweep_runs.append(SweepRun(point, seed, run))
    return sweep_runs


class SweepPlan(NamedTuple):
    """The runs and target stores of a sweep.

    sources: the teachers and initial weights of all runs. base_runs: those of them that are
    trained, each after the runs that it depends on. sweep_runs: every point with every seed.
    stores: target stores that runs share. runs: those of sweep_runs without duplicates, with their
    target stores.
    """

    sources: BaseRuns
    base_runs: list[RunSpec]
    sweep_runs: list[SweepRun]
    stores: list[shared_targets.TargetStorePlan]
    runs: list[RunSpec]

    def with_search_results(self, sweep: Sweep, points: list[Point], top: int) -> "SweepPlan":
        """Return the plan for the points of a finished search, the best first: all points with the
        first seed, and the `top` best with the other seeds."""
        out, with_local_paths = self.sources.folder, self.sources.with_local_paths
        sweep_runs = make_sweep_runs(points, sweep.seeds[:1], out, with_local_paths)
        sweep_runs += make_sweep_runs(points[:top], sweep.seeds[1:], out, with_local_paths)
        return SweepPlan(self.sources, self.base_runs, sweep_runs, *_shared(sweep, sweep_runs, out))


def duplicate_points(sweep_runs: list[SweepRun]) -> list[str]:
    """Return a message for each point that is the same run as a point before it."""
    first: dict[Path, str] = {}
    return [
        f"{sweep_run.point.name}: is the same run as {first[sweep_run.run.out]}, trained once"
        for sweep_run in sweep_runs
        if sweep_run.seed == sweep_runs[0].seed
        and first.setdefault(sweep_run.run.out, sweep_run.point.name) != sweep_run.point.name
    ]


def plan_sweep(sweep: Sweep, experiment: Experiment, *, recipe_config: Config) -> SweepPlan:
    """Return the plan of a sweep; for a search, the part that is known before its first trial.

    recipe_config: the recipe with the fields of the sweep file, before the command line. Raises
    ConfigError for invalid points and for points that must not share a sweep, DataError for missing
    teachers and images.
    """
    points = [] if sweep.search else points_of(sweep, experiment.config)
    known = boundary_points(sweep, experiment.config) if sweep.search else points
    _check_distinct(points)
    _check_splits(known)
    _check_teacher_outputs(sweep, known)
    first = experiment.config.replace(run={"seed": sweep.seeds[0]})
    out = experiment.out
    sources = BaseRuns(
        experiment,
        first,
        out,
        recipe_config=recipe_config,
        arms=[point.config for point in known],
    )
    for point in known:
        sources.with_local_paths(point.config)  # adds the base runs of the point
    base_runs = [
        RunSpec(name, config, out / slugify(name)) for name, config in sources.runs.items()
    ]
    for run in base_runs:
        check_base_run(run)
    for point in points:
        if point.name in sources.runs:
            raise ConfigError(
                f"sweep {sweep.name}, {point.name}: is the name of a teacher of this sweep; rename "
                "the run"
            )
    trained = {str(run.out) for run in base_runs}
    for point in known:
        check_inputs_exist(sources.with_local_paths(point.config), trained)
    sweep_runs = make_sweep_runs(points, sweep.seeds, out, sources.with_local_paths)
    return SweepPlan(sources, base_runs, sweep_runs, *_shared(sweep, sweep_runs, out))


def _shared(
    sweep: Sweep, sweep_runs: list[SweepRun], out: Path
) -> tuple[list[shared_targets.TargetStorePlan], list[RunSpec]]:
    """Return the shared stores, and the runs without duplicates, with their stores. Raises
    ConfigError."""
    unique = list({sweep_run.run.out: sweep_run.run for sweep_run in sweep_runs}.values())
    if not sweep.share_targets:
        return [], unique
    return shared_targets.plan_shared_stores(unique, out / "targets", content=sweep.content)


def check_inputs_exist(config: Config, trained: set[str]) -> None:
    """Raise DataError for missing teachers or images. trained: teachers that will be trained."""
    needs_teachers = config.loss.kind != "none" and not config.teacher.target_stores
    sources = [s for s in config.teacher.source if needs_teachers and s not in trained]
    check_inputs(sources, config.data)


def check_base_run(run: RunSpec) -> None:
    """Raise ConfigError if an existing base run was trained on other data.

    Its training images could be test images of the runs that depend on it.
    """
    saved = run.out / run_folder.CONFIG
    if not saved.is_file():
        return
    before, now = (
        shared_targets.result_fields(config) for config in (load_config(saved), run.config)
    )
    for name in sorted(before.keys() | now.keys()):
        decisive = name.startswith("data.") or name == "run.precision"
        if decisive and before.get(name) != now.get(name):
            raise ConfigError(
                f"{run.out}: was trained with another {name} ({before.get(name)!r} before, "
                f"{now.get(name)!r} now); give another folder"
            )


def _check_distinct(points: list[Point]) -> None:
    """Raise ConfigError if two different points have the same folder."""
    known: dict[str, Point] = {}
    for point in points:
        key = shared_targets.content_hash(shared_targets.result_fields(point.config))
        other = known.setdefault(key, point)
        if other.config != point.config:
            raise ConfigError(
                f"{other.name} and {point.name}: are the same run, since they differ only in "
                f"{', '.join(differing(other.config, point.config))}, which does not change the "
                "result; put them in separate sweeps"
            )


_SPLIT_FIELDS = ("source", "root", "classes", "exclude_list", "split_seed")
_SPLIT_FIELDS += ("validation_fraction", "test_fraction")


def _check_splits(points: list[Point]) -> None:
    """Raise ConfigError if a shared teacher would be trained on test images of some points."""
    for point in points:
        for leaf in _SPLIT_FIELDS:
            first = getattr(points[0].config.data, leaf)
            if getattr(point.config.data, leaf) != first and point.config.teacher.source:
                raise ConfigError(
                    f"{point.name}: data.{leaf} varies, so the shared teacher would be trained on "
                    "test images of other points; use one sweep per value, each with its own "
                    "teacher"
                )


def _check_teacher_outputs(sweep: Sweep, points: list[Point]) -> None:
    """Raise ConfigError for points whose teacher outputs no store of this sweep provides."""
    first = shared_targets.teacher_query_key(points[0].config) if sweep.search else None
    for point in points:
        config = point.config
        if config.loss.kind == "none" or config.teacher.target_stores or not config.teacher.source:
            continue
        uses_store = sweep.share_targets
        if sweep.search:  # it has one store, of the recipe's teacher outputs
            uses_store = uses_store and shared_targets.teacher_query_key(config) == first
        if config.views.teacher_view == "crops" and not uses_store:
            raise ConfigError(
                f"sweep {sweep.name}, {point.name}: the mean over crops needs a target store, and "
                "this sweep writes none for it; write one (deit targets write) and set "
                "teacher.target_stores"
            )
        if sweep.content and uses_store:
            check_content(
                sweep.content,
                config.teacher,
                config.loss,
                combine=None,
                where=f"{point.name}, content: {sweep.content}",
            )
