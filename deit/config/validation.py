"""Checks a configuration as a whole: every problem found at once, each with what to do."""

import dataclasses
import functools
import os
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deit.config.checks import CHECKS, LIVE_TEACHER_CHECKS
from deit.config.schema import Config, to_dict
from deit.core.console import count_noun
from deit.core.errors import (
    NO_VALUE,
    ConfigError,
    ConfigProblem,
    NotReadableError,
    did_you_mean,
    in_line,
    name_problem,
)
from deit.core.file_reading import read_bytes, read_text
from deit.core.filesystem import ENVIRONMENT, RESUMED
from deit.core.json_io import parse_strict_json
from deit.core.manifest import check_format_version


def field_names() -> list[str]:
    """Every field as `section.field`."""
    return [
        f"{section.name}.{leaf.name}"
        for section in dataclasses.fields(Config)
        for leaf in dataclasses.fields(section.type)
    ]


def config_from_dict(
    values: dict[str, Any], extra: typing.Iterable[ConfigProblem] = (), *, live_teacher: bool = True
) -> Config:
    """A checked configuration from nested values (text from a command line is converted).

    extra: problems found earlier, reported in the same message. online: whether teachers without
    stored targets will answer in training; else targets are written.
    Raises ConfigError naming every problem.
    """
    problems, broken = list(extra), set()
    for name in [name for name in values if name_problem(name)]:
        problems.append(unknown_field(name))
        values = {other: fields for other, fields in values.items() if other != name}
    for name, fields in values.items():
        if isinstance(fields, dict) and (odd := [leaf for leaf in fields if name_problem(leaf)]):
            problems += [unknown_field(f"{name}.{leaf}") for leaf in odd]
            kept = {leaf: value for leaf, value in fields.items() if leaf not in odd}
            values = values | {name: kept}
    adapter = _adapter()
    try:
        config = adapter.validate_python(values)
    except ValidationError as error:
        problems += [_translate(item) for item in error.errors()]
        # What is left after the broken sections can still contradict itself: say that as well.
        broken = {str(item["loc"][0]) for item in error.errors()}
        config = adapter.validate_python(
            {name: fields for name, fields in values.items() if name not in broken}
        )
    for section, fields in to_dict(config).items():
        for leaf, value in fields.items():
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, str) and (trouble := name_problem(one)):
                    problems.append(
                        ConfigProblem(f"{section}.{leaf}", one, f"{trouble}; rename it")
                    )
                if isinstance(one, int) and abs(one) >= LIMIT:
                    problems.append(ConfigProblem(f"{section}.{leaf}", one, "should be below 2^63"))
                    broken.add(section)
    for check, sections in {**CHECKS, **(LIVE_TEACHER_CHECKS if live_teacher else {})}.items():
        if not sections & broken:
            problems += check(config)
    if problems:
        raise _config_error(problems)
    return config


LIMIT = 2**63
"""Whole numbers are below: PyTorch's sizes and seeds are 64-bit integers."""


@functools.cache
def _adapter() -> TypeAdapter[Config]:
    """What checks the types; made once, as that takes a twentieth of a second."""
    return TypeAdapter(Config)


def validate(config: Config, *, live_teacher: bool = True) -> Config:
    """The same configuration, checked as `build` does. Raises ConfigError naming every problem."""
    return config_from_dict(to_dict(config), live_teacher=live_teacher)


def load_config(path: Path) -> Config:
    """A configuration from the config.json of a run. Relative paths in it that lead nowhere from
    here are taken from where the run was started. Raises ConfigError."""
    try:
        values = parse_strict_json(read_text(path))
    except PermissionError as error:
        raise NotReadableError(f"{path}: {error.strerror}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable configuration ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a configuration is a JSON object of sections")
    check_format_version(path.parent)  # rather than a list of all fields that it names otherwise
    return _from_here(config_from_dict(values), path.parent)


def started_in(run: Path, record: str) -> Path | None:
    """The working directory of the command that started a run. record: environment.json, or that
    of a resumed run, which holds the path from the run's folder, so that both may be moved
    together. None where it does not say."""
    try:
        found = parse_strict_json(read_bytes(run / record))["directory"]
        return (run.resolve() / found).resolve()
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _from_here(config: Config, run: Path) -> Config:
    """A run's configuration with the paths that are found where it was started."""
    starts = [started_in(run, record) for record in (RESUMED, ENVIRONMENT)]
    starts = [start for start in starts if start is not None and start != Path.cwd()]
    if not starts:
        return config

    def found(word: str) -> str:
        mark, name = ("@", word[1:]) if word.startswith("@") else ("", word)
        path = Path(name).expanduser()
        if path.is_absolute() or path.exists() or ".py:" in name or name in ("keep", "none", ""):
            return word
        places = (start / path for start in starts)
        return next((f"{mark}{os.path.relpath(one)}" for one in places if one.exists()), word)

    sections: dict[str, dict[str, Any]] = {}
    for field in _PATHS if config.data.source != "digits" else _PATHS[1:]:
        section, leaf = field.split(".")
        value = getattr(getattr(config, section), leaf)
        if isinstance(value, str):
            sections.setdefault(section, {})[leaf] = found(value)
        elif isinstance(value, tuple):
            lists = field in ("data.classes", "data.unseen_classes")  # where only @FILE is a path
            kept = tuple(one if lists and one[:1] != "@" else found(one) for one in value)
            sections.setdefault(section, {})[leaf] = kept
    return config.replace(**sections)


_PATHS = (
    *("data.root", "data.exclude_list", "data.classes", "data.unseen_classes"),
    *("init.weights", "init.pruning_masks", "teacher.source", "teacher.target_stores"),
)
"""Fields that may hold paths."""


def _config_error(problems: list[ConfigProblem]) -> ConfigError:
    count = count_noun(len(problems), "problem")
    lines = "".join(f"\n  {problem}" for problem in problems)
    return ConfigError(f"{count} in the configuration:{lines}", problems)


def _translate(error: dict[str, Any]) -> ConfigProblem:
    """A ConfigProblem from one of pydantic's error records."""
    # Below a field, locations also name union members and tuple positions: not the user's words.
    name = ".".join(str(part) for part in error["loc"][:2])
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return unknown_field(name)
    value, advice = error["input"], error["msg"].removeprefix("Value error, ")
    advice = advice.replace("Input should", "should").replace("Field required", "is required")
    allowed: tuple[str, ...] = ()
    if error["type"] == "literal_error":
        section, leaf = name.split(".")
        allowed = _words_of(typing.get_type_hints(_section_type(section))[leaf])
        advice += did_you_mean(value, allowed) if isinstance(value, str) else ""
    return ConfigProblem(name, value, advice, allowed)


def _words_of(annotation: Any) -> tuple[str, ...]:
    """The words a field takes, also where it takes several of them."""
    if isinstance(annotation, str):
        return (annotation,)
    return tuple(word for part in typing.get_args(annotation) for word in _words_of(part))


def _section_type(name: str) -> type:
    return typing.get_type_hints(Config)[name]


def unknown_field(name: str, others: Collection[str] = ()) -> ConfigProblem:
    """The problem of a field that does not exist, with the nearest name, or that of others that
    may have been meant."""
    return ConfigProblem(
        in_line(name), NO_VALUE, f"unknown field{did_you_mean(name, [*field_names(), *others])}"
    )
