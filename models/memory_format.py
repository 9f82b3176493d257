"""The memory format of a network's convolutions and its images: contiguous or channels_last."""

from typing import Literal

import torch
from torch import Tensor, nn

MemoryFormat = Literal["contiguous", "channels_last"]
MEMORY_FORMATS: dict[MemoryFormat, torch.memory_format] = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


def set_memory_format(network: nn.Module, memory_format: MemoryFormat) -> None:
    """Convert a network's convolution weights; convert its images with `to_memory_format`."""
    network.to(memory_format=MEMORY_FORMATS[memory_format])


def to_memory_format(images: Tensor, memory_format: MemoryFormat) -> Tensor:
    """Return images [batch, channels, height, width] in this memory format."""
    return images.contiguous(memory_format=MEMORY_FORMATS[memory_format])


def default_memory_format(
    network: nn.Module, device_type: str, *, mixed_precision: bool
) -> MemoryFormat:
    """Return the memory format in which a network is usually faster.

    channels_last for a ConvNet, on a CPU or in mixed precision; otherwise contiguous, also for a
    ViT, whose only convolution is the patch embedding (measurements: docs/log.md).

    >>> default_memory_format(nn.Conv2d(3, 8, 3), "cpu", mixed_precision=False)
    'channels_last'
    >>> default_memory_format(nn.Conv2d(3, 8, 4, stride=4), "cpu", mixed_precision=False)
    'contiguous'
    """
    convolutions = (layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    overlapping = any(layer.kernel_size > layer.stride for layer in convolutions)
    faster = overlapping and (device_type == "cpu" or mixed_precision)
    return "channels_last" if faster else "contiguous"
