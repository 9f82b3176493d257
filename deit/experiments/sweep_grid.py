"""The configurations that a sweep stands for: every combination of its grid with every run."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from deit.config.presets import PRESETS, apply_presets, fit_epochs
from deit.config.recipes import RECIPES
from deit.config.schema import Config, to_dict
from deit.config.validation import config_from_dict
from deit.core.errors import ConfigError, did_you_mean
from deit.core.file_reading import missing_file_reason
from deit.experiments.studies import STUDIES
from deit.experiments.sweep_spec import Fields, SearchRange, Sweep, read_sweep, texts_of, title_of


class Point(NamedTuple):
    """One configuration of a sweep, before its seeds.

    values: what varies, as text by the field's name; `run` is the name of a run or arm. own: what
    that one sets, likewise; None where there is none.
    """

    name: str
    values: dict[str, str]
    config: Config
    own: dict[str, str] | None = None


def with_fields(config: Config, fields: Fields, *, where: str) -> Config:
    """A configuration with presets and fields put over it. where: for the message.

    Raises ConfigError naming every problem.
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
        # Answers that only a store can give are written before the runs that need them.
        return config_from_dict(values, live_teacher=values["views"]["teacher_view"] != "crops")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}", error.problems) from None


def points_of(sweep: Sweep, config: Config) -> list[Point]:
    """Every configuration of a sweep: each combination of the grid, last field fastest, with each
    run or arm. config: the recipe's with what is set for all.

    Raises ConfigError where one of them cannot be, or two are the same point.
    """
    found: list[Point] = []
    wrong: list[ConfigError] = []
    axes = [[(name, value) for value in values] for name, values in sweep.grid.items()]
    for combination in itertools.product(*axes):
        fields = dict(combination)
        where = f"sweep {sweep.name}, {title_of(texts_of(fields)) or 'without a grid'}"
        try:
            base = with_fields(config, fields, where=where)
            for name, arm in _arms(sweep, base, fields):
                values = ({"run": name} if name else {}) | texts_of(fields)
                own = texts_of(sweep.runs.get(name, differing(base, arm))) if name else None
                found.append(Point(title_of(values), values, arm, own))
        except ConfigError as error:
            wrong.append(error)
    if wrong:
        more = f"\nand {len(wrong) - _TOLD} more" if len(wrong) > _TOLD else ""
        problems = [problem for error in wrong for problem in error.problems]
        raise ConfigError("\n".join(map(str, wrong[:_TOLD])) + more, problems)
    return found


_TOLD = 5  # points that cannot be, named at once


def with_command_line(sweep: Sweep, asked: Config, config: Config) -> Sweep:
    """The sweep with what its runs say left to the command line where that says it as well.

    asked: the recipe with what is set for all; config: with the command line over it. Raises
    ConfigError for a field that varies in the grid or the search.
    """
    typed = differing(asked, config)
    fitted = to_dict(asked.replace(optim={"epochs": config.optim.epochs}))
    fit_epochs(fitted, ["optim.epochs"])
    for name in typed.keys() - {"optim.epochs"}:
        section, leaf = name.split(".")
        if "optim.epochs" in typed and fitted[section][leaf] == typed[name]:
            del typed[name]  # follows from the number of epochs
    varied = {**sweep.grid, **(sweep.search.fields if sweep.search else {})}
    if both := sorted(typed.keys() & varied.keys()):
        raise ConfigError(
            f"--{both[0]}: varies in the sweep {sweep.name}; leave it out, or change it there"
        )
    runs = {
        name: {field: value for field, value in own.items() if field not in typed}
        for name, own in sweep.runs.items()
    }
    return dataclasses.replace(sweep, runs=runs)


_COMBINATIONS = 500  # of the values of other fields, tried before one is said to be impossible


