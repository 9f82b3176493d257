"""Fit the weights of one network to another: other resolutions, classes, heads and blocks."""

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deit.config.fields import PosEmbedKernel
from deit.config.student_section import InitConfig, StudentConfig
from deit.core.errors import CheckpointError, did_you_mean
from deit.models.parameters import classifier_names
from deit.models.pos_embed import grid_side, resize_positions
from deit.models.surgery.convpass import adapters_of
from deit.models.surgery.fake_quant import ranges_in
from deit.models.surgery.pruning_masks import Masks

Weights = dict[str, Tensor]


class LoadedWeights(NamedTuple):
    """Weights as they were found, with what is known of them.

    student: their network, as a student section; None where it is not one of ours.
    class_names, mean, std: None where the origin does not say.
    """

    weights: Weights
    description: str
    student: StudentConfig | None
    class_names: tuple[str, ...] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    heads_known: bool = True
    """Whether the origin says how many attention heads there are: they leave no trace in shapes."""
    masks: Masks | None = None
    """Those of a pruned network of ours."""


class AdaptedWeights(NamedTuple):
    """Weights that fit a network by name and shape, and what was done to them, for a person."""

    weights: Weights
    notes: tuple[str, ...]


def adapt_weights(
    found: LoadedWeights, network: nn.Module, class_names: tuple[str, ...], start: InitConfig
) -> AdaptedWeights:
    """Weights fitted to a network with random weights: positions resized, distillation tokens put
    in or left out, class rows matched by name, other heads left random where that was asked for;
    adapters as they begin where the weights have none; ranges of rounded layers likewise.

    What still differs in name or shape is for `load_weights` to refuse.
    Raises CheckpointError where the classes do not match.
    """
    own = network.state_dict()
    weights = {
        name: value.to(own[name].dtype) if name in own else value
        for name, value in found.weights.items()
    }
    notes: list[str] = []
    if "pos_embed" in weights and "pos_embed" in own:
        weights = _fit_tokens(weights, own, notes)
        weights = _fit_positions(weights, network, start.pos_embed_resize, notes)
    weights = _fit_heads(weights, network, found.class_names, class_names, start, notes)
    weights = _fit_shared(weights, own, notes)
    weights = _fit_adapters(weights, network, notes)
    weights = _fit_ranges(weights, own, notes)
    return AdaptedWeights(weights, tuple(notes))


def _fit_shared(weights: Weights, own: Weights, notes: list[str]) -> Weights:
    """For blocks that share attention and MLP, from weights of blocks that do not: those of the
    first of each group, and heads that are not mixed so far."""
    mixing = [name for name in own if name.endswith((".attn.before", ".attn.after"))]
    if not mixing or any(name in weights for name in mixing):
        return weights
    blocks = {name.rsplit(".attn.", 1)[0] for name in mixing}
    gone = [
        name
        for name in weights
        if name not in own and name.split(".attn.")[0].split(".mlp.")[0] in blocks
    ]
    kept = {name: value for name, value in weights.items() if name not in gone}
    left = len({name.split(".attn.")[0].split(".mlp.")[0] for name in gone})
    notes.append(
        f"attention and MLP of {left} of {len(blocks)} blocks left out: they share those of the "
        "first of their group; heads are not mixed so far"
    )
    return {**kept, **{name: own[name] for name in mixing}}


def _fit_tokens(weights: Weights, own: Weights, notes: list[str]) -> Weights:
    """As many distillation tokens as the network has: the last are left out, or the class token is
    copied, with its row of the position embedding and its head."""
    before, after = tokens_of(weights), tokens_of(own)
    if before == after:
        return weights
    weights = dict(weights)
    positions = weights.pop("pos_embed")
    heads = {kind: _pop_distillation_heads(weights, kind) for kind in ("weight", "bias")}
    tokens = weights.pop("dist_token", weights["cls_token"][:, :0])
    kept = min(before, after)
    copies = [1] * (after - kept)
    rows = positions[:, 1 : 1 + kept], positions[:, [0] * len(copies)]
    weights["pos_embed"] = torch.cat([positions[:, :1], *rows, positions[:, 1 + before :]], dim=1)
    if after:
        cls = weights["cls_token"]
        weights["dist_token"] = torch.cat([tokens[:, :kept], *(cls for _ in copies)], dim=1)
    for kind, values in heads.items():
        if f"head.{kind}" in weights:
            values = values[:kept] + [weights[f"head.{kind}"]] * len(copies)
        for place, value in enumerate(values):
            name = f"head_dist.{kind}" if after == 1 else f"head_dist.{place}.{kind}"
            weights[name] = value
    if after > before:
        said = "a copy of the class token, with its position and head"
        notes.append(f"{after - before} distillation token(s) put in: {said}")
    else:
        notes.append(f"{before - after} distillation token(s) left out, with position and head")
    return weights


