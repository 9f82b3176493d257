"""The section `student`: the network that is trained."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from deit.config.field_types import (
    STRICT,
    Adapters,
    Count,
    Counts,
    OptionalCount,
    Positive,
    QatMode,
    none_from_text,
)

SIZES: dict[str, dict[str, int]] = {
    "micro": {"embed_dim": 96, "depth": 6, "num_heads": 3},
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}
"""Width, depth and heads of the ViT sizes; tiny, small and base are those of DeiT's Table 1."""
STUDENTS = (
    *(f"deit_{size}" for size in SIZES),
    *(f"vit_{size}" for size in SIZES),
    "small_convnet",
    "dense",
    "regnety_002_small_stem",
    "regnety_004_small_stem",
    "rednet_micro",
    "rednet_tiny",
    "rednet_26",
    "rednet_38",
    "rednet_50",
    "rednet_26_small_stem",
)
"""The values of student.name; `timm:NAME` is any other model of timm."""


@dataclass(frozen=True)
class StudentConfig:
    """The network to train."""

    __pydantic_config__ = STRICT
    name: str = "deit_tiny"
    """Network: deit_* (class and distillation token) or vit_* (class token) in size micro, tiny,
    small or base; a ConvNet; or timm:NAME."""
    image_size: Count = 32
    """Side [px] of the student's input."""
    patch_size: Count = 4
    """Side [px] of a patch (deit_* and vit_*)."""
    embed_dim: OptionalCount = None
    """Embedding dimension (deit_* and vit_*). Default: that of the named size."""
    depth: Annotated[
        Annotated[int, Field(ge=1, le=1000)] | None, BeforeValidator(none_from_text)
    ] = None
    """Number of blocks (deit_* and vit_*). Default: that of the named size."""
    num_heads: OptionalCount = None
    """Number of attention heads (deit_* and vit_*). Default: that of the named size."""
    heads_per_block: Counts = ()
    """Number of attention heads in each block, as in a pruned student; the width of a head does not
    change. One value applies to all blocks (deit_* and vit_*). Default: num_heads."""
    mlp_hidden_per_block: Counts = ()
    """Number of hidden units in each block's MLP; one value applies to all blocks (deit_* and
    vit_*). Default: 4 * embed_dim."""
    shared_block_size: Count = 1
    """Number of consecutive blocks that share attention and MLP weights (MiniViT); norms and the
    transformations of the heads are not shared. Fewer parameters, the same compute (deit_* and
    vit_*)."""
    num_distillation_tokens: Count = 1
    """Number of distillation tokens, each with its own head; with teacher.combine tokens one per
    teacher (deit_*)."""
    weight_init: Literal["timm", "scaled"] = "timm"
    """Random initialization. timm: standard deviation 0.02 everywhere, as in the paper; scaled:
    linear layers that preserve the variance and a larger position embedding, for narrow students
    and few images (deit_* and vit_*)."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth rate of the last block, rising linearly from 0."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout rate after the position embedding, the attention projection and each linear layer of
    the MLP (deit_* and vit_*)."""
    adapters: Adapters = "none"
    """convpass: small convolutions parallel to attention and MLP of each block (Jie and Deng 2022);
    convpass_attention: parallel to attention only. Both start as the identity (deit_* and
    vit_*)."""
    adapter_dim: Count = 8
    """Number of channels in an adapter."""
    adapter_scale: Positive = 0.1
    """Factor on an adapter's output; the paper searches 0.01, 0.1, 1, 10 and 100 for each task."""
    qat: QatMode = "none"
    """Quantization-aware training. int8: weights and inputs of the linear layers and the patch
    embedding are rounded, in training and evaluation, as `deit quantize` does (deit_* and
    vit_*)."""

    @property
    def has_distillation_token(self) -> bool:
        """Whether the student has a distillation token."""
        return self.name.startswith("deit_") or "distilled" in self.name

    @property
    def is_transformer(self) -> bool:
        """Whether the student is a deit_* or vit_*, to which patch and width fields apply."""
        return self.name.startswith(("deit_", "vit_"))

    @property
    def width(self) -> int:
        """The embedding dimension of a deit_* or vit_*: embed_dim, or that of the named size."""
        return self.embed_dim or SIZES[self.name.split("_")[1]]["embed_dim"]

    @property
    def heads(self) -> int:
        """The attention heads of a deit_* or vit_*: num_heads, or those of the named size."""
        return self.num_heads or SIZES[self.name.split("_")[1]]["num_heads"]

    @property
    def num_blocks(self) -> int:
        """The number of blocks of a deit_* or vit_*: depth, or that of the named size."""
        return self.depth or SIZES[self.name.split("_")[1]]["depth"]

    @property
    def block_heads(self) -> tuple[int, ...]:
        """The number of attention heads in each block of a deit_* or vit_*."""
        return _per_block(self.heads_per_block or (self.heads,), self.num_blocks)

    @property
    def block_hidden(self) -> tuple[int, ...]:
        """The number of hidden units in each block's MLP of a deit_* or vit_*."""
        return _per_block(self.mlp_hidden_per_block or (4 * self.width,), self.num_blocks)


def _per_block(values: tuple[int, ...], depth: int) -> tuple[int, ...]:
    return values * depth if len(values) == 1 else values
