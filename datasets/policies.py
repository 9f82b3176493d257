"""Augmentation policies: sample the operations applied to each image and their strengths.

A policy is a function of keys that returns one or more layers: for each layer and image the code of
an operation (deit.datasets.operations.CODES) and its argument.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from deit.config.sections.views import ViewsConfig
from deit.core.rng import Keys, normal, uniform
from deit.core.tensors import device_constant
from deit.datasets.operations import CODES
from deit.datasets.resizing import MAX_SIGMA

Layers = tuple[Tensor, Tensor]
"""codes int64 [batch, layers], arguments float32 [batch, layers]."""


def sample_policy(keys: Keys, views: ViewsConfig) -> Layers:
    """Sample all layers of a view, in order: rotation, policy, color jitter."""
    layers = []
    if views.rotation > 0:
        layers.append(sample_rotation(keys, views.rotation))
    if views.auto_augment != "none":
        layers.append(POLICIES[views.auto_augment](keys, views))
    if views.color_jitter > 0:
        layers.append(sample_color_jitter(keys, views.color_jitter))
    if not layers:
        empty = torch.zeros(len(keys.samples), 0, device=keys.samples.device)
        return empty.long(), empty
    codes, arguments = zip(*layers)
    return torch.cat(codes, dim=1), torch.cat(arguments, dim=1)


def sample_rotation(keys: Keys, degrees: float) -> Layers:
    """Sample one layer: a rotation by an angle uniform in +-degrees."""
    angles = ((2 * uniform(keys, "rotation", 1) - 1) * degrees).float()
    return torch.full_like(keys.samples, CODES["rotate"])[:, None], angles


def sample_randaugment(keys: Keys, views: ViewsConfig) -> Layers:
    """Sample RandAugment (Cubuk et al. 2020) with timm's increasing magnitudes (`inc1`).

    `views.randaugment_num_ops` layers; each applies one of 15 operations with probability
    `views.randaugment_prob`, at a normally distributed magnitude clipped to 0 ... 10. The
    magnitudes are those of timm's `rand-m9-mstd0.5-inc1`, the setting of the DeiT paper (Table 9).
    """
    codes, arguments = [], []
    for layer in range(views.randaugment_num_ops):
        draws = uniform(keys, f"randaugment/{layer}", 3)
        noise = normal(keys, f"randaugment/{layer}/magnitude", 1).squeeze(1)
        level = (views.randaugment_magnitude + views.randaugment_magnitude_std * noise).clamp(0, 10)
        level = level / torch.full_like(level, 10)  # a tensor: see deit.datasets.resizing
        sign = torch.where(draws[:, 2] < 0.5, -1.0, 1.0)
        choice = (draws[:, 1] * len(RANDAUGMENT)).long()
        applied = draws[:, 0] < views.randaugment_prob
        selected = _codes(RANDAUGMENT, choice.device)[choice]
        scales = torch.stack([scale(level, sign) for scale in RANDAUGMENT.values()], dim=1)
        codes.append(torch.where(applied, selected, 0))
        arguments.append(scales.gather(1, choice[:, None]).squeeze(1).float())
    return torch.stack(codes, dim=1), torch.stack(arguments, dim=1)


def _no_argument(level: Tensor, sign: Tensor) -> Tensor:
    return torch.zeros_like(level)


def _factor(level: Tensor, sign: Tensor) -> Tensor:
    """Return the factor of the image in a blend: 1 +- 0.9 * level, at least 0.1."""
    return (1 + sign * 0.9 * level).clamp_min(0.1)


def _up_to(limit: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda level, sign: sign * limit * level


RANDAUGMENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auto_contrast": _no_argument,
    "equalize": _no_argument,
    "invert": _no_argument,
    "rotate": _up_to(30),
    # 4 bits at level 0, 1 at level 1; timm's formula gives 0 bits, a black image.
    "posterize": lambda level, sign: (4 - torch.floor(4 * level)).clamp_min(1),
    "solarize": lambda level, sign: 256 - torch.floor(256 * level).clamp_max(256),
    "solarize_add": lambda level, sign: torch.floor(110 * level).clamp_max(128),
    "color": _factor,
    "contrast": _factor,
    "brightness": _factor,
    "sharpness": _factor,
    "shear_x": _up_to(0.3),
    "shear_y": _up_to(0.3),
    "translate_x": _up_to(0.45),
    "translate_y": _up_to(0.45),
}
"""RandAugment's operations: (level in [0, 1], sign -1 or 1), float64 [batch] -> argument."""


