"""Work on a batch a few images at a time, so that what lies between stays in the cache."""

from collections.abc import Callable

import torch
from torch import Tensor

_BYTES = 2**18  # of uint8; the same in single precision is a megabyte


def chunked(work: Callable[..., Tensor], images: Tensor, *others: Tensor) -> Tensor:
    """work(images, *others) on a GPU; on a processor the same, put together from pieces.

    images: uint8 [batch, ...]. others: [batch, ...] each. work must treat each image alone.
    """
    number = max(_BYTES // max(images[:1].numel(), 1), 1)
    if images.is_cuda or len(images) <= number:
        return work(images, *others)
    parts = zip(*(values.split(number) for values in (images, *others)))
    return torch.cat([work(*part) for part in parts])
