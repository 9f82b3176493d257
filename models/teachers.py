"""Teachers: frozen networks from any source that map images in [0, 1] to logits."""

import hashlib
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import interpolate

from deit.core.errors import ConfigError, DataError
from deit.core.tensors import check_image_values, check_images, has_values
from deit.models.memory_format import MemoryFormat, set_memory_format, to_memory_format
from deit.models.weight_files import digest_of


class LoadedNetwork(NamedTuple):
    """A network and what its source states about its training."""

    network: nn.Module
    """Normalized images, float [batch, 3, height, width], to logits [batch, classes]."""
    description: str
    """For logs: name and source."""
    image_size: int | None
    """Side [px] of its input; None: any size."""
    mean: tuple[float, ...]
    """Normalization per channel, for images in [0, 1]."""
    std: tuple[float, ...]
    class_names: tuple[str, ...] | None
    """In the order of its logits; None if the source does not state them."""


BY_NAME = "its own class names"
ASSUMED = "assumed: the order of the data's classes"
"""How the order of a teacher's logits was determined, if teacher.classes is not set."""


class Teacher(nn.Module):
    """A frozen network with its own input size and normalization, always in evaluation mode.

    It is no part of the student, is not passed to `accelerator.prepare`, and is not saved in
    checkpoints.

    >>> network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> loaded = LoadedNetwork(network, "color", 8, (0.5,) * 3, (0.25,) * 3, ("r", "g", "b"))
    >>> teacher = Teacher(loaded, class_indices=(2, 0))  # the data's classes are b and r
    >>> teacher(torch.ones(4, 3, 16, 16))[0].tolist()  # (1 - 0.5) / 0.25
    [2.0, 2.0]
    """

    def __init__(
        self,
        loaded: LoadedNetwork,
        class_indices: tuple[int, ...] | None = None,
        trained_size: int | None = None,
        class_order: str = BY_NAME,
    ) -> None:
        """Freeze a loaded network.

        class_indices: the index of each of the data's classes among its logits. Default: all of
        its classes, in its order.
        trained_size: side [px] of the images it was trained on. Default: that of its input.
        class_order: how its logits were matched to the data's classes, for logs.
        """
        super().__init__()
        self.class_order = class_order
        self.trained_size = loaded.image_size if trained_size is None else trained_size
        self.network = loaded.network
        self.description = loaded.description
        self.image_size = loaded.image_size
        self.class_indices = None if class_indices is None else list(class_indices)
        positions = None if class_indices is None else torch.tensor(class_indices)
        self.register_buffer("class_positions", positions, persistent=False)
        self.normalization = (loaded.mean, loaded.std)
        for name, values in (("mean", loaded.mean), ("std", loaded.std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()
        self.memory_format: MemoryFormat = "contiguous"
        self._is_first_call = True

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Its normalization as timm's distillation tasks read it: it takes images in [0, 1]."""
        return {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

    def set_memory_format(self, memory_format: MemoryFormat) -> None:
        """Use this memory format for convolutions; logits differ by float rounding only."""
        self.memory_format = memory_format
        set_memory_format(self.network, memory_format)

    def fingerprint(self) -> dict[str, Any]:
        """Return what its logits depend on, as plain values.

        SHA-256 of the named weights and of the layers' settings (such as strides), input size,
        normalization and selected classes. Code of a custom network outside its layers is not
        included.
        """
        mean, std = self.normalization
        return {
            "weights": digest_of(self.network.state_dict()),
            "layers": _digest_of_layers(self.network),
            "image_size": self.image_size,
            "mean": list(mean),
            "std": list(std),
            "classes": self.class_indices,
        }

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode: batch statistics and dropout of a teacher are fixed."""
        return super().train(False)

    def __call__(self, images: Tensor) -> Tensor:
        """Call `forward`. Raises DataError if the network's code exits (SystemExit), which would
        end the whole program as if it had finished."""
        try:
            return super().__call__(images)
        except SystemExit as error:
            raise DataError(f"teacher {self.description}: its code exits with {error!r}") from error

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return float32 logits [batch, classes] of images, float [batch, 3, side, side] in [0, 1].

        Images of another size than the network's input are resized (bicubic, antialiased). Raises
        ConfigError for integers, for sides that differ if the network has an input size and, in the
        first call on a CPU, for values outside [0, 1].
        """
        check_images("teacher", images)
        if self._is_first_call and has_values():
            self._is_first_call = False
            check_image_values("teacher", images)
        side = self.image_size
        if side is not None and images.shape[-2:] != (side, side):
            if images.shape[-2] != images.shape[-1]:
                raise ConfigError(
                    f"teacher: takes square images, which it resizes to {side} px; got "
                    f"{list(images.shape)}"
                )
            images = interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        normalized = to_memory_format((images - self.mean) / self.std, self.memory_format)
        logits = self.network(normalized).float()
        if self.class_indices is None:
            return logits
        return logits[:, self.class_positions]


_SETTINGS = (
    *("kernel_size", "stride", "padding", "padding_mode", "dilation", "groups", "ceil_mode"),
    *("output_size", "num_groups", "num_heads", "eps", "negative_slope", "approximate"),
)
_NO_EFFECT = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    DropPath,
)


def _digest_of_layers(network: nn.Module) -> str:
    """Return the SHA-256 of the layers' names, types and settings.

    `repr` and layers without effect in evaluation are not included: they depend on the versions of
    PyTorch and timm.
    """
    digest = hashlib.sha256()
    for name, module in network.named_modules():
        leaf = next(module.children(), None) is None and not isinstance(module, _NO_EFFECT)
        settings = {key: vars(module)[key] for key in _SETTINGS if key in vars(module)}
        if leaf or settings:
            kind = type(module).__name__ if leaf else ""
            digest.update(f"{name} {kind} {settings}\n".encode())
    return digest.hexdigest()
