"""A sweep as a file says it: a recipe, what varies, and the configurations that follow."""

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from deit.config.presets import PRESETS
from deit.config.schema import Config
from deit.config.validation import LIMIT, field_names
from deit.core.errors import ConfigError, did_you_mean, shortened
from deit.core.file_reading import read_text
from deit.core.json_io import parse_strict_json
from deit.experiments.studies import STUDIES

Fields = dict[str, Any]
"""Values by `section.field`, or the name of a preset by its flag."""


@dataclass(frozen=True)
class SearchRange:
    """The values of a field that is searched, from low to high; whole numbers or any; log: as many
    between 1 and 10 as between 10 and 100."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class SearchSpace:
    """What is searched: a span of each field, or its values. trials: how many points are tried.
    prune: whether those that stay below the median are stopped."""

    fields: dict[str, SearchRange | tuple[Any, ...]]
    trials: int = 20
    prune: bool = True


@dataclass(frozen=True)
class Sweep:
    """What a sweep file asks for, nothing of it applied yet.

    set: fields over the recipe's, for all. grid: the values of each field that varies; every
    combination is trained. runs: fields by the name of a run, for each combination. study: the arms
    of a named study in their place; arms: some of these; none named: all. search: a space in place
    of a grid; the first seed searches, the best points are trained with the others. seeds: of each.
    share_targets: whether runs that ask the teacher the same share one store of its answers.
    content: of these stores; None: what the objectives need.
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


def read_sweep(path: Path) -> Sweep:
    """Read the sweep of a YAML or JSON file. Raises ConfigError."""
    try:
        text = read_text(path)
        values = parse_strict_json(text) if path.suffix == ".json" else yaml.load(text, _Unique)
        _check_extent(values)
    except (*_UNREADABLE, yaml.YAMLError) as error:
        reason = shortened(" ".join(str(error).split())) or type(error).__name__
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise ConfigError(f"{path}: not a sweep in readable {kind} ({reason})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a sweep names a recipe, a grid or runs; see docs/sweeps.md")
    return _checked(path, values)


_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What reading a file raises; PyYAML's constructors of tags raise all but OSError as well."""
_MOST_VALUES = 100_000


def _check_extent(values: Any) -> None:
    """Raise ValueError where aliases make a few lines endless, or a number is larger than any that
    PyTorch takes."""
    waiting, seen = [values], 0
    while waiting:
        one = waiting.pop()
        seen += 1
        if seen > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES:,} values, or an alias that holds itself")
        if isinstance(one, int) and abs(one) >= LIMIT:
            raise ValueError("a number that is not below 2^63")
        if isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list | tuple | set):
            waiting += one


