"""Commands that train and compare many runs, and the report of runs."""

import argparse
import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deit.cli.common_options import is_help_requested
from deit.cli.grammar import ConfigCommand
from deit.cli.parser import Names, Parser, command_of, parse_names, parse_seeds
from deit.cli.run_args import ALWAYS_RESUMES, RunArguments, parse_run, print_config_if_requested
from deit.config.command_choices import TOP_POINTS, check_content_name
from deit.config.input_paths import check_images, check_new_root
from deit.config.schema import Config
from deit.core import run_folder
from deit.core.console import info
from deit.core.errors import ConfigError
from deit.experiments.studies import STUDIES
from deit.experiments.sweep_grid import (
    SWEEPS,
    boundary_points,
    check_code_teachers,
    differing,
    find_sweep,
    points_of,
    study_sweep,
    trusted_code,
    with_command_line,
    with_fields,
)
from deit.experiments.sweep_spec import Sweep


def _compare_parser(program: str) -> Parser:
    parser = Parser(prog=program, add_help=False)
    parser.add_argument(
        "--study",
        default="teacher",
        metavar=Names(STUDIES),
        help="The students to compare: teacher (with and without the teacher), view-modes (every "
        "view mode), epochs (shorter and longer training), ensemble (several teachers combined and "
        "each alone), resolution (fine-tuning at a higher resolution, with each teacher and "
        "without one), or a table of the DeiT paper: table-2 (ConvNet and transformer teachers), "
        "table-3 (hard and soft distillation, class and distillation token), table-4 (disagreement "
        "between teacher and students), table-8 (ablation of the training).",
    )
    parser.add_argument(
        "--arms",
        default="",
        metavar="NAME,...",
        help="Students of the study to train. (default: all)",
    )
    parser.add_multi_run_options()
    parser.set_defaults(top=TOP_POINTS)
    return parser


_COMPARE = ConfigCommand(
    "compare",
    "Train a recipe's teacher and several students, and evaluate all of them on the test split. "
    "data.* and run.* also apply to the teacher, which is trained once, with the first seed. Run "
    "the same command again to resume; finished runs are not trained again.",
    own_parser=_compare_parser,
    help_overrides={
        "out": "Folder of all runs. (default: checkpoints/compare-RECIPE in the working directory)",
        "dry_run": "List the runs; train and write nothing.",
    },
    excluded=ALWAYS_RESUMES,
)


def compare(arguments: list[str], program: str) -> None:
    """Train a recipe with and without its teacher, or another study, and compare."""
    parser = _compare_parser(program)
    options, rest = parser.parse_known_args(arguments)
    arms, seeds = parse_names(options.arms), parse_seeds(options.seeds)
    plan = study_sweep(options.study, recipe="", arms=arms, seeds=seeds)
    recipe_configs: list[Config] = []

    def transform(config: Config) -> Config:
        recipe_configs.append(config)
        return config

    run = parse_run(
        rest,
        _COMPARE,
        program=program,
        own_parser=parser,
        transform=transform,
        prefix="compare-",
        live_teacher=False,
    )
    if print_config_if_requested(run):
        return
    if not run.out.exists():  # finished runs do not need their images any longer
        check_images(run.config.data)
    plan = dataclasses.replace(plan, recipe=run.recipe)
    command = command_of(program, arguments)
    (config,) = recipe_configs
    result = _train_points(plan, run, options, command, recipe=config, base=config)
    if result and options.study == "teacher":
        _suggest_next(run.recipe, result)


def _suggest_next(recipe: str, result: dict[str, Any]) -> None:
    """Print commands to run after a first comparison."""
    rows = result["rows"].values()
    student = next(row["folders"][0] for row in rows if not row["teacher"] and row["folders"])
    teachers = [row["folders"][0] for row in rows if row["teacher"] and row["folders"]]
    source = f"--teacher.source {shlex.quote(','.join(teachers))} " if teachers else ""
    info(
        "\nNext:\n"
        f"  deit evaluate {shlex.quote(student)}      metrics of every head and class\n"
        f"  python train_deit.py {recipe} --loss deit-hard {source}--out checkpoints/hard\n"
        "  python train_deit.py --help-all      all options\n"
        "  deit recipes      all recipes"
    )


_NO_SWEEP = Sweep("sweep")


def _sweep_parser(program: str, plan: Sweep = _NO_SWEEP) -> Parser:
    parser = Parser(prog=program, add_help=False)
    parser.add_argument(
        "--recipe",
        default=plan.recipe,
        metavar="RECIPE",
        help="Recipe to train. (default: that of SWEEP)",
    )
    parser.add_multi_run_options(seeds=",".join(map(str, plan.seeds)))
    parser.add_argument(
        "--top", type=int, default=TOP_POINTS, metavar="N", help="Number of best points to print."
    )
    return parser


