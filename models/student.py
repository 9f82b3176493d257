"""The student: a network that takes images in [0, 1] and answers with every head it has."""

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from deit.core.types import StudentOutput
from deit.models.surgery.convpass import adapters_of
from deit.models.surgery.fake_quant import fake_quant_layers

_OF_RANGES = ("range", "observed")


class Student(nn.Module):
    """Wraps a network: normalises for it, and always returns Outputs.

    The type of the answer never depends on training or evaluation, unlike timm's forward. The
    wrapped network's own parameter names are what checkpoints hold (`student.network`).
    """

    def __init__(
        self, network: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.network = network
        self.frozen_backbone = False
        self.register_buffer("mean", _per_channel(mean), persistent=False)
        self.register_buffer("std", _per_channel(std), persistent=False)
        # Else several processes send them around before every forward pass. Ranges are alike, and
        # what each process sees is its own.
        ranges = [f"network.{n}.{kind}" for n in fake_quant_layers(network) for kind in _OF_RANGES]
        self._ddp_params_and_buffers_to_ignore = ["mean", "std", *ranges]

    def train(self, mode: bool = True) -> "Student":
        """As any module; with `still` the network stays in evaluation mode, all but adapters that
        are trained: where these or heads alone are, statistics and drop path of the rest are part
        of what is fixed."""
        super().train(mode)
        if self.frozen_backbone:
            self.network.eval()
            for adapter in adapters_of(self.network).values():
                adapter.train(mode and adapter.up.weight.requires_grad)
        return self

    def forward(self, images: Tensor) -> StudentOutput:
        """images: float [batch, 3, height, width] in [0, 1]."""
        normalised = (images - self.mean) / self.std
        network = self.network
        if not isinstance(network, VisionTransformerDistilled):
            return StudentOutput(network(normalised))
        tokens = network.forward_features(normalised)  # class, distillation token(s), patches
        several = isinstance(network.head_dist, nn.ModuleList)
        heads = network.head_dist if several else [network.head_dist]
        taught = [
            head(network.head_drop(tokens[:, place])) for place, head in enumerate(heads, start=1)
        ]
        # Stacked even if it is one: torch warns where a divided network returns a view.
        taught = torch.stack(taught, dim=1)
        return StudentOutput(network.head(network.head_drop(tokens[:, 0])), taught)


def _per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def has_distillation_head(network: nn.Module) -> bool:
    """Whether the network answers with a distillation head beside the class head."""
    return isinstance(network, VisionTransformerDistilled)
