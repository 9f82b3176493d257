"""Options of a lottery experiment, and their checks; no torch."""

from dataclasses import dataclass

from deit.config.command_choices import check_at_least, check_choice
from deit.config.schema import Config
from deit.config.sparsity import densities_of, groups_of
from deit.core.errors import ConfigError

DENSE, TICKET = "dense", "ticket"
RANDOM, REINITIALIZED, ONE_SHOT = "random", "reinitialized", "one-shot"
CONTROLS = (RANDOM, REINITIALIZED, ONE_SHOT)
ROUNDS, RATE = 7, 0.2


@dataclass(frozen=True)
class LotteryOptions:
    """The options of a lottery experiment.

    scope: which weights are ranked together, as in deit.config.sparsity. rounds: number of pruning
    rounds. Default: ROUNDS. prune_rate: share of the remaining weights that each round removes.
    Default: RATE. A scope N:M defines its own rounds and takes neither. rewind_epoch: epoch of the
    dense run whose weights every round is rewound to. Default: the end of its warm-up. controls:
    some of CONTROLS. control_rounds: the rounds with controls. Default: all. tolerance: how far the
    mean of a matching ticket may be below that of the dense run [percentage points].
    """

    scope: str = "global"
    rounds: int | None = None
    prune_rate: float | None = None
    rewind_epoch: float | None = None
    controls: tuple[str, ...] = CONTROLS
    control_rounds: tuple[int, ...] | None = None
    tolerance: float = 1.0

    def densities(self) -> tuple[float, ...]:
        """Return the share of the prunable weights that each level keeps, from level 1."""
        rounds = ROUNDS if self.rounds is None else self.rounds
        rate = RATE if self.prune_rate is None else self.prune_rate
        return densities_of(self.scope, levels=rounds, rate=rate)


def check_options(options: LotteryOptions, config: Config) -> None:
    """Raise ConfigError for invalid options, before any image is read."""
    rounds, rate, rewind = options.rounds, options.prune_rate, options.rewind_epoch
    if groups_of(options.scope) is not None and (rounds is not None or rate is not None):
        raise ConfigError(
            f"scope = {options.scope}: defines the density of each round itself; leave out rounds "
            "and prune_rate"
        )
    if rounds is not None and not 1 <= rounds <= 100:
        raise ConfigError(f"rounds = {rounds}: should be in 1 ... 100")
    if rate is not None and not 0 < rate < 1:
        raise ConfigError(f"prune_rate = {rate:g}: should be a share between 0 and 1")
    for control in options.controls:
        check_choice("controls", control, CONTROLS)
    num_rounds = len(options.densities())
    for index in options.control_rounds or ():
        if not 1 <= index <= num_rounds:
            raise ConfigError(f"control_rounds = {index}: there are rounds 1 to {num_rounds}")
    epochs = config.optim.epochs
    if rewind is not None and not 0 <= rewind < epochs:
        raise ConfigError(
            f"rewind_epoch = {rewind:g}: should be at least 0 and below optim.epochs ({epochs})"
        )
    check_at_least("tolerance", options.tolerance, 0, integer=False)
    if config.optim.trainable != "all":
        raise ConfigError(
            f"optim.trainable = {config.optim.trainable!r}: a lottery prunes all weights, so all "
            "have to be trained; use optim.trainable all"
        )
    for leaf in ("pruning_masks", "start_step"):
        if getattr(config.init, leaf) != getattr(type(config.init)(), leaf):
            raise ConfigError(f"init.{leaf}: is set by this command itself; leave it out")