_AUTO_SCALES: dict[str, Callable[[float], tuple[float, float]]] = {
    "auto_contrast": lambda level: (0.0, 0.0),
    "equalize": lambda level: (0.0, 0.0),
    "invert": lambda level: (0.0, 0.0),
    "rotate": lambda level: (30 * level, -30 * level),
    "posterize": lambda level: (8 - round(4 * level),) * 2,
    "solarize": lambda level: (255 - 255 * level,) * 2,
    "color": lambda level: (1 + 0.9 * level, 1 - 0.9 * level),
    "contrast": lambda level: (1 + 0.9 * level, 1 - 0.9 * level),
    "sharpness": lambda level: (1 + 0.9 * level, 1 - 0.9 * level),
    "shear_x": lambda level: (0.3 * level, -0.3 * level),
}
"""AutoAugment's scales: level in [0, 1] -> the argument for either direction."""

AUTOAUGMENT: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...] = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("auto_contrast", 0.6, 5)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 4), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 7)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 2)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 8), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 2)),
    (("equalize", 0.0, 7), ("equalize", 0.8, 8)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 8)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 9)),
    (("color", 0.4, 0), ("equalize", 0.6, 3)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("auto_contrast", 0.6, 5)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
)
"""AutoAugment's policy for ImageNet (Cubuk et al. 2019, Table 9): sub-policies of two operations,
each with its probability and its level in 0 ... 9."""


def sample_autoaugment(keys: Keys, views: ViewsConfig) -> Layers:
    """Sample AutoAugment's ImageNet policy (Cubuk et al. 2019): one sub-policy for each image.

    Each of its two operations is applied with its own probability and strength, in a random
    direction.
    """
    draws = uniform(keys, "autoaugment", 5)
    device = draws.device
    choice = (draws[:, 0] * len(AUTOAUGMENT)).long()
    codes = device_constant(
        tuple(tuple(CODES[name] for name, _, _ in pair) for pair in AUTOAUGMENT), device
    )
    probabilities = device_constant(
        tuple(tuple(probability for _, probability, _ in pair) for pair in AUTOAUGMENT), device
    )
    scaled = [[_AUTO_SCALES[name](level / 9) for name, _, level in pair] for pair in AUTOAUGMENT]
    signed = device_constant(tuple(tuple(map(tuple, pair)) for pair in scaled), device)
    applied = draws[:, 1:3] < probabilities[choice]
    sign = (draws[:, 3:5] < 0.5).long()
    arguments = signed[choice].gather(2, sign[:, :, None]).squeeze(2)
    return torch.where(applied, codes[choice], 0), arguments.float()


def sample_three_augment(keys: Keys, views: ViewsConfig) -> Layers:
    """Sample 3-Augment (Touvron et al. 2022, "DeiT III"): one of three operations per image.

    Grayscale, solarize at 128, or Gaussian blur with a sigma of 0.1 ... 2 px, with equal
    probability. Its color jitter is set by `views.color_jitter` (0.3).
    """
    draws = uniform(keys, "three_augment", 2)
    choice = (draws[:, :1] * 3).long()
    names = ("grayscale", "solarize", "gaussian_blur")
    codes = _codes(names, choice.device)[choice]
    sigma = (0.1 + (MAX_SIGMA - 0.1) * draws[:, 1:]).float()
    return codes, torch.where(choice == 1, 128.0, sigma)


def sample_color_jitter(keys: Keys, strength: float) -> Layers:
    """Sample brightness, contrast and saturation in random order (torchvision's ColorJitter).

    Each is a blend with a factor uniform in 1 +- strength.
    """
    draws = uniform(keys, "color_jitter", 4)
    order = device_constant(_ORDERS, draws.device)[(draws[:, 3] * len(_ORDERS)).long()]
    factors = ((1 - strength) + 2 * strength * draws[:, :3]).clamp_min(0).float()
    names = ("brightness", "contrast", "color")
    return _codes(names, draws.device)[order], factors.gather(1, order)


def _codes(names: Iterable[str], device: torch.device) -> Tensor:
    return device_constant(tuple(CODES[name] for name in names), device)


_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))

POLICIES: dict[str, Callable[[Keys, ViewsConfig], Layers]] = {
    "randaugment": sample_randaugment,
    "three_augment": sample_three_augment,
    "autoaugment": sample_autoaugment,
}
"""The policies by their names in views.auto_augment."""
