"""What a command line says of a run: a recipe, then any field of its configuration; checked."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deit.cli.grammar import RawValue, option_of, parse_options, plain
from deit.config.data_section import DataConfig
from deit.config.presets import PRESETS, apply_presets, fit_epochs
from deit.config.recipes import RECIPES, find_recipe
from deit.config.schema import Config, LossConfig, to_dict
from deit.config.validation import config_from_dict, unknown_field
from deit.core.console import info
from deit.core.errors import ConfigError, ConfigProblem

TRAINS = "give it to deit train"
TRAINS_NOT = dict.fromkeys(("resume", "dry_run", "print_config"), TRAINS)
GOES_ON = {"resume": "the same command always goes on"}
"""What to do instead of options that not every command takes."""


@dataclass(frozen=True)
class RunArguments:
    """What a command line says of a run."""

    recipe: str
    config: Config
    out: Path
    resume: bool
    dry_run: bool
    print_config: bool
    trusts_teacher_code: bool = False
    """Whether the command line itself says who teaches: then they may be code."""


def parse_run(
    arguments: list[str],
    *,
    program: str,
    about: str,
    usage: str = "RECIPE",
    command_parser: argparse.ArgumentParser | None = None,
    help_overrides: Mapping[str, str] | None = None,
    excluded: Mapping[str, str] | None = None,
    online: bool = True,
    adapt: Callable[[Config], Config] | None = None,
    out: Path | None = None,
    prefix: str = "",
) -> RunArguments:
    """Parse and check the command line of a run: RECIPE first, options after it.

    usage: what is named before the options. command_parser, help_overrides: as `parse_options`
    takes them. excluded: shared options that the command does not take, with what to do instead.
    online: whether teachers run in training, as live_teacher of `config_from_dict`. adapt: changes
    the recipe before the command line's fields are applied. out: the default folder; None:
    checkpoints/RECIPE, with `prefix` before RECIPE.
    Raises ConfigError naming every problem; `--help` prints and raises SystemExit(0).
    """
    excluded = excluded or {}
    recipe, rest = _split_recipe(arguments, program)
    for name, instead in excluded.items():
        if any(word.partition("=")[0].replace("-", "_") == f"__{name}" for word in rest):
            raise ConfigError(f"{program}: takes no {option_of(name)}; {instead}")
    base = find_recipe(recipe)
    if adapt is not None:
        base = adapt(base)
    options, unknown = parse_options(
        rest,
        base,
        usage=f"{program} {usage}",
        about=f"{about}\n\n{_defaults(recipe, usage)}",
        command_parser=command_parser,
        help_overrides=help_overrides,
        excluded=excluded,
    )
    problems = _unknown(unknown, command_parser)
    values = _with_options(base, options, problems)
    folder = plain(options.out)
    if folder == "":
        problems.append(ConfigProblem("--out", folder, "needs a folder"))
    config = config_from_dict(values, problems, live_teacher=online)
    typed = isinstance(options.config.teacher.source, RawValue)
    if recipe.endswith(".json") and not typed:
        _refuse_teacher_code(recipe, config)
    return RunArguments(
        recipe=recipe,
        config=config,
        out=Path(folder).expanduser()
        if folder
        else out or Path("checkpoints") / (prefix + run_name(recipe)),
        resume=options.resume,
        dry_run=options.dry_run,
        print_config=options.print_config,
        trusts_teacher_code=typed,
    )


def _refuse_teacher_code(recipe: str, config: Config) -> None:
    """Refuse teachers that are code and that only a file names. Raises ConfigError."""
    if config.teacher.code_sources:
        named = ",".join(config.teacher.source)
        raise ConfigError(
            f"{recipe}: its teacher {named} is code, which no file but the command line may have "
            f"run; add --teacher.source {named} if you trust it"
        )


def _split_recipe(arguments: list[str], program: str) -> tuple[str, list[str]]:
    """Return the recipe and the words after it; `digits` for --help alone. Raises ConfigError."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    if {"-h", "--help"} & set(arguments):
        return "digits", arguments
    raise ConfigError(
        f"name a recipe first: {program} RECIPE [options]; recipes are "
        f"{', '.join(RECIPES)}, FILE.py:FUNCTION, or a run's config.json"
    )


