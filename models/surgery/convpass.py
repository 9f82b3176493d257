"""Convpass adapters: small convolutions parallel to attention and MLP of a ViT's blocks."""

from math import isqrt

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import linear

from deit.core.errors import ConfigError

_DROPOUT = 0.1


class Convpass(nn.Module):
    """A bottleneck with a 3 x 3 convolution over the grid of patches.

    Linear layer down to `hidden` channels, QuickGELU, convolution, QuickGELU, dropout, linear layer
    up. Each prefix token is convolved as an image of one pixel, so only the center of the kernel
    applies. The convolution is initialized as the identity and `up` as zero, so the initial output
    is zero. Source: Jie and Deng 2022, "Convolutional Bypasses Are Better Vision Transformer
    Adapters", equations 4 to 6.
    """

    def __init__(
        self, width: int, hidden: int, *, scale: float, prefix: int, drop_path: float
    ) -> None:
        """scale: factor of the output. prefix: tokens before the patches. drop_path: its rate."""
        super().__init__()
        self.prefix, self.scale = prefix, scale
        self.down = nn.Linear(width, hidden)
        self.convolution = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1)
        self.up = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(_DROPOUT)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.up.weight)
        nn.init.dirac_(self.convolution.weight)
        for layer in (self.down, self.convolution, self.up):
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return an output of the shape of `tokens`, float [batch, prefix + side**2, width].

        tokens: the normalized input of attention or MLP. Raises ConfigError if the number of
        patches is not a square.
        """
        hidden = _quick_gelu(self.down(tokens))
        prefix, patches = hidden[:, : self.prefix], hidden[:, self.prefix :]
        side = isqrt(patches.shape[1])
        if side**2 != patches.shape[1]:
            raise ConfigError(
                f"student.adapters: convolutions need a square number of patches, not "
                f"{patches.shape[1]}"
            )
        weight, bias = self.convolution.weight, self.convolution.bias
        prefix = linear(prefix, weight[:, :, 1, 1], bias)
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        patches = self.convolution(grid).flatten(2).transpose(1, 2)
        hidden = _quick_gelu(torch.cat([prefix, patches], dim=1))
        return self.drop_path(self.scale * self.up(self.dropout(hidden)))


def _quick_gelu(values: Tensor) -> Tensor:
    """Return x sigmoid(1.702 x) (Hendrycks and Gimpel 2016, section 2)."""
    return values * torch.sigmoid(1.702 * values)


class ConvpassBlock(Block):
    """timm's block with adapters that take the normalized input of attention and of MLP."""

    def __init__(self, block: Block, attention: Convpass, mlp: Convpass | None = None) -> None:
        """Take over the layers of `block`, under the same names."""
        nn.Module.__init__(self)  # Block's __init__ would create new layers
        for name, layer in block.named_children():
            self.add_module(name, layer)
        self.adapter1, self.adapter2 = attention, mlp

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Return tokens of the shape of `x`, float [batch, tokens, width]."""
        normalized = self.norm1(x)
        attended = self.attn(normalized, attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(self.ls1(attended)) + self.adapter1(normalized)
        normalized = self.norm2(x)
        x = x + self.drop_path2(self.ls2(self.mlp(normalized)))
        return x if self.adapter2 is None else x + self.adapter2(normalized)


def add_adapters(
    network: VisionTransformer, *, mlp: bool, hidden: int, scale: float, drop_path: float
) -> None:
    """Give each block of a ViT an adapter parallel to attention, and with `mlp` one for the MLP.

    hidden: channels within an adapter. scale: factor of its output. drop_path: the rate in the
    last block, rising linearly from 0.
    """
    blocks = network.blocks
    for index, block in enumerate(blocks):
        settings = {"scale": scale, "prefix": network.num_prefix_tokens}
        settings["drop_path"] = drop_path * index / max(len(blocks) - 1, 1)
        adapters = (Convpass(network.embed_dim, hidden, **settings) for _ in range(1 + mlp))
        blocks[index] = ConvpassBlock(block, *adapters)


def adapters_of(network: nn.Module) -> dict[str, Convpass]:
    """Return the adapters of a network by name."""
    modules = network.named_modules()
    return {name: module for name, module in modules if isinstance(module, Convpass)}
