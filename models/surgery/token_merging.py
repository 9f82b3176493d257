"""Token merging: a ViT that joins its most similar patches between attention and MLP."""

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


def with_merging(network: VisionTransformer, numbers: int | Sequence[int]) -> VisionTransformer:
    """The same network as a ViT that merges tokens; for evaluation only.

    It shares weights, their names and every layer with `network`, which stays as it is. numbers: of
    tokens to merge in each block, one for all or one a block; where fewer pairs are left, these.
    Class, distillation and register tokens never merge; 0 in all blocks is `network` to the bit.

    Raises ConfigError as `check_merging`; its forward pass, in training mode.
    Source: Bolya et al. 2023, "Token Merging: Your ViT But Faster", section 3.
    """
    check_merging(network, numbers)
    merging = copy(network)
    merging._modules = dict(network._modules)
    merging.grad_checkpointing = False  # nothing is trained, and blocks hand sizes on
    prefix, each = network.num_prefix_tokens, _each(network, numbers)
    blocks = [_Block(block, number, prefix) for block, number in zip(network.blocks, each)]
    merging.blocks = _Blocks(*blocks)
    merging.blocks.training = network.training
    return merging


def check_merging(network: nn.Module, numbers: int | Sequence[int]) -> None:
    """Raises ConfigError where tokens cannot be merged so: another network, or too many."""
    if adapters_of(network):
        raise ConfigError(
            "--merge-tokens: student.adapters convolve the grid of all patches, which merging "
            "takes apart; merge the run that they belong to"
        )
    if any(isinstance(module, MixedAttention) for module in network.modules()):
        raise ConfigError(
            "--merge-tokens: attention that mixes its heads (student.shared_block_size) is not "
            "among what "
            "can "
            "weigh merged tokens"
        )
    if not isinstance(network, VisionTransformer) or not all(
        type(block) is Block and type(block.attn) is Attention for block in network.blocks
    ):
        raise ConfigError(
            f"--merge-tokens: {type(network).__name__} has no tokens that could be merged; it "
            "takes a "
            "deit_* or vit_*, or a ViT of timm with its plain attention and blocks"
        )
    if network.global_pool != "token":
        raise ConfigError(
            f"--merge-tokens: this network answers by a pool of all patches "
            f"({network.global_pool}), "
            "which merging would weigh otherwise; it takes one that answers by its class token"
        )
    each = _each(network, numbers)
    if len(each) != len(network.blocks):
        raise ConfigError(
            f"merging {each} tokens: should be one number, or {len(network.blocks)}, one a block"
        )
    patches = network.patch_embed.num_patches
    for number in each:
        if not 0 <= number <= patches // 2:
            raise ConfigError(
                f"--merge-tokens {number}: should be from 0 to {patches // 2} tokens a block, half "
                "of the "
                f"{patches} patches of an image"
            )


def _each(network: VisionTransformer, numbers: int | Sequence[int]) -> tuple[int, ...]:
    return (numbers,) * len(network.blocks) if isinstance(numbers, int) else tuple(numbers)


def token_numbers(network: VisionTransformer) -> list[int]:
    """How many tokens of an image leave each block of a network, with merging or without."""
    prefix = network.num_prefix_tokens
    tokens = network.patch_embed.num_patches + prefix
    found = []
    for block in network.blocks:
        tokens -= _fitting(getattr(block, "number", 0), tokens, prefix)
        found.append(tokens)
    return found


