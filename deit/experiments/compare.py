"""The students of a study beside each other and their teachers, in one table and one picture."""

import itertools
import shlex
from pathlib import Path
from typing import Any

from deit.config.schema import Config
from deit.config.validation import validate
from deit.core.console import info, is_main_process, table
from deit.core.errors import ConfigError, SystemFault, did_you_mean
from deit.core.file_reading import read_bytes
from deit.core.filesystem import check_file, check_writable, write_json
from deit.core.json_io import check_same_request, parse_strict_json
from deit.distill.write_targets import write_targets
from deit.evaluation.evaluate import evaluate
from deit.evaluation.result_rows import add_run, new_row
from deit.experiments.base_runs import BaseRuns, Experiment, slugify
from deit.experiments.runner import (
    RunProgress,
    RunSpec,
    check_num_parallel,
    run_parallel_or_raise,
)
from deit.experiments.studies import STUDIES
from deit.training.train import train
from deit.viz.plots import draw_comparison
from deit.viz.tables import COLUMNS, comparison_cells

MANIFEST = "comparison.json"


def compare(
    config: Config,
    out: Path,
    *,
    recipe: str,
    study: str,
    arm_names: tuple[str, ...],
    seeds: tuple[int, ...],
    parallel: int,
    json_file: Path | None,
    command: str = "",
) -> dict[str, Any]:
    """Train and evaluate a recipe's teachers and the arms of a study for each seed; print the table
    and write the numbers.

    study: a name in STUDIES. arm_names: the arms to train, empty for all. parallel: how many runs
    train at a time. Finished runs in the folder are kept, interrupted ones are resumed.
    Returns the content of the file of results. Raises ConfigError where the loss has no teacher.
    """
    run = Experiment(recipe, config, out)
    if config.loss.kind == "none":
        raise ConfigError(f"compare {run.recipe}: its objective has no teacher to measure")
    check_num_parallel(parallel, option="--parallel")
    _check(config, study, arm_names, json_file)
    plans = [_Plan(run, seed, study, arm_names, alone=len(seeds) == 1) for seed in seeds]
    _open_folder(run)
    progress = RunProgress(sum(len(plan.ground) + len(plan.arms) for plan in plans))
    # What runs build on before them; of all seeds, those that come first in theirs.
    for stage in itertools.zip_longest(*(plan.ground.values() for plan in plans)):
        _train([planned for planned in stage if planned is not None], parallel, progress)
    for plan in plans:
        plan.write_targets()
    _train([planned for plan in plans for planned in plan.arms.values()], parallel, progress)
    rows: dict[str, dict[str, Any]] = {}
    for plan in plans:
        for name, planned in {**plan.ground, **plan.arms}.items():
            found = evaluate(planned.out)
            epochs, teacher = planned.config.optim.epochs, name in plan.teachers
            row = rows.setdefault(name, new_row(epochs=epochs, teacher=teacher))
            add_run(row, planned.out, found)
    result = {
        "recipe": run.recipe,
        "study": study,
        "split": found["split"],
        "num_samples": found["num_samples"],
        "seeds": list(seeds),
        "rows": rows,
        "command": command,
        "environment": found["environment"],
    }
    _print(result)
    if is_main_process():
        _write(result, run.out, json_file)
    if study == "teacher":
        _say_next(run.recipe, next(iter(plans[-1].arms.values())))
    return result


def _open_folder(run: Experiment) -> None:
    """Create the folder; refuse one of another comparison."""
    request = {"recipe": run.recipe}
    check_same_request(run.out, MANIFEST, request, what="comparison")
    check_writable(run.out, option="--out")
    if is_main_process():
        run.out.mkdir(parents=True, exist_ok=True)
        write_json(run.out / MANIFEST, request)


def _check(config: Config, study: str, arm_names: tuple[str, ...], json_file: Path | None) -> None:
    """Check every arm, and the file for the numbers, before the teachers are trained."""
    for name, arm in _arms(config, study, arm_names).items():
        try:
            validate(arm, live_teacher=False)
        except ConfigError as error:
            raise ConfigError(f"--study {study}, {name}: {error}") from None
    check_file(json_file, option="--json", replace=True)
    if json_file is not None and json_file.exists() and not _is_result(json_file):
        raise SystemFault(
            f"--json {json_file}: exists already and is no result of a comparison; give another"
        )


