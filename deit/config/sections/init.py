"""The section `init`: the initial weights of the student."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from deit.config.field_types import STRICT, OptionalText, PosEmbedKernel


@dataclass(frozen=True)
class InitConfig:
    """The initial weights of the student: pretrained or random."""

    __pydantic_config__ = STRICT
    weights: OptionalText = None
    """Pretrained weights: a run folder, a timm or transformers folder, a weight file, or the name
    of a timm model. Default: random weights."""
    head: Literal["keep", "new", "zero"] = "keep"
    """Classification heads. keep: those of the pretrained weights, with classes matched by name
    (without names, their number must be equal); new: random, for other classes; zero: zeros, for
    other classes."""
    pos_embed_resize: PosEmbedKernel = "deit"
    """Resizing of the position embedding. deit: bicubic, as in DeiT's code; timm: bicubic with
    antialiasing."""
    pruning_masks: str = "keep"
    """Weights that are pruned (zero, and stay zero in training). keep: those pruned in
    init.weights; none: no weights; or a file of masks (`deit lottery`)."""
    start_step: Annotated[int, Field(ge=0)] = 0
    """Step at which training starts; schedule, order and views of earlier steps are skipped
    (weight rewinding, Frankle et al. 2020)."""
