"""Commands that train one network or profile its training, and the list of recipes."""

from collections.abc import Callable
from pathlib import Path

from deit.cli.finetune_args import FINETUNE, parse_finetune
from deit.cli.grammar import ConfigCommand
from deit.cli.parser import Parser, command_of
from deit.cli.run_args import (
    NOT_TRAINING,
    TRAIN,
    RunArguments,
    parse_run,
    print_config_if_requested,
)
from deit.config.command_choices import PROFILED_STEPS, check_at_least
from deit.config.recipes import RECIPES
from deit.core.console import info, is_main_process, table


def train(arguments: list[str], program: str) -> None:
    """Train a student or a teacher by a recipe."""
    run = parse_run(arguments, program=program)
    _train(run, command_of(program, arguments))


def _train(run: RunArguments, command: str) -> None:
    """Train a run, or print its configuration. command: for environment.json."""
    if print_config_if_requested(run):
        return
    from deit.training.train import train

    train(run.config, run.out, resume=run.resume, dry_run=run.dry_run, command=command)


def finetune(arguments: list[str], program: str) -> None:
    """Fine-tune a run or pretrained weights, at a higher resolution or on other images."""
    _train(parse_finetune(arguments, program), command_of(program, arguments))


def _profile_parser(program: str) -> Parser:
    parser = Parser(prog=program, add_help=False)
    parser.add_argument(
        "--steps",
        type=int,
        default=PROFILED_STEPS,
        metavar="N",
        help="Number of training steps to time.",
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE.json",
        help="Write a trace to this file, for ui.perfetto.dev.",
    )
    parser.add_json()
    parser.add_force("--trace", "--json")
    return parser


_PROFILE = ConfigCommand(
    "profile",
    "Train for some steps and print the time of each component (views, teacher, student, backward "
    "pass, optimizer, EMA) and of each operator. No run folder is written.",
    own_parser=_profile_parser,
    excluded={**NOT_TRAINING, "out": "no run folder is written; use --trace and --json"},
)


def profile(arguments: list[str], program: str) -> None:
    """Profile training steps: time per component and per operator, with an optional trace."""
    parser = _profile_parser(program)
    options, rest = parser.parse_known_args(arguments)
    run = parse_run(rest, _PROFILE, program=program, own_parser=parser)
    check_at_least("steps", options.steps, 1)
    from deit.core.filesystem import check_file, write_json
    from deit.training.profile import profile_run

    for name, path in (("trace", options.trace), ("json_file", options.json)):
        check_file(path, name=name, replace=options.force)
    result = profile_run(run.config, num_steps=options.steps, trace=options.trace)
    if options.json is not None and is_main_process():
        write_json(options.json, result)
        info(f"wrote {options.json}")


def recipes(arguments: list[str], program: str) -> None:
    """List the named recipes."""
    _recipes_parser(program).parse_args(arguments)
    rows = []
    for name, recipe in RECIPES.items():
        config = recipe()
        student = f"{config.student.name} {config.student.image_size} px"
        epochs = str(config.optim.epochs)
        first_paragraph = (recipe.__doc__ or "").split("\n\n")[0]
        rows.append((name, student, epochs, " ".join(first_paragraph.split())))
    columns = ("name", "student", "epochs", "description")
    table("recipes", columns, rows, text=True, folds="description")


def _recipes_parser(program: str) -> Parser:
    about = "List the named recipes with student, input size and epochs."
    return Parser(prog=program, description=about)


PARSERS: dict[str, Callable[[str], Parser]] = {
    "train": TRAIN.parser,
    "finetune": FINETUNE.parser,
    "profile": _PROFILE.parser,
    "recipes": _recipes_parser,
}
"""The parsers of all options, by the words that select the command."""
