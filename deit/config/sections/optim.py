"""The section `optim`: optimizer, schedule and average of the weights."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from deit.config.field_types import (
    STRICT,
    Count,
    FractionTuple,
    NonNegative,
    OptionalCount,
    OptionalPositive,
    Positive,
    TrainableSet,
)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    __pydantic_config__ = STRICT
    epochs: Count = 300
    """Passes over the training images."""
    batch_size: Count = 1024
    """Global batch size: images per step over all processes and accumulation."""
    grad_accum_steps: Count = 1
    """Micro-batches per step on each process."""
    lr: Positive = 5e-4
    """Peak learning rate, before scaling by lr_base_batch_size."""
    lr_base_batch_size: OptionalCount = 512
    """The peak learning rate is lr * batch_size / lr_base_batch_size; `none`: lr is not scaled."""
    warmup_epochs: NonNegative = 5.0
    """Epochs of linear warm-up."""
    warmup_lr: NonNegative = 1e-6
    """Learning rate of the first step (not scaled)."""
    min_lr: NonNegative = 1e-5
    """Learning rate after the last step (not scaled)."""
    lr_milestones: FractionTuple = ()
    """Fractions of all steps after which the learning rate drops to a tenth. Default: a half cosine
    from the end of the warm-up to min_lr."""
    weight_decay: NonNegative = 0.05
    """Decoupled weight decay; not applied to biases, norms, tokens and position embedding."""
    independent_weight_decay: bool = False
    """Decay by weight_decay times the schedule, independent of the learning rate (big_vision's
    rule), instead of weight_decay times the learning rate (torch's)."""
    name: Literal["adamw", "sgd"] = "adamw"
    """adamw; or sgd with momentum and weight decay added to the gradient."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """sgd: momentum."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay rate of AdamW's second moment."""
    clip_grad_norm: OptionalPositive = None
    """Largest norm of all gradients together; larger ones are scaled down. Default: no
    clipping."""
    trainable: TrainableSet = "all"
    """Which weights are trained: all; heads; attention: heads and attention layers; adapters: heads
    and adapters (see student.adapters). With heads or adapters, all other layers are in evaluation
    mode. With adapters, checkpoints hold only the trained weights, so init.weights must stay at its
    path."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate per layer, from the heads down to the first layer; 1: the same
    rate for all."""
    ema_epochs: NonNegative = 0.0
    """Time constant of the exponential moving average of the weights [epochs]; 0 disables it."""

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: lr * batch_size / lr_base_batch_size."""
        if self.lr_base_batch_size is None:
            return self.lr
        return self.lr * self.batch_size / self.lr_base_batch_size
