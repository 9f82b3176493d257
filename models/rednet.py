"""RedNet: a residual network of involutions, whose kernels differ by position and not by channel.

Li et al., "Involution: Inverting the Inherence of Convolution for Visual Recognition", CVPR 2021
(arXiv 2103.06255). As a teacher it has another inductive bias than a ConvNet.
"""

from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

_GROUP_CHANNELS = 16  # channels that share a kernel
_REDUCTION = 4  # of the channels from which a kernel is generated
_EXPANSION = 4  # of the output channels of a block


def involve(features: Tensor, kernels: Tensor, *, stride: int = 1) -> Tensor:
    """Multiply each pixel's neighborhood with the pixel's own kernel and sum it (equation 4).

    features: float [batch, channels, height, width]. kernels: float [batch, groups, side**2,
    ceil(height / stride), ceil(width / stride)] with an odd side; channels are divided among the
    groups in order. Return [batch, channels, ceil(height / stride), ceil(width / stride)] in the
    dtype of `features`; sums are computed in float32, also under autocast.

    Computed as a sum of shifted images, because unfolding needs side**2 copies of the features.

    >>> kernels = torch.zeros(1, 1, 9, 4, 4)
    >>> kernels[:, :, 4] = 2.0  # only the center of a 3 x 3 kernel
    >>> involve(torch.ones(1, 16, 4, 4), kernels).unique().tolist()
    [2.0]
    """
    groups, kernel_size = kernels.shape[1:3]
    border = round(kernel_size**0.5) // 2
    wide = features if features.dtype == torch.float64 else features.float()
    padded = pad(wide, (border, border, border, border))
    padded = rearrange(padded, "b (g c) h w -> b g c h w", g=groups)
    total = _ShiftedSum.apply(padded, kernels.to(padded.dtype), stride)
    return rearrange(total, "b g c h w -> b (g c) h w").to(features.dtype)


class _ShiftedSum(torch.autograd.Function):
    """The sum with its own backward pass; autograd would allocate side**2 padded images."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, kernels: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(padded, kernels)
        ctx.stride = stride
        total = padded.new_zeros((*padded.shape[:3], *kernels.shape[-2:]))
        for window, kernel in zip(_windows(padded, kernels, stride), kernels.unbind(dim=2)):
            total.addcmul_(window, kernel[:, :, None])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        padded, kernels = ctx.saved_tensors
        grad_padded, grad_kernels = torch.zeros_like(padded), torch.empty_like(kernels)
        windows = _windows(padded, kernels, ctx.stride)
        for index, (window, target) in enumerate(
            zip(windows, _windows(grad_padded, kernels, ctx.stride))
        ):
            target.addcmul_(gradient, kernels[:, :, index, None])
            torch.sum(gradient * window, dim=2, out=grad_kernels[:, :, index])
        return grad_padded, grad_kernels, None


def _windows(padded: Tensor, kernels: Tensor, stride: int) -> Iterator[Tensor]:
    """Yield a view of `padded` for each position of a kernel: the pixels at that position."""
    side = round(kernels.shape[2] ** 0.5)
    height, width = kernels.shape[-2:]
    for top in range(side):
        for left in range(side):
            yield padded[..., top::stride, left::stride][..., :height, :width]


class Involution(nn.Module):
    """An involution whose kernels are generated from each pixel's features.

    Input: float [batch, channels, height, width] of any size; output: [batch, channels,
    ceil(height / stride), ceil(width / stride)].
    """

    def __init__(self, channels: int, side: int, stride: int = 1) -> None:
        """side: of the kernel [px], odd."""
        super().__init__()
        self.stride = stride
        hidden = max(channels // _REDUCTION, 1)
        groups = max(channels // _GROUP_CHANNELS, 1)
        # ceil_mode: for an odd size, the last row and column need kernels as well.
        self.pool = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
        self.reduce = _convolution(channels, hidden)
        self.span = nn.Conv2d(hidden, groups * side**2, 1)
        self.groups = groups

    def forward(self, features: Tensor) -> Tensor:
        kernels = self.span(self.reduce(self.pool(features)))
        kernels = rearrange(kernels, "b (g k) h w -> b g k h w", g=self.groups)
        with torch.autocast(features.device.type, enabled=False):
            return involve(features, kernels, stride=self.stride)


def _convolution(channels_in: int, channels_out: int, side: int = 1, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, side, stride, padding=side // 2, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


class _Block(nn.Module):
    """A residual bottleneck block with an involution instead of its 3x3 convolution."""

    def __init__(self, channels_in: int, channels: int, side: int, stride: int) -> None:
        super().__init__()
        channels_out = channels * _EXPANSION
        self.body = nn.Sequential(
            _convolution(channels_in, channels),
            Involution(channels, side, stride),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels_out, 1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False),
                nn.BatchNorm2d(channels_out),
            )
        self.activation = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        return self.activation(self.shortcut(features) + self.body(features))


class RedNet(nn.Module):
    """A stem, stages that each halve the side and double the channels, pooling, and a head.

    Input: normalized images, float [batch, 3, side, side]; output: [batch, num_classes].
    """

    def __init__(
        self,
        num_classes: int,
        *,
        depths: tuple[int, ...],
        width: int = 64,
        side: int = 7,
        stem_stride: int = 4,
    ) -> None:
        """depths: blocks per stage. width: channels of the stem and within the blocks of the first
        stage. side: of the kernels [px], odd. stem_stride: total stride of the stem: 4 as
        published, or 2 or 1 for images of 32 px."""
        super().__init__()
        half = width // 2
        self.num_classes = num_classes
        self.stem = nn.Sequential(
            _convolution(3, half, 3, stride=1 if stem_stride == 1 else 2),
            Involution(half, 3),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            _convolution(half, width, 3),
            nn.MaxPool2d(3, 2, padding=1) if stem_stride == 4 else nn.Identity(),
        )
        channels_in, blocks = width, []
        for stage, depth in enumerate(depths):
            channels = width * 2**stage
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(_Block(channels_in, channels, side, stride))
                channels_in = channels * _EXPANSION
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels_in, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(images))).flatten(1))


DEPTHS: dict[str, tuple[int, ...]] = {"26": (1, 2, 4, 1), "38": (2, 3, 5, 2), "50": (3, 4, 6, 3)}
"""Blocks per stage, by the paper's names."""