def boundary_points(sweep: Sweep, config: Config) -> list[Point]:
    """The configuration as it is and, of a search, with each value of each field and both ends of
    each span: alone or, where that cannot be, with the first values of the others that go with it.

    Raises ConfigError for a value that goes with nothing.
    """
    fields = {
        name: one if isinstance(one, tuple) else tuple(map(_end(one), (one.low, one.high)))
        for name, one in sweep.search.fields.items()
    }
    corners = [Point("the first", {}, config)]
    for name, values in fields.items():
        others = {other: rest for other, rest in fields.items() if other != name}
        for value in values:
            title = title_of(texts_of({name: value}))
            where = f"sweep {sweep.name}, {title}"
            combined = (dict(zip(others, rest)) for rest in itertools.product(*others.values()))
            tried = itertools.chain([{}], itertools.islice(combined, _COMBINATIONS))
            first: ConfigError | None = None
            for rest in tried:
                try:
                    found = with_fields(config, {name: value, **rest}, where=where)
                except ConfigError as error:
                    first = first or error
                    continue
                corners.append(Point(title, texts_of({name: value}), found))
                break
            else:
                raise first
    return corners


def _end(span: SearchRange) -> Callable[[float], float]:
    return int if span.whole else float


def _arms(sweep: Sweep, base: Config, fields: Fields) -> Iterator[tuple[str, Config]]:
    """Name and configuration of each run of one combination."""
    if sweep.study is not None:
        arms = STUDIES[sweep.study](base)
        for name in sweep.arms:
            if name not in arms:
                known = ", ".join(arms)
                raise ConfigError(
                    f"--study {sweep.study}: --arms {name}: should be of {known}"
                    f"{did_you_mean(name, arms)}"
                )
        for name in sweep.arms or arms:
            arm = arms[name]
            yield name, with_fields(arm, {}, where=f"sweep {sweep.name}, {name}")
        return
    for name, own in sweep.runs.items():
        both = sorted(own.keys() & fields.keys())
        if both:
            raise ConfigError(f"sweep {sweep.name}, {name}: {both[0]} varies in the grid as well")
        yield name, with_fields(base, own, where=f"sweep {sweep.name}, {name}")
    if not sweep.runs:
        yield "", base


def differing(before: Config, now: Config) -> Fields:
    """The fields that are not as before, with their values now."""
    earlier = to_dict(before)
    return {
        f"{section}.{leaf}": value
        for section, values in to_dict(now).items()
        for leaf, value in values.items()
        if value != earlier[section][leaf]
    }


_THREE = (0, 1, 2)
_RECIPES = {"ensemble": "digits-ensemble", "resolution": "digits-finetune"}


SWEEPS: dict[str, Sweep] = {
    **{
        name: Sweep(name, study=name, seeds=_THREE, recipe=_RECIPES.get(name, Sweep.recipe))
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
"""Every sweep by its name on the command line: each study, and grids of ours."""


def study_sweep(
    study: str, *, recipe: str, arms: tuple[str, ...] = (), seeds: tuple[int, ...] = (0,)
) -> Sweep:
    """Return the sweep of a study of a recipe. arms: some of the study's; none named: all.

    Raises ConfigError for an unknown study.
    """
    if study not in STUDIES:
        known = ", ".join(STUDIES)
        raise ConfigError(
            f"--study {study}: should be one of {known}{did_you_mean(study, STUDIES)}"
        )
    return Sweep(study, recipe=recipe, study=study, arms=arms, seeds=seeds)


def find_sweep(name: str) -> Sweep:
    """A named sweep, or that of a file. Raises ConfigError."""
    if name in SWEEPS:
        return SWEEPS[name]
    if name in RECIPES and not Path(name).is_file():
        raise ConfigError(
            f"{name}: is a recipe; name what is to vary: deit sweep table-3 --recipe {name} (or "
            f"another of {', '.join(SWEEPS)}), or a file of your own (docs/sweeps.md)"
        )
    if not Path(name).is_file():
        raise ConfigError(
            f"{name}: {missing_file_reason(Path(name))}{did_you_mean(name, SWEEPS)}; give a sweep "
            f"in YAML or JSON (docs/sweeps.md), or one of {', '.join(SWEEPS)}"
        )
    return read_sweep(Path(name))
