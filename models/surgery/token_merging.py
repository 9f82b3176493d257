"""Token merging: a ViT that averages its most similar patch tokens between attention and MLP."""

from collections.abc import Sequence
from copy import copy

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import normalize

from deit.core.errors import ConfigError
from deit.models.surgery.convpass import adapters_of
from deit.models.surgery.weight_sharing import MixedAttention


def with_merging(network: VisionTransformer, counts: int | Sequence[int]) -> VisionTransformer:
    """Return a copy of a ViT that merges tokens, for evaluation only.

    The copy shares all layers, weights and names with `network`, which is not changed.

    counts: tokens to merge in each block; one for all blocks, or one per block. If fewer pairs are
    left, all of them merge. With 0 in all blocks the outputs are bit-identical to those of
    `network`. Class, distillation and register tokens never merge.

    Raises ConfigError as `check_merging`; so does its forward pass in training mode.
    Source: Bolya et al. 2023, "Token Merging: Your ViT But Faster", section 3.
    """
    check_merging(network, counts)
    merging = copy(network)
    merging._modules = dict(network._modules)
    merging.grad_checkpointing = False  # no training, and these blocks pass token sizes along
    prefix = network.num_prefix_tokens
    blocks = zip(network.blocks, _per_block(network, counts))
    merging.blocks = _Blocks(*(_Block(block, count, prefix) for block, count in blocks))
    merging.blocks.training = network.training
    return merging


def check_merging(network: nn.Module, counts: int | Sequence[int]) -> None:
    """Raise ConfigError if the network cannot merge tokens, or not that many."""
    if adapters_of(network):
        raise ConfigError(
            "merge_tokens: student.adapters convolve the grid of all patches, which merged "
            "tokens no longer form; use a run without adapters, such as the one they were trained "
            "on"
        )
    if any(isinstance(module, MixedAttention) for module in network.modules()):
        raise ConfigError(
            "merge_tokens: attention that mixes its heads (student.shared_block_size) does not "
            "support merged tokens; use a run with student.shared_block_size 1"
        )
    if not isinstance(network, VisionTransformer) or not all(
        type(block) is Block and type(block.attn) is Attention for block in network.blocks
    ):
        raise ConfigError(
            f"merge_tokens: {type(network).__name__} has no tokens to merge; use a deit_* or "
            "vit_*, or a ViT of timm with plain attention and blocks"
        )
    if network.global_pool != "token":
        raise ConfigError(
            f"merge_tokens: this network classifies by a pool of all patches "
            f"({network.global_pool}), which merging would weight differently; use a network that "
            "classifies by its class token"
        )
    per_block = _per_block(network, counts)
    if len(per_block) != len(network.blocks):
        raise ConfigError(
            f"merge_tokens = {','.join(map(str, per_block))}: should be one number, or "
            f"{len(network.blocks)}, one per block"
        )
    patches = network.patch_embed.num_patches
    for count in per_block:
        if not 0 <= count <= patches // 2:
            raise ConfigError(
                f"merge_tokens = {count}: should be from 0 to {patches // 2} tokens per block, "
                f"half of the {patches} patches of an image"
            )


def _per_block(network: VisionTransformer, counts: int | Sequence[int]) -> tuple[int, ...]:
    return (counts,) * len(network.blocks) if isinstance(counts, int) else tuple(counts)


def num_tokens_per_block(network: VisionTransformer) -> list[int]:
    """Return the number of tokens after each block, for a network with or without merging."""
    prefix = network.num_prefix_tokens
    tokens = network.patch_embed.num_patches + prefix
    per_block = []
    for block in network.blocks:
        tokens -= _num_pairs(getattr(block, "count", 0), tokens, prefix)
        per_block.append(tokens)
    return per_block


