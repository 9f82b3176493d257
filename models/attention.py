"""What the tokens of a ViT look at: attention over depth, and how alike the tokens become."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from einops import rearrange
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from deit.core.errors import ConfigError


class AttentionMaps(NamedTuple):
    """Attention rolled out from the last block to the image.

    maps: float32 [batch, tokens, side, side]: how much each prefix token (the class token, then the
    distillation tokens) takes from each patch; a token's map and what it takes from the prefix sum
    to 1. names: of the tokens.
    """

    maps: Tensor
    names: tuple[str, ...]


@torch.no_grad()
def rollout(network: nn.Module, images: Tensor) -> AttentionMaps:
    """Attention rollout (Abnar and Zuidema 2020, section 3): the product over the blocks of half
    the attention, mean over its heads, and half the identity for the residual path.

    images: normalised, [batch, 3, height, width]. Raises ConfigError for a network without timm's
    attention.
    """
    check_attention(network)
    with _attention_of(network) as matrices:
        network.forward_features(images)
    prefix = network.num_prefix_tokens
    rolled: Tensor | None = None
    for attention in matrices:
        mean = attention.mean(dim=1)
        step = (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2
        rolled = step if rolled is None else step @ rolled
    patches = rolled[:, :prefix, prefix:]
    side = round(patches.shape[-1] ** 0.5)
    maps = rearrange(patches, "b t (h w) -> b t h w", h=side)
    return AttentionMaps(maps.float().cpu(), _token_names(network))


def _token_names(network: nn.Module) -> tuple[str, ...]:
    """What the prefix tokens are called, in their order."""
    names = ["class"] if network.cls_token is not None else []
    taught = network.dist_token.shape[1] if hasattr(network, "dist_token") else 0
    names += ["distillation"] if taught == 1 else [f"distillation {n + 1}" for n in range(taught)]
    others = network.num_prefix_tokens - len(names)
    return (*names, *(f"register {n + 1}" for n in range(others)))


def check_attention(network: nn.Module) -> None:
    """Raises ConfigError where there is no attention to look at."""
    if (
        not isinstance(network, VisionTransformer)
        or not network.num_prefix_tokens
        or not all(isinstance(block.attn, Attention) for block in network.blocks)
    ):
        raise ConfigError(
            f"{type(network).__name__} has no tokens whose attention could be shown; it takes a "
            "deit_* or vit_*, whose heads are not mixed (student.shared_block_size 1)"
        )


@contextmanager
def _attention_of(network: VisionTransformer) -> Iterator[list[Tensor]]:
    """Collects the attention [batch, heads, tokens, tokens] of each block, in their order.

    Worked out beside the network's own: the fused kernel that it runs never holds this matrix.
    """
    found: list[Tensor] = []

    def listen(attention: Attention, inputs: tuple[Tensor, ...]) -> None:
        qkv = rearrange(
            attention.qkv(inputs[0]), "b n (s h d) -> s b h n d", s=3, h=attention.num_heads
        )
        queries, keys = attention.q_norm(qkv[0]), attention.k_norm(qkv[1])
        found.append((queries @ keys.transpose(-2, -1) * attention.scale).softmax(dim=-1))

    handles = [block.attn.register_forward_pre_hook(listen) for block in network.blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def token_cosines(network: nn.Module, images: Tensor) -> Tensor:
    """Cosine of the class token and the (first) distillation token, float32 [batch, depth + 1]:
    before the first block, with their positions, and after each block; the last is after the norm.

    The paper (section 5.2) has 0.06 at the input and 0.93 at the output of a DeiT-B.
    images: normalised. Raises ConfigError for a network without both tokens.
    """
    if not isinstance(network, VisionTransformer) or network.num_prefix_tokens < 2:
        raise ConfigError(
            f"{type(network).__name__} has no class and distillation token to compare; it takes a "
            "deit_*"
        )
    states: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda block, inputs: states.append(inputs[0]))
        for block in network.blocks
    ]
    try:
        states.append(network.forward_features(images))
    finally:
        for handle in handles:
            handle.remove()
    cosines = [torch.cosine_similarity(state[:, 0], state[:, 1], dim=-1) for state in states]
    return torch.stack(cosines, dim=1).float().cpu()
