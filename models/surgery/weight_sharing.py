"""Weight sharing (MiniViT): consecutive blocks share attention and MLP weights, but no norms."""

import torch
from einops import rearrange
from timm.layers import Attention
from torch import Tensor, nn


class MixedAttention(nn.Module):
    """Attention with its own or another block's projections, and with its own mixing of heads.

    Heads are mixed linearly before and after the softmax. Both matrices are initialized as the
    identity, which gives plain attention. After mixing, a token's attention weights do not
    necessarily sum to 1. Source: Zhang et al. 2022, "MiniViT", section 3.2, equation 5.
    """

    def __init__(self, attention: Attention, shared: "MixedAttention | None") -> None:
        """attention: timm's, whose number of heads and, without `shared`, projections are used.
        shared: the attention of the first block of the group, if this is not the first."""
        super().__init__()
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.scale = attention.scale
        if shared is None:
            self.qkv, self.proj = attention.qkv, attention.proj
            self.proj_drop = attention.proj_drop
        # In a list, so that its parameters are registered, saved and counted once.
        self._first = [] if shared is None else [shared]
        self.before = nn.Parameter(torch.eye(attention.num_heads))
        self.after = nn.Parameter(torch.eye(attention.num_heads))

    def forward(self, tokens: Tensor, **masks: object) -> Tensor:
        """Return tokens of the same shape, float [batch, tokens, width].

        masks: timm's blocks pass None for each; others are not supported.
        """
        assert not any(masks.values()), masks
        core = self._first[0] if self._first else self
        parts = rearrange(core.qkv(tokens), "b n (s h d) -> s b h n d", s=3, h=self.num_heads)
        queries, keys, values = parts.unbind(0)
        logits = (queries * self.scale) @ keys.transpose(-2, -1)
        weights = _mix_heads(_mix_heads(logits, self.before).softmax(dim=-1), self.after)
        attended = rearrange(weights @ values, "b h n d -> b n (h d)")
        return core.proj_drop(core.proj(attended))


def _mix_heads(maps: Tensor, matrix: Tensor) -> Tensor:
    """Mix maps [batch, heads, tokens, tokens] over the heads by a matrix [output, input]."""
    return torch.einsum("b h n m, g h -> b g n m", maps, matrix.to(maps.dtype))


class SharedMlp(nn.Module):
    """Use the MLP of another block."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self._first = [first]  # as above

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the same shape, float [batch, tokens, width]."""
        return self._first[0](tokens)


def share_weights(network: nn.Module, block_size: int) -> None:
    """Let each group of `block_size` consecutive blocks use the weights of its first, in place.

    Attention and MLP are shared; each block keeps its norms, drop path and head mixing. The number
    of parameters decreases, the arithmetic does not.
    """
    for index, block in enumerate(network.blocks):
        first = network.blocks[index - index % block_size]
        if first is block:
            block.attn = MixedAttention(block.attn, None)
        else:
            block.attn = MixedAttention(block.attn, first.attn)
            block.mlp = SharedMlp(first.mlp)
