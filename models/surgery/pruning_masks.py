"""Masks of pruned networks: which weights may go, which stay, and how that holds in training."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from deit.config.sparsity import SCOPES, groups_of
from deit.core.errors import CheckpointError, ConfigError
from deit.core.sharding import local_tensor, shard_like
from deit.models.parameters import classifier_names
from deit.models.weight_files import read_weights

MASKS = "masks.safetensors"

Weights = dict[str, Tensor]
Masks = dict[str, Tensor]
"""Bool tensors by the names of the weights they are of, True where a weight is kept."""


_STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


def prunable(network: nn.Module) -> Weights:
    """The weights that may be pruned, in the order of the network: of every linear layer and
    convolution (modules of torch's, by their `weight`) but the first, which sees the pixels, and
    the heads. One that several layers share is there once. Tokens, positions, norms and biases are
    dense, and so are filters that are standardised before they are used: their zeros would be none.
    """
    first_seen, heads, found, known = (
        False,
        classifier_names(network),
        dict[str, Tensor](),
        set[int](),
    )
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or name in heads:
            continue
        plain = not isinstance(module, _STANDARDISED) and not is_parametrized(module)
        if first_seen and plain and id(module.weight) not in known:
            found[f"{name}.weight"] = module.weight.detach()
        known.add(id(module.weight))
        first_seen = True
    return found


def all_ones(weights: Weights) -> Masks:
    """Masks that keep every weight."""
    return {name: torch.ones_like(one, dtype=torch.bool) for name, one in weights.items()}


def num_kept(masks: Masks) -> int:
    """How many weights are kept."""
    return sum(int(mask.sum()) for mask in masks.values())


def keep_largest(scores: Weights, masks: Masks, number: int) -> Masks:
    """Of all kept weights together exactly `number`, those of the largest scores; of equal ones
    those that come first in the order of the masks. Raises ValueError where fewer are there."""
    if not 0 <= number <= num_kept(masks):
        raise ValueError(f"{number} of {num_kept(masks)} weights")
    ranked = torch.cat(
        [scores[name].masked_fill(~mask, -torch.inf).flatten() for name, mask in masks.items()]
    )
    chosen = torch.zeros_like(ranked, dtype=torch.bool)
    # A threshold would take all of several equal ones, or none.
    chosen[ranked.sort(stable=True, descending=True).indices[:number]] = True
    parts = chosen.split([mask.numel() for mask in masks.values()])
    return {name: part.view_as(mask) for (name, mask), part in zip(masks.items(), parts)}


def _globally(scores: Weights, masks: Masks, density: float) -> Masks:
    """All tensors ranked together."""
    total = sum(mask.numel() for mask in masks.values())
    return keep_largest(scores, masks, round(total * density))


def _layer_by_layer(scores: Weights, masks: Masks, density: float) -> Masks:
    """The same share of each tensor."""
    found: Masks = {}
    for name, mask in masks.items():
        found |= keep_largest(scores, {name: mask}, round(mask.numel() * density))
    return found


def _in_groups(scores: Weights, masks: Masks, density: float, *, size: int) -> Masks:
    """The same number of each group of `size` neighbours along the inputs of a layer."""
    number, found = round(size * density), dict[str, Tensor]()
    for name, mask in masks.items():
        # Inputs last: the layout in which hardware looks for groups.
        ranked = scores[name].masked_fill(~mask, -torch.inf).movedim(1, -1)
        if ranked.shape[-1] % size:
            raise ConfigError(
                f"scope N:{size}: {name} has {ranked.shape[-1]} inputs, which {size} does not "
                f"divide; use {' or '.join(SCOPES)}"
            )
        groups = ranked.reshape(-1, size)
        places = groups.sort(dim=1, stable=True, descending=True).indices[:, :number]
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, places, True)
        found[name] = kept.view(ranked.shape).movedim(-1, 1).contiguous()
    return found


Prune = Callable[[Weights, Masks, float], Masks]
"""(scores, masks, density) -> masks that keep this share of all weights, the largest scores among
those kept so far: exactly round(number * density) of each set of weights that is ranked together.
"""
PRUNE: dict[str, Prune] = {"global": _globally, "layerwise": _layer_by_layer}


def prune_in(scope: str) -> Prune:
    """Pruning in a scope by its name (deit.config.sparsity). Raises ConfigError."""
    groups = groups_of(scope)
    return PRUNE[scope] if groups is None else partial(_in_groups, size=groups[1])


def random_like(masks: Masks, scope: str, *, seed: int) -> Masks:
    """Random masks with as many kept weights in each tensor; in each group, where the scope has
    groups."""
    drawn, found = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for name, mask in masks.items():
        # float64: of float32 many would be equal.
        scores = {name: torch.rand(mask.shape, generator=drawn, dtype=torch.float64)}
        if groups_of(scope) is None:
            found |= keep_largest(scores, all_ones(scores), int(mask.sum()))
        else:
            found |= prune_in(scope)(scores, all_ones(scores), int(mask.sum()) / mask.numel())
    return found


def check_fits(masks: Masks, network: nn.Module, *, origin: str) -> None:
    """Raises CheckpointError where masks are none, or of another network."""
    parameters = dict(network.named_parameters())
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise CheckpointError(f"{origin}: {name} is {mask.dtype}, a mask is bool")
        if name not in parameters:
            raise CheckpointError(f"{origin}: masks {name}, which the network does not have")
        if mask.shape != parameters[name].shape:
            raise CheckpointError(
                f"{origin}: {name} is {tuple(mask.shape)} in the masks, "
                f"{tuple(parameters[name].shape)} in the network"
            )


def read_masks(path: Path) -> Masks:
    """The masks of a file, on the CPU. Raises CheckpointError."""
    return read_weights(path)


@torch.no_grad()
def apply(masks: Masks, network: nn.Module) -> None:
    """Make the weights zero that are not kept."""
    parameters = dict(network.named_parameters())
    for name, mask in masks.items():
        parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)


def is_masked(masks: Masks, weights: Weights) -> bool:
    """Whether every weight that is not kept is zero."""
    return not any(
        weights[name][~mask.to(weights[name].device)].any() for name, mask in masks.items()
    )


class PruningMasks:
    """Masks that hold while a network is trained.

    Where a gradient is zero from the first update on, so are AdamW's moments and momentum, decay
    leaves a zero at zero, and an average of zeros is zero: masking gradients is enough.
    """

    def __init__(self, masks: Masks, network: nn.Module) -> None:
        """masks: whole, on any device. network: on the device of its training, divided or not, its
        weights masked."""
        self.masks = masks
        parameters = dict(network.named_parameters())
        self._pairs = [
            (
                parameters[name],
                local_tensor(shard_like(mask.to(parameters[name].device), parameters[name])),
            )
            for name, mask in masks.items()
        ]

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Make the gradients zero of weights that are not kept; NaN and infinity stay what they
        are."""
        for parameter, mask in self._pairs:
            if parameter.grad is not None:
                local_tensor(parameter.grad).mul_(mask)


def mask_summary(masks: Masks) -> dict[str, Any]:
    """What there is to know of masks, ready for JSON: `kept` and `total` weights, `layers` with the
    same of each, its `dead_rows`: outputs without any weight; of a joint layer of queries, keys and
    values the three apart."""
    layers: dict[str, dict[str, int]] = {}
    for name, mask in masks.items():
        joint = name.endswith("attn.qkv.weight")
        for part, rows in zip("qkv" if joint else ("",), mask.chunk(3) if joint else (mask,)):
            layers[f"{name.removesuffix('.weight')}{'.' * bool(part)}{part}"] = {
                "kept": int(rows.sum()),
                "total": rows.numel(),
                "dead_rows": int((~rows.flatten(1).any(dim=1)).sum()),
            }
    total = sum(mask.numel() for mask in masks.values())
    return {"kept": num_kept(masks), "total": total, "layers": layers}
