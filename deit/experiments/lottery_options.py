"""Options of a lottery experiment, and their checks; no torch."""

from dataclasses import dataclass

from deit.config.schema import Config
from deit.config.sparsity import densities_of, groups_of
from deit.core.errors import ConfigError

DENSE, TICKET = "dense", "ticket"
RANDOM, REINITIALIZED, ONE_SHOT = "random", "reinitialized", "one-shot"
CONTROLS = (RANDOM, REINITIALIZED, ONE_SHOT)
LEVELS, RATE = 7, 0.2


@dataclass(frozen=True)
class LotteryOptions:
    """The options of a lottery experiment.

    scope: which weights are ranked together, as in deit.config.sparsity. levels: number of pruning
    rounds. Default: LEVELS. rate: share of the remaining weights that each level removes. Default:
    RATE. A scope N:M defines its own levels and takes neither. rewind: epoch of the dense run whose
    weights every level is rewound to. Default: the end of its warm-up. controls: some of CONTROLS.
    control_levels: the levels with controls. Default: all. tolerance: how far the mean of a
    matching ticket may be below that of the dense run [percentage points].
    """

    scope: str = "global"
    levels: int | None = None
    rate: float | None = None
    rewind: float | None = None
    controls: tuple[str, ...] = CONTROLS
    control_levels: tuple[int, ...] | None = None
    tolerance: float = 1.0

    def densities(self) -> tuple[float, ...]:
        """Return the share of the prunable weights that each level keeps, from level 1."""
        levels = LEVELS if self.levels is None else self.levels
        rate = RATE if self.rate is None else self.rate
        return densities_of(self.scope, levels=levels, rate=rate)


def check_options(options: LotteryOptions, config: Config) -> None:
    """Raise ConfigError for invalid options, before any image is read."""
    has_levels = options.levels is not None or options.rate is not None
    if groups_of(options.scope) is not None and has_levels:
        raise ConfigError(
            f"--scope {options.scope}: defines the density of each level itself; leave out "
            "--rounds and --prune-rate"
        )
    if options.levels is not None and not 1 <= options.levels <= 100:
        raise ConfigError(f"--rounds {options.levels}: should be in 1 ... 100")
    if options.rate is not None and not 0 < options.rate < 1:
        raise ConfigError(f"--prune-rate {options.rate:g}: should be a share between 0 and 1")
    levels = len(options.densities())
    for level in options.control_levels or ():
        if not 1 <= level <= levels:
            raise ConfigError(f"--control-rounds {level}: there are levels 1 to {levels}")
    epochs = config.optim.epochs
    if options.rewind is not None and not 0 <= options.rewind < epochs:
        raise ConfigError(
            f"--rewind-epoch {options.rewind:g}: should be at least 0 and below optim.epochs "
            f"({epochs})"
        )
    if not options.tolerance >= 0:
        raise ConfigError(f"--tolerance {options.tolerance:g}: should be at least 0")
    if config.optim.trainable != "all":
        raise ConfigError(
            f"optim.trainable = {config.optim.trainable!r}: a lottery prunes all weights, so all "
            "have to be trained; use --optim.trainable all"
        )
    for leaf in ("pruning_masks", "start_step"):
        if getattr(config.init, leaf) != getattr(type(config.init)(), leaf):
            raise ConfigError(f"init.{leaf}: is set by this command itself; leave it out")
