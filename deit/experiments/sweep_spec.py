"""Read a sweep file: a recipe, and the fields that vary."""

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import yaml

from deit.config.field_aliases import suggestion
from deit.config.presets import PRESETS
from deit.config.schema import Config
from deit.config.validation import INT_LIMIT, field_names
from deit.core.errors import ConfigError, did_you_mean, shortened
from deit.core.file_reading import read_text
from deit.core.json_io import parse_strict_json
from deit.experiments.studies import STUDIES
from deit.viz.tables import short_names

Fields = dict[str, Any]
"""Values by `section.field`, and names of presets by the name of their option."""


@dataclass(frozen=True)
class SearchRange:
    """The range of a searched field, both ends included.

    log: sample uniformly in the logarithm. is_integer: integers only.
    """

    low: float
    high: float
    log: bool = False
    is_integer: bool = False


@dataclass(frozen=True)
class SearchSpace:
    """The search space: a range or a list of values for each field.

    trials: number of trials. prune: stop trials whose validation accuracy is below the median.
    """

    fields: dict[str, SearchRange | tuple[Any, ...]]
    trials: int = 20
    prune: bool = True


@dataclass(frozen=True)
class Sweep:
    """The content of a sweep file.

    set: fields that replace the recipe's in all runs. grid: the values of each field that varies;
    every combination is trained. runs: named runs with their fields, for each combination. study: a
    named study, whose arms are the runs. arms: the arms to train. Default: all. search: a search
    space instead of a grid; the search uses the first seed, and the best points are then trained
    with the other seeds. seeds: of each point. share_targets: write one target store for runs with
    the same teacher outputs. content: of these stores. Default: what the losses need.
    """

    name: str
    recipe: str = "digits"
    set: Fields = field(default_factory=dict)
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    runs: dict[str, Fields] = field(default_factory=dict)
    study: str | None = None
    arms: tuple[str, ...] = ()
    search: SearchSpace | None = None
    seeds: tuple[int, ...] = (0,)
    share_targets: bool = True
    content: str | None = None


def read_sweep(path: str | Path) -> Sweep:
    """Read the sweep of a YAML or JSON file. Raises ConfigError."""
    path = Path(path)
    try:
        text = read_text(path)
        is_json = path.suffix == ".json"
        values = parse_strict_json(text) if is_json else yaml.load(text, _UniqueKeyLoader)
        _check_size(values)
    except (*_UNREADABLE, yaml.YAMLError) as error:
        reason = shortened(" ".join(str(error).split())) or type(error).__name__
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise ConfigError(f"{path}: not a readable sweep in {kind} ({reason})") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: should be a mapping with a recipe and a grid or runs; see "
            "docs/guides/sweeps.md"
        )
    return _to_sweep(path.stem, values, where=str(path))


_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)
"""Errors of reading a file; PyYAML's constructors of tags raise all of them but OSError."""
_MAX_VALUES = 100_000


def _check_size(values: Any) -> None:
    """Raise ValueError for too many values, as nested aliases can make, and for integers that
    PyTorch cannot represent."""
    waiting, num_values = [values], 0
    while waiting:
        value = waiting.pop()
        num_values += 1
        if num_values > _MAX_VALUES:
            raise ValueError(f"more than {_MAX_VALUES:,} values, or an alias that contains itself")
        if isinstance(value, int) and abs(value) >= INT_LIMIT:
            raise ValueError("a number that is not below 2^63")
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value


class _UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys; PyYAML would silently use the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str | int | float):
                raise ValueError(f"{key!r} should be the name of a field")
            if keys.count(key) > 1:
                raise ValueError(f"duplicate key {key!r}")
        return super().construct_mapping(node, deep)


def sweep_from_dict(values: dict[str, Any], *, name: str = "sweep") -> Sweep:
    """Return the sweep of values as in a sweep file. name: of the sweep. Raises ConfigError."""
    return _to_sweep(name, _with_lists(values), where=f"sweep {name}")


def _with_lists(value: Any) -> Any:
    """Return a value with lists instead of tuples, as in a file."""
    if isinstance(value, dict):
        return {key: _with_lists(item) for key, item in value.items()}
    return list(map(_with_lists, value)) if isinstance(value, list | tuple) else value


