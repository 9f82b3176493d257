"""The command-line grammar of a run: a recipe, then any field of its configuration."""

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from deit.checks import Problem
from deit.config import Config, DataConfig, LossConfig, code_of, to_dict
from deit.errors import ConfigError
from deit.presets import PRESETS, put_presets
from deit.recipes import RECIPES, find_recipe
from deit.validation import build, unknown_field


@dataclass(frozen=True)
class RunArguments:
    """What a command line says of a run."""

    recipe: str
    config: Config
    out: Path
    resume: bool
    dry_run: bool
    print_config: bool
    names_teachers: bool = False
    """Whether the command line itself says who teaches: then they may be code."""


class _Typed(NamedTuple):
    """The words typed after a flag; the configuration's types convert them, so that every wrong
    value of a command line is reported in one message."""

    words: tuple[str, ...]
    many: bool

    @property
    def text(self) -> str:
        return ",".join(self.words)


_RUN_REGISTRY = ConstructorRegistry()


@_RUN_REGISTRY.primitive_rule
def _as_typed(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    if dataclasses.is_dataclass(info.type) or info.type is bool:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=_metavar(info.type),
        instance_from_str=lambda arguments: _Typed(
            tuple(arguments), typing.get_origin(info.type) is tuple
        ),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [_shown(value)],
    )


def _metavar(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if origin in (types.UnionType, typing.Union):
        return "|".join("none" if part is type(None) else _metavar(part) for part in inner)
    if origin is Annotated:
        return _metavar(inner[0])
    if origin is tuple:
        return "A,B,..." if inner[-1] is Ellipsis else ",".join(_metavar(part) for part in inner)
    return {int: "INT", float: "FLOAT"}.get(kind, "TEXT")


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(map(_shown, value)) or "(none)"
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class _Options:
    out: str | None = None
    """Run folder. None: checkpoints/RECIPE below the working directory."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with the run in the folder, from its newest sound checkpoint."""
    objective: str | None = None
    """A whole loss section by name: deit-hard, deit-soft, class-hard, class-soft,
    function-matching, usi, dkd or none."""
    augmentation: str | None = None
    """Policy, jitter, erasing, mixing and repeats of the views by name: deit, deit3, mix, usi or
    none; crop and flip stay the recipe's."""
    teaching: str | None = None
    """What the teacher sees beside the student, with crop and mixing, by name: fix/rs, fix/cc,
    fix/ic_ens, ind/rc, ind/ic, same/rc, same/ic or function-matching."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """One training and one evaluation step; nothing is written."""
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the resolved configuration as JSON and stop."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)


def parse_run(
    arguments: list[str],
    *,
    program: str,
    about: str,
    online: bool = True,
    adapt: Callable[[Config], Config] | None = None,
    out: Path | None = None,
) -> RunArguments:
    """The checked arguments of a run: RECIPE first, options after it.

    online: whether its teachers will answer in training, as `deit.validation.build` takes it.
    adapt: what is done to the recipe before the fields of the command line are put over it.
    out: the run folder where none is named; None: checkpoints/RECIPE.
    Raises ConfigError naming every problem; `--help` prints and raises SystemExit(0).
    """
    helps = {"-h", "--help"} & set(arguments)
    if arguments and not arguments[0].startswith("-"):
        recipe, rest = arguments[0], arguments[1:]
    elif helps:
        recipe, rest = "digits", arguments
    else:
        raise ConfigError(
            f"name a recipe first: {program} RECIPE [options]; recipes are "
            f"{', '.join(RECIPES)}, FILE.py:FUNCTION, or a run's config.json"
        )
    base = find_recipe(recipe)
    if adapt is not None:
        base = adapt(base)
    options, unknown = _read(rest, recipe, base, program=program, about=about)
    problems = _unknown(unknown)
    values = to_dict(base)
    named = {flag: _plain(getattr(options, flag)) for flag in PRESETS}
    for flag, advice in put_presets(values, named).items():
        problems.append(Problem(f"--{flag}", named[flag], advice))
    problems += _merge(values, base, options.config)
    folder = _plain(options.out)
    if folder == "":
        problems.append(Problem("--out", folder, "needs a folder"))
    config = build(values, problems, online=online)
    typed = isinstance(options.config.teacher.source, _Typed)
    if recipe.endswith(".json") and not typed and code_of(config.teacher):
        named = ",".join(config.teacher.source)
        raise ConfigError(
            f"{recipe}: its teacher {named} is code, which no file but the command line may have "
            f"run; add --teacher.source {named} if you trust it"
        )
    return RunArguments(
        recipe=recipe,
        config=config,
        out=Path(folder).expanduser() if folder else out or Path("checkpoints") / run_name(recipe),
        resume=options.resume,
        dry_run=options.dry_run,
        print_config=options.print_config,
        names_teachers=typed,
    )


def parse_data(arguments: list[str]) -> DataConfig:
    """The data that a command line of a run asks for, RECIPE first, whatever else it says.

    Raises ConfigError naming every problem of the data.
    """
    recipe, rest = arguments[0], arguments[1:]
    base = find_recipe(recipe)
    options, _unknown = _read(rest, recipe, base, program="", about="")
    values = to_dict(base)
    _merge(values, base, options.config)
    plain = to_dict(Config(loss=LossConfig(kind="none")))  # nothing else to be wrong
    return build({**plain, "data": values["data"]}).data


def _read(
    arguments: list[str], recipe: str, base: Config, *, program: str, about: str
) -> tuple[_Options, list[str]]:
    """Options as they were typed, over a recipe's configuration, and the words that are none."""
    return tyro.cli(
        _Options,
        prog=f"{program} RECIPE",
        description=f"{about}\n\nRECIPE: {', '.join(RECIPES)}, FILE.py:FUNCTION, or a run's "
        f"config.json. Defaults shown are those of {recipe!r}.",
        default=_Options(config=base),
        args=arguments,
        return_unknown_args=True,
        use_underscores=True,
        registry=_RUN_REGISTRY,
    )


def _plain(value: Any) -> Any:
    return value.text if isinstance(value, _Typed) else value


def _merge(values: dict[str, dict[str, Any]], base: Config, parsed: Config) -> list[Problem]:
    """Put what was typed over the recipe's values; the rest of a section may be a preset's.

    Returns a problem for each flag without a value.
    """
    problems = []
    for section in dataclasses.fields(Config):
        before, after = getattr(base, section.name), getattr(parsed, section.name)
        for leaf in dataclasses.fields(section.type):
            typed = getattr(after, leaf.name)
            if isinstance(typed, _Typed) and not typed.words:
                problems.append(Problem(f"--{section.name}.{leaf.name}", "", "needs a value"))
            elif isinstance(typed, _Typed) and len(typed.words) > 1 and not typed.many:
                words = " ".join(typed.words)
                advice = "takes one value; a value with spaces needs quotes"
                problems.append(Problem(f"{section.name}.{leaf.name}", words, advice))
            elif isinstance(typed, _Typed) or typed != getattr(before, leaf.name):
                values[section.name][leaf.name] = _plain(typed)
    return problems


def _unknown(arguments: list[str]) -> list[Problem]:
    """A problem for each flag that does not exist, and for each word that belongs to none."""
    problems, after_flag = [], False
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].split("=")[0].replace("-", "_")
            problems.append(unknown_field(name))
        elif not after_flag:
            problems.append(Problem("arguments", argument, "belongs to no option"))
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


