"""Among which weights pruning looks for the smallest, and how many a level keeps; no torch."""

import re

from deit.core.errors import ConfigError

SCOPES = ("global", "layerwise")
"""All layers ranked together, or the same share of each; beside these N:M, as 2:4: of each M
neighbours along the inputs of a layer N."""


def groups_of(scope: str) -> tuple[int, int] | None:
    """N and M of N:M; None of a scope without groups. Raises ConfigError of what is no scope."""
    if scope in SCOPES:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", scope)
    kept, size = map(int, found.groups()) if found else (0, 0)
    if not 0 < kept < size:
        raise ConfigError(
            f"scope {scope}: should be {', '.join(SCOPES)} or N:M, as 2:4, with N below M"
        )
    return kept, size


def density_after(level: int, rate: float) -> float:
    """The share of the weights that is left after so many levels, each of which takes `rate` of
    those before it: (1 - rate) ** level."""
    return (1 - rate) ** level


def densities_of(scope: str, *, levels: int, rate: float) -> tuple[float, ...]:
    """The share that each level keeps, from level 1 on; N:M takes one of each M a level, down to N,
    and knows no others. Raises ConfigError."""
    groups = groups_of(scope)
    if groups is None:
        return tuple(density_after(level, rate) for level in range(1, levels + 1))
    kept, size = groups
    return tuple(left / size for left in range(size - 1, kept - 1, -1))
