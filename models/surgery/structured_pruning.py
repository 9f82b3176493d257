"""Structured pruning of a ViT: what heads and hidden units are worth, which stay, and the cut."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from deit.config.student_section import StudentConfig

Weights = dict[str, Tensor]
PerBlock = tuple[Tensor, ...]


class Scores(NamedTuple):
    """What each part of a ViT is worth: float32, of each block one tensor, heads: [heads], hidden:
    [hidden units]."""

    heads: PerBlock
    hidden: PerBlock


class KeptUnits(NamedTuple):
    """Which parts stay: of each block the places of its heads and hidden units, in order."""

    heads: tuple[tuple[int, ...], ...]
    hidden: tuple[tuple[int, ...], ...]


class TaylorScorer:
    """What parts of a ViT are worth to a loss: the sum over images of the square of what it would
    change, to first order, if a head or hidden unit were taken away.

    With a gate of 1 on each part that change is the gate's gradient, the sum over tokens and
    channels of activation times gradient. Source: Molchanov et al. 2019, "Importance Estimation for
    Neural Network Pruning", equation 8, of gates (section 4.2); heads: Michel et al. 2019, "Are
    Sixteen Heads Really Better than One?", equation 2.
    """

    def __init__(self, network: nn.Module) -> None:
        blocks = network.blocks
        self._counts = [block.attn.num_heads for block in blocks]
        self._inputs: dict[tuple[str, int], Tensor] = {}
        self.heads = [torch.zeros(number) for number in self._counts]
        self.hidden = [torch.zeros(block.mlp.fc1.out_features) for block in blocks]

    @contextmanager
    def on(self, network: nn.Module) -> Iterator[None]:
        """Look at what goes into the last layer of attention and MLP while this lasts."""

        def seen(kind: str, place: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
                self._inputs[kind, place] = given[0]

            return hook

        hooks = [
            layer.register_forward_pre_hook(seen(kind, place))
            for place, block in enumerate(network.blocks)
            for kind, layer in (("heads", block.attn.proj), ("hidden", block.mlp.fc2))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._inputs.clear()

    def add(self, loss: Tensor) -> None:
        """Take up a batch, whose forward pass was seen. loss: the sum over its images."""
        keys = list(self._inputs)
        slopes = torch.autograd.grad(loss, [self._inputs[key] for key in keys])
        for (kind, place), slope in zip(keys, slopes):
            change = (self._inputs[kind, place].detach() * slope).float()  # [images, tokens, ...]
            if kind == "heads":
                heads = self._counts[place]
                change = reduce(change, "b n (h c) -> b h", "sum", h=heads)
                self.heads[place] += change.square().sum(dim=0).cpu()
            else:
                self.hidden[place] += change.sum(dim=1).square().sum(dim=0).cpu()

    def scores(self) -> Scores:
        """What was found so far."""
        return Scores(tuple(self.heads), tuple(self.hidden))


def magnitudes(network: nn.Module) -> Scores:
    """Without images: the squared norm of the weights by which a part speaks to what follows."""
    heads, hidden = [], []
    for block in network.blocks:
        attention, mlp = block.attn, block.mlp
        out = rearrange(attention.proj.weight.detach(), "d (h c) -> h (d c)", h=attention.num_heads)
        heads.append(out.float().square().sum(dim=1).cpu())
        hidden.append(mlp.fc2.weight.detach().float().square().sum(dim=0).cpu())
    return Scores(tuple(heads), tuple(hidden))


def select_top(scores: PerBlock, number: int, *, scope: str) -> tuple[tuple[int, ...], ...]:
    """The places of the `number` largest of all blocks together, of equal ones the first, and at
    least one in each block; scope layerwise: the same share of each block, rounded down.

    Raises ValueError where there are fewer, or fewer asked than blocks.
    """
    total = sum(map(len, scores))
    if not len(scores) <= number <= total:
        raise ValueError(f"{number} of {total} in {len(scores)} blocks")
    if scope == "layerwise":
        counts = [max(len(one) * number // total, 1) for one in scores]  # never more than asked
        chosen = [_top(one, count) for one, count in zip(scores, counts)]
        return tuple(chosen)
    best = [int(one.argmax()) for one in scores]
    ranked = torch.cat([one.double() for one in scores])
    starts = [sum(map(len, scores[:place])) for place in range(len(scores))]
    ranked[[start + one for start, one in zip(starts, best)]] = torch.inf
    kept = torch.zeros(total, dtype=torch.bool)
    kept[ranked.sort(stable=True, descending=True).indices[:number]] = True
    return tuple(
        tuple(part.nonzero().flatten().tolist()) for part in kept.split(list(map(len, scores)))
    )


def _top(scores: Tensor, number: int) -> tuple[int, ...]:
    order = scores.sort(stable=True, descending=True).indices[:number]
    return tuple(sorted(order.tolist()))


def slice_weights(weights: Weights, kept: KeptUnits, *, head_width: int) -> Weights:
    """The weights of the parts that stay: rows of queries, keys and values and columns of the
    projection, rows of the MLP's first layer and columns of its second."""
    found = dict(weights)
    for place, (heads, hidden) in enumerate(zip(kept.heads, kept.hidden, strict=True)):
        block = f"blocks.{place}"
        channels = (torch.tensor(heads)[:, None] * head_width + torch.arange(head_width)).flatten()
        units = torch.tensor(hidden)
        for leaf in ("weight", "bias"):
            joint = weights[f"{block}.attn.qkv.{leaf}"]
            three = [part[channels] for part in joint.chunk(3)]
            found[f"{block}.attn.qkv.{leaf}"] = torch.cat(three)
            name = f"{block}.mlp.fc1.{leaf}"
            found[name] = weights[name][units]
        for name, places in ((f"{block}.attn.proj", channels), (f"{block}.mlp.fc2", units)):
            found[f"{name}.weight"] = weights[f"{name}.weight"][:, places]
    return found


def pruned_config(student: StudentConfig, kept: KeptUnits) -> StudentConfig:
    """The student section of what stays."""
    counts = {
        "heads_per_block": tuple(map(len, kept.heads)),
        "mlp_hidden_per_block": tuple(map(len, kept.hidden)),
    }
    return replace(student, **counts)


def macs_of(student: StudentConfig, heads: int, hidden: int) -> int:
    """Multiply-accumulates of an image's way through the blocks of a ViT of ours with so many heads
    and hidden units in all, wherever they are: projections and products of queries, keys and
    values, and the two layers of the MLPs."""
    width, tokens = student.width, tokens_of(student)
    wide = width // student.heads
    return tokens * (heads * wide * (4 * width + 2 * tokens) + 2 * width * hidden)


def tokens_of(student: StudentConfig) -> int:
    """The tokens of an image in a ViT of ours, class and distillation tokens among them."""
    patches = (student.image_size // student.patch_size) ** 2
    return patches + 1 + student.num_distillation_tokens * student.has_distillation_token


def numbers_for_macs(student: StudentConfig, share: float) -> tuple[int, int]:
    """The most heads and hidden units, the same share of both as nearly as whole ones allow, with
    which the arithmetic of the blocks is at most `share` of what it is.

    Raises ValueError where one of each in every block is more than that.
    """
    heads, hidden = sum(student.block_heads), sum(student.block_hidden)
    depth, most = student.num_blocks, share * macs_of(student, heads, hidden)
    for units in range(hidden, depth - 1, -1):
        number = max(round(heads * units / hidden), depth)
        if macs_of(student, number, units) <= most:
            return number, units
    raise ValueError(f"{share:g} of the arithmetic")
