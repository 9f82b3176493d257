"""Mixup and cutmix on pairs of neighbours in a batch, image and label by the same weight.

Pairs replace the whole-batch mixing of the DeiT code so that a view depends on no batch size: rows
2k and 2k + 1 of the epoch's order are partners whatever process or micro-batch holds them.
"""

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from deit.config import ViewsConfig
from deit.keys import Keys, beta, uniform


class Mix(NamedTuple):
    """How each pair is mixed; both partners share it.

    own_weight: float64 [pairs], the share an image keeps of itself, 1 where nothing is mixed.
    cut: bool [pairs], cutmix where true, mixup where false.
    boxes: int64 [pairs, 4], top, left, bottom, right of the pasted region.
    """

    own_weight: Tensor
    cut: Tensor
    boxes: Tensor


def sample_mix(keys: Keys, *, views: ViewsConfig, height: int, width: int) -> Mix:
    """The mixing of each pair; `keys.samples` holds the number of the pair in the epoch.

    mixup (Zhang et al. 2018): weight ~ Beta(alpha, alpha). cutmix (Yun et al. 2019): a box of
    area 1 - weight with a uniform centre; cut off at the border, so that the weight is
    corrected to the area that is really kept.
    """
    switch = uniform(keys, "mix/switch", 2)
    ones = torch.ones_like(switch[:, 0])
    mixup_weight = beta(keys, "mix/mixup", views.mixup_alpha) if views.mixup_alpha > 0 else ones
    cut_weight = beta(keys, "mix/cutmix", views.cutmix_alpha) if views.cutmix_alpha > 0 else ones
    boxes = _boxes(uniform(keys, "mix/box", 2), cut_weight, height, width)
    top, left, bottom, right = boxes.unbind(dim=1)
    kept = 1 - ((bottom - top) * (right - left)).double() / (height * width)
    if views.mixup_alpha > 0 and views.cutmix_alpha > 0:
        cut = switch[:, 1] < views.cutmix_share
    else:
        cut = torch.full_like(switch[:, 1], views.cutmix_alpha > 0, dtype=torch.bool)
    mixed = switch[:, 0] < views.mix_probability
    own_weight = torch.where(mixed, torch.where(cut, kept, mixup_weight), ones)
    return Mix(own_weight, cut, boxes)


def _boxes(centres: Tensor, weight: Tensor, height: int, width: int) -> Tensor:
    side = (1 - weight).sqrt()
    edges = []
    for axis, extent in ((0, height), (1, width)):
        centre, half = (centres[:, axis] * extent).long(), (side * extent).long() // 2
        edges += [(centre - half).clamp(0, extent), (centre + half).clamp(0, extent)]
    top, bottom, left, right = edges
    return torch.stack([top, left, bottom, right], dim=1)


def apply_mix(images: Tensor, targets: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """Mix each image [batch, 3, height, width] and target [batch, classes] with its partner.

    Rows 2k and 2k + 1 are partners. The inputs are left as they are.
    """
    partner = torch.arange(len(images), device=images.device) ^ 1
    own = repeat(mix.own_weight, "pair -> (pair 2)").to(images.dtype)
    cut = repeat(mix.cut, "pair -> (pair 2) 1 1 1")
    weight = rearrange(own, "row -> row 1 1 1")
    blended = weight * images + (1 - weight) * images[partner]
    inside = repeat(_inside(mix.boxes, *images.shape[-2:]), "pair h w -> (pair 2) 1 h w")
    pasted = torch.where(inside & (weight < 1), images[partner], images)
    mixed = torch.where(cut, pasted, blended)
    return mixed, own[:, None] * targets + (1 - own[:, None]) * targets[partner]


def _inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Mask [pairs, height, width] of the pixels within each box."""
    top, left, bottom, right = rearrange(boxes, "pair edge -> edge pair 1 1")
    rows = torch.arange(height, device=boxes.device)[:, None]
    columns = torch.arange(width, device=boxes.device)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