def _is_result(path: Path) -> bool:
    """Whether a file is of an earlier comparison: the same command, going on, writes it again."""
    try:
        return {"recipe", "rows"} <= parse_strict_json(read_bytes(path)).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _arms(student: Config, study: str, arm_names: tuple[str, ...]) -> dict[str, Config]:
    """The configurations of a study. Raises ConfigError on an unknown name."""
    if study not in STUDIES:
        known = ", ".join(STUDIES)
        raise ConfigError(
            f"--study {study}: should be one of {known}{did_you_mean(study, STUDIES)}"
        )
    arms = STUDIES[study](student)
    for name in arm_names:
        if name not in arms:
            known = ", ".join(arms)
            raise ConfigError(f"--arms {name}: should be of {known}{did_you_mean(name, arms)}")
    return {name: arm for name, arm in arms.items() if not arm_names or name in arm_names}


class _Plan:
    """The runs of one seed, by their names in the table: what the arms build on, and the arms."""

    def __init__(
        self, run: Experiment, seed: int, study: str, arm_names: tuple[str, ...], *, alone: bool
    ) -> None:
        """alone: whether there is no other seed."""
        folder = run.out if alone else run.out / f"seed-{seed}"
        student = run.config.replace(run={"seed": seed})
        arms = _arms(student, study, arm_names)
        ground = BaseRuns(run, student, folder, arms=arms.values())

        def planned(name: str, config: Config) -> RunSpec:
            return RunSpec(f"{name}, seed {seed}", config, folder / slugify(name))

        self.arms = {
            name: planned(name, ground.with_local_paths(arm)) for name, arm in arms.items()
        }
        # After the arms: they say what they build on.
        self.ground = {name: planned(name, config) for name, config in ground.runs.items()}
        self.teachers = ground.teachers

    def write_targets(self) -> None:
        """Write the stored targets of those arms whose teaching needs them."""
        for name, (title, config, out) in self.arms.items():
            needed = config.views.teacher_view == "crops" and not config.teacher.target_stores
            if config.loss.kind != "none" and needed:
                store = out.with_name(f"targets-{out.name}")
                write_targets(config, store)
                config = config.replace(teacher={"target_stores": (str(store),)})
                self.arms[name] = RunSpec(title, config, out)


def _train(runs: list[RunSpec], parallel: int, progress: RunProgress) -> None:
    """Train them, unless they are finished: one after the other here, or so many at once."""
    if parallel > 1:
        run_parallel_or_raise(runs, number=parallel, progress=progress)
        return
    for title, config, out in runs:
        info(f"\n{title}: {out}")
        train(config, out, resume=True)


def _write(result: dict[str, Any], out: Path, json_file: Path | None) -> None:
    """The numbers where they were asked for, the picture beside the runs."""
    if json_file is not None:
        write_json(json_file, result)
        info(f"wrote {json_file}")
    try:
        draw_comparison(result, out / "comparison.png")
        info(f"drew {out / 'comparison.png'}")
    except SystemFault as error:
        info(f"no picture: {error}")


def _print(result: dict[str, Any]) -> None:
    """The table; with several seeds each cell is mean and standard deviation."""
    number = len(result["seeds"])
    title = f"{result['recipe']}: top-1 % on {result['num_samples']} {result['split']} images" + (
        f", mean and standard deviation of {number} seeds" if number > 1 else ""
    )
    table(title, COLUMNS, [comparison_cells(name, row) for name, row in result["rows"].items()])


def _say_next(recipe: str, arm: RunSpec) -> None:
    folder, config = arm.out.parent, arm.config
    info(
        "\nNext:\n"
        f"  deit evaluate {shlex.quote(str(folder / 'distilled'))}      "
        "every head, class by class\n"
        f"  python train_deit.py {recipe} --loss deit-hard "
        f"--teacher.source {shlex.quote(','.join(config.teacher.source))} --out checkpoints/hard\n"
        "  python train_deit.py --help      every setting\n"
        "  deit recipes      the other experiments"
    )
