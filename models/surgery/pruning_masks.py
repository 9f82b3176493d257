"""Masks of pruned networks: which weights can be pruned, ranking, and training with masks."""

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
"""Bool tensors by the name of their weight and of its shape; True where a weight is kept."""

_STANDARDIZED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


def prunable(network: nn.Module) -> Weights:
    """Return the weights that can be pruned by name, in the order of the network.

    They are the weights of all linear layers and convolutions but the first one, which reads the
    pixels, and the heads. A weight that several layers share appears once. Tokens, position
    embedding, norms and biases are not pruned, nor are filters that are standardized before use,
    because their zeros would not stay zero.
    """
    heads = classifier_names(network)
    weights: Weights = {}
    seen: set[int] = set()
    is_first = True
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or name in heads:
            continue
        plain = not isinstance(module, _STANDARDIZED) and not is_parametrized(module)
        if not is_first and plain and id(module.weight) not in seen:
            weights[f"{name}.weight"] = module.weight.detach()
        seen.add(id(module.weight))
        is_first = False
    return weights


def all_ones(weights: Weights) -> Masks:
    """Return masks that keep every weight."""
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}


def num_remaining(masks: Masks) -> int:
    """Return the number of weights that the masks keep."""
    return sum(int(mask.sum()) for mask in masks.values())


def keep_largest(scores: Weights, masks: Masks, count: int) -> Masks:
    """Return masks that keep the `count` weights with the largest scores, ranked together.

    Only weights that `masks` keep are candidates. Of equal scores the first in the order of the
    masks win. Raises ValueError if there are fewer candidates.

    >>> scores = {"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([3.0, 2.0])}
    >>> masks = keep_largest(scores, all_ones(scores), 2)
    >>> masks["a"].tolist(), masks["b"].tolist()
    ([False, True], [True, False])
    """
    if not 0 <= count <= num_remaining(masks):
        raise ValueError(f"{count} of {num_remaining(masks)} weights")
    ranked = torch.cat(
        [scores[name].masked_fill(~mask, -torch.inf).flatten() for name, mask in masks.items()]
    )
    is_selected = torch.zeros_like(ranked, dtype=torch.bool)
    # A threshold would keep all of several equal scores, or none.
    is_selected[ranked.sort(stable=True, descending=True).indices[:count]] = True
    parts = is_selected.split([mask.numel() for mask in masks.values()])
    return {name: part.view_as(mask) for (name, mask), part in zip(masks.items(), parts)}


def _globally(scores: Weights, masks: Masks, density: float) -> Masks:
    """Rank all tensors together."""
    total = sum(mask.numel() for mask in masks.values())
    return keep_largest(scores, masks, round(total * density))


def _layer_by_layer(scores: Weights, masks: Masks, density: float) -> Masks:
    """Rank each tensor by itself: the same density in each."""
    pruned: Masks = {}
    for name, mask in masks.items():
        pruned |= keep_largest(scores, {name: mask}, round(mask.numel() * density))
    return pruned


def _in_groups(scores: Weights, masks: Masks, density: float, *, size: int) -> Masks:
    """Keep the same number in each group of `size` neighbors along a layer's inputs (N:M)."""
    group_count, pruned = round(size * density), dict[str, Tensor]()
    for name, mask in masks.items():
        # Inputs last: hardware expects the groups along this dimension.
        ranked = scores[name].masked_fill(~mask, -torch.inf).movedim(1, -1)
        if ranked.shape[-1] % size:
            raise ConfigError(
                f"scope N:{size}: {name} has {ranked.shape[-1]} inputs, not a multiple of {size}; "
                f"use scope {' or '.join(SCOPES)}"
            )
        groups = ranked.reshape(-1, size)
        largest = groups.sort(dim=1, stable=True, descending=True).indices[:, :group_count]
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, largest, True)
        pruned[name] = mask.view(ranked.shape).movedim(-1, 1).contiguous()
    return pruned


