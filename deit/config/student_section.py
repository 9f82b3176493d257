"""The sections of a configuration about the student: its network and its initial weights."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from deit.config.fields import (
    STRICT,
    Adapters,
    Count,
    Counts,
    OptionalCount,
    OptionalText,
    PosEmbedKernel,
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
"""Width, depth and heads of the ViT sizes; tiny, small and base are the paper's (Table 1)."""
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
"""Every network that can be trained by name; `timm:NAME` trains any other timm model."""


@dataclass(frozen=True)
class StudentConfig:
    """The network that is trained."""

    __pydantic_config__ = STRICT
    name: str = "deit_tiny"
    """deit_*: class and distillation token; vit_*: class token; a ConvNet; or timm:NAME."""
    image_size: Count = 32
    """Side [px] of the student's input."""
    patch_size: Count = 4
    """Side [px] of a patch (deit_* and vit_*)."""
    embed_dim: OptionalCount = None
    """Width of the tokens. Default: that of the named size (deit_* and vit_*)."""
    depth: Annotated[
        Annotated[int, Field(ge=1, le=1000)] | None, BeforeValidator(none_from_text)
    ] = None
    """Number of blocks. Default: that of the named size (deit_* and vit_*)."""
    num_heads: OptionalCount = None
    """Number of attention heads. Default: that of the named size (deit_* and vit_*)."""
    heads_per_block: Counts = ()
    """Attention heads of each block of a pruned student, each as wide as before; one value: of all
    blocks. Default: num_heads (deit_* and vit_*)."""
    mlp_hidden_per_block: Counts = ()
    """Hidden units of each block's MLP, in the same format. Default: four times embed_dim (deit_*
    and vit_*)."""
    shared_block_size: Count = 1
    """Number of consecutive blocks that share attention and MLP weights; norms and the
    transformations of the heads are not shared (MiniViT; deit_* and vit_*). Fewer parameters, the
    same arithmetic."""
    num_distillation_tokens: Count = 1
    """Distillation tokens, each with its own head; one per teacher with teacher.combine tokens
    (deit_*)."""
    weight_init: Literal["timm", "scaled"] = "timm"
    """timm: standard deviation 0.02 everywhere, as in the paper. scaled: for narrow students on few
    images, linear layers that preserve the variance and a larger position embedding (deit_* and
    vit_*)."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth rate of the last block, rising linearly from 0."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout rate after the position embedding, attention and each linear layer of the MLP (deit_*
    and vit_*)."""
    adapters: Adapters = "none"
    """convpass: small convolutions parallel to attention and MLP of every block (Jie and Deng
    2022); convpass_attention: parallel to attention only. Both start as the identity (deit_* and
    vit_*)."""
    adapter_dim: Count = 8
    """Channels within an adapter."""
    adapter_scale: Positive = 0.1
    """Factor of an adapter's output; the paper searches 0.01, 0.1, 1, 10 and 100 for each task."""
    qat: QatMode = "none"
    """Quantization-aware training. int8: weights and inputs of linear layers and patch embedding
    are rounded in training and evaluation as in the file of `deit quantize` (deit_* and vit_*)."""

    @property
    def has_distillation_token(self) -> bool:
        """Whether the named student has a distillation token."""
        return self.name.startswith("deit_") or "distilled" in self.name

    @property
    def is_transformer(self) -> bool:
        """Whether the name is one of our ViT sizes, so that patch and width fields apply."""
        return self.name.startswith(("deit_", "vit_"))

    @property
    def width(self) -> int:
        """embed_dim of a deit_* or vit_*: its own, or that of the named size."""
        return self.embed_dim or SIZES[self.name.split("_")[1]]["embed_dim"]

    @property
    def heads(self) -> int:
        """num_heads of a deit_* or vit_*: its own, or that of the named size."""
        return self.num_heads or SIZES[self.name.split("_")[1]]["num_heads"]

    @property
    def num_blocks(self) -> int:
        """depth of a deit_* or vit_*: its own, or that of the named size."""
        return self.depth or SIZES[self.name.split("_")[1]]["depth"]

    @property
    def block_heads(self) -> tuple[int, ...]:
        """The attention heads of each block of a deit_* or vit_*."""
        return _per_block(self.heads_per_block or (self.heads,), self.num_blocks)

    @property
    def block_hidden(self) -> tuple[int, ...]:
        """The hidden units of each block's MLP of a deit_* or vit_*."""
        return _per_block(self.mlp_hidden_per_block or (4 * self.width,), self.num_blocks)


def _per_block(values: tuple[int, ...], depth: int) -> tuple[int, ...]:
    return values * depth if len(values) == 1 else values


@dataclass(frozen=True)
class InitConfig:
    """Initial weights of the student: those of another training, or random ones."""

    __pydantic_config__ = STRICT
    weights: OptionalText = None
    """A run folder, a timm or transformers folder, a weight file, or a timm name. Default: random
    weights."""
    head: Literal["keep", "new", "zero"] = "keep"
    """keep: match classes by name; without names their number must be equal. new: random heads, for
    other classes; zero: heads of zeros, for other classes."""
    pos_embed_resize: PosEmbedKernel = "deit"
    """How a position embedding is resized: deit: bicubic, as in DeiT's code; timm: with
    antialiasing."""
    pruning_masks: str = "keep"
    """Which weights are zero and stay zero. keep: those pruned in init.weights; none; or a file of
    masks (`deit lottery`)."""
    start_step: Annotated[int, Field(ge=0)] = 0
    """Step at which training begins; schedule, order and views of earlier steps are skipped
    (rewinding, Frankle et al. 2020)."""
