"""Adapt the weights of one network to another: resolution, classes, heads, adapters, sharing."""

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deit.config.field_types import PosEmbedKernel
from deit.config.sections.init import InitConfig
from deit.config.sections.student import StudentConfig
from deit.core.errors import CheckpointError, did_you_mean
from deit.models.parameters import classifier_names
from deit.models.pos_embed import grid_side, resize_positions
from deit.models.surgery.convpass import adapters_of
from deit.models.surgery.fake_quant import range_names
from deit.models.surgery.pruning_masks import Masks

Weights = dict[str, Tensor]


class LoadedWeights(NamedTuple):
    """Weights and what their source states about them."""

    weights: Weights
    description: str
    """For logs: name of the network and source."""
    student: StudentConfig | None
    """The network as a student section; None if it is not a plain deit_* or vit_*."""
    class_names: tuple[str, ...] | None
    """In the order of the logits; None if the source does not state them."""
    mean: tuple[float, ...] | None
    """Normalization per channel, for images in [0, 1]; None if the source does not state it."""
    std: tuple[float, ...] | None
    heads_known: bool = True
    """Whether the source states the number of attention heads; shapes do not show it."""
    masks: Masks | None = None
    """The masks of a pruned student."""


class AdaptedWeights(NamedTuple):
    """Weights adapted to a network, with notes on each change, one line of text each."""

    weights: Weights
    notes: tuple[str, ...]


def adapt_weights(
    loaded: LoadedWeights, network: nn.Module, class_names: tuple[str, ...], init: InitConfig
) -> AdaptedWeights:
    """Adapt weights to a newly initialized network.

    Distillation tokens are added or removed, the position embedding is resized, and class rows are
    matched by name or the heads replaced (init.head). Adapters and activation ranges that the
    weights lack get their initial values. Names and shapes that still differ are reported by
    `load_weights`. Raises CheckpointError if the classes do not match.
    """
    target = network.state_dict()
    weights = {
        name: value.to(target[name].dtype) if name in target else value
        for name, value in loaded.weights.items()
    }
    notes: list[str] = []
    if "pos_embed" in weights and "pos_embed" in target:
        weights = _adapt_tokens(weights, target, notes)
        weights = _adapt_positions(weights, network, init.pos_embed_resize, notes)
    weights = _adapt_heads(weights, network, loaded.class_names, class_names, init, notes)
    weights = _adapt_shared(weights, target, notes)
    weights = _adapt_adapters(weights, network, notes)
    weights = _adapt_ranges(weights, target, notes)
    return AdaptedWeights(weights, tuple(notes))


def _adapt_shared(weights: Weights, target: Weights, notes: list[str]) -> Weights:
    """For blocks that share weights: keep those of the first block of each group.

    Head mixing starts as the identity.
    """
    mixing = [name for name in target if name.endswith((".attn.before", ".attn.after"))]
    if not mixing or any(name in weights for name in mixing):
        return weights
    blocks = {name.rsplit(".attn.", 1)[0] for name in mixing}
    removed = [
        name
        for name in weights
        if name not in target and name.split(".attn.")[0].split(".mlp.")[0] in blocks
    ]
    remaining = {name: value for name, value in weights.items() if name not in removed}
    num_blocks = len({name.split(".attn.")[0].split(".mlp.")[0] for name in removed})
    notes.append(
        f"attention and MLP of {num_blocks} of {len(blocks)} blocks dropped: they now share those "
        "of the first block of their group; head mixing starts as the identity"
    )
    return {**remaining, **{name: target[name] for name in mixing}}


def _adapt_tokens(weights: Weights, target: Weights, notes: list[str]) -> Weights:
    """Match the number of distillation tokens: drop the last, or add copies of the class token.

    Each token comes with its row of the position embedding and its head.
    """
    before, after = num_distillation_tokens(weights), num_distillation_tokens(target)
    if before == after:
        return weights
    weights = dict(weights)
    positions = weights.pop("pos_embed")
    heads = {
        kind: _pop_distillation_heads(weights, kind, num_tokens=before)
        for kind in ("weight", "bias")
    }
    tokens = weights.pop("dist_token", weights["cls_token"][:, :0])
    num_common = min(before, after)
    copies = [1] * (after - num_common)
    rows = positions[:, 1 : 1 + num_common], positions[:, [0] * len(copies)]
    weights["pos_embed"] = torch.cat([positions[:, :1], *rows, positions[:, 1 + before :]], dim=1)
    if after:
        cls = weights["cls_token"]
        weights["dist_token"] = torch.cat([tokens[:, :num_common], *(cls for _ in copies)], dim=1)
    for kind, values in heads.items():
        if f"head.{kind}" in weights:
            values = values[:num_common] + [weights[f"head.{kind}"]] * len(copies)
        for index, value in enumerate(values):
            name = f"head_dist.{kind}" if after == 1 else f"head_dist.{index}.{kind}"
            weights[name] = value
    if after > before:
        notes.append(
            f"{after - before} distillation token(s) added: copies of the class token, with its "
            "position and head"
        )
    else:
        notes.append(f"{before - after} distillation token(s) dropped, with position and head")
    return weights


