"""The commands that train many runs beside each other, and the page about runs."""

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import Any

from deit.cli.parser import Parser, check_content, command_of, parse_seeds
from deit.cli.run_args import GOES_ON, RunArguments, parse_run, print_config_if_asked
from deit.config.schema import Config
from deit.core.console import info
from deit.core.errors import ConfigError
from deit.experiments.sweep_grid import (
    SWEEPS,
    Point,
    boundary_points,
    find_sweep,
    points_of,
    study_sweep,
    with_command_line,
    with_fields,
)
from deit.experiments.sweep_spec import Sweep


def compare(arguments: list[str], program: str) -> None:
    """What the teacher is worth, or another study of a recipe, in one table."""
    parser = Parser(prog=program, add_help=False)
    parser.add_argument(
        "--study",
        default="teacher",
        metavar="NAME",
        help="teacher (the student with and without teacher), view-modes (every view mode), "
        "epochs (shorter and longer training), ensemble (teachers together and alone), resolution "
        "(a fine-tuning by "
        "its teachers and none), or of the DeiT paper table-2 (teachers of other kinds), table-3 "
        "(ways of distilling), table-4 (who decides like whom), table-8 (parts of the training).",
    )
    parser.add_argument(
        "--arms", default="", metavar="A,B", help="Some students of the study; none named: all."
    )
    parser.add_multi_run_options()
    parser.set_defaults(top=5)
    options, rest = parser.parse_known_args(arguments)
    names = tuple(name.strip() for name in options.arms.split(",") if name.strip())
    plan = study_sweep(options.study, recipe="", arms=names, seeds=parse_seeds(options.seeds))
    asked: list[Config] = []

    def adapt(config: Config) -> Config:
        asked.append(config)
        return config

    run = parse_run(
        rest,
        program=program,
        about="Train a recipe's teacher and several students, and evaluate all on the test split: "
        "the sweep of a study. data.* and run.* apply to the teacher too, which is trained once, "
        "with the first seed. The same command resumes: a finished run is not trained again.",
        command_parser=parser,
        help_overrides={
            "out": "Folder of all runs. None: checkpoints/compare-RECIPE in the working directory.",
            "dry_run": "List the runs; nothing is trained or written.",
        },
        excluded=GOES_ON,
        adapt=adapt,
        prefix="compare-",
        online=False,
    )
    if print_config_if_asked(run):
        return
    plan = dataclasses.replace(plan, recipe=run.recipe)
    command = command_of(program, arguments)
    result = _train_points(plan, run, options, command, recipe=asked[0], asked=asked[0])
    if result and options.study == "teacher":
        _suggest_next(run.recipe, result)


def _suggest_next(recipe: str, result: dict[str, Any]) -> None:
    """Print what a newcomer may want to type after a first comparison."""
    rows = result["rows"].values()
    student = next(row["folders"][0] for row in rows if not row["teacher"] and row["folders"])
    teachers = [row["folders"][0] for row in rows if row["teacher"] and row["folders"]]
    taught = f"--teacher.source {shlex.quote(','.join(teachers))} " if teachers else ""
    info(
        "\nNext:\n"
        f"  deit evaluate {shlex.quote(student)}      every head, class by class\n"
        f"  python train_deit.py {recipe} --loss deit-hard {taught}--out checkpoints/hard\n"
        "  python train_deit.py --help      every setting\n"
        "  deit recipes      the other experiments"
    )