def _num_pairs(count: int, tokens: int, prefix: int) -> int:
    """Return the number of pairs to merge: at most half of the patches, one of each pair."""
    return min(count, (tokens - prefix) // 2)


class _Blocks(nn.Sequential):
    """The blocks in sequence, which pass along the tokens and their sizes in patches."""

    def forward(self, tokens: Tensor) -> Tensor:
        if self.training:
            raise ConfigError("tokens can be merged in evaluation mode only; call eval() first")
        sizes = None
        for block in self:
            tokens, sizes = block(tokens, sizes)
        return tokens


class _Block(nn.Module):
    """timm's pre-norm block with token merging between attention and MLP; shares its layers."""

    def __init__(self, block: Block, count: int, prefix: int) -> None:
        super().__init__()
        self.count, self.prefix = count, prefix
        for name, layer in block.named_children():
            self.add_module(name, layer)
        self.training = block.training

    def forward(self, tokens: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """tokens: float [batch, tokens, width]. sizes: float [batch, tokens]; None: all 1."""
        attended, keys = attend(self.attn, self.norm1(tokens), sizes)
        tokens = tokens + self.drop_path1(self.ls1(attended))
        count = _num_pairs(self.count, tokens.shape[1], self.prefix)
        if count:
            tokens, sizes = merge(tokens, sizes, keys, count=count, prefix=self.prefix)
        return tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens)))), sizes


def attend(attention: Attention, tokens: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Apply proportional attention: each token counts as often as the patches it was merged from.

    The logarithm of a token's size is added to the logits of its key (equation 1).
    tokens: float [batch, tokens, width]. sizes: float [batch, tokens]; None: all 1. Return tokens
    of the same shape, and the keys [batch, heads, tokens, channels].
    """
    keys: list[Tensor] = []
    # A hook, because recomputing the keys would cost a third of the projection.
    handle = attention.k_norm.register_forward_hook(lambda *call: keys.append(call[-1]))
    log_sizes = None if sizes is None else sizes.log().to(tokens.dtype)[:, None, None]
    try:
        return attention(tokens, attn_mask=log_sizes), keys[0]
    finally:
        handle.remove()


def merge(
    tokens: Tensor, sizes: Tensor | None, keys: Tensor, *, count: int, prefix: int
) -> tuple[Tensor, Tensor]:
    """Merge the `count` most similar pairs of an image's tokens into size-weighted means.

    Each token at an even index is matched with the most similar token at an odd index, by the
    cosine of their keys, averaged over heads. The `count` best pairs merge; of equal ones the
    first. The first `prefix` tokens never merge. The output contains the prefix, the even tokens
    that did not merge, and the odd tokens, each in their original order.

    tokens: float [batch, tokens, width]. sizes: float [batch, tokens], the number of patches of
    each token; None: all 1. keys: [batch, heads, tokens, channels]. count: from 1 to half of the
    tokens after the prefix. Return tokens and sizes, both with `count` fewer tokens.
    Source: Bolya et al. 2023, section 3, "Bipartite Soft Matching".

    >>> tokens = torch.tensor([[[9.0], [1.0], [2.0], [-5.0], [7.0]]])  # the first is the prefix
    >>> keys = torch.tensor([[[[0.0, 1], [1, 0], [1, 0], [0, 1], [-1, 0]]]])
    >>> merged, sizes = merge(tokens, None, keys, count=1, prefix=1)
    >>> merged.flatten().tolist(), sizes.tolist()
    ([9.0, 7.0, 1.5, -5.0], [[1.0, 1.0, 2.0, 1.0]])
    """
    if sizes is None:
        sizes = torch.ones(tokens.shape[:2], device=tokens.device)
    even, odd = slice(prefix + prefix % 2, None, 2), slice(prefix + 1 - prefix % 2, None, 2)
    with torch.autocast(tokens.device.type, enabled=False):  # bfloat16 would give many equal pairs
        metric = normalize(keys.float().mean(dim=1), dim=-1)
        cosines = metric[:, even] @ metric[:, odd].transpose(1, 2)
    best, partner = cosines.max(dim=2)
    order = best.argsort(dim=1, descending=True, stable=True)
    merged, unmerged = order[:, :count], order[:, count:].sort(dim=1).values
    partner = partner.gather(1, merged)
    weighted = torch.cat([sizes[..., None], tokens * sizes[..., None]], dim=2)
    sources, sums = weighted[:, even], weighted[:, odd]
    sums = sums.scatter_add(1, _expand(partner, sums), _rows(sources, merged))
    weighted = torch.cat([weighted[:, :prefix], _rows(sources, unmerged), sums], dim=1)
    sizes = weighted[..., 0]
    return (weighted[..., 1:] / sizes[..., None]).to(tokens.dtype), sizes


def _rows(values: Tensor, indices: Tensor) -> Tensor:
    """values: [batch, tokens, width]; indices: int64 [batch, selected]."""
    return values.gather(1, _expand(indices, values))


def _expand(indices: Tensor, values: Tensor) -> Tensor:
    return indices[..., None].expand(-1, -1, values.shape[2])
