"""Weight multiplexing (MiniViT): neighbouring blocks that share attention and MLP, not the rest."""

import torch
from einops import rearrange
from timm.layers import Attention
from torch import Tensor, nn


class MixedAttention(nn.Module):
    """Attention by its own projections or by another block's, whose heads are mixed linearly before
    the softmax and after it, by matrices of its own.

    Both begin as the identity: then it is plain attention. Mixed after the softmax, the weights of
    a token need not sum to 1. Source: Zhang et al. 2022, "MiniViT", section 3.2, equation 5.
    """

    def __init__(self, own: Attention, shared: "MixedAttention | None") -> None:
        """own: timm's, whose projections are taken over; shared: the first of the group, whose
        projections are used instead; None: this is the first."""
        super().__init__()
        self.num_heads, self.head_dim, self.scale = own.num_heads, own.head_dim, own.scale
        if shared is None:
            self.qkv, self.proj, self.proj_drop = own.qkv, own.proj, own.proj_drop
        # In a list, so that its parameters are registered, saved and counted once.
        self._first = [] if shared is None else [shared]
        self.before = nn.Parameter(torch.eye(own.num_heads))
        self.after = nn.Parameter(torch.eye(own.num_heads))

    def forward(self, tokens: Tensor, **nothing: object) -> Tensor:
        """tokens: [batch, tokens, width]; nothing: masks, which timm's blocks hand on as None."""
        assert not any(nothing.values()), nothing
        core = self._first[0] if self._first else self
        parts = rearrange(core.qkv(tokens), "b n (s h d) -> s b h n d", s=3, h=self.num_heads)
        queries, keys, values = parts.unbind(0)
        logits = (queries * self.scale) @ keys.transpose(-2, -1)
        weights = _mixed(_mixed(logits, self.before).softmax(dim=-1), self.after)
        heard = rearrange(weights @ values, "b h n d -> b n (h d)")
        return core.proj_drop(core.proj(heard))


def _mixed(maps: Tensor, matrix: Tensor) -> Tensor:
    """Maps [batch, heads, tokens, tokens] mixed over the heads by a matrix [to, from]."""
    return torch.einsum("b h n m, g h -> b g n m", maps, matrix.to(maps.dtype))


class SharedMlp(nn.Module):
    """The MLP of another block."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self._first = [first]  # as above

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [batch, tokens, width]."""
        return self._first[0](tokens)


def share_weights(network: nn.Module, share: int) -> None:
    """Let each `share` blocks in a row use the attention and MLP of their first, in place: norms,
    drop path and the mixing of the heads stay each block's own. The network's arithmetic stays what
    it was (a little more, for the mixing), its parameters become fewer."""
    for place, block in enumerate(network.blocks):
        first = network.blocks[place - place % share]
        if first is block:
            block.attn = MixedAttention(block.attn, None)
        else:
            block.attn = MixedAttention(block.attn, first.attn)
            block.mlp = SharedMlp(first.mlp)
