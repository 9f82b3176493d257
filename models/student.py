"""The student: a network that takes images in [0, 1] and returns the logits of all its heads."""

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from deit.config.arguments import checks_types
from deit.config.sections.student import StudentConfig
from deit.core.tensors import check_images
from deit.core.types import StudentOutput
from deit.models.surgery.convpass import adapters_of
from deit.models.surgery.fake_quant import fake_quant_layers

_RANGE_BUFFERS = ("range", "observed")


class Student(nn.Module):
    """Wrap a network: normalize its input and return the logits of all heads.

    In training and in evaluation it returns a StudentOutput; timm's forward of a distilled ViT
    returns a mean of both heads in evaluation. Checkpoints store the parameters of
    `student.network`, by that network's names.

    mean, std: normalization per channel, for images in [0, 1]. config: what the network was built
    from, if it was built by a name.
    """

    @checks_types
    def __init__(
        self,
        network: nn.Module,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        config: StudentConfig | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.frozen_backbone = False
        self.config = config
        self.register_buffer("mean", _per_channel(mean), persistent=False)
        self.register_buffer("std", _per_channel(std), persistent=False)
        # DistributedDataParallel would broadcast these buffers before every forward pass. The
        # ranges are equal in all processes, and observed ranges differ by intention.
        layers = fake_quant_layers(network)
        ranges = [f"network.{name}.{buffer}" for name in layers for buffer in _RANGE_BUFFERS]
        self._ddp_params_and_buffers_to_ignore = ["mean", "std", *ranges]

    def train(self, mode: bool = True) -> "Student":
        """Set training mode; a frozen backbone stays in evaluation mode.

        With `frozen_backbone`, only trainable adapters enter training mode: the batch statistics
        and the drop path of the frozen layers must not change.
        """
        super().train(mode)
        if self.frozen_backbone:
            self.network.eval()
            for adapter in adapters_of(self.network).values():
                adapter.train(mode and adapter.up.weight.requires_grad)
        return self

    def forward(self, images: Tensor) -> StudentOutput:
        """Return the logits of images, float [batch, 3, height, width] in [0, 1].

        The class logits have the shape [batch, classes], the distillation logits [batch,
        distillation tokens, classes]; these are None for a network without distillation tokens.
        Raises ConfigError for integers.

        >>> from deit.config.sections.student import StudentConfig
        >>> from deit.models.registry import create_network
        >>> network = create_network(StudentConfig("deit_micro", image_size=8, depth=1), 10)
        >>> student = Student(network, mean=(0.5,) * 3, std=(0.25,) * 3)
        >>> output = student(torch.rand(4, 3, 8, 8))
        >>> tuple(output.class_logits.shape), tuple(output.distillation_logits.shape)
        ((4, 10), (4, 1, 10))
        """
        check_images("student", images)
        normalized = (images - self.mean) / self.std
        network = self.network
        if not isinstance(network, VisionTransformerDistilled):
            return StudentOutput(network(normalized))
        tokens = network.forward_features(normalized)  # class, distillation token(s), patches
        is_multi = isinstance(network.head_dist, nn.ModuleList)
        heads = network.head_dist if is_multi else [network.head_dist]
        distillation_logits = [
            head(network.head_drop(tokens[:, index])) for index, head in enumerate(heads, start=1)
        ]
        # Stacked even for one head: torch warns if a sharded network returns a view.
        distillation_logits = torch.stack(distillation_logits, dim=1)
        class_logits = network.head(network.head_drop(tokens[:, 0]))
        return StudentOutput(class_logits, distillation_logits)


def _per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def has_distillation_head(network: nn.Module) -> bool:
    """Return whether the network has a distillation head in addition to its class head.

    >>> from deit.models.saved_student import load_student
    >>> has_distillation_head(load_student("checkpoints/digits/best")[0].network)
    True
    """
    return isinstance(network, VisionTransformerDistilled)