def _with_options(
    base: Config, options: Any, problems: list[ConfigProblem]
) -> dict[str, dict[str, Any]]:
    """Return the values of a recipe with presets and fields of a command line applied; add what is
    wrong to `problems`."""
    values = to_dict(base)
    named = {flag: plain(getattr(options, flag)) for flag in PRESETS}
    for flag, advice in apply_presets(values, named).items():
        problems.append(ConfigProblem(option_of(flag), named[flag], advice))
    problems += _merge(values, base, options.config)
    presets = [flag for flag, name in named.items() if name is not None]
    fit_epochs(values, [*_typed(options.config), *presets])
    return values


def print_config_if_asked(run: RunArguments) -> bool:
    """Whether a configuration is all that was asked for; it is printed then."""
    if run.print_config:
        info(json.dumps(to_dict(run.config), indent=1))
    return run.print_config


def parse_data(arguments: list[str]) -> DataConfig:
    """The data that a command line of a run asks for, RECIPE first, whatever else it says.

    Raises ConfigError naming every problem of the data.
    """
    recipe, rest = arguments[0], arguments[1:]
    base = find_recipe(recipe)
    options, _ = parse_options(rest, base, usage="", about="")
    values = to_dict(base)
    _merge(values, base, options.config)
    sound = to_dict(Config(loss=LossConfig(kind="none")))  # nothing else to be wrong
    return config_from_dict({**sound, "data": values["data"]}).data


def _defaults(recipe: str, usage: str) -> str:
    """Return the paragraph of --help about recipes, and about whose defaults it shows."""
    of = f"The defaults of fields are those of {recipe!r}."
    if "RECIPE" in usage:
        named = "a name listed by `deit recipes`, FILE.py:FUNCTION, or a run's config.json"
        return f"RECIPE: {named}. {of}"
    return of if recipe.endswith(".json") else f"{of} Name {usage} to see its own."


def _merge(values: dict[str, dict[str, Any]], base: Config, parsed: Config) -> list[ConfigProblem]:
    """Put what was typed over the recipe's values; the rest of a section may be a preset's.

    Returns a problem for each flag without a value.
    """
    problems = []
    for section in dataclasses.fields(Config):
        before, after = getattr(base, section.name), getattr(parsed, section.name)
        for leaf in dataclasses.fields(section.type):
            typed = getattr(after, leaf.name)
            if isinstance(typed, RawValue) and not typed.words:
                problems.append(ConfigProblem(f"--{section.name}.{leaf.name}", "", "needs a value"))
            elif isinstance(typed, RawValue) and len(typed.words) > 1 and not typed.many:
                words = " ".join(typed.words)
                advice = "takes one value; a value with spaces needs quotes"
                problems.append(ConfigProblem(f"{section.name}.{leaf.name}", words, advice))
            elif isinstance(typed, RawValue) or typed != getattr(before, leaf.name):
                values[section.name][leaf.name] = plain(typed)
    return problems


def _typed(parsed: Config) -> list[str]:
    """The fields that were typed, but for those that are switches."""
    return [
        f"{section.name}.{leaf.name}"
        for section in dataclasses.fields(Config)
        for leaf in dataclasses.fields(section.type)
        if isinstance(getattr(getattr(parsed, section.name), leaf.name), RawValue)
    ]


def _unknown(
    arguments: list[str], command_parser: argparse.ArgumentParser | None
) -> list[ConfigProblem]:
    """A problem for each flag that does not exist, and for each word that belongs to none. own:
    the command's own options, any of which may have been meant."""
    known = (
        {action.option_strings[0][2:] for action in command_parser._actions}
        if command_parser is not None
        else ()
    )
    problems, after_flag = [], False
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].split("=")[0].replace("-", "_")
            problems.append(unknown_field(name, known))
        elif not after_flag:
            problems.append(ConfigProblem("arguments", argument, "belongs to no option"))
        after_flag = argument.startswith("--") and "=" not in argument
    return problems


def typed_epochs(words: list[str]) -> int | None:
    """What a command line says of optim.epochs; None where it says nothing, or no number."""
    option, found = "--optim.epochs", None
    for word, following in zip(words, [*words[1:], ""]):
        if word == option or word.startswith(f"{option}="):
            found = following if word == option else word.partition("=")[2]
    return int(found) if found is not None and found.isdecimal() else None


def run_name(recipe: str) -> str:
    """`digits` for the recipe digits, `mine` for mine.py:mine or mine.py."""
    return recipe.rsplit(":", 1)[-1] if ".py:" in recipe else Path(recipe).stem
