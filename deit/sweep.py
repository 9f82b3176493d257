"""Every run of a sweep trained, evaluated and put into one table: resumable run by run."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from deit import checkpoint, outcome, shared_targets
from deit.arguments import RunArguments
from deit.at_once import Failed, Planned, check_number, failure_of, train_at_once, train_beside
from deit.config import Config, code_of, derive
from deit.console import percent, say, table
from deit.disk import hold, write_json
from deit.errors import ConfigError, DeitError, EnvironmentFault
from deit.finished import Finished
from deit.ground import Ground, slug
from deit.measured import Evaluations, Measured, disagreement
from deit.search import Search, check_optuna
from deit.sweep_file import Point, Sweep, points_of
from deit.sweep_pictures import draw_sweep
from deit.sweep_results import (
    MANIFEST,
    best_of,
    cells,
    columns,
    described,
    told_of_best,
    write_results,
)
from deit.sweep_training import Mishaps, train_all, unfinished
from deit.typed_json import read_typed
from deit.validation import load


class Trial(NamedTuple):
    """A point with one seed."""

    point: Point
    seed: int
    run: Planned


def sweep(
    plan: Sweep,
    run: RunArguments,
    *,
    asked: Config,
    at_once: int,
    retries: int,
    best: int,
    arguments: list[str],
) -> dict[str, Any]:
    """Train and evaluate every point of a sweep for each of its seeds; write results.json,
    results.csv, results.md and pictures into the folder, and print the table.

    asked: the recipe with what the file sets for all, before the command line. at_once: how many
    runs share the machine. retries: how often a run that failed is tried again. best: how many
    points are named in the end. A run finished before is kept, whatever it is called: it is known
    by a hash of its configuration. Returns what results.json holds. Raises the errors of
    deit.errors; one for all runs that failed, once everything else is written.
    """
    check_number(at_once, option="--at_once")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a sweep starts a process for each run: start it without torchrun (--at_once N for "
            "several at a time)"
        )
    if run.config.run.seed != asked.run.seed:
        raise ConfigError(f"--run.seed {run.config.run.seed}: a sweep takes --seeds A,B")
    for option, number, least in (("--retries", retries, 0), ("--best", best, 1)):
        if number < least:
            raise ConfigError(f"{option} {number}: should be at least {least}")
    points = [] if plan.search else points_of(plan, run.config)
    out = run.out
    _check_folder(out, plan, run.recipe)
    if plan.search:
        check_optuna()
    first = derive(run.config, run={"seed": plan.seeds[0]})
    ground = Ground(run, first, out, asked=asked, arms=[point.config for point in points])
    _check_apart(points)
    trials = _trials(points, plan.seeds, out, ground.laid)
    base = ground.laid(first) if plan.search else first  # now `ground` knows its teachers as well
    below = [Planned(name, config, out / slug(name)) for name, config in ground.runs.items()]
    for one in below:
        _check_ground(one)
    for point in points:
        if point.name in ground.runs:
            raise ConfigError(f"sweep {plan.name}, {point.name}: is what a teacher is called here")
    stores, taught = _shared(plan, trials, out)
    if run.dry_run:
        _list(below, stores, taught)
        return {}
    out.mkdir(parents=True, exist_ok=True)
    with hold(out, option="--out"):
        write_json(out / MANIFEST, {"sweep": plan.name, "recipe": run.recipe})
        finished, counts, failed = Finished(), None, []
        finished.check([*below, *(trial.run for trial in trials)])
        if plan.search:
            found = _search(plan, run.config, base, below, ground, at_once, retries)
            points, counts = found.finished, found.counts
            failed = [one for _, one in found.failed]
            trials = _trials(points, plan.seeds[:1], out, ground.laid)
            trials += _trials(points[:best], plan.seeds[1:], out, ground.laid)
            stores, taught = _shared(plan, trials, out)
            trials += _trials(
                [point for point, _ in found.failed], plan.seeds[:1], out, ground.laid
            )
        mishaps = train_all(
            below, stores, taught, finished=finished, at_once=at_once, retries=retries
        )
        mishaps.failed[:0] = failed
        rows, found, asked_of = _rows(below, ground.teachers, trials, mishaps)
        result = {
            "sweep": plan.name,
            "recipe": run.recipe,
            "study": plan.study,
            "fields": list(dict.fromkeys(name for point in points for name in point.values)),
            "split": found["split"],
            "num_samples": found["num_samples"],
            "seeds": list(plan.seeds),
            "rows": rows,
            "best": best_of(rows, best),
            "disagreement": disagreement(asked_of),
            "search": counts,
            "command": f"deit sweep {shlex.join(arguments)}",
            "environment": _environment(rows),
        }
        for path in write_results(result, out) + _draw(result, out):
            say(f"wrote {path}")
    _print(result)
    if mishaps.failed:
        raise failure_of(mishaps.failed)
    return result


def _shared(
    plan: Sweep, trials: list[Trial], out: Path
) -> tuple[list[shared_targets.Store], list[Planned]]:
    """The stores that the runs share, and each run once, taught by them."""
    unique = list({trial.run.out: trial.run for trial in trials}.values())
    if not plan.share_targets:
        return [], unique
    return shared_targets.share(unique, out / "targets", records=plan.records)


class _Found(NamedTuple):
    """What a search came to. finished: the points of the trials that ran to their end, the best
    first. counts: how many trials ended how."""

    finished: list[Point]
    counts: dict[str, int]
    failed: list[tuple[Point, Failed]]


def _search(
    plan: Sweep,
    config: Config,
    base: Config,
    below: list[Planned],
    ground: Ground,
    at_once: int,
    retries: int,
) -> _Found:
    """Run the search of a sweep to its end. base: the first seed's configuration, as its runs are
    trained. Raises DeitError where no trial finished."""
    out, seed = ground.folder, plan.seeds[0]
    train_at_once(unfinished(below), number=1)
    taught = base
    if plan.share_targets:
        # As if there were two of them: which trials ask the same shows when they are proposed.
        twice = [Planned(str(place), base, out / str(place)) for place in range(2)]
        records = plan.records or "full"
        stores, (shared, _) = shared_targets.share(twice, out / "targets", records=records)
        for store in stores:
            shared_targets.write(store)
        taught = shared.config

    def planned(point: Point) -> Planned:
        (trial,) = _trials([point], (seed,), out, ground.laid)
        same = shared_targets.question_of(trial.run.config) == shared_targets.question_of(base)
        shorter = trial.run.config.optim.epochs <= base.optim.epochs
        if not (same and shorter and trial.run.config.loss.kind != "none"):
            return trial.run
        targets = {"targets": taught.teacher.targets}
        return trial.run._replace(config=derive(trial.run.config, teacher=targets))

    fields = {name: repr(one) for name, one in plan.search.fields.items()}
    of = shared_targets.content_hash({**shared_targets.identity(base), **fields, "seed": seed})
    search = Search(
        plan.search, config, out, name=plan.name, seed=seed, of=of, plan=planned, retries=retries
    )
    over = search.done()
    if over:
        say(f"{min(over, plan.search.trials)} of {plan.search.trials} trials are over already")
    failed: dict[Path, Failed] = {}
    while (left := plan.search.trials - search.done()) > 0:
        # Once more: a trial that fails when no other is to be begun is proposed anew.
        ended = train_beside(search.runs(), number=at_once, total=left, watch=search)
        failed |= {one.run.out: one for one in ended}
    lost = [(point, failed[planned(point).out]) for point in search.failed()]
    points = search.finished()
    if not points:
        if lost:
            raise failure_of([one for _, one in lost])
        raise ConfigError("--out: no trial ran to its end")
    return _Found(points, search.counts(), lost)


def _check_folder(out: Path, plan: Sweep, recipe: str) -> None:
    """Refuse a folder that holds something else. Raises ConfigError and EnvironmentFault."""
    if out.exists() and not out.is_dir():
        raise EnvironmentFault(f"--out {out}: is a file, not a folder")
    before = out / MANIFEST
    if before.is_file():
        there = read_typed(before, dict[str, str])
        for key, mine in (("sweep", plan.name), ("recipe", recipe)):
            if there.get(key) != mine:
                raise ConfigError(
                    f"--out {out}: holds a sweep whose {key} is {there.get(key)}, not {mine}; give "
                    "another --out"
                )
    elif out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise ConfigError(f"--out {out}: holds something, but no sweep; give another --out")


def _check_ground(one: Planned) -> None:
    """Refuse a teacher or start that lies here and was trained on other images: it may have seen
    what others are tested on. Raises ConfigError."""
    saved = one.out / checkpoint.CONFIG
    if not saved.is_file():
        return
    before, now = (shared_targets.identity(config) for config in (load(saved), one.config))
    for name in sorted(before.keys() | now.keys()):
        decisive = name.startswith("data.") or name == "run.precision"
        if decisive and before.get(name) != now.get(name):
            raise ConfigError(
                f"{one.out}: was trained with another {name} ({before.get(name)!r} before, "
                f"{now.get(name)!r} now); give another --out"
            )


_OF_SPLITS = ("source", "root", "classes", "quarantine", "split_seed")
_OF_SPLITS += ("validation_fraction", "test_fraction")


def _check_apart(points: list[Point]) -> None:
    """Refuse points that would be the same run, or be taught by one that has seen their test
    images. Raises ConfigError."""
    known: dict[str, Point] = {}
    for point in points:
        key = shared_targets.content_hash(shared_targets.identity(point.config))
        other = known.setdefault(key, point)
        if other.config != point.config:
            raise ConfigError(
                f"{other.name} and {point.name} differ in nothing that decides a result (but in "
                "where images or stores lie, or how it is computed) and would be the same run; a "
                "sweep for each tells them apart"
            )
        for leaf in _OF_SPLITS:
            first = getattr(points[0].config.data, leaf)
            if getattr(point.config.data, leaf) != first and point.config.teacher.source:
                raise ConfigError(
                    f"{point.name}: data.{leaf} varies, and one teacher would have seen images "
                    "that others test on; a sweep for each value trains a teacher for each"
                )


def _trials(
    points: list[Point],
    seeds: tuple[int, ...],
    out: Path,
    laid: Callable[[Config], Config],
) -> list[Trial]:
    """Every point with every seed, each in a folder that ends in the hash of its configuration; in
    that of an earlier name, where a run of that hash is there."""
    there = {
        path.name[-shared_targets.DIGITS :]: path
        for path in (out / "runs").glob("*")
        if path.is_dir()
    }
    trials = []
    for seed in seeds:
        for point in points:
            config = derive(point.config, run={"seed": seed})
            key = shared_targets.content_hash(shared_targets.identity(config))
            folder = there.setdefault(
                key, out / "runs" / f"{slug(point.name)[:80]}-seed-{seed}-{key}"
            )
            planned = Planned(f"{point.name}, seed {seed}", laid(config), folder)
            trials.append(Trial(point, seed, planned))
    return trials


def _list(below: list[Planned], stores: list[shared_targets.Store], runs: list[Planned]) -> None:
    """Say what would be done."""
    rows = [(one.name, "teacher or start", _state(one), str(one.out)) for one in below]
    rows += [(store.path.name, "answers to share", "", str(store.path)) for store in stores]
    rows += [(one.name, "run", _state(one), str(one.out)) for one in runs]
    table(
        "dry run: nothing is trained or written", ("", "what", "state", "folder"), rows, text=True
    )
    left = sum(checkpoint.result_of(one.out) is None for one in runs)
    say(f"{len(runs)} runs, {len(runs) - left} of them finished")


def _state(run: Planned) -> str:
    if checkpoint.result_of(run.out) is not None:
        return "finished"
    return "begun" if checkpoint.found(run.out) else "new"


def _rows(
    below: list[Planned], teachers: set[str], trials: list[Trial], mishaps: Mishaps
) -> tuple[dict[str, outcome.Row], dict[str, Any], dict[str, Measured]]:
    """A row for each teacher and point, the last evaluation, and that of each point's first seed.
    An evaluation that fails is one more mishap. Raises DeitError where none is left."""
    evaluations = Evaluations()
    first: dict[str, Measured] = {}
    rows: dict[str, outcome.Row] = {}
    found: dict[str, Any] = {}
    reasons = mishaps.reasons()

    def said(run: Planned) -> Measured | None:
        if run.out in reasons:
            return None
        # Code that teaches was named to us, not by somebody's saved run.
        teacher = ",".join(run.config.teacher.source) if code_of(run.config.teacher) else None
        try:
            return evaluations.of(run.out, teacher=teacher)
        except DeitError as error:
            reasons[run.out] = f"not evaluated: {error}"
            log = run.out.with_name(f"{run.out.name}.log")
            mishaps.failed.append(Failed(run, error.exit_code, reasons[run.out], log))
            return None

    for one in below:
        if checkpoint.result_of(one.out) is None:
            continue  # gone since, or never trained: its runs have a row of their own
        row = outcome.new_row(epochs=one.config.optim.epochs, teacher=one.name in teachers)
        rows[one.name] = {**row, "values": {}, "seeds": [], "folders": [], "failed": {}}
        seed = load(one.out / checkpoint.CONFIG).run.seed  # it may be of a call with other seeds
        if (evaluated := said(one)) is None:
            rows[one.name]["failed"][str(seed)] = reasons[one.out]
        else:
            found = evaluated.found
            _note(rows[one.name], seed, one.out, found)
    for trial in trials:
        epochs = trial.run.config.optim.epochs
        row = outcome.new_row(epochs=epochs, teacher=False)
        more = {"values": trial.point.values, "seeds": [], "folders": [], "failed": {}}
        row = rows.setdefault(trial.point.name, {**row, **more})
        if (evaluated := said(trial.run)) is None:
            row["failed"][str(trial.seed)] = reasons[trial.run.out]
            continue
        first.setdefault(trial.point.name, evaluated)
        found = evaluated.found
        _note(row, trial.seed, trial.run.out, found)
    if not first:
        raise failure_of(mishaps.failed)
    return rows, found, first


def _environment(rows: dict[str, outcome.Row]) -> dict[str, Any]:
    """Where the runs were trained: that of the first, with the commits of all."""
    folders = [Path(folder) for row in rows.values() if row["values"] for folder in row["folders"]]
    found = [read_typed(folder / checkpoint.ENVIRONMENT, dict[str, Any]) for folder in folders]
    commits = dict.fromkeys(str(one["commit"]) for one in found)
    return {**found[0], "commit": ", ".join(commits)}


def _note(row: outcome.Row, seed: int, out: Path, found: dict[str, Any]) -> None:
    outcome.note(row, out, found)
    row["seeds"].append(seed)
    row["folders"].append(str(out))


def _draw(result: dict[str, Any], out: Path) -> list[Path]:
    try:
        return draw_sweep(result, out)
    except EnvironmentFault as error:
        say(f"no picture: {error}")
        return []


def _print(result: dict[str, Any]) -> None:
    """The table, and the best points."""
    number = len(result["seeds"])
    title = f"{result['sweep']}: top-1 % on {result['num_samples']} {result['split']} images" + (
        f", mean and standard deviation of {number} seeds" if number > 1 else ""
    )
    table(title, columns(result), cells(result))
    shares = result["disagreement"]
    if 2 < len(shares) <= 8:  # of more, the files have it: a terminal is not wide enough
        rows = [(one, *(percent(share) for share in row.values())) for one, row in shares.items()]
        table("different answers, % of the images, first seed", ("", *shares), rows)
    if result["search"]:
        say(", ".join(f"{number} {name}" for name, number in result["search"].items()))
    say(told_of_best(result))
    for place, name in enumerate(result["best"], start=1):
        say(f"  {place}. {described(result, name)}")
