"""Expand a sweep into configurations: every combination of its grid with every run."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from deit.config.command_choices import check_choice
from deit.config.presets import PRESETS, apply_presets, fit_epochs
from deit.config.recipes import RECIPES
from deit.config.schema import Config, to_dict
from deit.config.validation import config_from_dict
from deit.core.errors import ConfigError, did_you_mean
from deit.core.file_reading import missing_file_reason
from deit.experiments.base_runs import UNNAMED
from deit.experiments.studies import STUDIES
from deit.experiments.sweep_spec import (
    Fields,
    SearchRange,
    Sweep,
    parse_seeds,
    read_sweep,
    texts_of,
    title_of,
)


class Point(NamedTuple):
    """A configuration of a sweep, without its seeds.

    values: the fields that vary, as text by name; `run` is the name of a run or arm. changes: the
    fields that this run or arm sets, also through presets, as text by name; None without runs.
    """

    name: str
    values: dict[str, str]
    config: Config
    changes: dict[str, str] | None = None


def with_fields(config: Config, fields: Fields, *, where: str) -> Config:
    """Return a configuration with presets applied and fields set. where: for messages.

    Raises ConfigError with all problems.
    """
    values = to_dict(config)
    for name in PRESETS:
        if not isinstance(fields.get(name), str | None):
            raise ConfigError(f"{where}: {name} = {fields[name]!r}: should be the name of a preset")
    for flag, advice in apply_presets(values, {name: fields.get(name) for name in PRESETS}).items():
        raise ConfigError(f"{where}: {flag} = {fields[flag]!r}: {advice}")
    for name, value in fields.items():
        if name not in PRESETS:
            section, leaf = name.split(".")
            values[section][leaf] = value
    fit_epochs(values, fields)
    try:
        # A teacher that sees crops needs a target store, which the sweep writes before the runs.
        return config_from_dict(values, live_teacher=values["views"]["teacher_view"] != "crops")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}", error.problems) from None


def with_overrides(config: Config, overrides: Fields) -> Config:
    """Return a configuration with fields replaced, by `section.field`. Raises ConfigError with all
    problems."""
    if not overrides:
        return config
    values = to_dict(config)
    for name, value in overrides.items():
        section, _, leaf = name.partition(".")
        values.setdefault(section, {})[leaf] = value
    # As in `with_fields`.
    return config_from_dict(values, live_teacher=values["views"]["teacher_view"] != "crops")


def trusted_code(sweep: Sweep, recipe: Config) -> set[str]:
    """Return the teachers that are Python code and named by a recipe in Python; `recipe`: as it is
    before the sweep's fields are set."""
    return set() if sweep.recipe.endswith(".json") else {*recipe.teacher.code_sources}


def check_code_teachers(sweep: Sweep, points: list[Point], trusted: set[str]) -> None:
    """Raise ConfigError if only the sweep's file names Python code as a teacher."""
    for point in points:
        if untrusted := sorted({*point.config.teacher.code_sources} - trusted):
            raise ConfigError(
                f"sweep {sweep.name}, {point.name}: its teacher {untrusted[0]} is Python code, "
                "which a sweep file cannot run; give it outside the file if you trust it "
                f"(--teacher.source {untrusted[0]})"
            )


def points_of(sweep: Sweep, config: Config) -> list[Point]:
    """Return every configuration of a sweep: each combination of the grid, the last field varying
    fastest, with each run or arm.

    config: the recipe with the fields that are set in all runs. Raises ConfigError for invalid
    configurations, with the problems of all.

    >>> from deit.config.recipes import find_recipe
    >>> spec = Sweep("lr", grid={"optim.lr": (0.001, 0.002), "optim.batch_size": (32,)})
    >>> [point.name for point in points_of(spec, find_recipe("digits"))]
    ['lr 0.001, batch size 32', 'lr 0.002, batch size 32']
    """
    points: list[Point] = []
    errors: list[ConfigError] = []
    axes = [[(name, value) for value in values] for name, values in sweep.grid.items()]
    for combination in itertools.product(*axes):
        fields = dict(combination)
        where = f"sweep {sweep.name}, {title_of(texts_of(fields)) or 'without a grid'}"
        try:
            base = with_fields(config, fields, where=where)
            arms = dict(_arms(sweep, base, fields))
            varied = set().union(*(differing(base, arm) for arm in arms.values()))
            for name, arm in arms.items():
                values = ({"run": name} if name else {}) | texts_of(fields)
                given = sweep.runs.get(name, differing(base, arm))
                changes = texts_of(given | _preset_fields(given, arm, varied)) if name else None
                points.append(Point(title_of(values), values, arm, changes))
        except ConfigError as error:
            errors.append(error)
    if errors:
        raise _combined(errors)
    return points


