"""Teachers: frozen networks of any origin behind one call, images in [0, 1] to logits."""

import hashlib
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import interpolate

from deit.core.errors import (
    DataError,
)
from deit.core.tensors import device_constant
from deit.models.memory_format import MemoryFormat, set_memory_format, to_memory_format
from deit.models.weight_files import digest_of


class LoadedNetwork(NamedTuple):
    """A network as it was found, with what is known of its training.

    class_names is None where the origin does not say.
    """

    network: nn.Module
    description: str
    image_size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] | None


BY_NAME = "its own class names"
ASSUMED = "assumed: the order of the data's classes"
"""How a teacher's answers are matched to classes, where teacher.classes does not say it."""


class Teacher(nn.Module):
    """A frozen network with its own input size and normalisation; never in training mode.

    It is not part of the student, is not handed to `accelerator.prepare`, and is in no checkpoint.
    """

    def __init__(
        self,
        origin: LoadedNetwork,
        columns: tuple[int, ...] | None = None,
        trained_size: int | None = None,
        class_order: str = BY_NAME,
    ) -> None:
        """columns: which of its classes are the data's, in the data's order; None: all.
        trained_size: side [px] of the images it learned from, where that is another than its
        input's. class_order: how its answers were matched to the data's classes."""
        super().__init__()
        self.class_order = class_order
        self.trained_size = origin.image_size if trained_size is None else trained_size
        self.network = origin.network
        self.description = origin.description
        self.image_size = origin.image_size
        self.class_indices = None if columns is None else list(columns)
        self.normalisation = (origin.mean, origin.std)
        for name, values in (("mean", origin.mean), ("std", origin.std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()
        self.memory_format: MemoryFormat = "contiguous"

    def set_memory_format(self, layout: MemoryFormat) -> None:
        """Have its convolutions compute in this layout: the same answers but for the last bits."""
        self.memory_format = layout
        set_memory_format(self.network, layout)

    def fingerprint(self) -> dict[str, Any]:
        """What its answers depend on, as plain values: SHA-256 of the weights by name and of the
        layers (strides and the like have no weights), input size, normalisation, and which of its
        classes are the data's. What a network of one's own computes besides is not in it."""
        mean, std = self.normalisation
        return {
            "weights": digest_of(self.network.state_dict()),
            "layers": _digest_of_layers(self.network),
            "image_size": self.image_size,
            "mean": list(mean),
            "std": list(std),
            "classes": self.class_indices,
        }

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in evaluation mode whatever a container asks for: its statistics are fixed."""
        return super().train(False)

    def __call__(self, images: Tensor) -> Tensor:
        """As `forward`. Raises DataError where the network's own code asks Python to exit, which
        would look like the end of what asks it."""
        try:
            return super().__call__(images)
        except SystemExit as error:
            raise DataError(f"teacher {self.description}: leaves with {error!r}") from error

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images: float [batch, 3, height, width] in [0, 1]. Logits, float32 [batch, classes]."""
        if self.image_size is not None and images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        answer = self.network(to_memory_format((images - self.mean) / self.std, self.memory_format))
        logits = answer.float()
        if self.class_indices is None:
            return logits
        return logits[:, device_constant(tuple(self.class_indices), logits.device)]


_SETTINGS = (
    *("kernel_size", "stride", "padding", "padding_mode", "dilation", "groups", "ceil_mode"),
    *("output_size", "num_groups", "num_heads", "eps", "negative_slope", "approximate"),
)
_IDLE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, DropPath)


def _digest_of_layers(network: nn.Module) -> str:
    """SHA-256 of the layers by name and kind, and of what they compute by beside their weights.

    Not of what `repr` prints: that depends on the versions of PyTorch and timm, as do layers that
    do nothing in evaluation.
    """
    digest = hashlib.sha256()
    for name, module in network.named_modules():
        leaf = next(module.children(), None) is None and not isinstance(module, _IDLE)
        settings = {key: vars(module)[key] for key in _SETTINGS if key in vars(module)}
        if leaf or settings:
            kind = type(module).__name__ if leaf else ""
            digest.update(f"{name} {kind} {settings}\n".encode())
    return digest.hexdigest()
