"""A position embedding resized to an image of another size, its prefix rows left as they are."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from deit.config.fields import PosEmbedKernel
from deit.core.errors import CheckpointError


class Resized(NamedTuple):
    """A position embedding and what became of it.

    positions: [1, prefix + side**2, width]. sides: patches along an edge, before and after.
    norms: mean Euclidean norm of the patches' rows, before and after: an interpolation that lowers
    it takes from the positions' say (Touvron et al. 2021, section 4: bilinear does).
    """

    positions: Tensor
    sides: tuple[int, int]
    norms: tuple[float, float]


def resize_positions(
    positions: Tensor, *, prefix: int, side: int, kernel: PosEmbedKernel
) -> Resized:
    """The rows of the patches resampled on a grid of `side` x `side`; of the same side as they are.

    positions: [1, prefix + n**2, width], those of the class and distillation tokens first.
    kernel: bicubic either way. deit: the kernel of DeiT's code, four pixels wide; timm: with
    antialiasing, whose kernel has other coefficients even where it enlarges.
    Raises CheckpointError where the rows after the prefix are no square.
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
    """Patches along an edge of an embedding with so many rows. Raises CheckpointError."""
    side = round(max(rows - prefix, 0) ** 0.5)
    if side < 1 or side**2 != rows - prefix:
        raise CheckpointError(
            f"pos_embed: {rows} rows are not {prefix} token(s) and a square of patches"
        )
    return side
