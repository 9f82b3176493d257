"""Parts of a network by the names of its parameters: its heads, its depth, what is held still."""

from collections.abc import Iterable

from timm.models import group_parameters
from torch import nn

from deit.config.fields import TrainableSet
from deit.core.errors import ConfigError
from deit.models.surgery.convpass import adapters_of


def classifier_names(network: nn.Module) -> tuple[str, ...]:
    """The names of the layers that answer with classes, the class head first: linear ones, or as
    in BiT's networks a convolution of one pixel.

    timm's models name theirs; ours call it `head`.
    """
    known = getattr(network, "pretrained_cfg", None) or {}
    roots = known.get("classifier") or "head"
    roots = (roots,) if isinstance(roots, str) else tuple(roots)
    return tuple(
        name
        for root in roots
        for name, module in network.named_modules()
        if (isinstance(module, nn.Linear) and (name == root or name.startswith(f"{root}.")))
        or (isinstance(module, nn.Conv2d) and name == root)
    )


def trainable_parameters(network: nn.Module, trained: TrainableSet) -> set[str]:
    """The names of the parameters that are trained.

    heads: the class layers. attention: these and every attention (Touvron et al. 2022, "Three
    things everyone should know about vision transformers", section 4). adapters: these and every
    adapter. Raises ConfigError where a network has no such part.
    """
    names = [name for name, _ in network.named_parameters()]
    if trained == "all":
        return set(names)
    heads = _prefixes(classifier_names(network))
    if not heads:
        raise ConfigError(
            f"optim.trainable = {trained!r}: this network's head is not known by name"
        )
    found = set()
    if trained == "attention":
        found = {name for name in names if ".attn." in name}
    elif trained == "adapters":
        found = {name for name in names if name.startswith(_prefixes(adapters_of(network)))}
    if trained != "heads" and not found:
        raise ConfigError(f"optim.trainable = {trained!r}: this network has none; use all or heads")
    return found | {name for name in names if name.startswith(heads)}


def _prefixes(modules: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in modules)


def freeze_except(network: nn.Module, trained: TrainableSet) -> None:
    """Train a part of the network only, as `trainable_parameters` says; the other parameters take
    no gradient. Raises ConfigError where a network has no such part."""
    if trained == "all":
        return  # and what a network itself holds still stays so
    names = trainable_parameters(network, trained)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in names)


def layer_depths(network: nn.Module) -> dict[str, int]:
    """For each parameter the number of its layer, 0 the nearest to the image: tokens, patch and
    position embedding first, then block by block, the last norm with the last block, and heads.

    The layers are timm's. Raises ConfigError for a network that does not say what they are.
    """
    matcher = getattr(network, "group_matcher", None)
    if matcher is None:
        raise ConfigError(
            f"optim.layer_decay: {type(network).__name__} does not tell its layers apart; use 1"
        )
    return dict(group_parameters(network, matcher(coarse=False), reverse=True))


def count_parameters(network: nn.Module, *, trainable: bool = False) -> int:
    """Return how many parameters a network has. trainable: only those that require a gradient."""
    return sum(
        parameter.numel()
        for parameter in network.parameters()
        if parameter.requires_grad or not trainable
    )
