"""Recipes: named functions that return a complete configuration."""

import dataclasses
import fnmatch
import os
from pathlib import Path
from typing import Any

# The modules register their recipes in this order, which is that of --help.
from deit.config.arguments import checks_types

from deit.config.recipes import handwriting  # noqa: F401  # isort: skip
from deit.config.recipes import cifar  # noqa: F401  # isort: skip
from deit.config.recipes import imagenet  # noqa: F401  # isort: skip
from deit.config.command_choices import check_path
from deit.config.presets import apply_presets, fit_epochs
from deit.config.recipes.registry import RECIPES
from deit.config.schema import Config, to_dict
from deit.config.sections.loss import LossConfig
from deit.config.validation import config_from_dict, load_config, plain_values, unknown_field
from deit.core.errors import ConfigError, ConfigProblem, did_you_mean, raise_if_transient
from deit.core.file_reading import missing_file_reason
from deit.core.run_folder import run_dir_of
from deit.core.user_code import import_file


def recipe_of_path(source: str | None) -> str | None:
    """Return the recipe whose default run folder is `source`; None if there is none.

    >>> recipe_of_path("checkpoints/digits-teacher")
    'digits-teacher'
    """
    folder, _, name = (source or "").rpartition("/")
    return name if folder == "checkpoints" and name in RECIPES else None


def find_recipe(name: str) -> Config:
    """Return the configuration of a recipe.

    name: a name of RECIPES, FILE.py:FUNCTION, FILE.py (with a function named `recipe`), or the path
    of a run's config.json.
    Raises ConfigError if there is no such recipe, or it fails.

    >>> sorted(name for name in RECIPES if name.startswith("mnist"))
    ['mnist', 'mnist-held-out', 'mnist-teacher']
    >>> find_recipe("mnist").teacher.source
    ('checkpoints/mnist-teacher',)
    """
    if name in RECIPES:
        return RECIPES[name]()
    if name.endswith(".json"):
        return load_config(Path(name))
    if name.endswith(".py") or ".py:" in name:
        return _from_file(name)
    if (Path(name) / "config.json").is_file():
        raise ConfigError(f"{name}: is a run, not a recipe; give its {Path(name) / 'config.json'}")
    raise ConfigError(
        f"no recipe {name!r}{did_you_mean(name, RECIPES, count=3)}; `deit recipes` lists all; "
        "FILE.py:FUNCTION and a run's config.json are recipes, too"
    )


@checks_types
def list_recipes(pattern: str = "*") -> list[str]:
    """Return the names of the recipes that match a pattern, as `timm.list_models` does.

    >>> list_recipes("mnist*")
    ['mnist-teacher', 'mnist', 'mnist-held-out']
    """
    return fnmatch.filter(RECIPES, pattern)


@checks_types
def recipe(
    name: str | os.PathLike | Config,
    *,
    loss: str | dict[str, Any] | LossConfig | None = None,
    augmentation: str | None = None,
    view_mode: str | None = None,
    **sections: dict[str, Any],
) -> Config:
    """Return the configuration of a recipe, with some of its fields changed.

    name: as for `find_recipe`; a run folder or a checkpoint folder in it, for the configuration of
    that run; or a configuration.
    loss: the name of a loss preset (`deit-hard`, `usi`, ...), or fields of the section loss.
    augmentation, view_mode: names of presets, as `deit train` takes them.
    sections: fields by section: data, views, student, init, teacher, optim, run; or a section such
    as ViewsConfig, which replaces all fields. Text is converted to the type of the field; paths are
    `str` or `Path`. With another number of epochs, warm-ups that are not given are limited to half
    of it.

    Raises ConfigError with all problems, NotReadableError for a file that may not be read.

    >>> config = recipe("digits", loss="deit-hard", optim={"epochs": 4}, student={"depth": 2})
    >>> config.loss.kind, config.optim.epochs, config.optim.warmup_epochs, config.student.depth
    ('hard', 4, 2.0, 2)
    """
    presets = {"augmentation": augmentation, "view_mode": view_mode}
    presets["loss"] = loss if isinstance(loss, str) else None
    fields = sections if loss is None or isinstance(loss, str) else {**sections, "loss": loss}
    if isinstance(name, Config):
        return with_changes(name, fields, presets)
    name = check_path("recipe", name)
    run = run_dir_of(name)
    is_run = name not in RECIPES and (run / "config.json").is_file()
    config = find_recipe(str(run / "config.json") if is_run else name)
    changed = with_changes(config, fields, presets)
    is_file = is_run or name.endswith(".json")
    if is_file and config.teacher.code_sources == changed.teacher.code_sources != ():
        raise ConfigError(
            f"{name}: its teacher {config.teacher.code_sources[0]} is Python code, and code is not "
            "run because a file names it; give teacher={'source': ...} if you trust it"
        )
    return changed


def with_changes(
    config: Config, sections: dict[str, Any], presets: dict[str, str | None] | None = None
) -> Config:
    """Return a validated configuration with presets applied, then fields replaced.

    sections: fields by section, as for `recipe`. Raises ConfigError with all problems.
    """
    values, presets = to_dict(config), presets or {}
    problems = [
        ConfigProblem(flag, presets[flag], advice)
        for flag, advice in apply_presets(values, presets).items()
    ]
    given = [name for name, preset in presets.items() if preset is not None]
    for section, fields in plain_values(sections).items():
        if dataclasses.is_dataclass(fields) and not isinstance(fields, type):
            fields = dataclasses.asdict(fields)
        if section not in values:
            problems.append(unknown_field(section, values))
        elif not isinstance(fields, dict):
            problems.append(ConfigProblem(section, fields, "should be a dict of fields"))
        else:
            values[section] |= fields
            given += [f"{section}.{leaf}" for leaf in fields]
    fit_epochs(values, given)
    return config_from_dict(values, problems, live_teacher=_is_live(values))


def _is_live(values: dict[str, Any]) -> bool:
    """Return whether teachers may run in training: views of many crops need stored targets, which
    the configuration may be for."""
    return values["views"]["teacher_view"] != "crops"


def _from_file(name: str) -> Config:
    file, _, function = name.partition(".py:")
    path = Path(file if file.endswith(".py") else f"{file}.py")
    function = function or "recipe"
    if not path.is_file():
        raise ConfigError(f"recipe {name}: {missing_file_reason(path)}")
    try:
        config = getattr(import_file(path), function)()
    except (Exception, SystemExit) as error:  # user code can raise any error
        raise_if_transient(error, f"recipe {name}")
        raise ConfigError(f"recipe {name}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(
            f"recipe {name}: should return a Config, returned {type(config).__name__}"
        )
    return config
