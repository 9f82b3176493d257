"""Validation of a whole configuration: all problems in one error, each with a remedy."""

import dataclasses
import functools
import os
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deit.config.cross_field_checks import CHECKS, LIVE_TEACHER_CHECKS
from deit.config.field_aliases import suggestion
from deit.config.schema import Config, to_dict
from deit.core.console import count_noun
from deit.core.errors import (
    NO_VALUE,
    ConfigError,
    ConfigProblem,
    NotReadableError,
    did_you_mean,
    name_problem,
    single_line,
)
from deit.core.file_reading import read_bytes, read_text
from deit.core.filesystem import ENVIRONMENT, RESUMED
from deit.core.json_io import parse_strict_json
from deit.core.manifest import check_format_version

Section = typing.TypeVar("Section")


def field_names() -> list[str]:
    """Return the names of all fields as `section.field`."""
    return [
        f"{section.name}.{leaf.name}"
        for section in dataclasses.fields(Config)
        for leaf in dataclasses.fields(section.type)
    ]


def config_from_dict(
    values: dict[str, Any], extra: typing.Iterable[ConfigProblem] = (), *, live_teacher: bool = True
) -> Config:
    """Return a validated configuration from nested values; text is converted to the field's type.

    extra: problems found earlier, to report in the same error.
    live_teacher: whether teachers without stored targets run in training. False for writing
    targets.
    Raises ConfigError with all problems.
    """
    problems, invalid_sections = list(extra), set()
    for name in [name for name in values if name_problem(name)]:
        problems.append(unknown_field(name))
        values = {other: fields for other, fields in values.items() if other != name}
    for name, fields in values.items():
        if not isinstance(fields, dict):
            continue
        if unprintable := [leaf for leaf in fields if name_problem(leaf)]:
            problems += [unknown_field(f"{name}.{leaf}") for leaf in unprintable]
            others = {leaf: value for leaf, value in fields.items() if leaf not in unprintable}
            values = values | {name: others}
    adapter = _adapter()
    try:
        config = adapter.validate_python(values)
    except ValidationError as error:
        problems += [_translate(item) for item in error.errors()]
        # Check the valid sections as well, so that one message reports all problems.
        invalid_sections = {str(item["loc"][0]) for item in error.errors()}
        config = adapter.validate_python(
            {name: fields for name, fields in values.items() if name not in invalid_sections}
        )
    for section, fields in to_dict(config).items():
        for leaf, value in fields.items():
            for item in value if isinstance(value, tuple) else (value,):
                field = f"{section}.{leaf}"
                if isinstance(item, str) and (problem := name_problem(item)):
                    problems.append(ConfigProblem(field, item, f"{problem}; rename it"))
                if isinstance(item, int) and abs(item) >= INT_LIMIT:
                    problems.append(ConfigProblem(field, item, "should be below 2^63"))
                    invalid_sections.add(section)
    for check, sections in {**CHECKS, **(LIVE_TEACHER_CHECKS if live_teacher else {})}.items():
        if not sections & invalid_sections:
            problems += check(config)
    if problems:
        raise _config_error(problems)
    return config


INT_LIMIT = 2**63
"""Integers must be below it: PyTorch's sizes and seeds are 64-bit integers."""


@functools.cache
def _adapter() -> TypeAdapter[Config]:
    """Return the type checker of `Config`; cached because building it takes 0.05 s."""
    return TypeAdapter(Config)


def section_from_dict(section: type[Section], name: str, fields: dict[str, Any]) -> Section:
    """Return a validated section of a configuration. name: of the section, for messages.

    Raises ConfigError with all problems.

    >>> from deit.config.sections.loss import LossConfig
    >>> section_from_dict(LossConfig, "loss", {"kind": "soft", "temperature": "3"}).temperature
    3.0
    """
    try:
        return _section_adapter(section).validate_python(plain_values(fields))
    except ValidationError as error:
        problems = [_translate({**item, "loc": (name, *item["loc"])}) for item in error.errors()]
        raise _config_error(problems) from None


def as_section(section: type[Section], name: str, value: Section | dict[str, Any]) -> Section:
    """Return a section of a configuration, or a dict of its fields, as a validated section.

    A section that is made in Python is not validated when it is made. Raises ConfigError with all
    problems.

    >>> from deit.config.sections.loss import LossConfig
    >>> as_section(LossConfig, "loss", LossConfig("soft", temperature=3)).temperature
    3.0
    """
    if isinstance(value, dict):
        value = section_from_dict(section, name, value)
    return getattr(validate_sections(Config(**{name: value}), [name]), name)


def validate_sections(config: Config, names: Collection[str]) -> Config:
    """Return the configuration after validating these sections, and not the others.

    Raises ConfigError with all problems.
    """
    problems, sections = [], {}
    for name in names:
        section, value = _section_type(name), getattr(config, name)
        if not isinstance(value, section):
            hint = f"should be a {section.__name__} or a dict of its fields"
            problems.append(ConfigProblem(name, value, hint))
            continue
        try:
            sections[name] = section_from_dict(section, name, to_dict(value))
        except ConfigError as error:
            problems += error.problems
    config = dataclasses.replace(config, **sections)
    for check, reads in CHECKS.items():
        if reads <= sections.keys():
            problems += check(config)
    if problems:
        raise _config_error(problems)
    return config