def _to_sweep(name: str, values: dict[str, Any], *, where: str) -> Sweep:
    """Return the sweep of a file's content. where: for messages. Raises ConfigError with all
    problems."""
    known = [item.name for item in dataclasses.fields(Sweep) if item.name != "name"]

    def parse(key: str, value: Any) -> Any:
        if key not in known:
            advice = f"should be one of {', '.join(known)}{did_you_mean(str(key), known)}"
            raise ValueError(f"{key}: {advice}")
        return _within(key, _PARSERS[key], value)

    try:
        parsed = _parsed(values, parse)
    except ValueError as error:
        raise ConfigError("\n".join(f"{where}: {problem}" for problem in error.args)) from None
    if parsed.get("runs") and parsed.get("study"):
        raise ConfigError(f"{where}: has runs and a study; give one of the two")
    if parsed.get("arms") and not parsed.get("study"):
        raise ConfigError(f"{where}: arms: only valid with a study; add `study: NAME`")
    if parsed.get("search") and any(parsed.get(key) for key in ("grid", "runs", "study")):
        raise ConfigError(
            f"{where}: has a search together with a grid, runs or a study; give only one"
        )
    if not any(parsed.get(key) for key in ("grid", "runs", "study", "search")):
        raise ConfigError(f"{where}: nothing varies; give a grid, runs, a study or a search")
    return Sweep(name, **parsed)


def _parsed(values: dict[Any, Any], parse: Callable[[Any, Any], Any]) -> dict[Any, Any]:
    """Return each value as `parse(name, value)` returns it. Raises ValueError with the problems of
    all values as its arguments."""
    parsed, problems = {}, []
    for name, value in values.items():
        try:
            parsed[name] = parse(name, value)
        except ValueError as error:
            problems += error.args
    if problems:
        raise ValueError(*problems)
    return parsed


def _within(name: str, parse: Callable[[Any], Any], value: Any) -> Any:
    """Return `parse(value)`. Raises ValueError with the name before each problem."""
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(*(f"{name}: {problem}" for problem in error.args)) from None


def _flat(value: Any) -> Fields:
    """Return fields by name, from `section.field: value` or `section: {field: value}`."""
    if not isinstance(value, dict):
        raise ValueError(f"should be fields with values, is {value!r}")
    sections = {section.name for section in dataclasses.fields(Config)}
    flat: Fields = {}
    for name, inner in value.items():
        nested = name in sections and isinstance(inner, dict)
        fields = {f"{name}.{leaf}": v for leaf, v in inner.items()} if nested else {name: inner}
        if both := flat.keys() & fields.keys():
            raise ValueError(f"{min(both)}: is given twice")
        flat |= fields
    return _parsed(flat, _known_field)


def _known_field(name: str, value: Any) -> Any:
    """Return the value. Raises ValueError for a field that a sweep does not have."""
    names = [*PRESETS, *field_names()]
    if name not in names:
        raise ValueError(f"{name}: unknown field{suggestion(str(name), names)}")
    if name == "run.seed":
        raise ValueError("run.seed: give the seeds of all runs as `seeds: [0, 1]`")
    return value


def _grid(value: Any) -> dict[str, tuple[Any, ...]]:
    return _parsed(_flat(value), _grid_values)


def _grid_values(name: str, values: Any) -> tuple[Any, ...]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name}: should be a list of values, is {values!r}")
    texts = [text_of(item) for item in values]
    if len(set(texts)) < len(texts):
        raise ValueError(f"{name}: has the value {max(texts, key=texts.count)} twice")
    return tuple(values)


def _search_space(value: Any) -> SearchSpace:
    known = ("fields", "trials", "prune")
    if not isinstance(value, dict) or not isinstance(value.get("fields"), dict):
        raise ValueError("should have fields, each with low and high or a list of values")
    for key in value:
        if key not in known:
            raise ValueError(
                f"{key}: should be one of {', '.join(known)}{did_you_mean(str(key), known)}"
            )
    trials = value.get("trials", SearchSpace.trials)
    if not value["fields"] or "run.seed" in value["fields"]:
        raise ValueError("fields: should be at least one field, and not run.seed (give `seeds`)")
    if type(trials) is not int or trials < 1:
        raise ValueError(f"trials: should be at least 1, is {trials!r}")
    fields = _parsed(value["fields"], _searched)
    return SearchSpace(fields, trials, _bool(value.get("prune", True)))


