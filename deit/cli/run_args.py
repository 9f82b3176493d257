"""Parse the command line of a run: a recipe, options, and fields of its configuration."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deit.cli.common_options import is_help_requested
from deit.cli.grammar import ConfigCommand, RawValue, option_of, parse_options, plain
from deit.cli.parser import Parser
from deit.config.presets import PRESETS, apply_presets, fit_epochs
from deit.config.recipes import find_recipe
from deit.config.schema import Config, to_dict
from deit.config.sections.data import DataConfig
from deit.config.sections.loss import LossConfig
from deit.config.validation import config_from_dict
from deit.core.console import info
from deit.core.errors import NO_VALUE, ConfigError, ConfigProblem, single_line

USE_TRAIN = "use it with deit train"
NOT_TRAINING = dict.fromkeys(("resume", "dry_run", "print_config"), USE_TRAIN)
ALWAYS_RESUMES = {"resume": "run the same command again to resume"}
"""Shared options that a command does not take, each with what to do instead."""

TRAIN = ConfigCommand(
    "train", "Train a student by a recipe, with or without a teacher; or train a teacher."
)


@dataclass(frozen=True)
class RunArguments:
    """The parsed command line of a run."""

    recipe: str
    config: Config
    out: Path
    resume: bool
    dry_run: bool
    print_config: bool
    trusts_teacher_code: bool = False
    """Whether teachers may be Python files: only if --teacher.source is given as an option."""


def parse_run(
    arguments: list[str],
    command: ConfigCommand = TRAIN,
    *,
    program: str,
    own_parser: Parser | None = None,
    live_teacher: bool = True,
    transform: Callable[[Config], Config] | None = None,
    out: Path | None = None,
    prefix: str = "",
) -> RunArguments:
    """Parse and check the command line of a run: RECIPE first, then options.

    own_parser: the parser of the command's own options, if they were parsed before; see
    `ConfigCommand.parser`. live_teacher: whether the teachers run during training; see
    `config_from_dict`. transform: applied to the recipe before the fields of the command line.
    out: the default folder; by default checkpoints/RECIPE, with `prefix` before RECIPE.

    Raises ConfigError with all problems. `--help` prints and raises SystemExit(0).
    """
    recipe, rest = _split_recipe(arguments, program)
    _check_excluded(rest, command.excluded, program)
    base = find_recipe(recipe)
    if transform is not None:
        base = transform(base)
    parser = command.parser(program, recipe=recipe, base=base, own_parser=own_parser)
    options, unknown = parse_options(rest, parser, base)
    problems = _unknown_arguments(unknown, parser)
    values = _with_options(base, options, problems)
    folder = plain(options.out)
    if folder == "":
        problems.append(ConfigProblem("--out", folder, "needs a folder"))
    config = config_from_dict(values, problems, live_teacher=live_teacher)
    source_given = isinstance(options.config.teacher.source, RawValue)
    if recipe.endswith(".json") and not source_given:
        _check_teacher_code(recipe, config)
    return RunArguments(
        recipe=recipe,
        config=config,
        out=Path(folder).expanduser()
        if folder
        else out or Path("checkpoints") / (prefix + run_name(recipe)),
        resume=options.resume,
        dry_run=options.dry_run,
        print_config=options.print_config,
        trusts_teacher_code=source_given,
    )


def _check_excluded(arguments: list[str], excluded: Mapping[str, str], program: str) -> None:
    """Raise ConfigError if an option is given that the command does not take."""
    given = {argument.partition("=")[0].replace("-", "_") for argument in arguments}
    for name, instead in excluded.items():
        if f"__{name}" in given:
            raise ConfigError(f"{program}: does not take {option_of(name)}; {instead}")


def _check_teacher_code(recipe: str, config: Config) -> None:
    """Raise ConfigError if a configuration file names Python code as a teacher."""
    if config.teacher.code_sources:
        sources = ",".join(config.teacher.source)
        raise ConfigError(
            f"{recipe}: its teacher {sources} is Python code, and code is run only if the command "
            f"line names it; add --teacher.source {sources} if you trust it"
        )


def _split_recipe(arguments: list[str], program: str) -> tuple[str, list[str]]:
    """Return the recipe and the arguments after it; `digits` for --help alone."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    if is_help_requested(arguments):
        return "digits", arguments
    raise ConfigError(
        f"name a recipe first: {program} RECIPE [options]; such as digits-teacher or folder; "
        "`deit recipes` lists all; FILE.py:FUNCTION and a run's config.json are recipes, too"
    )