def _combined(errors: list[ConfigError]) -> ConfigError:
    """Return one error with the first messages and the problems of all."""
    hidden = len(errors) - _MAX_ERRORS
    more = f"\nand {hidden} more" if hidden > 0 else ""
    problems = [problem for error in errors for problem in error.problems]
    return ConfigError("\n".join(map(str, errors[:_MAX_ERRORS])) + more, problems)


def _preset_fields(given: Fields, config: Config, varied: Collection[str]) -> Fields:
    """Return the values behind the presets that a run names, of the fields in which runs vary."""
    sections = {PRESETS[name].section for name in given if name in PRESETS}
    return {
        f"{section}.{leaf}": value
        for section, values in to_dict(config).items()
        for leaf, value in values.items()
        if section in sections and f"{section}.{leaf}" in varied
    }


_MAX_ERRORS = 5  # invalid points that a message lists


def with_command_line(sweep: Sweep, recipe_config: Config, config: Config) -> Sweep:
    """Return the sweep without those fields of its runs that the command line sets.

    recipe_config: the recipe with the fields that the sweep sets in all runs. config: the same with
    the options of the command line. Raises ConfigError if the command line sets a field that varies
    in the grid or the search.
    """
    typed = differing(recipe_config, config)
    fitted = to_dict(recipe_config.replace(optim={"epochs": config.optim.epochs}))
    fit_epochs(fitted, ["optim.epochs"])
    for name in typed.keys() - {"optim.epochs"}:
        section, leaf = name.split(".")
        if "optim.epochs" in typed and fitted[section][leaf] == typed[name]:
            del typed[name]  # follows from the number of epochs
    varied = {**sweep.grid, **(sweep.search.fields if sweep.search else {})}
    if both := sorted(typed.keys() & varied.keys()):
        raise ConfigError(
            f"{both[0]}: varies in the sweep {sweep.name}; leave it out, or change the sweep"
        )
    runs = {
        name: {field: value for field, value in fields.items() if field not in typed}
        for name, fields in sweep.runs.items()
    }
    return dataclasses.replace(sweep, runs=runs)


_MAX_COMBINATIONS = 500  # of the other fields, tried before a value is reported as invalid


def boundary_points(sweep: Sweep, config: Config) -> list[Point]:
    """Return the configuration itself and, for a search, the configurations with each value of each
    field and both ends of each range.

    Where a value is invalid alone, the other fields take the first combination of their values that
    makes it valid. Raises ConfigError for a value without such a combination.
    """
    fields = {
        name: values
        if isinstance(values, tuple)
        else tuple(map(_number_type(values), (values.low, values.high)))
        for name, values in sweep.search.fields.items()
    }
    points = [Point("the first", {}, config)]
    for name, values in fields.items():
        others = {other: choices for other, choices in fields.items() if other != name}
        for value in values:
            title = title_of(texts_of({name: value}))
            where = f"sweep {sweep.name}, {title}"
            combinations = (dict(zip(others, rest)) for rest in itertools.product(*others.values()))
            tried = itertools.chain([{}], itertools.islice(combinations, _MAX_COMBINATIONS))
            first_error: ConfigError | None = None
            for rest in tried:
                try:
                    changed = with_fields(config, {name: value, **rest}, where=where)
                except ConfigError as error:
                    first_error = first_error or error
                    continue
                points.append(Point(title, texts_of({name: value}), changed))
                break
            else:
                raise first_error
    return points


