"""Convpass adapters: small convolutions beside the attention and the MLP of a ViT's blocks."""

from math import isqrt

import torch
from timm.layers import DropPath
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import linear

from deit.core.errors import ConfigError

_DROPOUT = 0.1


class Convpass(nn.Module):
    """A bottleneck with a 3 x 3 convolution between the patches.

    down to `hidden` channels, QuickGELU, convolution, QuickGELU, dropout, up. Patches are convolved
    on their grid; each token before them is an image of one pixel, which the kernel's centre alone
    reaches. The convolution starts as the identity, `up` as zero: so does the answer.
    Source: Jie and Deng 2022, "Convolutional Bypasses Are Better Vision Transformer Adapters",
    equations 4 to 6.
    """

    def __init__(
        self, width: int, hidden: int, *, scale: float, prefix: int, drop_path: float
    ) -> None:
        """scale: of the answer. prefix: tokens before the patches. drop_path: of this branch."""
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
        """tokens: [batch, prefix + side**2, width], normed; the answer has their shape.

        Raises ConfigError where the patches are no square.
        """
        hidden = _quick_gelu(self.down(tokens))
        alone, patches = hidden[:, : self.prefix], hidden[:, self.prefix :]
        side = isqrt(patches.shape[1])
        if side**2 != patches.shape[1]:
            raise ConfigError(
                f"student.adapters: convolve a square of patches, {patches.shape[1]} are none"
            )
        weight, bias = self.convolution.weight, self.convolution.bias
        alone = linear(alone, weight[:, :, 1, 1], bias)
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        patches = self.convolution(grid).flatten(2).transpose(1, 2)
        mixed = _quick_gelu(torch.cat([alone, patches], dim=1))
        return self.drop_path(self.scale * self.up(self.dropout(mixed)))


def _quick_gelu(values: Tensor) -> Tensor:
    """x sigmoid(1.702 x), Hendrycks and Gimpel 2016, section 2."""
    return values * torch.sigmoid(1.702 * values)


class ConvpassBlock(Block):
    """A block of timm's with adapters, which see what attention and MLP see: the normed tokens."""

    def __init__(self, block: Block, attention: Convpass, mlp: Convpass | None = None) -> None:
        """block: whose parts these are from now on, by the same names."""
        nn.Module.__init__(self)  # not Block's, which would make parts of its own
        for name, part in block.named_children():
            self.add_module(name, part)
        self.adapter1, self.adapter2 = attention, mlp

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x: [batch, tokens, width]; the rest as timm's."""
        normed = self.norm1(x)
        attended = self.attn(normed, attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(self.ls1(attended)) + self.adapter1(normed)
        normed = self.norm2(x)
        x = x + self.drop_path2(self.ls2(self.mlp(normed)))
        return x if self.adapter2 is None else x + self.adapter2(normed)


def add_adapters(
    network: VisionTransformer, *, mlp: bool, hidden: int, scale: float, drop_path: float
) -> None:
    """Give every block of a ViT an adapter beside its attention, and with `mlp` one beside its MLP.

    hidden, scale: of each. drop_path: of the last block's, rising linearly from 0 as the network's.
    """
    blocks = network.blocks
    for place, block in enumerate(blocks):
        shape = {"scale": scale, "prefix": network.num_prefix_tokens}
        shape["drop_path"] = drop_path * place / max(len(blocks) - 1, 1)
        adapters = (Convpass(network.embed_dim, hidden, **shape) for _ in range(1 + mlp))
        blocks[place] = ConvpassBlock(block, *adapters)


def adapters_of(network: nn.Module) -> dict[str, Convpass]:
    """The adapters of a network by name."""
    return {name: one for name, one in network.named_modules() if isinstance(one, Convpass)}