def _adapt_adapters(weights: Weights, network: nn.Module, notes: list[str]) -> Weights:
    """Add the initial adapters if the weights have none."""
    target, adapters = network.state_dict(), tuple(f"{name}." for name in adapters_of(network))
    names = [name for name in target if name.startswith(adapters)]
    if not names or any(name in weights for name in names):
        return weights
    notes.append(f"{len(adapters)} new adapters, whose output is zero until they are trained")
    return {**weights, **{name: target[name] for name in names}}


def _adapt_ranges(weights: Weights, target: Weights, notes: list[str]) -> Weights:
    """Add unknown ranges for newly fake-quantized layers; drop those of layers now in float."""
    before, after = range_names(weights), range_names(target)
    if new := after - before:
        notes.append(
            f"{len(new)} layers newly quantized: their first batch sets their activation ranges"
        )
    if before and not after:
        notes.append(f"{len(before)} layers compute in float again: activation ranges dropped")
    remaining = {name: value for name, value in weights.items() if name not in before - after}
    return {**remaining, **{name: target[name] for name in new}}


def _pop_distillation_heads(weights: Weights, kind: str, *, num_tokens: int) -> list[Tensor]:
    """Remove and return the weights or biases of the distillation heads, in token order.

    Raises CheckpointError if there are more heads than tokens, which would be lost.
    """
    names = [name for name in weights if re.fullmatch(rf"head_dist(\.\d+)?\.{kind}", name)]
    if len(names) > num_tokens:
        raise CheckpointError(
            f"init.weights: {num_tokens} distillation token(s), but {len(names)} distillation "
            f"heads: {', '.join(names)}; remove the heads without a token"
        )
    return [weights.pop(name) for name in sorted(names, key=lambda n: (len(n), n))]


def _adapt_positions(
    weights: Weights, network: nn.Module, kernel: PosEmbedKernel, notes: list[str]
) -> Weights:
    positions, target = weights["pos_embed"], network.state_dict()["pos_embed"]
    if positions.shape[-1] != target.shape[-1]:
        return weights  # another width: `load_weights` reports it with the other differences
    # In some timm networks the prefix tokens have no position.
    no_prefix = getattr(network, "no_embed_class", False)
    prefix = 0 if no_prefix else getattr(network, "num_prefix_tokens", 0)
    side = grid_side(target.shape[1], prefix)
    resized = resize_positions(positions, prefix=prefix, side=side, kernel=kernel)
    before, after = resized.sides
    if before != after:
        norms = f"mean norm {resized.norms[0]:.3f} -> {resized.norms[1]:.3f}"
        notes.append(
            f"position embedding {before} x {before} -> {after} x {after} patches ({kernel}'s "
            f"bicubic kernel; {norms}); the rows of its {prefix} token(s) unchanged"
        )
    return {**weights, "pos_embed": resized.positions}


def _adapt_heads(
    weights: Weights,
    network: nn.Module,
    source_names: tuple[str, ...] | None,
    class_names: tuple[str, ...],
    init: InitConfig,
    notes: list[str],
) -> Weights:
    """Select the head rows of the data's classes, or replace the heads (init.head)."""
    target, origin = network.state_dict(), f"init.weights {init.weights}:"
    names = [f"{head}.{kind}" for head in classifier_names(network) for kind in ("weight", "bias")]
    names = [name for name in names if name in target]
    if init.head != "keep":
        zero = init.head == "zero"
        num_heads = sum(name in weights for name in names if name.endswith("weight"))
        source = f"init.weights: {num_heads} head(s)"
        if source_names is not None:
            source += f" for {len(source_names)} classes"
        kind = "zeros" if zero else "random"
        notes.append(f"{len(class_names)} classes: new heads, {kind} ({source})")
        new = {name: torch.zeros_like(target[name]) if zero else target[name] for name in names}
        return {**weights, **new}
    present = [name for name in names if name in weights]
    if not present:
        raise CheckpointError(f"{origin} has no head; use --init.head new for random heads")
    if source_names is not None:
        counts = {len(weights[name]) for name in present} - {len(source_names)}
        if counts:
            raise CheckpointError(
                f"{origin} has {len(source_names)} class names, but heads for {counts.pop()} "
                "classes"
            )
    if source_names is None:
        counts = {len(weights[name]) for name in present} - {len(class_names)}
        if counts:
            raise CheckpointError(
                f"{origin} its heads have {counts.pop()} classes, the data {len(class_names)}, and "
                "it has no class names to match them by; use --init.head new for random heads"
            )
        notes.append(
            f"{len(class_names)} classes, assumed to be in the order of the data: no class names"
        )
        return weights
    if source_names == class_names:
        return weights
    rows = {name: row for row, name in enumerate(source_names)}
    missing = [name for name in class_names if name not in rows]
    if missing:
        raise CheckpointError(
            f"{origin} has {len(source_names)} classes, but lacks {len(missing)} of the data's "
            f"{len(class_names)}: {', '.join(map(repr, missing[:5]))}"
            f"{did_you_mean(missing[0], rows)}; use --init.head new for random heads"
        )
    indices = torch.tensor([rows[name] for name in class_names])
    notes.append(
        f"{len(class_names)} classes, selected by name from the {len(source_names)} of init.weights"
    )
    return {**weights, **{name: weights[name][indices] for name in present}}


def num_distillation_tokens(weights: Weights) -> int:
    """Return the number of distillation tokens among a ViT's weights."""
    return weights["dist_token"].shape[1] if "dist_token" in weights else 0
