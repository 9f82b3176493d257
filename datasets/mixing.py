"""Mixup and cutmix of pairs of neighbors in a batch.

Rows 2k and 2k + 1 of an epoch are mixed with each other, unlike in the DeiT code, which mixes a
whole batch. So a view does not depend on the batch size, the process or the micro-batch.
"""

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor

from deit.config.sections.views import ViewsConfig
from deit.core.rng import Keys, beta, uniform


class Mix(NamedTuple):
    """The mixing parameters of each pair, the same for both images.

    lam: float64 [pairs], the weight of an image itself, in [0, 1]; 1 if a pair is not mixed.
    is_cutmix: bool [pairs]; mixup where false.
    boxes: int64 [pairs, 4], top, left, bottom, right of the pasted box, in pixels of a size x size
    image (the student's). For images of another size the box is scaled.
    """

    lam: Tensor
    is_cutmix: Tensor
    boxes: Tensor
    size: int

    def select(self, pairs: slice) -> "Mix":
        """Return the parameters of some of the pairs."""
        return Mix(self.lam[pairs], self.is_cutmix[pairs], self.boxes[pairs], self.size)


def sample_mix(keys: Keys, *, views: ViewsConfig, size: int) -> Mix:
    """Sample the mixing of each pair. `keys.samples` holds the index of each pair in the epoch.

    size: side [px] of the student's image. mixup (Zhang et al. 2018): lam ~ Beta(alpha, alpha).
    cutmix (Yun et al. 2019): a box of area 1 - lam with a uniform center, clipped at the border;
    lam is then corrected to the share of the area that is not pasted over.

    >>> views = ViewsConfig(mixup_alpha=0.8, cutmix_alpha=1.0)
    >>> mix = sample_mix(Keys(seed=0, epoch=0, samples=torch.arange(16)), views=views, size=32)
    >>> mix.lam.shape, mix.boxes.shape
    (torch.Size([16]), torch.Size([16, 4]))
    """
    switch = uniform(keys, "mix/switch", 2)
    ones = torch.ones_like(switch[:, 0])
    mixup_weight = beta(keys, "mix/mixup", views.mixup_alpha) if views.mixup_alpha > 0 else ones
    cut_weight = beta(keys, "mix/cutmix", views.cutmix_alpha) if views.cutmix_alpha > 0 else ones
    boxes = _boxes(uniform(keys, "mix/box", 2), cut_weight, size)
    top, left, bottom, right = boxes.unbind(dim=1)
    pasted = (bottom - top) * (right - left)
    corrected = (size**2 - pasted) / torch.full_like(switch[:, 0], size**2)
    if views.mixup_alpha > 0 and views.cutmix_alpha > 0:
        is_cutmix = switch[:, 1] < views.mixup_switch_prob
    else:
        is_cutmix = torch.full_like(switch[:, 1], views.cutmix_alpha > 0, dtype=torch.bool)
    mixed = switch[:, 0] < views.mixup_prob
    lam = torch.where(mixed, torch.where(is_cutmix, corrected, mixup_weight), ones)
    return Mix(lam, is_cutmix, boxes, size)


def _boxes(centers: Tensor, weight: Tensor, size: int) -> Tensor:
    half = ((1 - weight).sqrt() * size).long()[:, None] // 2
    middle = (centers * size).long()
    first, last = (middle - half).clamp(0, size), (middle + half).clamp(0, size)
    return torch.cat([first, last], dim=1)


def mix_images(images: Tensor, mix: Mix) -> Tensor:
    """Mix each image with its partner: rows 2k and 2k + 1.

    images: float [batch, 3, height, width], an even number, not changed. Return the same shape.

    >>> mix = Mix(torch.tensor([0.75]).double(), torch.tensor([False]), torch.zeros(1, 4).long(), 8)
    >>> black_and_white = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    >>> mix_images(black_and_white, mix)[:, 0, 0, 0].tolist()
    [0.25, 0.75]
    """
    pairs = rearrange(images, "(pair two) c h w -> pair two c h w", two=2)
    lam = rearrange(_own_weights(mix, *images.shape[-2:]).to(images.dtype), "p h w -> p 1 1 h w")
    # Exact for weights of 0 and 1: x * 1 + y * 0.
    mixed = (pairs * lam).add_(pairs.flip(1).mul_(1 - lam))
    return rearrange(mixed, "pair two c h w -> (pair two) c h w")


def mix_targets(targets: Tensor, mix: Mix) -> Tensor:
    """Mix each target, float [batch, classes], with that of its partner, by the corrected lam.

    >>> mix = Mix(torch.tensor([0.75]).double(), torch.tensor([False]), torch.zeros(1, 4).long(), 8)
    >>> mix_targets(torch.eye(2), mix).tolist()
    [[0.75, 0.25], [0.25, 0.75]]
    """
    lam = repeat(mix.lam, "pair -> (pair 2) 1").to(targets.dtype)
    partner = torch.arange(len(targets), device=targets.device) ^ 1
    return lam * targets + (1 - lam) * targets[partner]


def _own_weights(mix: Mix, height: int, width: int) -> Tensor:
    """Return the weight of each pixel of the image itself, [pairs, height, width].

    lam for mixup. For cutmix 0 if the center of the pixel is within the box, otherwise 1.
    """
    top, left, bottom, right = rearrange(2 * mix.boxes, "pair edge -> edge pair 1")
    # (index + 1/2) / extent compared with edge / size, in integers.
    rows = (2 * torch.arange(height, device=top.device) + 1) * mix.size
    columns = (2 * torch.arange(width, device=top.device) + 1) * mix.size
    rows = ((rows >= top * height) & (rows < bottom * height)).double()
    columns = ((columns >= left * width) & (columns < right * width)).double()
    pasted = (mix.is_cutmix & (mix.lam < 1))[:, None, None] * rows[:, :, None] * columns[:, None]
    blended = torch.where(mix.is_cutmix, 1.0, mix.lam)[:, None, None]
    return blended - pasted