def _number_type(values: SearchRange) -> Callable[[float], float]:
    return int if values.is_integer else float


def _arms(sweep: Sweep, base: Config, fields: Fields) -> Iterator[tuple[str, Config]]:
    """Yield name and configuration of each run of a combination of the grid."""
    if sweep.study is not None:
        arms = STUDIES[sweep.study](base)
        for name in sweep.arms:
            if name not in arms:
                known = ", ".join(arms)
                raise ConfigError(
                    f"arms = {name}: should be one of {known}, the arms of {sweep.study}"
                    f"{did_you_mean(name, arms)}"
                )
        for name in sweep.arms or arms:
            arm = arms[name]
            yield name, with_fields(arm, {}, where=f"sweep {sweep.name}, {name}")
        return
    errors: list[ConfigError] = []
    for name, run_fields in sweep.runs.items():
        where = f"sweep {sweep.name}, {name}"
        try:
            if both := sorted(run_fields.keys() & fields.keys()):
                raise ConfigError(
                    f"{where}: sets {both[0]}, which also varies in the grid; give it in one of "
                    "the two"
                )
            yield name, with_fields(base, run_fields, where=where)
        except ConfigError as error:
            errors.append(error)
    if errors:
        raise _combined(errors)
    if not sweep.runs:
        yield "", base


def differing(before: Config, after: Config) -> Fields:
    """Return the fields that differ, with their values in `after`."""
    values_before = to_dict(before)
    return {
        f"{section}.{leaf}": value
        for section, values in to_dict(after).items()
        for leaf, value in values.items()
        if value != values_before[section][leaf]
    }


_STUDY_SEEDS = (0, 1, 2)
_STUDY_RECIPES = {"ensemble": "digits-ensemble", "resolution": "digits-finetune"}


SWEEPS: dict[str, Sweep] = {
    **{
        name: Sweep(
            name, study=name, seeds=_STUDY_SEEDS, recipe=_STUDY_RECIPES.get(name, Sweep.recipe)
        )
        for name in STUDIES
    },
    "held-out": Sweep(
        "held-out",
        recipe="digits-held-out",
        grid={
            "loss.temperature": (1, 5, 10, 20),
            "loss.distillation_weight": (0.1, 0.5, 1.0),
            "optim.lr": (1e-3, 2e-3),
        },
    ),
}
"""Built-in sweeps by their names on the command line: each study, and some grids."""


def study_sweep(
    study: str, *, recipe: str = UNNAMED, arms: Sequence[str] = (), seeds: Sequence[int] = (0,)
) -> Sweep:
    """Return the sweep of a study. recipe: the name of the recipe that it is of, for the results.
    arms: the arms to train; default: all.

    Raises ConfigError for an unknown study, and for seeds that are not different integers of at
    least 0.
    """
    check_choice("study", study, STUDIES)
    if isinstance(arms, str) or not isinstance(arms, Iterable):
        raise ConfigError(f"arms = {arms!r}: should be a list of names")
    try:
        numbers = parse_seeds([*seeds] if isinstance(seeds, Iterable) else seeds)
    except ValueError as error:
        raise ConfigError(f"seeds = {seeds}: {error}") from None
    return Sweep(study, recipe=recipe, study=study, arms=tuple(arms), seeds=numbers)


def find_sweep(name: str | Path) -> Sweep:
    """Return a built-in sweep by its name, or read a sweep file. Raises ConfigError."""
    name = str(name)
    if name in SWEEPS:
        return SWEEPS[name]
    if name in RECIPES and not Path(name).is_file():
        raise ConfigError(
            f"{name}: is a recipe, not a sweep; use deit sweep table-3 --recipe {name} (or another "
            f"of {', '.join(SWEEPS)}), or write a sweep file (docs/guides/sweeps.md)"
        )
    if not Path(name).is_file():
        raise ConfigError(
            f"{name}: {missing_file_reason(Path(name))}{did_you_mean(name, SWEEPS)}; give a sweep "
            f"file in YAML or JSON (docs/guides/sweeps.md), or one of {', '.join(SWEEPS)}"
        )
    return read_sweep(Path(name))
