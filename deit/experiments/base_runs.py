"""The runs that an experiment depends on: its teachers, the runs whose weights it starts from, and
the dependencies of both."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from deit.config.recipes import RECIPES, recipe_of_path
from deit.config.schema import Config


def slugify(name: str) -> str:
    """Return a name as part of a path: `fix-rs` for `fix/rs`."""
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")


UNNAMED = "custom"
"""The recipe of a configuration that is not from a recipe, in messages and results."""

NEEDED_FIRST = "needed first"
"""The kind of a base run in the list of a dry run: a teacher, or the start of a fine-tuning."""


class Experiment(NamedTuple):
    """What the runs of an experiment have in common.

    recipe: the name of the configuration, for messages and results. out: folder of the experiment.
    """

    recipe: str
    config: Config
    out: Path
    dry_run: bool = False


class BaseRuns:
    """The runs of built-in recipes that an experiment depends on.

    They are the teachers and the runs whose weights are the initial ones, and the dependencies of
    these. A source that the user names on the command line is used as it is and is not trained.

    runs: configurations by name, in the order of training. teachers: the names of those that are
    teachers.
    """

    def __init__(
        self,
        experiment: Experiment,
        student: Config,
        folder: str | Path,
        *,
        recipe_config: Config | None = None,
        arms: Iterable[Config] = (),
    ) -> None:
        """Find the dependencies.

        student: the configuration with the options of the command line. folder: where the base runs
        are trained. recipe_config: the recipe with the fields of a sweep file, before the command
        line. Default: the recipe. arms: configurations whose teachers and initial weights are
        trained as well, unless the command line names a source.
        """
        self.runs: dict[str, Config] = {}
        self.teachers: set[str] = set()
        self.folder, self.student = Path(folder), student
        known = experiment.recipe in RECIPES
        self.recipe = RECIPES[experiment.recipe]() if known else None
        self.recipes: set[str] = set()
        recipe_config = recipe_config or self.recipe
        if recipe_config is not None and not student.teacher.target_stores:
            for section, leaf in (("teacher", "source"), ("init", "weights")):
                source = getattr(getattr(student, section), leaf)
                if source != getattr(getattr(recipe_config, section), leaf):
                    continue
                for sources in (source, *(getattr(getattr(arm, section), leaf) for arm in arms)):
                    self._collect(sources)
        initial_weights = (self.recipe or student).init.weights
        self._has_single_run = len(self.recipes) == 1 and initial_weights is None

    def _collect(self, sources: tuple[str, ...] | str | None) -> None:
        """Add the recipes of sources and, recursively, of their dependencies."""
        for source in (sources,) if isinstance(sources, str) else sources or ():
            name = recipe_of_path(source)
            if name is not None and name not in self.recipes:
                self.recipes.add(name)
                config = RECIPES[name]()
                self._collect(config.teacher.source)
                self._collect(config.init.weights)

    def with_local_paths(self, config: Config) -> Config:
        """Return a configuration whose sources are runs in this folder, where they are runs of
        built-in recipes. Adds these runs to `runs`."""
        teachers = tuple(
            self._local_path(source, is_teacher=True) for source in config.teacher.source
        )
        weights = self._local_path(config.init.weights, is_teacher=False)
        return config.replace(teacher={"source": teachers}, init={"weights": weights})

    def _local_path(self, source: str | None, *, is_teacher: bool) -> str | None:
        recipe = recipe_of_path(source)
        if recipe is None or recipe not in self.recipes:
            return source
        name = "teacher" if self._has_single_run else recipe
        if name not in self.runs:
            config = self.with_local_paths(self._with_data(RECIPES[recipe]()))
            self.runs[name] = config
        if is_teacher:
            self.teachers.add(name)
        return str(self.folder / slugify(name))

    def _with_data(self, config: Config) -> Config:
        """Return a base run's configuration with the data and hardware of the command line. Keeps
        the image size of a run that uses another size than the recipe."""
        changed = dataclasses.asdict(self.student.data)
        if self.recipe is not None:
            default = dataclasses.asdict(self.recipe.data)
            changed = {name: value for name, value in changed.items() if value != default[name]}
        # Only the student must not see these classes; its teacher may.
        changed.pop("unseen_classes", None)
        # The recipe of a user's own file does not define the image size of its teachers.
        if self.recipe is None or config.data.image_size != self.recipe.data.image_size:
            changed.pop("image_size", None)
        run = self.student.run
        leaves = ("seed", "device", "precision", "linear_backend")
        return config.replace(data=changed, run={leaf: getattr(run, leaf) for leaf in leaves})
