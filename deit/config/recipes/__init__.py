"""Recipes: named functions that return a complete configuration."""

from pathlib import Path

# The modules register their recipes in this order, which is that of --help.
from deit.config.recipes import handwriting  # noqa: F401  # isort: skip
from deit.config.recipes import cifar  # noqa: F401  # isort: skip
from deit.config.recipes import imagenet  # noqa: F401  # isort: skip
from deit.config.recipes.registry import RECIPES
from deit.config.schema import Config
from deit.config.validation import load_config
from deit.core.errors import ConfigError, did_you_mean, raise_if_transient
from deit.core.file_reading import missing_file_reason
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
        f"no recipe {name!r}{did_you_mean(name, RECIPES)}; recipes are {', '.join(RECIPES)}, "
        "FILE.py:FUNCTION, or a run's config.json"
    )


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