_SWEEP = ConfigCommand(
    "sweep",
    f"Train and evaluate every run of a sweep for each seed. SWEEP: a YAML or JSON file "
    f"(docs/guides/sweeps.md), or one of {', '.join(SWEEPS)}. Writes results.json, "
    "tables (results.md, results.tex, results.csv, points.csv), plots and the runs to --out. Run "
    "the same command again to resume; finished runs are reused, even if the file has changed.",
    usage="SWEEP [--recipe RECIPE]",
    own_parser=_sweep_parser,
    help_overrides={
        "out": "Folder of the sweep. (default: checkpoints/SWEEP in the working directory)",
        "dry_run": "List the runs; train and write nothing.",
    },
    excluded=ALWAYS_RESUMES,
)


def sweep(arguments: list[str], program: str) -> None:
    """Train every run of a grid, a search or a study; report mean and standard deviation."""
    plan, rest = _split_sweep(arguments, program)
    parser = _sweep_parser(program, plan)
    options, rest = parser.parse_known_args(rest)
    plan = dataclasses.replace(plan, recipe=options.recipe, seeds=parse_seeds(options.seeds))
    check_content_name(plan.content, "--content")
    recipe_configs: list[Config] = []
    base_configs: list[Config] = []

    def transform(config: Config) -> Config:
        recipe_configs.append(config)
        base_configs.append(with_fields(config, plan.set, where=f"sweep {plan.name}, set"))
        return base_configs[0]

    run = parse_run(
        [plan.recipe, *rest],
        _SWEEP,
        program=program,
        own_parser=parser,
        transform=transform,
        out=Path("checkpoints") / plan.name,
        live_teacher=False,
    )
    if print_config_if_requested(run):
        return
    (recipe,), (base,) = recipe_configs, base_configs
    plan = with_command_line(plan, base, run.config)
    _train_points(plan, run, options, command_of(program, arguments), recipe=recipe, base=base)


def _train_points(
    plan: Sweep,
    run: RunArguments,
    options: argparse.Namespace,
    command: str,
    *,
    recipe: Config,
    base: Config,
) -> dict[str, Any]:
    """Check all points of a sweep, then train them. base: the recipe with the fields that the
    sweep's file sets for all points."""
    # Report every error of the file before torch is imported.
    points = boundary_points(plan, run.config) if plan.search else points_of(plan, run.config)
    # Teachers that are Python code must come from the command line or from a recipe in Python.
    trusted = trusted_code(plan, recipe)
    if run.trusts_teacher_code:
        trusted |= {*run.config.teacher.code_sources}
    check_code_teachers(plan, points, trusted)
    from deit.experiments.sweep import sweep

    return sweep(
        plan,
        run.out,
        config=base,
        overrides=differing(base, run.config),
        parallel=options.parallel,
        retries=options.retries,
        top=options.top,
        dry_run=run.dry_run,
        command=command,
    )


def _split_sweep(arguments: list[str], program: str) -> tuple[Sweep, list[str]]:
    """Return the sweep and the arguments after it; an empty sweep for --help alone."""
    if arguments and not arguments[0].startswith("-"):
        return find_sweep(arguments[0]), arguments[1:]
    if is_help_requested(arguments):
        return _NO_SWEEP, arguments
    raise ConfigError(
        f"name a sweep first: {program} FILE.yaml --out DIR, or one of {', '.join(SWEEPS)}"
    )


def _report_parser(program: str) -> Parser:
    parser = Parser(
        prog=program,
        usage="%(prog)s RUN [RUN ...] [OPTIONS]",
        description="Write a self-contained HTML report of finished runs and sweeps: training "
        "curves, metrics per class, calibration, attention maps and views. Every chart is also "
        "written as PNG and every table as CSV.",
    )
    parser.add_run(many=True, text="Folders of runs and sweeps.")
    parser.add_argument(
        "--out", type=Path, default=Path("report"), metavar="DIR", help="Folder of the report."
    )
    parser.add_data_root()
    parser.add_force("--out")
    return parser


def report(arguments: list[str], program: str) -> None:
    """Write an HTML report of runs and sweeps, with charts (PNG) and tables (CSV)."""
    options = _report_parser(program).parse_args(arguments)
    for run in options.runs:
        run_folder.require_folder(run)
    check_new_root(options.root)
    from deit.analysis.report import report

    report(options.runs, options.out, root=options.root, force=options.force)


PARSERS: dict[str, Callable[[str], Parser]] = {
    "compare": _COMPARE.parser,
    "sweep": _SWEEP.parser,
    "report": _report_parser,
}
"""The parsers of all options, by the words that select the command."""
