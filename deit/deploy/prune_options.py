"""The options of structured pruning, checked without importing torch."""

from dataclasses import dataclass

from deit.config.sparsity import SCOPES
from deit.core.errors import ConfigError, did_you_mean

MANIFEST = "prune.json"
SELECTION = "kept_units.json"
PRUNED, RECOVERED = "pruned", "recovered"
"""Files and folders of a pruning: the request, the units that were kept, and the two runs."""
CONTROLS = {"short": "short-control", "long": "long-control"}
"""Students of the same shape from random weights, and their folders. `short` is trained as long as
the recovery, `long` as long as the run and the recovery together."""
CRITERIA = ("taylor", "magnitude")
_DEFAULT_RATIO = 0.5


@dataclass(frozen=True)
class PruneOptions:
    """The options of structured pruning.

    heads, hidden: the share of all attention heads and hidden MLP units to remove. macs: instead of
    these, the share of the blocks' MACs to keep. scope: rank units over all blocks, or remove the
    same share of each block. criterion: of importance, by images (taylor) or by weights. images:
    number of images for taylor.
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
    """Return the options of a command line; None: not given. Raises ConfigError.

    ratio: the share of both heads and hidden units to remove.
    """
    shares = {"--ratio": ratio, "--macs": macs, "--heads": heads, "--hidden": hidden}
    given = {option: value for option, value in shares.items() if value is not None}
    for option, value in given.items():
        if not 0 <= value < 1 or (value == 0 and option in ("--ratio", "--macs")):
            raise ConfigError(f"{option} {value:g}: should be a share between 0 and 1")
    if len(given) > 1 and set(given) != {"--heads", "--hidden"}:
        raise ConfigError(f"{' and '.join(given)}: overlap; give only one of them")
    for option, value, known in (("--scope", scope, SCOPES), ("--criterion", criterion, CRITERIA)):
        if value not in known:
            raise ConfigError(
                f"{option} {value}: should be one of {', '.join(known)}{did_you_mean(value, known)}"
            )
    if images < 1:
        raise ConfigError(f"--images {images}: should be at least 1")
    default = 0.0
    if given.keys() <= {"--ratio"}:
        default = _DEFAULT_RATIO if ratio is None else ratio
    return PruneOptions(
        default if heads is None else heads,
        default if hidden is None else hidden,
        macs,
        scope,
        criterion,
        images,
    )
