"""What a teacher is worth: teacher, distilled and undistilled student of a recipe in one table."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from deit import checkpoint
from deit.arguments import RunArguments
from deit.config import OBJECTIVES, Config, derive
from deit.console import is_main_process, say, table
from deit.errors import ConfigError, EnvironmentFault
from deit.evaluation import evaluate
from deit.recipes import RECIPES, TEACHERS
from deit.report import COLUMNS, HEADS, comparison_cells, draw_comparison
from deit.run import train
from deit.saving import selected_top1


def compare(
    run: RunArguments, *, seeds: list[int], json_file: Path | None, arguments: list[str]
) -> dict[str, Any]:
    """Train and evaluate the three for each seed; print the table and write the numbers.

    A finished run in the folder is not trained again, an interrupted one goes on.
    Returns, for each of teacher, distilled and undistilled, `top1` by head, `agreement` with the
    teacher, `seconds` of training and `curves` of validation top-1 by epoch, each a list over the
    seeds.
    Raises ConfigError for a recipe whose objective has no teacher.
    """
    if run.config.loss.kind == "none":
        raise ConfigError(f"compare {run.recipe}: its objective has no teacher to measure")
    if run.print_config or run.dry_run:
        raise ConfigError("compare takes neither --print_config nor --dry_run; give them to train")
    checkpoint.check_file(json_file, option="--json", replace=True)
    rows: dict[str, dict[str, Any]] = {}
    for seed in seeds:
        folder = run.out if len(seeds) == 1 else run.out / f"seed-{seed}"
        for name, config in _runs(run, folder, seed).items():
            say(f"\n{name}, seed {seed}: {folder / name}")
            state = train(config, folder / name, resume=True)
            found = evaluate(folder / name)
            row = rows.setdefault(name, {"top1": [], "agreement": [], "seconds": [], "curves": []})
            row["top1"].append(_top1(found))
            row["agreement"].append(_agreement(found))
            row["seconds"].append(state["seconds"])
            row["curves"].append(_curve(folder / name))
    result = {
        "recipe": run.recipe,
        "split": found["split"],
        "num_samples": found["num_samples"],
        "seeds": seeds,
        "rows": rows,
        "command": f"deit compare {shlex.join(arguments)}",
        "environment": found["environment"],
    }
    _print(result)
    if is_main_process():
        _write(result, run.out, json_file)
    _say_next(run.recipe, folder, config)
    return result


def _runs(run: RunArguments, folder: Path, seed: int) -> dict[str, Config]:
    """What to train, in order; the teacher only where the recipe has one and none was given."""
    student = derive(run.config, run={"seed": seed})
    runs: dict[str, Config] = {}
    if run.recipe in TEACHERS and student.teacher.source == RECIPES[run.recipe]().teacher.source:
        teacher = RECIPES[TEACHERS[run.recipe]]()
        machine = {"seed": seed, "device": student.run.device, "precision": student.run.precision}
        runs["teacher"] = derive(teacher, data=dataclasses.asdict(student.data), run=machine)
        student = derive(student, teacher={"source": str(folder / "teacher")})
    runs["distilled"] = student
    # The teacher stays in the configuration: training ignores it, evaluation compares with it.
    smoothing = student.loss.label_smoothing
    labels = dataclasses.replace(OBJECTIVES["none"], label_smoothing=smoothing)
    runs["undistilled"] = dataclasses.replace(student, loss=labels)
    return runs


def _top1(found: dict[str, Any]) -> dict[str, float | None]:
    two_heads = found["heads"]["distillation"] is not None
    names = HEADS if two_heads else ("class",)
    return {head: found["heads"][head]["top1"] if head in names else None for head in HEADS}


def _agreement(found: dict[str, Any]) -> float | None:
    return found["agreement"].get("fused", found["agreement"]["class"]).get("teacher")


def _curve(folder: Path) -> list[tuple[int, float]]:
    """Validation top-1 by epoch, of the weights and head that select the best checkpoint."""
    rows = checkpoint.read_metrics(folder)
    return [(row["epoch"], selected_top1(row["validation"])) for row in rows if "validation" in row]


def _write(result: dict[str, Any], out: Path, json_file: Path | None) -> None:
    """The numbers where they were asked for, the picture beside the runs."""
    if json_file is not None:
        checkpoint.write_json(json_file, result)
        say(f"wrote {json_file}")
    try:
        draw_comparison(result, out / "comparison.png")
        say(f"drew {out / 'comparison.png'}")
    except EnvironmentFault as error:
        say(f"no picture: {error}")


def _print(result: dict[str, Any]) -> None:
    """The table; with several seeds each cell is mean and standard deviation."""
    number = len(result["seeds"])
    title = f"{result['recipe']}: top-1 % on {result['num_samples']} {result['split']} images" + (
        f", mean and standard deviation of {number} seeds" if number > 1 else ""
    )
    table(title, COLUMNS, [comparison_cells(name, row) for name, row in result["rows"].items()])


def _say_next(recipe: str, folder: Path, config: Config) -> None:
    say(
        "\nNext:\n"
        f"  python evaluate_deit.py {folder / 'distilled'}      every head, class by class\n"
        f"  python train_deit.py {recipe} --objective deit-hard "
        f"--teacher.source {config.teacher.source} --out checkpoints/hard\n"
        "  python train_deit.py --help      every setting\n"
        "  deit recipes      the other experiments"
    )
