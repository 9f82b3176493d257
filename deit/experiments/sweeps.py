"""The sweeps that have a name: the paper's tables and the experiments of others."""

from pathlib import Path

from deit.config.recipes import RECIPES
from deit.core.errors import ConfigError, did_you_mean
from deit.core.file_reading import no_file
from deit.experiments.studies import STUDIES
from deit.experiments.sweep_spec import Sweep, read_sweep

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
            f"{name}: {no_file(Path(name))}{did_you_mean(name, SWEEPS)}; give a sweep in YAML or "
            "JSON "
            f"(docs/sweeps.md), or one of {', '.join(SWEEPS)}"
        )
    return read_sweep(Path(name))
