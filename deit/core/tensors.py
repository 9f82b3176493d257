"""Small tensors: constants on a device, checks, and copies that do not synchronize with a GPU."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from deit.core.errors import ConfigError, SystemFault, did_you_mean, first_line

MakeTensor = TypeVar("MakeTensor", bound=Callable[..., Tensor])

DEVICES = ("cpu", "cuda")
"""The types of devices that the package is tested on."""


def as_device(device: torch.device | str) -> torch.device:
    """Return a device by its name: cpu, cuda, cuda:1, or auto for a GPU if there is one.

    Raises ConfigError for another name or type, and SystemFault if there is no such GPU.

    >>> as_device("cpu")
    device(type='cpu')
    """
    name = str(device)
    if isinstance(device, str) and device == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        result = torch.device(name) if isinstance(device, torch.device | str) else None
    except RuntimeError:
        result = None
    if result is None or result.type not in DEVICES:
        advice = "; use 'cuda'" if name.startswith("gpu") else did_you_mean(name, DEVICES)
        raise ConfigError(
            f"device = {device!r}: should be cpu, cuda, cuda:INDEX or auto, or a torch.device of "
            f"these{advice}"
        )
    count = torch.cuda.device_count() if result.type == "cuda" else 1
    if (result.index or 0) >= count:
        raise SystemFault(f"device = {name!r}: there are {count} CUDA devices; use device='cpu'")
    return result


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


def has_values() -> bool:
    """Return whether new tensors have values: not while code is traced by torch.compile or
    torch.export, or under FakeTensorMode. A tensor made then must not be kept."""
    return not torch.compiler.is_compiling() and type(torch.empty(0, device="cpu")) is Tensor


def tensor_cache(maxsize: int | None) -> Callable[[MakeTensor], MakeTensor]:
    """Return a decorator: keep the tensors that a function makes, by its hashable arguments.

    maxsize: how many; None: all. They are shared: do not write to them.
    """

    def decorate(function: MakeTensor) -> MakeTensor:
        cached = functools.lru_cache(maxsize)(function)

        @functools.wraps(function)
        def make(*arguments: Any) -> Tensor:
            return (cached if has_values() else function)(*arguments)

        return make

    return decorate


@tensor_cache(maxsize=None)
def device_constant(
    values: tuple, device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Return numbers (a tuple, or a tuple of tuples) as a tensor on a device.

    It is shared: do not write to it.
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


def check_images(name: str, images: Any) -> None:
    """Raise ConfigError unless images are a tensor of floats with three channels. name: of the
    network that gets them.

    >>> check_images("student", torch.zeros(1, 3, 8, 8))
    """
    is_tensor = isinstance(images, Tensor)
    if is_tensor and images.is_floating_point() and images.ndim == 4 and images.shape[1] == 3:
        return
    given = type(images).__name__
    if is_tensor:
        given = f"{images.dtype} {list(images.shape)}{layout_advice(images.shape)}"
    raise ConfigError(
        f"{name}: takes images as float [batch, 3, height, width] in [0, 1], such as "
        f"batch.images or pixels / 255; got {given}"
    )


def layout_advice(shape: Sequence[int]) -> str:
    """Return what to do with images that are not [images, 3, height, width]; often nothing.

    >>> layout_advice((600, 28, 28))
    '; repeat gray images for the three channels'
    """
    if len(shape) == 3 and shape[0] == 3:
        return "; add the dimension of the batch: image[None]"
    if len(shape) == 3 or (len(shape) == 4 and shape[1] == 1):
        return "; repeat gray images for the three channels"
    if len(shape) == 4 and shape[1] != 3 and shape[3] == 3:
        return "; move the channels before height and width"
    return ""


_MARGIN = 0.5
"""Resizing exceeds [0, 1] by less, normalized images and pixels up to 255 by more."""


def check_image_values(name: str, images: Tensor) -> None:
    """Raise ConfigError for images that are clearly not in [0, 1]. On a CPU only: the comparison
    would synchronize a GPU.

    >>> check_image_values("teacher", torch.rand(1, 3, 8, 8))
    """
    if images.device.type != "cpu" or not images.numel():
        return
    low, high = images.aminmax()
    is_finite = math.isfinite(low) and math.isfinite(high)  # infinite logits are reported elsewhere
    if is_finite and (low < -_MARGIN or high > 1 + _MARGIN):
        raise ConfigError(
            f"{name}: takes images in [0, 1] and normalizes them itself; got values from "
            f"{low.item():.3g} to {high.item():.3g}"
        )
