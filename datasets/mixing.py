"""Mixup and cutmix on pairs of neighbours in a batch, image and label by the same weight.

Pairs replace the whole-batch mixing of the DeiT code so that a view depends on no batch size: rows
2k and 2k + 1 of the epoch's order are partners whatever process or micro-batch holds them.
"""

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from deit.config.data_section import ViewsConfig
from deit.core.rng import Keys, beta, uniform


class Mix(NamedTuple):
    """How each pair is mixed; both partners share it.

    own_weight: float64 [pairs], the share an image keeps of itself, 1 where nothing is mixed.
    cut: bool [pairs], cutmix where true, mixup where false.
    boxes: int64 [pairs, 4], top, left, bottom, right of the pasted region, in pixels of an image
    of size x size (the student's); of another size it is the same region.
    """

    own_weight: Tensor
    cut: Tensor
    boxes: Tensor
    size: int

    def select(self, pairs: slice) -> "Mix":
        """The mixing of some of the pairs."""
        return Mix(self.own_weight[pairs], self.cut[pairs], self.boxes[pairs], self.size)


def sample_mix(keys: Keys, *, views: ViewsConfig, size: int) -> Mix:
    """The mixing of each pair; `keys.samples` holds the number of the pair in the epoch.

    size: side [px] of the student's image.
    mixup (Zhang et al. 2018): weight ~ Beta(alpha, alpha). cutmix (Yun et al. 2019): a box of
    area 1 - weight with a uniform centre; cut off at the border, so that the weight is
    corrected to the area that is really kept.
    """
    switch = uniform(keys, "mix/switch", 2)
    ones = torch.ones_like(switch[:, 0])
    mixup_weight = beta(keys, "mix/mixup", views.mixup_alpha) if views.mixup_alpha > 0 else ones
    cut_weight = beta(keys, "mix/cutmix", views.cutmix_alpha) if views.cutmix_alpha > 0 else ones
    boxes = _boxes(uniform(keys, "mix/box", 2), cut_weight, size)
    top, left, bottom, right = boxes.unbind(dim=1)
    pasted = (bottom - top) * (right - left)
    kept = (size**2 - pasted) / torch.full_like(switch[:, 0], size**2)
    if views.mixup_alpha > 0 and views.cutmix_alpha > 0:
        cut = switch[:, 1] < views.mixup_switch_prob
    else:
        cut = torch.full_like(switch[:, 1], views.cutmix_alpha > 0, dtype=torch.bool)
    mixed = switch[:, 0] < views.mixup_prob
    own_weight = torch.where(mixed, torch.where(cut, kept, mixup_weight), ones)
    return Mix(own_weight, cut, boxes, size)


def _boxes(centres: Tensor, weight: Tensor, size: int) -> Tensor:
    half = ((1 - weight).sqrt() * size).long()[:, None] // 2
    middle = (centres * size).long()
    first, last = (middle - half).clamp(0, size), (middle + half).clamp(0, size)
    return torch.cat([first, last], dim=1)


def mix_images(images: Tensor, mix: Mix) -> Tensor:
    """Mix each image, float [batch, 3, height, width], with its partner, rows 2k and 2k + 1.

    The input is left as it is.
    """
    pairs = rearrange(images, "(pair own) c h w -> pair own c h w", own=2)
    own = rearrange(_own_share(mix, *images.shape[-2:]).to(images.dtype), "p h w -> p 1 1 h w")
    # Exact where an image keeps all or nothing: x * 1 + y * 0.
    mixed = (pairs * own).add_(pairs.flip(1).mul_(1 - own))
    return rearrange(mixed, "pair own c h w -> (pair own) c h w")


def mix_targets(targets: Tensor, mix: Mix) -> Tensor:
    """Mix each target, float [batch, classes], with its partner's by the corrected weight."""
    own = repeat(mix.own_weight, "pair -> (pair 2) 1").to(targets.dtype)
    partner = torch.arange(len(targets), device=targets.device) ^ 1
    return own * targets + (1 - own) * targets[partner]


def _own_share(mix: Mix, height: int, width: int) -> Tensor:
    """What each pixel keeps of its own image [pairs, height, width]: the weight in mixup, all or
    nothing in cutmix, nothing where its middle lies within the box."""
    top, left, bottom, right = rearrange(2 * mix.boxes, "pair edge -> edge pair 1")
    # (place + 1/2) / extent against edge / size, in whole numbers.
    rows = (2 * torch.arange(height, device=top.device) + 1) * mix.size
    columns = (2 * torch.arange(width, device=top.device) + 1) * mix.size
    rows = ((rows >= top * height) & (rows < bottom * height)).double()
    columns = ((columns >= left * width) & (columns < right * width)).double()
    pasted = (mix.cut & (mix.own_weight < 1))[:, None, None] * rows[:, :, None] * columns[:, None]
    blended = torch.where(mix.cut, 1.0, mix.own_weight)[:, None, None]
    return blended - pasted
