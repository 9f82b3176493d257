"""Structured pruning of a ViT: score attention heads and MLP units, select, slice the weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from deit.config.sections.student import StudentConfig

Weights = dict[str, Tensor]
PerBlock = tuple[Tensor, ...]


class Scores(NamedTuple):
    """Importance of each unit of a ViT, one float32 tensor per block.

    heads: [attention heads]. hidden: [hidden units of the MLP].
    """

    heads: PerBlock
    hidden: PerBlock


class KeptUnits(NamedTuple):
    """The units to keep: for each block, the sorted indices of its heads and hidden units."""

    heads: tuple[tuple[int, ...], ...]
    hidden: tuple[tuple[int, ...], ...]


class TaylorScorer:
    """Score heads and hidden units by their effect on a loss, to first order.

    The score is the sum over images of the squared change of the loss if the unit were removed.
    With a gate of 1 on each unit, this change is the gate's gradient: the sum over tokens and
    channels of activation times gradient. Source: Molchanov et al. 2019, "Importance Estimation for
    Neural Network Pruning", equation 8, for gates (section 4.2); for heads: Michel et al. 2019,
    "Are Sixteen Heads Really Better than One?", equation 2.
    """

    def __init__(self, network: nn.Module) -> None:
        blocks = network.blocks
        self._num_heads = [block.attn.num_heads for block in blocks]
        self._inputs: dict[tuple[str, int], Tensor] = {}
        self.heads = [torch.zeros(num_heads) for num_heads in self._num_heads]
        self.hidden = [torch.zeros(block.mlp.fc1.out_features) for block in blocks]

    @contextmanager
    def on(self, network: nn.Module) -> Iterator[None]:
        """Record the inputs of the last layer of attention and MLP within this context."""

        def recorder(kind: str, index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                self._inputs[kind, index] = inputs[0]

            return hook

        hooks = [
            layer.register_forward_pre_hook(recorder(kind, index))
            for index, block in enumerate(network.blocks)
            for kind, layer in (("heads", block.attn.proj), ("hidden", block.mlp.fc2))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._inputs.clear()

    def add(self, loss: Tensor) -> None:
        """Add a batch whose forward pass was recorded. loss: a scalar, the sum over its images."""
        keys = list(self._inputs)
        gradients = torch.autograd.grad(loss, [self._inputs[key] for key in keys])
        for (kind, index), gradient in zip(keys, gradients):
            change = (self._inputs[kind, index].detach() * gradient).float()  # [images, tokens, .]
            if kind == "heads":
                heads = self._num_heads[index]
                change = reduce(change, "b n (h c) -> b h", "sum", h=heads)
                self.heads[index] += change.square().sum(dim=0).cpu()
            else:
                self.hidden[index] += change.sum(dim=1).square().sum(dim=0).cpu()

    def scores(self) -> Scores:
        """Return the scores of the batches added so far."""
        return Scores(tuple(self.heads), tuple(self.hidden))


def magnitudes(network: nn.Module) -> Scores:
    """Score units without images: the squared norm of their outgoing weights."""
    heads, hidden = [], []
    for block in network.blocks:
        attention, mlp = block.attn, block.mlp
        out = rearrange(attention.proj.weight.detach(), "d (h c) -> h (d c)", h=attention.num_heads)
        heads.append(out.float().square().sum(dim=1).cpu())
        hidden.append(mlp.fc2.weight.detach().float().square().sum(dim=0).cpu())
    return Scores(tuple(heads), tuple(hidden))


def select_top(scores: PerBlock, count: int, *, scope: str) -> tuple[tuple[int, ...], ...]:
    """Return the indices of the `count` largest scores of all blocks, at least one per block.

    Of equal scores the first win. scope: global ranks all blocks together; layerwise keeps the
    same share of each block, rounded down. Raises ValueError if there are fewer units than `count`
    or more blocks.

    >>> scores = (torch.tensor([9.0, 8.0, 7.0]), torch.tensor([1.0, 2.0]))
    >>> select_top(scores, 3, scope="global")
    ((0, 1), (1,))
    """
    total = sum(map(len, scores))
    if not len(scores) <= count <= total:
        raise ValueError(f"{count} of {total} in {len(scores)} blocks")
    if scope == "layerwise":
        counts = [max(len(block) * count // total, 1) for block in scores]  # at most `count` in all
        return tuple(_top(block, size) for block, size in zip(scores, counts))
    best = [int(block.argmax()) for block in scores]
    ranked = torch.cat([block.double() for block in scores])
    starts = [sum(map(len, scores[:index])) for index in range(len(scores))]
    ranked[[start + index for start, index in zip(starts, best)]] = torch.inf
    is_selected = torch.zeros(total, dtype=torch.bool)
    is_selected[ranked.sort(stable=True, descending=True).indices[:count]] = True
    blocks = is_selected.split(list(map(len, scores)))
    return tuple(tuple(block.nonzero().flatten().tolist()) for block in blocks)


def _top(scores: Tensor, count: int) -> tuple[int, ...]:
    order = scores.sort(stable=True, descending=True).indices[:count]
    return tuple(sorted(order.tolist()))


def slice_weights(weights: Weights, units: KeptUnits, *, head_width: int) -> Weights:
    """Return the weights of the units to keep. head_width: channels of an attention head.

    Slices rows of queries, keys and values, columns of the projection, rows of the MLP's first
    layer and columns of its second.
    """
    sliced = dict(weights)
    for index, (heads, hidden) in enumerate(zip(units.heads, units.hidden, strict=True)):
        block = f"blocks.{index}"
        channels = (torch.tensor(heads)[:, None] * head_width + torch.arange(head_width)).flatten()
        hidden_units = torch.tensor(hidden)
        for leaf in ("weight", "bias"):
            joint = weights[f"{block}.attn.qkv.{leaf}"]
            qkv = [part[channels] for part in joint.chunk(3)]
            sliced[f"{block}.attn.qkv.{leaf}"] = torch.cat(qkv)
            name = f"{block}.mlp.fc1.{leaf}"
            sliced[name] = weights[name][hidden_units]
        columns = {f"{block}.attn.proj": channels, f"{block}.mlp.fc2": hidden_units}
        for name, indices in columns.items():
            sliced[f"{name}.weight"] = weights[f"{name}.weight"][:, indices]
    return sliced


def pruned_config(student: StudentConfig, units: KeptUnits) -> StudentConfig:
    """Return the student section of the pruned network."""
    counts = {
        "heads_per_block": tuple(map(len, units.heads)),
        "mlp_hidden_per_block": tuple(map(len, units.hidden)),
    }
    return replace(student, **counts)


def macs_of(student: StudentConfig, heads: int, hidden: int) -> int:
    """Return the multiply-accumulates of one image in the blocks of a deit_* or vit_*.

    heads, hidden: attention heads and hidden units of all blocks together. Counts the projections
    and products of queries, keys and values, and both layers of the MLPs.
    """
    width, tokens = student.width, num_tokens(student)
    head_width = width // student.heads
    return tokens * (heads * head_width * (4 * width + 2 * tokens) + 2 * width * hidden)


def num_tokens(student: StudentConfig) -> int:
    """Return the number of tokens of an image in a deit_* or vit_*, prefix tokens included."""
    patches = (student.image_size // student.patch_size) ** 2
    return patches + 1 + student.num_distillation_tokens * student.has_distillation_token


def units_for_macs(student: StudentConfig, share: float) -> tuple[int, int]:
    """Return the largest numbers of heads and hidden units that meet a budget of arithmetic.

    share: of the multiply-accumulates of the blocks, in (0, 1]. The same share of heads and of
    hidden units is kept, up to rounding, at least one of each per block. Raises ValueError if even
    that exceeds the budget.
    """
    heads, hidden = sum(student.block_heads), sum(student.block_hidden)
    depth, budget = student.num_blocks, share * macs_of(student, heads, hidden)
    for num_hidden in range(hidden, depth - 1, -1):
        num_heads = max(round(heads * num_hidden / hidden), depth)
        if macs_of(student, num_heads, num_hidden) <= budget:
            return num_heads, num_hidden
    raise ValueError(f"{share:g} of the arithmetic")
