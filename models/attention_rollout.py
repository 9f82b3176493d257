"""Attention rollout of a ViT, and the similarity of its class and distillation tokens."""

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
    """Attention rollout from the last block to the image.

    maps: float32 [batch, tokens, side, side] on the CPU, in [0, 1]: the weight of each patch for
    each prefix token (class token, then distillation tokens). The weights of a token sum to 1
    together with those of the prefix tokens, which are not included.
    names: of the tokens.
    """

    maps: Tensor
    names: tuple[str, ...]


@torch.no_grad()
def rollout(network: nn.Module, images: Tensor) -> AttentionMaps:
    """Return the attention rollout (Abnar and Zuidema 2020, section 3).

    It is the product over the blocks of 0.5 * attention, averaged over the heads, + 0.5 * identity
    for the residual path. images: normalized, float [batch, 3, height, width]. Raises ConfigError
    for a network without timm's attention.

    >>> from deit.models.saved_student import load_student
    >>> student, _ = load_student("checkpoints/digits/best")
    >>> attention = rollout(student.network, torch.zeros(4, 3, 8, 8))
    >>> attention.names, attention.maps.shape  # 4 x 4 patches of 2 px
    (('class', 'distillation'), torch.Size([4, 2, 4, 4]))
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
    """Return the names of the prefix tokens, in order."""
    names = ["class"] if network.cls_token is not None else []
    count = network.dist_token.shape[1] if hasattr(network, "dist_token") else 0
    names += ["distillation"] if count == 1 else [f"distillation {n + 1}" for n in range(count)]
    num_registers = network.num_prefix_tokens - len(names)
    return (*names, *(f"register {n + 1}" for n in range(num_registers)))


def check_attention(network: nn.Module) -> None:
    """Raise ConfigError if the network has no attention of prefix tokens to visualize."""
    if (
        not isinstance(network, VisionTransformer)
        or not network.num_prefix_tokens
        or not all(isinstance(block.attn, Attention) for block in network.blocks)
    ):
        raise ConfigError(
            f"{type(network).__name__}: cannot show the attention of its tokens; use a deit_* or "
            "vit_* without mixed heads (student.shared_block_size 1)"
        )


@contextmanager
def _attention_of(network: VisionTransformer) -> Iterator[list[Tensor]]:
    """Collect the attention [batch, heads, tokens, tokens] of each block, in order.

    It is computed a second time, because the network's fused kernel does not return it.
    """
    matrices: list[Tensor] = []

    def record(attention: Attention, inputs: tuple[Tensor, ...]) -> None:
        qkv = rearrange(
            attention.qkv(inputs[0]), "b n (s h d) -> s b h n d", s=3, h=attention.num_heads
        )
        queries, keys = attention.q_norm(qkv[0]), attention.k_norm(qkv[1])
        matrices.append((queries @ keys.transpose(-2, -1) * attention.scale).softmax(dim=-1))

    handles = [block.attn.register_forward_pre_hook(record) for block in network.blocks]
    try:
        yield matrices
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def token_cosines(network: nn.Module, images: Tensor) -> Tensor:
    """Return the cosine of class token and first distillation token, float32 [batch, depth + 1].

    It is measured at the input of each block, first with the position embedding, and after the
    final norm. The paper (section 5.2) reports 0.06 at the input and 0.93 at the output of a
    DeiT-B. images: normalized, float [batch, 3, height, width]. Raises ConfigError for a network
    without both tokens.

    >>> from deit.models.saved_student import load_student
    >>> student, _ = load_student("checkpoints/digits/best")
    >>> token_cosines(student.network, torch.zeros(4, 3, 8, 8)).shape  # one block
    torch.Size([4, 2])
    """
    if not isinstance(network, VisionTransformer) or network.num_prefix_tokens < 2:
        raise ConfigError(
            f"{type(network).__name__} has no class and distillation token to compare; use a deit_*"
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
