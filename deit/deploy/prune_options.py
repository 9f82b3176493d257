"""What a structured pruning is asked, and what cannot be; no torch."""

from dataclasses import dataclass

from deit.config.sparsity import SCOPES
from deit.core.errors import ConfigError, did_you_mean

MANIFEST = "prune.json"
KEPT = "kept_units.json"
PRUNED, RECOVERED = "pruned", "recovered"
"""What is in the folder of a pruning: what was asked, what stays, and the runs."""
CONTROLS = {"short": "short-control", "long": "long-control"}
"""Students of the same shape from random weights, with their folders: trained as long as the
recovery, and as long as the run and its recovery together."""
CRITERIA = ("taylor", "magnitude")
_RATIO = 0.5


@dataclass(frozen=True)
class PruneOptions:
    """What a command line says of a structured pruning.

    heads, hidden: the share of all heads and hidden units that goes. macs: instead of these, the
    share of the blocks' arithmetic that stays. scope: all blocks ranked together, or the same share
    of each. score: what parts are worth, by images or by weights. images: how many.
    """

    heads: float
    hidden: float
    macs: float | None
    scope: str
    criterion: str
    images: int


def prune_options(
    *,
    ratio: float | None,
    heads: float | None,
    hidden: float | None,
    macs: float | None,
    scope: str,
    criterion: str,
    images: int,
) -> PruneOptions:
    """What the options come to; None: not given. Raises ConfigError."""
    given = {"--ratio": ratio, "--macs": macs, "--heads": heads, "--hidden": hidden}
    named = {option: value for option, value in given.items() if value is not None}
    for option, value in named.items():
        if not 0 <= value < 1 or (value == 0 and option in ("--ratio", "--macs")):
            raise ConfigError(f"{option} {value:g}: should be a share between 0 and 1")
    if len(named) > 1 and set(named) != {"--heads", "--hidden"}:
        raise ConfigError(f"{' and '.join(named)}: both say how much goes; give one of them")
    for option, value, known in (("--scope", scope, SCOPES), ("--criterion", criterion, CRITERIA)):
        if value not in known:
            raise ConfigError(
                f"{option} {value}: should be one of {', '.join(known)}{did_you_mean(value, known)}"
            )
    if images < 1:
        raise ConfigError(f"--images {images}: should be at least 1")
    both = (_RATIO if ratio is None else ratio) if named.keys() <= {"--ratio"} else 0.0
    parts = (both if one is None else one for one in (heads, hidden))
    return PruneOptions(*parts, macs, scope, criterion, images)
