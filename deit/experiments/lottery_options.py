"""What a search for lottery tickets is asked, and what cannot be; no torch."""

from dataclasses import dataclass

from deit.config.schema import Config
from deit.config.sparsity import densities_of, groups_of
from deit.core.errors import ConfigError

DENSE, TICKET = "dense", "ticket"
RANDOM, REINITIALIZED, ONE_SHOT = "random", "re-initialised", "one-shot"
CONTROLS = (RANDOM, REINITIALIZED, ONE_SHOT)
LEVELS, RATE = 7, 0.2


@dataclass(frozen=True)
class LotteryOptions:
    """What a command line says of a search for tickets.

    scope: as deit.config.sparsity names it. levels, rate: so many levels, each of which takes this
    share of the weights left; None: LEVELS and RATE, or what the scope itself says. rewind: epochs
    of the dense run after which its weights are those to go back to; None: where its warm-up ends.
    controls: of CONTROLS. at: the levels that have them; None: all. tolerance: by how much
    [percentage points] the mean of a matching ticket may lie below the dense run's.
    """

    scope: str = "global"
    levels: int | None = None
    rate: float | None = None
    rewind: float | None = None
    controls: tuple[str, ...] = CONTROLS
    at: tuple[int, ...] | None = None
    tolerance: float = 1.0

    def densities(self) -> tuple[float, ...]:
        """The share of the prunable weights that each level keeps, from level 1 on."""
        levels = LEVELS if self.levels is None else self.levels
        rate = RATE if self.rate is None else self.rate
        return densities_of(self.scope, levels=levels, rate=rate)


def check_asked(asked: LotteryOptions, config: Config) -> None:
    """Refuse what cannot be, before any image is looked at. Raises ConfigError."""
    own = asked.levels is not None or asked.rate is not None
    if groups_of(asked.scope) is not None and own:
        raise ConfigError(
            f"--scope {asked.scope}: says itself what each level keeps; leave out --rounds, "
            "--prune-rate"
        )
    if asked.levels is not None and not 1 <= asked.levels <= 100:
        raise ConfigError(f"--rounds {asked.levels}: should be in 1 ... 100")
    if asked.rate is not None and not 0 < asked.rate < 1:
        raise ConfigError(f"--prune-rate {asked.rate:g}: should be a share between 0 and 1")
    levels = len(asked.densities())
    for level in asked.at or ():
        if not 1 <= level <= levels:
            raise ConfigError(f"--control-rounds {level}: there are levels 1 to {levels}")
    epochs = config.optim.epochs
    if asked.rewind is not None and not 0 <= asked.rewind < epochs:
        raise ConfigError(
            f"--rewind-epoch {asked.rewind:g}: should be at least 0 and below optim.epochs "
            f"({epochs})"
        )
    if not asked.tolerance >= 0:
        raise ConfigError(f"--tolerance {asked.tolerance:g}: should be at least 0")
    if config.optim.trainable != "all":
        raise ConfigError(
            f"optim.trainable = {config.optim.trainable!r}: tickets are looked for among all "
            "weights, "
            "so all have to be trained"
        )
    for leaf in ("pruning_masks", "start_step"):
        if getattr(config.init, leaf) != getattr(type(config.init)(), leaf):
            raise ConfigError(f"init.{leaf}: is what this command itself decides; leave it out")
