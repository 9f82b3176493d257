"""Scopes of magnitude pruning and the density after each round, without torch."""

import re

from deit.core.errors import ConfigError

SCOPES = ("global", "layerwise")
"""global: all layers are ranked together; layerwise: the same fraction of each layer. A scope can
also be N:M, such as 2:4: N of M consecutive weights along the inputs of a layer are kept."""


def groups_of(scope: str) -> tuple[int, int] | None:
    """Return (N, M) of a scope N:M; None for the scopes without groups.

    Raises ConfigError if it is not a scope.
    """
    if scope in SCOPES:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", scope)
    num_left, group_size = map(int, match.groups()) if match else (0, 0)
    if not 0 < num_left < group_size:
        raise ConfigError(
            f"scope = {scope}: should be {', '.join(SCOPES)} or N:M (such as 2:4) with N below M"
        )
    return num_left, group_size


def density_after(level: int, rate: float) -> float:
    """Return the fraction of weights left after `level` rounds, each of which prunes `rate` of
    those left before it: (1 - rate) ** level."""
    return (1 - rate) ** level


def densities_of(scope: str, *, levels: int, rate: float) -> tuple[float, ...]:
    """Return the density after each round, from round 1 on.

    With N:M each round prunes one more of each M weights, until N are left; levels and rate have no
    effect. Raises ConfigError for an invalid scope.

    >>> densities_of("2:4", levels=0, rate=0.0)
    (0.75, 0.5)
    """
    groups = groups_of(scope)
    if groups is None:
        return tuple(density_after(level, rate) for level in range(1, levels + 1))
    num_left, group_size = groups
    return tuple(left / group_size for left in range(group_size - 1, num_left - 1, -1))