def _searched(name: str, values: Any) -> SearchRange | tuple[Any, ...]:
    _known_field(name, values)
    if not isinstance(values, list):
        return _range(name, values)
    if len(values) < 2:
        raise ValueError(f"{name}: should be at least two values, is {values!r}")
    return tuple(values)


def _range(name: str, value: Any) -> SearchRange:
    known = {"low", "high", "log"}
    if not isinstance(value, dict) or not {"low", "high"} <= value.keys() <= known:
        raise ValueError(f"{name}: should be a list, or low and high (and log: true)")
    try:
        low, high = (float(value[end]) for end in ("low", "high"))
    except (TypeError, ValueError):
        ends = f"are {value['low']!r} and {value['high']!r}"
        raise ValueError(f"{name}: low and high should be numbers, {ends}") from None
    log = _bool(value.get("log", False))
    if not low < high or (log and low <= 0):
        ends = f"low {low:g} should be below high {high:g}"
        raise ValueError(f"{name}: {ends}" + ", and above 0 if log is true" * log)
    is_integer = _is_integer_field(name)
    return (
        SearchRange(int(low), int(high), log, True) if is_integer else SearchRange(low, high, log)
    )


def _is_integer_field(name: str) -> bool:
    """Return whether the type of a field is an integer. Raises ValueError for a field that is no
    number."""
    if name in PRESETS:
        raise ValueError(f"{name}: a preset has no low and high; give a list of names")
    section, leaf = name.split(".")
    sections = typing.get_type_hints(Config)
    types = _type_names(typing.get_type_hints(sections[section])[leaf])
    if not types & {"int", "float"}:
        raise ValueError(f"{name}: is no number, so no low and high; give a list of values")
    return "int" in types


def _type_names(annotation: Any) -> set[str]:
    """Return the names of the plain types in an annotation."""
    inner = typing.get_args(annotation)
    if not inner:
        return {getattr(annotation, "__name__", "")}
    return set().union(*map(_type_names, inner))


def _runs(value: Any) -> dict[str, Fields]:
    """Return runs by name; the runs of a list are named after the fields that they change."""
    if isinstance(value, list):
        listed = [_flat(fields) for fields in value]
        titles = [title_of(texts_of(fields)) or "as it is" for fields in listed]
        value = dict(zip(titles, listed))
        if len(value) < len(listed):
            raise ValueError(f"has the run {max(titles, key=titles.count)!r} twice")
    if not isinstance(value, dict) or not value:
        raise ValueError(f"should be runs by name, or a list of them, is {value!r}")
    return _parsed(
        {str(name): fields for name, fields in value.items()},
        lambda name, fields: _within(name, _flat, {} if fields is None else fields),
    )


def _study(value: Any) -> str:
    if not isinstance(value, str) or value not in STUDIES:
        raise ValueError(
            f"{value}: should be one of {', '.join(STUDIES)}{did_you_mean(str(value), STUDIES)}"
        )
    return value


def parse_seeds(value: Any) -> tuple[int, ...]:
    if type(value) is int:  # ambiguous: a seed, or a number of seeds
        raise ValueError(f"should be a list: [{value}] for the seed {value}, [0, 1, 2] for three")
    is_list = isinstance(value, list) and value
    if not is_list or not all(map(_is_seed, value)):
        raise ValueError(f"should be a list of whole numbers from 0, is {value!r}")
    if len(set(value)) < len(value):
        raise ValueError(f"{value}: has a seed twice")
    return tuple(map(int, value))


def _is_seed(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 0


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"should be a name, is {value!r}")
    return value


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"should be true or false, is {value!r}")
    return value


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"should be a list of names, is {value!r}")
    return tuple(value)


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "recipe": _text,
    "set": _flat,
    "grid": _grid,
    "runs": _runs,
    "study": _study,
    "arms": _names,
    "search": _search_space,
    "seeds": parse_seeds,
    "share_targets": _bool,
    "content": _text,
}


def texts_of(fields: Fields) -> dict[str, str]:
    """Return the values of fields as tables show them."""
    return {name: text_of(value) for name, value in fields.items()}


def text_of(value: Any) -> str:
    """Return a value as tables show it: `none`, `0.5`, `a,b`."""
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ",".join(map(text_of, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def title_of(values: dict[str, str]) -> str:
    """Return the name of a point: its run, then each field that varies with its value."""
    short = short_names(list(values))
    return ", ".join(
        value if name == "run" else f"{short[name]} {value}" for name, value in values.items()
    )