Prune = Callable[[Weights, Masks, float], Masks]
"""(scores, masks, density) -> masks that keep the largest scores among the weights kept so far.

density: the share of all weights to keep, in [0, 1]: exactly round(n * density) of each set of n
weights that are ranked together.
"""
PRUNE: dict[str, Prune] = {"global": _globally, "layerwise": _layer_by_layer}


def prune_in(scope: str) -> Prune:
    """Return the pruning function of a scope (deit.config.sparsity): global, layerwise or N:M.

    Raises ConfigError for an unknown scope.
    """
    groups = groups_of(scope)
    return PRUNE[scope] if groups is None else partial(_in_groups, size=groups[1])


def random_like(masks: Masks, scope: str, *, seed: int) -> Masks:
    """Return random masks that keep as many weights in each tensor as `masks`.

    For an N:M scope, N in each group.
    """
    generator, drawn = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for name, mask in masks.items():
        # float64: float32 would give many equal scores.
        scores = {name: torch.rand(mask.shape, generator=generator, dtype=torch.float64)}
        if groups_of(scope) is None:
            drawn |= keep_largest(scores, all_ones(scores), int(mask.sum()))
        else:
            drawn |= prune_in(scope)(scores, all_ones(scores), int(mask.sum()) / mask.numel())
    return drawn


def check_fits(masks: Masks, network: nn.Module, *, origin: str) -> None:
    """Raise CheckpointError if the masks are not bool or belong to another network."""
    parameters = dict(network.named_parameters())
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise CheckpointError(f"{origin}: {name} is {mask.dtype}, but a mask must be bool")
        if name not in parameters:
            raise CheckpointError(f"{origin}: masks {name}, which the network does not have")
        if mask.shape != parameters[name].shape:
            raise CheckpointError(
                f"{origin}: {name} is {tuple(mask.shape)} in the masks, "
                f"{tuple(parameters[name].shape)} in the network"
            )


def read_masks(path: str | Path) -> Masks:
    """Read the masks of a file, on the CPU. Raises CheckpointError if it cannot be read."""
    return read_weights(path)


@torch.no_grad()
def apply(masks: Masks, network: nn.Module) -> None:
    """Set all weights that are not kept to zero, in place."""
    parameters = dict(network.named_parameters())
    for name, mask in masks.items():
        parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)


def is_masked(masks: Masks, weights: Weights) -> bool:
    """Return whether all weights that are not kept are zero."""
    return not any(
        weights[name][~mask.to(weights[name].device)].any() for name, mask in masks.items()
    )


class PruningMasks:
    """Keep pruned weights at zero during training, by masking their gradients.

    This is sufficient: a gradient that is zero from the first step on leaves the optimizer's
    moments at zero, and weight decay and weight averaging leave a zero unchanged.
    """

    def __init__(self, masks: Masks, network: nn.Module) -> None:
        """Bind masks to a network whose weights are already masked.

        masks: unsharded, on any device. network: on its training device, sharded or not.

        >>> network = nn.Linear(2, 1, bias=False)
        >>> masks = {"weight": torch.tensor([[True, False]])}
        >>> apply(masks, network)
        >>> network(torch.ones(1, 2)).sum().backward()
        >>> PruningMasks(masks, network).mask_gradients()
        >>> network.weight.grad.tolist()
        [[1.0, 0.0]]
        """
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
        """Multiply gradients with the masks; NaN and infinite gradients stay non-finite."""
        for parameter, mask in self._pairs:
            if parameter.grad is not None:
                local_tensor(parameter.grad).mul_(mask)


def mask_summary(masks: Masks) -> dict[str, Any]:
    """Return the counts of masks, ready for JSON.

    `kept` and `total` weights; `layers`: both for each layer, and `dead_rows`, the outputs without
    any weight. The queries, keys and values of a joint layer are counted separately.
    """
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
    return {"kept": num_remaining(masks), "total": total, "layers": layers}