def parse_shard(text: str) -> tuple[int, int]:
    """`2/8` as (2, 8): part 2, counted from 0, of 8. Raises ConfigError."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise ConfigError(f"--shard {text}: should be I/N with I in 0 ... N - 1, as in 0/4")
    return int(part), int(parts)


def check_records(text: str | None) -> str | None:
    """hard, full or top-K. Raises ConfigError."""
    kept = (text or "").removeprefix("top-")
    if text in (None, "hard", "full") or (kept != text and kept.isdecimal() and int(kept) > 0):
        return text
    raise ConfigError(f"--records {text}: should be hard, full or top-K, as in top-10")


def read_numbers(text: str | None, option: str, *, whole: bool, least: int = 1) -> tuple[Any, ...]:
    """`8,16` as numbers: counts from `least`, or shares in (0, 1]. Raises ConfigError."""
    found = []
    for word in (text or "").split(","):
        if not word:
            continue
        try:
            value = int(word) if whole else float(word)
        except ValueError:
            value = -1
        if not (value >= least if whole else 0 < value <= 1):  # nor a NaN
            kind = f"whole numbers from {least}" if whole else "shares in (0, 1]"
            raise ConfigError(f"{option} {text}: should be {kind}, with commas")
        found.append(value)
    if len({f"{value:g}" for value in found}) < len(found):
        raise ConfigError(f"{option} {text}: names one of them twice")
    return tuple(found)


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` as seeds, each once. Raises ConfigError."""
    try:
        seeds = tuple(int(seed) for seed in text.split(","))
    except ValueError:
        seeds = (-1,)
    if min(seeds) < 0:
        raise ConfigError(f"--seeds {text}: should be whole numbers from 0, with commas")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text}: names one of them twice")
    return seeds


class Parser(argparse.ArgumentParser):
    """argparse for the commands without a configuration: errors become ours, nothing is guessed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")
