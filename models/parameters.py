"""Group a network's parameters by name: classifier heads, layer depth, trainable parts."""

from collections.abc import Iterable

from timm.models import group_parameters
from torch import nn

from deit.config.field_types import TrainableSet
from deit.core.errors import ConfigError
from deit.models.surgery.convpass import adapters_of


def classifier_names(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the classifier layers, the class head first.

    They are linear layers or, as in BiT's networks, 1x1 convolutions. timm's models list them in
    pretrained_cfg; our networks call theirs `head`.
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


def trainable_parameters(network: nn.Module, part: TrainableSet) -> set[str]:
    """Return the names of the parameters to train (optim.trainable).

    part: all; heads: the classifier layers; attention: heads and all attention layers (Touvron et
    al. 2022, arXiv 2203.09795, section 4); adapters: heads and all adapters. Raises ConfigError if
    the network has no such part.

    >>> from deit.config.sections.student import StudentConfig
    >>> from deit.models.registry import create_network
    >>> network = create_network(StudentConfig("deit_micro", image_size=8, depth=1), 10)
    >>> sorted(trainable_parameters(network, "heads"))
    ['head.bias', 'head.weight', 'head_dist.bias', 'head_dist.weight']
    """
    names = [name for name, _ in network.named_parameters()]
    if part == "all":
        return set(names)
    heads = _prefixes(classifier_names(network))
    if not heads:
        raise ConfigError(
            f"optim.trainable = {part!r}: the classifier layer of this network is not known; use "
            "all"
        )
    names_of_part = set()
    if part == "attention":
        names_of_part = {name for name in names if ".attn." in name}
    elif part == "adapters":
        names_of_part = {name for name in names if name.startswith(_prefixes(adapters_of(network)))}
    if part != "heads" and not names_of_part:
        raise ConfigError(
            f"optim.trainable = {part!r}: this network has no such layers; use all or heads"
        )
    return names_of_part | {name for name in names if name.startswith(heads)}


def _prefixes(modules: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{name}." for name in modules)


def freeze_except(network: nn.Module, part: TrainableSet) -> None:
    """Set requires_grad of the parameters in `trainable_parameters`, and clear it of all others.

    For part all, nothing is changed. Raises ConfigError if the network has no such part.
    """
    if part == "all":
        return  # parameters that the network itself freezes stay frozen
    names = trainable_parameters(network, part)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in names)


def layer_depths(network: nn.Module) -> dict[str, int]:
    """Return the layer index of each parameter, counted from the input.

    0: tokens, patch embedding and position embedding; then one index per block, the last norm
    with the last block, then the heads (timm's group_matcher). Raises ConfigError if the network
    does not define its layers.
    """
    matcher = getattr(network, "group_matcher", None)
    if matcher is None:
        raise ConfigError(
            f"optim.layer_decay: {type(network).__name__} does not define its layers; use 1"
        )
    return dict(group_parameters(network, matcher(coarse=False), reverse=True))


def count_parameters(network: nn.Module, *, trainable: bool = False) -> int:
    """Return the number of parameters. trainable: count those that require a gradient only.

    >>> count_parameters(nn.Linear(3, 2))  # 3 * 2 weights and 2 biases
    8
    """
    return sum(
        parameter.numel()
        for parameter in network.parameters()
        if parameter.requires_grad or not trainable
    )
