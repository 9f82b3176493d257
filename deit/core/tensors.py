"""Small tensors: moved to a device without waiting for its queue, or made."""

from functools import cache

import torch
from torch import Tensor


def to_device_async(values: Tensor, device: torch.device) -> Tensor:
    """Values of the CPU on a device. To a GPU by pinned memory, behind what is queued there: an
    ordinary copy would wait until all of that is done."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def evenly_spaced(total: int, number: int) -> Tensor:
    """Return int64 [min(number, total)]: evenly spaced indices from 0 to total - 1, both included.

    >>> evenly_spaced(9, 3).tolist()
    [0, 4, 8]
    """
    return torch.linspace(0, total - 1, min(number, total)).round().long()


@cache
def device_constant(
    values: tuple, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Numbers (a tuple of them, or of such tuples) on a device, sent there once; not to be written
    to."""
    with torch.inference_mode(False):  # whoever asks first: it may be needed for a gradient
        return torch.tensor(values, device=device, dtype=dtype)
