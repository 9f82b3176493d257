"""The runs that a comparison builds on: teachers, starts, and what these build on in their turn."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from deit.config.recipes import RECIPES, recipe_of_path
from deit.config.schema import Config


def slugify(name: str) -> str:
    """A name as part of a path: `fix/rs` is fix-rs."""
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")


class Experiment(NamedTuple):
    """What the runs of an experiment have in common.

    recipe: the name of the configuration, for messages and results. out: folder of the experiment.
    """

    recipe: str
    config: Config
    out: Path
    dry_run: bool = False


class BaseRuns:
    """The runs that the arms of a recipe of ours build on: its teachers and what it starts from,
    and whatever these build on.

    runs: their configurations by name, in the order in which they are trained. teachers: which of
    them teach. What a command line names itself is taken as it lies, and is not trained here.
    asked: what a file says of the recipe, before the command line. arms: what they name beside it
    is trained here as well, unless the command line names a source.
    """

    def __init__(
        self,
        run: Experiment,
        student: Config,
        folder: Path,
        *,
        recipe_config: Config | None = None,
        arms: Iterable[Config] = (),
    ) -> None:
        self.runs: dict[str, Config] = {}
        self.teachers: set[str] = set()
        self.folder, self.student = folder, student
        self.recipe = RECIPES[run.recipe]() if run.recipe in RECIPES else None
        self.recipes: set[str] = set()
        recipe_config = recipe_config or self.recipe
        if recipe_config is not None and not student.teacher.target_stores:
            for name, field in (("teacher", "source"), ("init", "weights")):
                typed = getattr(getattr(student, name), field)
                if typed != getattr(getattr(recipe_config, name), field):
                    continue
                for source in (typed, *(getattr(getattr(arm, name), field) for arm in arms)):
                    self._collect(source)
        self.alone = len(self.recipes) == 1 and (self.recipe or student).init.weights is None

    def _collect(self, sources: tuple[str, ...] | str | None) -> None:
        """Note the recipes behind sources, and those behind these."""
        for source in (sources,) if isinstance(sources, str) else sources or ():
            name = recipe_of_path(source)
            if name is not None and name not in self.recipes:
                self.recipes.add(name)
                config = RECIPES[name]()
                self._collect(config.teacher.source)
                self._collect(config.init.weights)

    def with_local_paths(self, config: Config) -> Config:
        """A configuration whose sources are runs in this folder, where they are of our recipes."""
        taught = tuple(self._moved(source, teaches=True) for source in config.teacher.source)
        start = self._moved(config.init.weights, teaches=False)
        return config.replace(teacher={"source": taught}, init={"weights": start})

    def _moved(self, source: str | None, *, teaches: bool) -> str | None:
        recipe = recipe_of_path(source)
        if recipe is None or recipe not in self.recipes:
            return source
        name = "teacher" if self.alone else recipe
        if name not in self.runs:
            config = self.with_local_paths(self._with_data(RECIPES[recipe]()))
            self.runs[name] = config
        if teaches:
            self.teachers.add(name)
        return str(self.folder / slugify(name))

    def _with_data(self, config: Config) -> Config:
        """The data and the machine that the command line asked for; images of another size keep
        theirs."""
        changed = dataclasses.asdict(self.student.data)
        if self.recipe is not None:
            default = dataclasses.asdict(self.recipe.data)
            changed = {name: value for name, value in changed.items() if value != default[name]}
        changed.pop(
            "unseen_classes", None
        )  # of the student: what it never saw its teacher may know
        # A recipe of somebody's own says nothing of the size that its teachers learn from.
        if self.recipe is None or config.data.image_size != self.recipe.data.image_size:
            changed.pop("image_size", None)
        run = self.student.run
        leaves = ("seed", "device", "precision", "linear_backend")
        return config.replace(data=changed, run={leaf: getattr(run, leaf) for leaf in leaves})
