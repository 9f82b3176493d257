"""Commands that train one network or profile its training, and the list of recipes."""

import inspect
from collections.abc import Callable
from pathlib import Path
from textwrap import fill, shorten

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
from deit.config.input_paths import check_inputs
from deit.config.recipes import RECIPES, find_recipe, list_recipes, recipe_of_path
from deit.core.console import count_noun, info, is_main_process
from deit.core.errors import ConfigError


def train(arguments: list[str], program: str) -> None:
    """Train a student or a teacher by a recipe."""
    run = parse_run(arguments, program=program)
    _train(run, command_of(program, arguments))


def _train(run: RunArguments, command: str) -> None:
    """Train a run, or print its configuration. command: for environment.json."""
    if print_config_if_requested(run):
        return
    if run.dry_run or not run.out.exists():  # a finished run does not need its inputs any longer
        check_inputs(run.config)
    from deit.api import training

    if run.dry_run:
        training.dry_run(run.config, run.out, resume=run.resume)
    else:
        training.train(run.config, run.out, resume=run.resume, command=command)


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
    check_inputs(run.config)
    from deit.core.filesystem import check_file, write_json
    from deit.training.profile import profile_run

    for name, path in (("trace", options.trace), ("json_file", options.json)):
        check_file(path, name=name, replace=options.force)
    result = profile_run(run.config, num_steps=options.steps, trace=options.trace)
    if options.json is not None and is_main_process():
        write_json(options.json, result)
        info(f"wrote {options.json}")


def _recipes_parser(program: str) -> Parser:
    parser = Parser(
        prog=program,
        usage="%(prog)s [NAME]",
        description="List the recipes, or show one of them: its description, data, student, "
        "teacher, loss and schedule.",
    )
    parser.add_argument(
        "name",
        nargs="?",
        metavar="RECIPE",
        help="A recipe to show, or a pattern of names to list, such as 'mnist*'.",
    )
    return parser


def recipes(arguments: list[str], program: str) -> None:
    """List the named recipes, or show one."""
    name = _recipes_parser(program).parse_args(arguments).name
    if name is not None and not set("*?[") & set(name):
        _show_recipe(name)
        return
    names = list_recipes(name or "*")
    if not names:
        raise ConfigError(f"no recipe matches {name}; deit recipes lists all")
    width = max(map(len, RECIPES))
    for recipe in names:
        summary = _description(recipe).split("\n\n")[0].partition(": ")[0].removesuffix(".")
        summary = shorten(summary, _COLUMNS - width - 2, placeholder=" ...", break_on_hyphens=False)
        info(f"{recipe:<{width}}  {summary}")
    info(f"\n{program} RECIPE shows one recipe; deit train RECIPE runs it.")


_COLUMNS = 100  # of a terminal


def _description(recipe: str) -> str:
    """Return the docstring of a recipe; an empty text for a recipe of a file."""
    return inspect.getdoc(RECIPES[recipe]) or "" if recipe in RECIPES else ""


def _show_recipe(name: str) -> None:
    """Print what a recipe is and what it sets."""
    config = find_recipe(name)
    info(f"{name}\n")
    for paragraph in filter(None, _description(name).split("\n\n")):
        info(f"{fill(' '.join(paragraph.split()), _COLUMNS)}\n")
    data, student, loss, optim = config.data, config.student, config.loss, config.optim
    folder = "" if data.source == "digits" else f" in {data.root}"
    rows = {
        "data": f"{data.source}{folder}, {data.image_size} px",
        "student": f"{student.name}, {student.image_size} px",
        "teacher": ", ".join(config.teacher.source) or "none",
        "loss": loss.kind if loss.kind == "none" else f"{loss.kind}, head {loss.head}",
        "training": f"{count_noun(optim.epochs, 'epoch')}, batch size {optim.batch_size}, "
        f"{optim.name}, learning rate {optim.lr:g}",
    }
    for title, text in rows.items():
        info(f"  {title:<9} {text}")
    teachers = [recipe for path in config.teacher.source if (recipe := recipe_of_path(path))]
    info()
    for recipe in teachers:
        info(f"deit train {recipe}")
    needs_weights = "--from WEIGHTS" in _description(name)
    info(f"deit finetune {name} --from WEIGHTS" if needs_weights else f"deit train {name}")
    info(f"deit train {name} --print-config   # all settings")


PARSERS: dict[str, Callable[[str], Parser]] = {
    "train": TRAIN.parser,
    "finetune": FINETUNE.parser,
    "profile": _PROFILE.parser,
    "recipes": _recipes_parser,
}
"""The parsers of all options, by the words that select the command."""
