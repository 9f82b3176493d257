"""Small tensors: constants on a device, and copies that do not synchronize with a GPU."""

from functools import cache

import torch
from torch import Tensor


def to_device_async(values: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device.

    A copy to a GPU goes through pinned memory, so that it is queued: an ordinary copy would wait
    until the GPU has finished all queued work.
    """
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def evenly_spaced(total: int, count: int) -> Tensor:
    """Return int64 [min(count, total)]: evenly spaced indices from 0 to total - 1, both included.

    >>> evenly_spaced(9, 3).tolist()
    [0, 4, 8]
    """
    return torch.linspace(0, total - 1, min(count, total)).round().long()


@cache
def device_constant(
    values: tuple, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Return numbers (a tuple, or a tuple of tuples) as a tensor on a device.

    The tensor is cached and shared: do not write to it.
    """
    with torch.inference_mode(False):  # later callers may need it for a gradient
        return torch.tensor(values, device=device, dtype=dtype)