def _with_options(
    base: Config, options: Any, problems: list[ConfigProblem]
) -> dict[str, dict[str, Any]]:
    """Return the values of a recipe with the presets and fields of a command line applied. Add
    what is invalid to `problems`."""
    values = to_dict(base)
    presets = {name: plain(getattr(options, name)) for name in PRESETS}
    for name, advice in apply_presets(values, presets).items():
        problems.append(ConfigProblem(option_of(name), presets[name], advice))
    problems += _merge(values, base, options.config)
    given_presets = [name for name, preset in presets.items() if preset is not None]
    fit_epochs(values, [*_given_fields(options.config), *given_presets])
    return values


def print_config_if_requested(run: RunArguments) -> bool:
    """Print the configuration if --print-config was given; return whether it was."""
    if run.print_config:
        info(json.dumps(to_dict(run.config), indent=1))
    return run.print_config


def parse_data(arguments: list[str]) -> DataConfig:
    """Return the data section of the command line of a run, RECIPE first.

    Raises ConfigError with all problems of the data section, and ignores those of other sections.
    """
    recipe, rest = arguments[0], arguments[1:]
    base = find_recipe(recipe)
    options, _ = parse_options(rest, TRAIN.parser("", base=base), base)
    values = to_dict(base)
    _merge(values, base, options.config)
    valid = to_dict(Config(loss=LossConfig(kind="none")))
    return config_from_dict({**valid, "data": values["data"]}).data


def _merge(values: dict[str, dict[str, Any]], base: Config, parsed: Config) -> list[ConfigProblem]:
    """Write the given fields into `values`. Other fields keep their value, which may be a preset's.

    Returns a problem for each field with no value or too many.
    """
    problems = []
    for section in dataclasses.fields(Config):
        before, after = getattr(base, section.name), getattr(parsed, section.name)
        for field in dataclasses.fields(section.type):
            name, value = f"{section.name}.{field.name}", getattr(after, field.name)
            if isinstance(value, RawValue) and not value.arguments:
                problems.append(ConfigProblem(f"--{name}", "", "needs a value"))
            elif isinstance(value, RawValue) and len(value.arguments) > 1 and not value.many:
                advice = "takes one value; a value with spaces needs quotes"
                problems.append(ConfigProblem(name, " ".join(value.arguments), advice))
            elif isinstance(value, RawValue) or value != getattr(before, field.name):
                values[section.name][field.name] = plain(value)
    return problems


def _given_fields(parsed: Config) -> list[str]:
    """Return the names of the fields that were given, without switches."""
    return [
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(Config)
        for field in dataclasses.fields(section.type)
        if isinstance(getattr(getattr(parsed, section.name), field.name), RawValue)
    ]


def _unknown_arguments(arguments: list[str], parser: Parser) -> list[ConfigProblem]:
    """Return a problem for each unknown option and each argument that belongs to none."""
    problems, after_option = [], False
    for argument in arguments:
        if argument.startswith("--"):
            hint = f"unknown option{parser.suggestion(argument)}"
            problems.append(ConfigProblem(single_line(argument.split("=")[0]), NO_VALUE, hint))
        elif not after_option:
            problems.append(ConfigProblem("arguments", argument, "unexpected argument"))
        after_option = argument.startswith("--") and "=" not in argument
    return problems


def given_epochs(arguments: list[str]) -> int | None:
    """Return the --optim.epochs of a command line; None if it is missing or no integer."""
    option, value = "--optim.epochs", None
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        if argument == option or argument.startswith(f"{option}="):
            value = following if argument == option else argument.partition("=")[2]
    return int(value) if value is not None and value.isdecimal() else None


def run_name(recipe: str) -> str:
    """Return the name for a recipe's folder: `digits` for digits, `mine` for mine.py:mine."""
    return recipe.rsplit(":", 1)[-1] if ".py:" in recipe else Path(recipe).stem