def _fit_adapters(weights: Weights, network: nn.Module, notes: list[str]) -> Weights:
    """All adapters as they begin, where the weights were trained without any."""
    own, adapters = network.state_dict(), tuple(f"{name}." for name in adapters_of(network))
    names = [name for name in own if name.startswith(adapters)]
    if not names or any(name in weights for name in names):
        return weights
    notes.append(f"{len(adapters)} new adapters, which add nothing until they are trained")
    return {**weights, **{name: own[name] for name in names}}


def _fit_ranges(weights: Weights, own: Weights, notes: list[str]) -> Weights:
    """The ranges of the layers that round: those of layers that did not so far begin as unknown,
    those of layers that do no more are left out."""
    before, after = ranges_in(weights), ranges_in(own)
    if new := after - before:
        notes.append(f"{len(new)} layers round from now on: their ranges begin with what they hear")
    if before and not after:
        notes.append(f"{len(before)} layers compute in float again: their ranges are left out")
    kept = {name: value for name, value in weights.items() if name not in before - after}
    return {**kept, **{name: own[name] for name in new}}


def _pop_distillation_heads(weights: Weights, kind: str) -> list[Tensor]:
    """Takes the distillation heads' weights or biases out, in the order of their tokens."""
    names = [name for name in weights if re.fullmatch(rf"head_dist(\.\d+)?\.{kind}", name)]
    return [weights.pop(name) for name in sorted(names, key=lambda n: (len(n), n))]


def _fit_positions(
    weights: Weights, network: nn.Module, kernel: PosEmbedKernel, notes: list[str]
) -> Weights:
    theirs, ours = weights["pos_embed"], network.state_dict()["pos_embed"]
    if theirs.shape[-1] != ours.shape[-1]:
        return weights  # another width: `load_weights` will list it with the others
    # In some networks of timm's the tokens before the patches have no position.
    bare = getattr(network, "no_embed_class", False)
    prefix = 0 if bare else getattr(network, "num_prefix_tokens", 0)
    side = grid_side(ours.shape[1], prefix)
    resized = resize_positions(theirs, prefix=prefix, side=side, kernel=kernel)
    before, after = resized.sides
    if before != after:
        norms = f"mean norm {resized.norms[0]:.3f} -> {resized.norms[1]:.3f}"
        notes.append(
            f"position embedding {before} x {before} -> {after} x {after} patches ({kernel}'s "
            f"bicubic kernel; {norms}), the rows of its {prefix} token(s) as they were"
        )
    return {**weights, "pos_embed": resized.positions}


def _fit_heads(
    weights: Weights,
    network: nn.Module,
    known: tuple[str, ...] | None,
    wanted: tuple[str, ...],
    start: InitConfig,
    notes: list[str],
) -> Weights:
    """The rows of the heads for the data's classes, or none of them."""
    own, where = network.state_dict(), f"init.weights {start.weights}:"
    names = [f"{head}.{kind}" for head in classifier_names(network) for kind in ("weight", "bias")]
    names = [name for name in names if name in own]
    if start.head != "keep":
        zero = start.head == "zero"
        said = "the start had" if known is None else f"the start knew {len(known)}, and had"
        had = sum(name in weights for name in names if name.endswith("weight"))
        kind = "zeros" if zero else "random"
        notes.append(f"{len(wanted)} classes: new heads, {kind} ({said} {had} head(s))")
        new = {name: torch.zeros_like(own[name]) if zero else own[name] for name in names}
        return {**weights, **new}
    present = [name for name in names if name in weights]
    if not present:
        raise CheckpointError(f"{where} has no head; --init.head new begins with random ones")
    if known is not None and any(len(weights[name]) != len(known) for name in present):
        raise CheckpointError(f"{where} names {len(known)} classes, its heads have others")
    if known is None:
        counts = {len(weights[name]) for name in present} - {len(wanted)}
        if counts:
            raise CheckpointError(
                f"{where} its heads answer with {counts.pop()} classes, the data has "
                f"{len(wanted)}, and no names say which is which; --init.head new begins with "
                "random heads"
            )
        notes.append(f"{len(wanted)} classes, taken to be in the data's order: it names none")
        return weights
    if known == wanted:
        return weights
    rows = {name: row for row, name in enumerate(known)}
    missing = [name for name in wanted if name not in rows]
    if missing:
        raise CheckpointError(
            f"{where} knows {len(known)} classes, but of the data's {len(wanted)} it lacks "
            f"{len(missing)}: {', '.join(map(repr, missing[:5]))}{did_you_mean(missing[0], rows)}; "
            "--init.head new begins with random heads"
        )
    picked = torch.tensor([rows[name] for name in wanted])
    notes.append(f"{len(wanted)} classes: their rows of its {len(known)}, by name")
    return {**weights, **{name: weights[name][picked] for name in present}}


def tokens_of(weights: Weights) -> int:
    """Distillation tokens among these weights."""
    return weights["dist_token"].shape[1] if "dist_token" in weights else 0
