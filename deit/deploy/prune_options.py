"""The options of structured pruning, checked without importing torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deit.config.command_choices import check_at_least, check_choice
from deit.config.finetune_schedules import FINETUNE_SCHEDULES, with_epochs
from deit.config.schema import Config
from deit.config.sparsity import SCOPES
from deit.core.errors import ConfigError

MANIFEST = "prune.json"
SELECTION = "kept_units.json"
PRUNED, RECOVERED = "pruned", "recovered"
"""Files and folders of a pruning: the request, the units that were kept, and the two runs."""
CONTROLS = {"short": "short-control", "long": "long-control"}
"""Students of the same shape from random weights, and their folders. `short` is trained as long as
the recovery, `long` as long as the run and the recovery together."""
CRITERIA = ("taylor", "magnitude")
DEFAULT_RATIO = 0.5
SCHEDULE = "short"
"""The default schedule of the training after pruning."""


@dataclass(frozen=True)
class PruneOptions:
    """The options of structured pruning; shares are in [0, 1).

    ratio: the share of all attention heads and hidden MLP units to remove (default: DEFAULT_RATIO).
    heads, hidden: instead of it, the share of each (default: 0 if only the other is given). macs:
    instead of these, the share of the blocks' MACs to keep. scope: rank units over all blocks
    (global), or remove the same share of each block (layerwise). criterion: of importance, by
    images (taylor) or by weights (magnitude). images: number of training views for taylor.
    """

    ratio: float | None = None
    heads: float | None = None
    hidden: float | None = None
    macs: float | None = None
    scope: str = "global"
    criterion: str = "taylor"
    images: int = 1024

    @property
    def removed_heads(self) -> float:
        """The share of the heads to remove; 0 if `macs` decides."""
        return self._default if self.heads is None else self.heads

    @property
    def removed_hidden(self) -> float:
        """The share of the hidden units to remove; 0 if `macs` decides."""
        return self._default if self.hidden is None else self.hidden

    @property
    def _default(self) -> float:
        if (self.heads, self.hidden, self.macs) != (None, None, None):
            return 0.0
        return DEFAULT_RATIO if self.ratio is None else self.ratio

    def recorded(self) -> dict[str, Any]:
        """Return the options as the manifest of a pruning records them."""
        return {
            "heads": self.removed_heads,
            "hidden": self.removed_hidden,
            "macs": self.macs,
            "scope": self.scope,
            "criterion": self.criterion,
            "images": self.images,
        }


def check_options(options: PruneOptions) -> None:
    """Raise ConfigError if an option has an invalid value, or two overlap."""
    shares = {name: getattr(options, name) for name in ("ratio", "macs", "heads", "hidden")}
    given = {name: value for name, value in shares.items() if value is not None}
    for name, value in given.items():
        if not 0 <= value < 1 or (value == 0 and name in ("ratio", "macs")):
            raise ConfigError(f"{name} = {value:g}: should be a share between 0 and 1")
    if len(given) > 1 and set(given) != {"heads", "hidden"}:
        (name, value), *others = given.items()
        raise ConfigError(
            f"{name} = {value:g}: overlaps with {' and '.join(dict(others))}; give only one of them"
        )
    check_choice("scope", options.scope, SCOPES)
    check_choice("criterion", options.criterion, CRITERIA)
    check_at_least("images", options.images, 1)


def check_controls(controls: Sequence[str]) -> None:
    """Raise ConfigError for a control that does not exist."""
    for control in controls:
        check_choice("controls", control, CONTROLS)


def recovery_config(
    config: Config, *, schedule: str = SCHEDULE, epochs: int | None = None
) -> Config:
    """Return the configuration of the training after pruning: that of a run with a schedule.

    schedule: a key of FINETUNE_SCHEDULES. epochs: instead of the schedule's. Raises ConfigError if
    it would not train all weights.
    """
    check_choice("schedule", schedule, FINETUNE_SCHEDULES)
    recovery = with_epochs(FINETUNE_SCHEDULES[schedule](config), epochs)
    if recovery.optim.trainable != "all":
        cause = f"schedule = {schedule}" if config.optim.trainable == "all" else "the run"
        raise ConfigError(
            f"{cause}: trains only {recovery.optim.trainable} (optim.trainable), but a pruned "
            "student needs all its weights trained; use a run and a schedule that train all"
        )
    return recovery
