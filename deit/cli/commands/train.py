"""The commands that train one network, or time its updates; and the list of recipes."""

from pathlib import Path

from deit.cli.finetune_args import parse_finetune
from deit.cli.parser import Parser, command_of
from deit.cli.run_args import TRAINS_NOT, RunArguments, parse_run, print_config_if_asked
from deit.config.recipes import RECIPES
from deit.core.console import info, is_main_process, table
from deit.core.errors import ConfigError


def train(arguments: list[str], program: str) -> None:
    """Train a student (or a teacher) by a recipe."""
    run = parse_run(arguments, program=program, about="Train by a recipe, with or without teacher.")
    _train(run, command_of(program, arguments))


def _train(run: RunArguments, command: str) -> None:
    """Train as a command line says, or print its configuration. command: for the record."""
    if print_config_if_asked(run):
        return
    from deit.training.train import train

    train(run.config, run.out, resume=run.resume, dry_run=run.dry_run, command=command)


def finetune(arguments: list[str], program: str) -> None:
    """Fine-tune a run or a checkpoint: at a higher resolution, or on other images."""
    _train(parse_finetune(arguments, program), command_of(program, arguments))


def profile(arguments: list[str], program: str) -> None:
    """Where the time of an update goes, by part and by operation, with a trace to look into."""
    parser = Parser(prog=program, add_help=False)
    parser.add_argument("--updates", type=int, default=10, metavar="N", help="How many to time.")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE.json", help="Write a trace, for ui.perfetto.dev."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write the numbers here.")
    parser.add_argument(
        "--force", action="store_true", help="Let --trace and --json replace files."
    )
    options, rest = parser.parse_known_args(arguments)
    run = parse_run(
        rest,
        program=program,
        about="Train some updates of a recipe and print where their time went: views, teacher, "
        "student, backward pass, optimizer, average, and the operations by their own time. Nothing "
        "is written but what is named.",
        command_parser=parser,
        excluded={**TRAINS_NOT, "out": "it writes no run; --trace and --json name files"},
    )
    if options.updates < 1:
        raise ConfigError(f"--updates {options.updates}: should be at least 1")
    from deit.core.filesystem import check_file, write_json
    from deit.training.profile import profile_run

    for option, path in (("--trace", options.trace), ("--json", options.json)):
        check_file(path, option=option, replace=options.force)
    found = profile_run(run.config, updates=options.updates, trace=options.trace)
    if options.json is not None and is_main_process():
        write_json(options.json, found)
        info(f"wrote {options.json}")


def recipes(arguments: list[str], program: str) -> None:
    """The named recipes and what they are."""
    Parser(prog=program, description="List the named recipes.").parse_args(arguments)
    rows = []
    for name, recipe in RECIPES.items():
        config = recipe()
        student = f"{config.student.name} {config.student.image_size} px"
        epochs = str(config.optim.epochs)
        first = (recipe.__doc__ or "").split("\n\n")[0]  # the first paragraph
        rows.append((name, student, epochs, " ".join(first.split())))
    table("recipes", ("name", "student", "epochs", "what"), rows, text=True, folds="what")
