"""Small tensors: constants on a device, and copies that do not synchronize with a GPU."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from deit.core.errors import ConfigError, first_line


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


def as_tensor(name: str, value: Any) -> Tensor:
    """Return a tensor, an array or nested sequences of numbers as a tensor.

    name: of the parameter, for messages. Raises ConfigError for other types.

    >>> as_tensor("labels", [2, 0]).tolist()
    [2, 0]
    """
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{name}: should be a tensor or an array of numbers; got {type(value).__name__} "
            f"({first_line(error)})"
        ) from None