class _Unique(yaml.SafeLoader):
    """YAML in which no key stands twice: the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str | int | float):
                raise ValueError(f"{key!r} should be the name of a field")
            if keys.count(key) > 1:
                raise ValueError(f"{key!r} stands there twice")
        return super().construct_mapping(node, deep)


def _checked(path: Path, values: dict[str, Any]) -> Sweep:
    """A sweep from what the file holds. Raises ConfigError."""
    known = [one.name for one in dataclasses.fields(Sweep) if one.name != "name"]
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            advice = f"should be of {', '.join(known)}{did_you_mean(str(key), known)}"
            raise ConfigError(f"{path}: {key}: {advice}")
        try:
            found[key] = _READ[key](value)
        except ValueError as error:
            raise ConfigError(f"{path}: {key}: {error}") from None
    if found.get("runs") and found.get("study"):
        raise ConfigError(f"{path}: has runs and a study; a study brings runs of its own")
    if found.get("arms") and not found.get("study"):
        raise ConfigError(f"{path}: arms: are those of a study, and none is named")
    if found.get("search") and (found.get("grid") or found.get("runs") or found.get("study")):
        raise ConfigError(f"{path}: has a search and a grid, runs or a study; a search is alone")
    if not any(found.get(key) for key in ("grid", "runs", "study", "search")):
        raise ConfigError(f"{path}: nothing varies; give a grid, runs, a study or a search")
    return Sweep(path.stem, **found)


def _flat(value: Any) -> Fields:
    """Fields by name, from `section.field: value` or `section: {field: value}`."""
    if not isinstance(value, dict):
        raise ValueError(f"should be fields with values, is {value!r}")
    sections = {one.name for one in dataclasses.fields(Config)}
    flat: Fields = {}
    for name, inner in value.items():
        nested = name in sections and isinstance(inner, dict)
        fields = {f"{name}.{leaf}": one for leaf, one in inner.items()} if nested else {name: inner}
        if both := flat.keys() & fields.keys():
            raise ValueError(f"{min(both)}: stands there twice")
        flat |= fields
    names = [*PRESETS, *field_names()]
    for name in flat:
        if name not in names:
            raise ValueError(f"{name}: unknown field{did_you_mean(str(name), names)}")
        if name == "run.seed":
            raise ValueError("run.seed: give the seeds of all runs as `seeds: [0, 1]`")
    return flat


def _grid(value: Any) -> dict[str, tuple[Any, ...]]:
    grid = {}
    for name, values in _flat(value).items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{name}: should be a list of values, is {values!r}")
        shown = [text_of(one) for one in values]
        if len(set(shown)) < len(shown):
            raise ValueError(f"{name}: names {max(shown, key=shown.count)} twice")
        grid[name] = tuple(values)
    return grid


def _space(value: Any) -> SearchSpace:
    known = ("fields", "trials", "prune")
    if not isinstance(value, dict) or not isinstance(value.get("fields"), dict):
        raise ValueError("should have fields, each with low and high or a list of values")
    for key in value:
        if key not in known:
            raise ValueError(
                f"{key}: should be of {', '.join(known)}{did_you_mean(str(key), known)}"
            )
    trials = value.get("trials", SearchSpace.trials)
    if not value["fields"] or "run.seed" in value["fields"]:
        raise ValueError("fields: at least one, and not run.seed (give `seeds`)")
    if type(trials) is not int or trials < 1:
        raise ValueError(f"trials: should be at least 1, is {trials!r}")
    names = [*PRESETS, *field_names()]
    fields: dict[str, SearchRange | tuple[Any, ...]] = {}
    for name, one in value["fields"].items():
        if name not in names:
            raise ValueError(f"{name}: unknown field{did_you_mean(str(name), names)}")
        fields[name] = tuple(_several(name, one)) if isinstance(one, list) else _span(name, one)
    return SearchSpace(fields, trials, _truth(value.get("prune", True)))


def _several(name: str, values: list[Any]) -> list[Any]:
    if len(values) < 2:
        raise ValueError(f"{name}: should be at least two values, is {values!r}")
    return values


def _span(name: str, one: Any) -> SearchRange:
    known = {"low", "high", "log"}
    if not isinstance(one, dict) or not {"low", "high"} <= one.keys() <= known:
        raise ValueError(f"{name}: should be a list, or low and high (and log: true)")
    try:
        low, high = (float(one[end]) for end in ("low", "high"))
    except (TypeError, ValueError):
        ends = f"are {one['low']!r} and {one['high']!r}"
        raise ValueError(f"{name}: low and high should be numbers, {ends}") from None
    log = _truth(one.get("log", False))
    if not low < high or (log and low <= 0):
        ends = f"low {low:g} should be below high {high:g}"
        raise ValueError(f"{name}: {ends}" + ", and above 0 where log is true" * log)
    whole = _is_whole(name)
    return SearchRange(int(low), int(high), log, True) if whole else SearchRange(low, high, log)


def _is_whole(name: str) -> bool:
    """Whether a field takes whole numbers alone: the fields of a configuration say so. Raises
    ValueError for one that takes no numbers."""
    if name in PRESETS:
        raise ValueError(f"{name}: a preset has names, no span")
    section, leaf = name.split(".")
    sections = typing.get_type_hints(Config)
    kinds = _kinds_of(typing.get_type_hints(sections[section])[leaf])
    if not kinds & {"int", "float"}:
        raise ValueError(f"{name}: takes no numbers, so no low and high; give a list of values")
    return "int" in kinds


def _kinds_of(annotation: Any) -> set[str]:
    """The plain types in an annotation, by name."""
    inner = typing.get_args(annotation)
    if not inner:
        return {getattr(annotation, "__name__", "")}
    return set().union(*map(_kinds_of, inner))


def _runs(value: Any) -> dict[str, Fields]:
    """Runs by name; those of a list are called by what they change."""
    if isinstance(value, list):
        listed = [_flat(one) for one in value]
        titles = [title_of(texts_of(one)) or "as it is" for one in listed]
        value = dict(zip(titles, listed))
        if len(value) < len(listed):
            raise ValueError(f"names the run {max(titles, key=titles.count)!r} twice")
    if not isinstance(value, dict) or not value:
        raise ValueError(f"should be runs by name, or a list of them, is {value!r}")
    runs = {}
    for name, fields in value.items():
        try:
            runs[str(name)] = _flat({} if fields is None else fields)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return runs


def _study(value: Any) -> str:
    if not isinstance(value, str) or value not in STUDIES:
        raise ValueError(
            f"{value}: should be one of {', '.join(STUDIES)}{did_you_mean(str(value), STUDIES)}"
        )
    return value


def _seeds(value: Any) -> tuple[int, ...]:
    if type(value) is int:  # one seed, or so many: people mean either
        raise ValueError(f"should be a list: [{value}] for the seed {value}, [0, 1, 2] for three")
    listed = isinstance(value, list) and value
    if not listed or not all(type(seed) is int and seed >= 0 for seed in value):
        raise ValueError(f"should be a list of whole numbers from 0, is {value!r}")
    if len(set(value)) < len(value):
        raise ValueError(f"{value}: names one of them twice")
    return tuple(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"should be a name, is {value!r}")
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"should be true or false, is {value!r}")
    return value


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"should be a list of names, is {value!r}")
    return tuple(value)


_READ: dict[str, Callable[[Any], Any]] = {
    "recipe": _text,
    "set": _flat,
    "grid": _grid,
    "runs": _runs,
    "study": _study,
    "arms": _names,
    "search": _space,
    "seeds": _seeds,
    "share_targets": _truth,
    "content": _text,
}


def texts_of(fields: Fields) -> dict[str, str]:
    return {name: text_of(value) for name, value in fields.items()}


def text_of(value: Any) -> str:
    """A value as a table shows it: `none`, `0.5`, `a,b`."""
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ",".join(map(text_of, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def title_of(values: dict[str, str]) -> str:
    """What a point is called: its run, then what varies by the last part of each name."""
    short = short_names(list(values))
    return ", ".join(
        value if name == "run" else f"{short[name]} {value}" for name, value in values.items()
    )


def short_names(names: list[str]) -> dict[str, str]:
    """Fields by the last part of their names, where that tells them apart."""
    leaves = [name.rpartition(".")[2] for name in names]
    return {
        name: leaf.replace("_", " ") if leaves.count(leaf) == 1 else name
        for name, leaf in zip(names, leaves)
    }