def _fitting(number: int, tokens: int, prefix: int) -> int:
    """How many pairs can be merged: at most half of the patches, as they stand in two rows."""
    return min(number, (tokens - prefix) // 2)


class _Blocks(nn.Sequential):
    """The blocks one after the other, which hand on the tokens and how many patches each is."""

    def forward(self, tokens: Tensor) -> Tensor:
        if self.training:
            raise ConfigError("tokens are merged in evaluation only; call eval() first")
        sizes = None
        for block in self:
            tokens, sizes = block(tokens, sizes)
        return tokens


class _Block(nn.Module):
    """timm's pre-norm block by its own layers, with merging between attention and MLP."""

    def __init__(self, block: Block, number: int, prefix: int) -> None:
        super().__init__()
        self.number, self.prefix = number, prefix
        for name, layer in block.named_children():
            self.add_module(name, layer)
        self.training = block.training

    def forward(self, tokens: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """tokens: [batch, tokens, width]; sizes: [batch, tokens], None: 1 each."""
        attended, keys = attend(self.attn, self.norm1(tokens), sizes)
        tokens = tokens + self.drop_path1(self.ls1(attended))
        number = _fitting(self.number, tokens.shape[1], self.prefix)
        if number:
            tokens, sizes = merge(tokens, sizes, keys, number=number, prefix=self.prefix)
        return tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens)))), sizes


def attend(attention: Attention, tokens: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    """What an attention says, [batch, tokens, width], where a token is heard as often as it has
    patches, and the keys [batch, heads, tokens, channels] of its tokens.

    Proportional attention: the logarithm of a key's size is added to its logits (equation 1).
    """
    keys: list[Tensor] = []
    # Listened to, not worked out again: a third of the largest product of the attention.
    handle = attention.k_norm.register_forward_hook(lambda *seen: keys.append(seen[-1]))
    heard = None if sizes is None else sizes.log().to(tokens.dtype)[:, None, None]
    try:
        return attention(tokens, attn_mask=heard), keys[0]
    finally:
        handle.remove()


def merge(
    tokens: Tensor, sizes: Tensor | None, keys: Tensor, *, number: int, prefix: int
) -> tuple[Tensor, Tensor]:
    """Merge the `number` most similar pairs of an image's tokens into their means by size.

    Tokens at even places look for the most similar at odd places, by the cosine of their keys,
    averaged over heads; the `number` best pairs merge, of equal ones the first. The first `prefix`
    tokens take no part. Left are the prefix, the even tokens that did not merge, and the odd ones,
    each in the order in which they were.

    tokens: [batch, tokens, width]; sizes: float [batch, tokens], of how many patches each is made,
    None: of one; keys: [batch, heads, tokens, channels]; number: from 1 to half of the tokens
    behind the prefix. Returns tokens and sizes of `number` fewer. Source: section 3,
    "Bipartite Soft Matching".
    """
    if sizes is None:
        sizes = torch.ones(tokens.shape[:2], device=tokens.device)
    even, odd = slice(prefix + prefix % 2, None, 2), slice(prefix + 1 - prefix % 2, None, 2)
    with torch.autocast(tokens.device.type, enabled=False):  # in bfloat16 many pairs are alike
        metric = normalize(keys.float().mean(dim=1), dim=-1)
        cosines = metric[:, even] @ metric[:, odd].transpose(1, 2)
    best, partner = cosines.max(dim=2)
    order = best.argsort(dim=1, descending=True, stable=True)
    gone, left = order[:, :number], order[:, number:].sort(dim=1).values
    partner = partner.gather(1, gone)
    weighted = torch.cat([sizes[..., None], tokens * sizes[..., None]], dim=2)
    sources, sums = weighted[:, even], weighted[:, odd]
    sums = sums.scatter_add(1, _wide(partner, sums), _rows(sources, gone))
    weighted = torch.cat([weighted[:, :prefix], _rows(sources, left), sums], dim=1)
    sizes = weighted[..., 0]
    return (weighted[..., 1:] / sizes[..., None]).to(tokens.dtype), sizes


def _rows(values: Tensor, places: Tensor) -> Tensor:
    """values: [batch, tokens, width]; places: int64 [batch, chosen]."""
    return values.gather(1, _wide(places, values))


def _wide(places: Tensor, values: Tensor) -> Tensor:
    return places[..., None].expand(-1, -1, values.shape[2])