@functools.cache
def _section_adapter(section: type[Section]) -> TypeAdapter[Section]:
    return TypeAdapter(section)


def plain_values(value: Any) -> Any:
    """Return a value with paths as text and lists as tuples, also within dicts.

    >>> plain_values({"source": [Path("runs/a")], "epochs": 3})
    {'source': ('runs/a',), 'epochs': 3}
    """
    if isinstance(value, dict):
        return {name: plain_values(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(map(plain_values, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def validate(config: Config, *, live_teacher: bool = True) -> Config:
    """Return the configuration after validating it as `config_from_dict` does.

    Raises ConfigError with all problems.

    >>> from deit.config.recipes import find_recipe
    >>> try:
    ...     validate(find_recipe("digits").replace(optim={"epochs": 0}))
    ... except ConfigError as error:
    ...     print(error.problems[0].field)
    optim.epochs
    """
    return config_from_dict(to_dict(config), live_teacher=live_teacher)


def load_config(path: str | Path) -> Config:
    """Load a configuration from the config.json of a run.

    A relative path in it that does not exist in the working directory is taken relative to the
    directory in which the run was started. Raises ConfigError.

    >>> load_config("checkpoints/digits/config.json").student.depth
    1
    """
    path = Path(path)
    try:
        values = parse_strict_json(read_text(path))
    except PermissionError as error:
        raise NotReadableError(f"{path}: {error.strerror}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable configuration ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a configuration is a JSON object of sections")
    check_format_version(path.parent)  # clearer than a list of fields that were renamed since
    return _with_found_paths(config_from_dict(values), path.parent)


def started_in(run: Path, record: str) -> Path | None:
    """Return the working directory of the command that started a run; None if it is unknown.

    record: ENVIRONMENT or RESUMED. It holds the directory relative to the run, so that both can be
    moved together.
    """
    try:
        directory = parse_strict_json(read_bytes(run / record))["directory"]
        return (run.resolve() / directory).resolve()
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _with_found_paths(config: Config, run: Path) -> Config:
    """Replace paths that exist only in the directory in which the run was started."""
    directories = [started_in(run, record) for record in (RESUMED, ENVIRONMENT)]
    directories = [path for path in directories if path is not None and path != Path.cwd()]
    if not directories:
        return config

    def locate(value: str) -> str:
        prefix, name = ("@", value[1:]) if value.startswith("@") else ("", value)
        path = Path(name).expanduser()
        if path.is_absolute() or path.exists() or ".py:" in name or name in ("keep", "none", ""):
            return value
        candidates = (directory / path for directory in directories)
        existing = (f"{prefix}{os.path.relpath(path)}" for path in candidates if path.exists())
        return next(existing, value)

    sections: dict[str, dict[str, Any]] = {}
    for field in _PATH_FIELDS if config.data.source != "digits" else _PATH_FIELDS[1:]:
        section, leaf = field.split(".")
        value = getattr(getattr(config, section), leaf)
        if isinstance(value, str):
            sections.setdefault(section, {})[leaf] = locate(value)
        elif isinstance(value, tuple):
            only_at = field in ("data.classes", "data.unseen_classes")  # only @FILE is a path here
            sections.setdefault(section, {})[leaf] = tuple(
                item if only_at and item[:1] != "@" else locate(item) for item in value
            )
    return config.replace(**sections)


_PATH_FIELDS = (
    *("data.root", "data.exclude_list", "data.classes", "data.unseen_classes"),
    *("init.weights", "init.pruning_masks", "teacher.source", "teacher.target_stores"),
)
"""Fields that can hold paths."""


def _config_error(problems: list[ConfigProblem]) -> ConfigError:
    count = count_noun(len(problems), "problem")
    lines = "".join(f"\n  {problem}" for problem in problems)
    return ConfigError(f"{count} in the configuration:{lines}", problems)


def _translate(error: dict[str, Any]) -> ConfigProblem:
    """Convert an error record of pydantic."""
    # The first two parts only: below a field, pydantic names union members and tuple positions.
    name = ".".join(str(part) for part in error["loc"][:2])
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return unknown_field(name)
    value, hint = error["input"], error["msg"].removeprefix("Value error, ")
    hint = hint.replace("Input should", "should").replace("Field required", "is required")
    allowed: tuple[str, ...] = ()
    if error["type"] == "literal_error":
        section, leaf = name.split(".")
        allowed = _choices_of(typing.get_type_hints(_section_type(section))[leaf])
        hint += did_you_mean(value, allowed) if isinstance(value, str) else ""
    return ConfigProblem(name, value, hint, allowed)


def _choices_of(annotation: Any) -> tuple[str, ...]:
    """Return the choices of a field, also of one that takes several of them."""
    if isinstance(annotation, str):
        return (annotation,)
    return tuple(choice for part in typing.get_args(annotation) for choice in _choices_of(part))


def _section_type(name: str) -> type:
    return typing.get_type_hints(Config)[name]


def unknown_field(name: str, others: Collection[str] = ()) -> ConfigProblem:
    """Return the problem of an unknown field, with the closest name of a field or of `others`."""
    return ConfigProblem(
        single_line(name), NO_VALUE, f"unknown field{suggestion(name, [*field_names(), *others])}"
    )
