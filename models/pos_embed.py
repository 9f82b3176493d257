"""Resize the position embedding of a ViT to another grid of patches."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from deit.config.field_types import PosEmbedKernel
from deit.core.errors import CheckpointError


class Resized(NamedTuple):
    """A resized position embedding.

    positions: [1, prefix + side**2, width].
    sides: patches along an edge, before and after.
    norms: mean Euclidean norm of the patch rows, before and after. Bilinear interpolation lowers
    it, which costs accuracy without fine-tuning (Touvron et al. 2021, section 4).
    """

    positions: Tensor
    sides: tuple[int, int]
    norms: tuple[float, float]


def resize_positions(
    positions: Tensor, *, prefix: int, side: int, kernel: PosEmbedKernel
) -> Resized:
    """Resample the patch rows of a position embedding to a grid of `side` x `side`.

    The first `prefix` rows (class and distillation tokens) are not changed. If the grid already
    has this size, the embedding is returned unchanged.

    positions: float [1, prefix + n**2, width].
    kernel: bicubic in both cases. deit: as in DeiT's code. timm: with antialiasing, which uses
    other bicubic coefficients, also for upsampling.
    Raises CheckpointError if the number of patch rows is not a square.

    >>> positions = torch.rand(1, 1 + 4 * 4, 8)
    >>> resized = resize_positions(positions, prefix=1, side=6, kernel="deit")
    >>> tuple(resized.positions.shape), resized.sides
    ((1, 37, 8), (4, 6))
    """
    tokens, patches = positions[:, :prefix], positions[:, prefix:]
    before = grid_side(positions.shape[1], prefix)
    norm = patches.norm(dim=-1).mean().item()
    if side == before:
        return Resized(positions, (before, side), (norm, norm))
    grid = rearrange(patches.float(), "1 (h w) d -> 1 d h w", h=before)
    grid = interpolate(
        grid, (side, side), mode="bicubic", align_corners=False, antialias=kernel == "timm"
    )
    resized = rearrange(grid, "1 d h w -> 1 (h w) d").to(positions.dtype)
    after = resized.norm(dim=-1).mean().item()
    return Resized(torch.cat([tokens, resized], dim=1), (before, side), (norm, after))


def grid_side(rows: int, prefix: int) -> int:
    """Return the patches along an edge, for an embedding with `rows` rows, `prefix` of them tokens.

    Raises CheckpointError if the number of patches is not a square.
    """
    side = round(max(rows - prefix, 0) ** 0.5)
    if side < 1 or side**2 != rows - prefix:
        raise CheckpointError(
            f"pos_embed: its {rows} rows are not {prefix} token(s) and a square number of patches"
        )
    return side