def sweep(arguments: list[str], program: str) -> None:
    """Every combination of a grid, or the runs of a file or study: one table, mean and std."""
    plan, rest = _split_sweep(arguments, program)
    parser = _sweep_parser(program, plan)
    options, rest = parser.parse_known_args(rest)
    plan = dataclasses.replace(plan, recipe=options.recipe, seeds=parse_seeds(options.seeds))
    check_content(plan.content)
    asked: list[Config] = []
    recipe: list[Config] = []

    def adapt(config: Config) -> Config:
        recipe.append(config)
        asked.append(with_fields(config, plan.set, where=f"sweep {plan.name}, set"))
        return asked[0]

    run = parse_run(
        [plan.recipe, *rest],
        program=program,
        usage="SWEEP [--recipe RECIPE]",
        about="Train and evaluate every run of a sweep for each seed. SWEEP: a YAML or JSON file "
        f"(docs/sweeps.md), or one of {', '.join(SWEEPS)}. Into --out: results.csv, results.json, "
        "results.md, pictures and the runs. The same command goes on; what is finished is kept, "
        "also when the file changes.",
        command_parser=parser,
        help_overrides={
            "out": "Folder of the sweep. None: checkpoints/SWEEP below the working directory.",
            "dry_run": "List the runs; nothing is trained or written.",
        },
        excluded=GOES_ON,
        adapt=adapt,
        out=Path("checkpoints") / plan.name,
        online=False,
    )
    if print_config_if_asked(run):
        return
    plan = with_command_line(plan, asked[0], run.config)
    command = command_of(program, arguments)
    _train_points(plan, run, options, command, recipe=recipe[0], asked=asked[0])


def _train_points(
    plan: Sweep,
    run: RunArguments,
    options: argparse.Namespace,
    command: str,
    *,
    recipe: Config,
    asked: Config,
) -> dict[str, Any]:
    """Check every point, then train them all. asked: the recipe with what a sweep's file sets."""
    # Every mistake in the file, before torch is imported.
    points = boundary_points(plan, run.config) if plan.search else points_of(plan, run.config)
    # Code that may teach: the command line's, and that of a recipe that is no file of JSON.
    trusted = set() if plan.recipe.endswith(".json") else {*recipe.teacher.code_sources}
    if run.trusts_teacher_code:
        trusted |= {*run.config.teacher.code_sources}
    _check_trusted(plan, points, trusted)
    from deit.experiments.sweep import sweep

    return sweep(
        plan,
        run.config,
        run.out,
        asked=asked,
        dry_run=run.dry_run,
        parallel=options.parallel,
        retries=options.retries,
        top=options.top,
        command=command,
    )


def _split_sweep(arguments: list[str], program: str) -> tuple[Sweep, list[str]]:
    """Return the sweep and the words after it; an empty one for --help alone."""
    if arguments and not arguments[0].startswith("-"):
        return find_sweep(arguments[0]), arguments[1:]
    if {"-h", "--help"} & set(arguments):
        return Sweep("sweep"), arguments
    raise ConfigError(
        f"name a sweep first: {program} FILE.yaml --out DIR, or one of {', '.join(SWEEPS)}"
    )


def _sweep_parser(program: str, plan: Sweep) -> Parser:
    parser = Parser(prog=program, add_help=False)
    parser.add_argument(
        "--recipe", default=plan.recipe, metavar="RECIPE", help="Recipe instead of the file's."
    )
    parser.add_multi_run_options(seeds=",".join(map(str, plan.seeds)))
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="How many of the best points to print."
    )
    return parser


def _check_trusted(plan: Sweep, points: list[Point], trusted: set[str]) -> None:
    """Refuse teachers that are code and that only the sweep's file names. Raises ConfigError."""
    for point in points:
        if named := sorted({*point.config.teacher.code_sources} - trusted):
            raise ConfigError(
                f"sweep {plan.name}, {point.name}: its teacher {named[0]} is code, which no file "
                f"but the command line may have run; add --teacher.source {named[0]} if you trust "
                "it"
            )


def report(arguments: list[str], program: str) -> None:
    """One page about runs and sweeps: curves, classes, calibration, attention, views; PNG, CSV."""
    parser = Parser(
        prog=program,
        description="Write one self-contained HTML page about finished runs and sweeps, with every "
        "chart as PNG and every table as CSV beside it.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run or sweep folder")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder (report)")
    parser.add_argument("--data.root", dest="root", metavar="DIR", help="images lie here now")
    parser.add_argument("--force", action="store_true", help="let --out replace a report")
    options = parser.parse_args(arguments)
    from deit.analysis.report import report

    report(options.runs, options.out, root=options.root, force=options.force)
