"""The configuration of a run: frozen sections of typed fields."""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from deit.config.data_section import DataConfig, ViewsConfig
from deit.config.fields import (
    STRICT,
    Compile,
    Count,
    Counts,
    DistillationHead,
    EnsembleMode,
    FloatTuple,
    FractionTuple,
    LinearBackend,
    LossKind,
    MemoryFormats,
    NamesOrNone,
    NonNegative,
    OptIntTuple,
    OptionalCount,
    OptionalNonNegative,
    OptionalPositive,
    Positive,
    Seconds,
    StrTuple,
    Trackers,
    TrainableSet,
)
from deit.config.student_section import InitConfig, StudentConfig

CLASS_ORDERS = ("data", "sorted", "natural", "natural_cased", "caseless", "reversed")
"""Names of class orders that teacher.classes accepts."""


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen networks that the student learns from; several form an ensemble.

    With several teachers, a list holds one value per teacher in the order of source; a single value
    applies to all.
    """

    __pydantic_config__ = STRICT
    source: StrTuple = ()
    """A run folder, a timm name or folder, a checkpoint file, or FILE.py:FUNCTION; several
    separated by commas."""
    architecture: StrTuple = ()
    """Network of a checkpoint file: a name that student.name accepts."""
    classes: NamesOrNone = ()
    """Classes of a teacher in the order of its outputs: names separated by commas, @FILE with one
    per line, or an order of the data's names: data (unchanged), sorted, natural (room2 before
    room10, as timm numbers folders), natural_cased, caseless or reversed. With several teachers,
    one @FILE, order or none each. Default: the names stored with the teacher, else the data's
    order."""
    image_size: OptIntTuple = ()
    """Side [px] of the teacher's input. Default: the size of its training."""
    mean: FloatTuple = ()
    """Mean of the teacher's normalization, three numbers per teacher. Default: that of its
    training."""
    std: FloatTuple = ()
    """Standard deviation of the teacher's normalization, three numbers per teacher. Default: that
    of its training."""
    weights: FloatTuple = ()
    """Weight of each teacher in the ensemble; only the proportions matter. Default: equal
    weights."""
    combine: EnsembleMode = "probabilities"
    """Output of an ensemble. probabilities: their mean (at loss.temperature); logits: their mean;
    tokens: not combined, each teacher has its own distillation token."""
    memory_format: MemoryFormats = ()
    """Memory format of a teacher's images: contiguous, channels_last or auto; which one is faster
    depends on the network. Default: auto, channels_last for ConvNets on a CPU or in mixed
    precision."""
    target_stores: StrTuple = ()
    """Stored teacher outputs (`deit targets write`), used instead of running the teachers. With
    several teachers: one per teacher (`none` to run it), or one store of their combined outputs."""
    allow_near_chance: bool = False
    """Train even if the teacher's accuracy on the validation split is near chance."""

    @property
    def code_sources(self) -> tuple[str, ...]:
        """The sources that run Python code (FILE.py:FUNCTION)."""
        return tuple(source for source in self.source if source is not None and ".py:" in source)


@dataclass(frozen=True)
class LossConfig:
    """The loss: label term, teacher term, and which head each applies to."""

    __pydantic_config__ = STRICT
    kind: LossKind = "hard"
    """hard: cross-entropy with the teacher's argmax (DeiT eq. 3); soft: KL divergence from its
    distribution (eq. 2); cross_entropy: soft without the teacher's entropy; dkd: decoupled (Zhao et
    al. 2022); none: labels only."""
    head: DistillationHead = "distillation"
    """Head that learns from the teacher; all: every head of the student."""
    distillation_weight: NonNegative = 0.5
    """Weight of the teacher term."""
    label_weight: OptionalNonNegative = None
    """Weight of the label term. Default: 1 - distillation_weight."""
    distillation_warmup_epochs: NonNegative = 0.0
    """Epochs over which the weight of the teacher term rises linearly from 0."""
    temperature: Positive = 1.0
    """Temperature of the soft losses, applied to both logits."""
    standardize_logits: bool = False
    """Standardize each row of logits (mean 0, standard deviation 1) before the temperature (Sun et
    al. 2024)."""
    dkd_alpha: NonNegative = 1.0
    """dkd: weight of the target-class term (alpha)."""
    dkd_beta: NonNegative = 8.0
    """dkd: weight of the non-target-class term (beta)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Smoothing of the true labels; the teacher's labels are never smoothed."""

    @property
    def effective_label_weight(self) -> float:
        """The weight of the label term: label_weight, or 1 - distillation_weight."""
        return 1 - self.distillation_weight if self.label_weight is None else self.label_weight


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


@dataclass(frozen=True)
class RunConfig:
    """Seed, hardware, evaluation and checkpoint intervals."""

    __pydantic_config__ = STRICT
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initial weights, order of the images, views, drop path and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a CUDA device if there is one, else the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: the value of `accelerate launch --mixed_precision`, else fp32."""
    linear_backend: LinearBackend = "auto"
    """Implementation of the student's linear layers on a CPU in fp32: torch, or oneDNN called
    directly. auto: oneDNN on AMD processors, where PyTorch's own matrix products are slow."""
    compile: Compile = "none"
    """Mode of torch.compile for student and teachers. none: eager; default: fused kernels;
    reduce-overhead: also CUDA graphs, for small batches; max-autotune: kernels chosen by
    benchmarks."""
    activation_checkpointing: bool = False
    """Recompute the activations of the student's blocks in the backward pass. The results are
    bit-identical; it saves most of their memory for about a third more compute."""
    sharding: Literal["none", "fsdp", "hsdp"] = "none"
    """Shard the student, its gradients, AdamW's state and the EMA over all processes (fsdp) or the
    processes of each node (hsdp), for students that do not fit one GPU."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """bf16: processes exchange gradients rounded to bfloat16, which halves the traffic."""
    eval_every_epochs: Count = 1
    """Epochs between evaluations on the validation split; the last epoch is always evaluated."""
    eval_batch_size: Count = 256
    """Images per batch and process in evaluations."""
    save_every_steps: OptionalCount = None
    """Steps between checkpoints, in addition to one at the end of each epoch. Default: only at the
    end of each epoch."""
    num_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Number of latest checkpoints to keep; at least 2, in case one gets damaged."""
    keep_steps: Counts = ()
    """Steps whose checkpoints are also kept, for example to rewind to them."""
    auto_micro_batch: bool = False
    """Before the first step, double optim.grad_accum_steps until a micro-batch fits the memory. The
    batch size stays the same."""
    max_nonfinite_steps: Count = 10
    """Largest number of consecutive steps that may be skipped because the loss or a gradient is not
    finite; one more stops the run."""
    trackers: Trackers = ()
    """Trackers that log metrics in addition to the run folder: tensorboard, wandb, mlflow, trackio;
    several separated by commas."""
    timeout_s: Seconds = 300.0
    """Time [s] after which a process that does not respond counts as lost."""


class EvalSettings(NamedTuple):
    """The settings of an evaluation on validation or test images.

    image_size: side of the student's input [px].
    crop_pct: side of the center crop, as a fraction of the resized image.
    batch_size: images per batch and process.
    num_workers: decoding processes; None: by the number of cores.
    """

    image_size: int
    crop_pct: float
    batch_size: int
    num_workers: int | None


@dataclass(frozen=True)
class Config:
    """The configuration of a run, in sections."""

    __pydantic_config__ = STRICT
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    init: InitConfig = field(default_factory=InitConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def views_seed(self) -> int:
        """The seed of order and views: views.seed, or run.seed."""
        return self.run.seed if self.views.seed is None else self.views.seed

    @property
    def evaluation(self) -> EvalSettings:
        """The settings of evaluations on validation and test images."""
        return EvalSettings(
            image_size=self.student.image_size,
            crop_pct=self.views.eval_crop_pct,
            batch_size=self.run.eval_batch_size,
            num_workers=self.data.num_workers,
        )

    def replace(self, **sections: dict[str, Any] | object) -> "Config":
        """Return a copy with some fields or sections replaced.

        sections: by section name, a dict of field values, or a whole new section.
        Raises TypeError for an unknown section or field. Values are checked when a run starts.

        >>> from deit.config.recipes import find_recipe
        >>> config = find_recipe("digits").replace(optim={"lr": 2e-3, "epochs": 20})
        >>> config.optim.lr, config.optim.epochs, config.optim.batch_size
        (0.002, 20, 32)
        """
        new = {
            name: dataclasses.replace(getattr(self, name), **fields)
            if isinstance(fields, dict)
            else fields
            for name, fields in sections.items()
        }
        return dataclasses.replace(self, **new)


RESUMABLE_FIELDS = (
    "data.root",
    "data.download",
    "data.memory_fraction",
    "data.num_workers",
    "teacher.target_stores",  # compared by the digest of the stores
    "teacher.source",  # compared by the digest of the weights
    "optim.grad_accum_steps",  # the batch size stays the same
    "run.device",
    "teacher.memory_format",
    "run.linear_backend",
    "run.compile",
    "run.activation_checkpointing",
    "run.sharding",
    "run.eval_batch_size",
    "run.save_every_steps",
    "run.num_checkpoints",
    "run.keep_steps",
    "run.auto_micro_batch",
    "run.max_nonfinite_steps",
    "run.trackers",
    "run.timeout_s",
)
"""Fields that a resumed run may change: they choose where and how to compute, not what."""


SPLIT_FIELDS = ("source", "root", "reader", "classes", "exclude_list", "split_seed")
SPLIT_FIELDS += ("validation_fraction", "test_fraction")
"""Fields of DataConfig that decide which images are in which split."""


def differing_split_field(first: DataConfig, second: DataConfig) -> str | None:
    """Return the first field by which the splits differ; None if they have the same images."""
    for leaf in SPLIT_FIELDS:
        values = [getattr(data, leaf) for data in (first, second)]
        if leaf == "root":
            values = [os.path.realpath(value) * (first.source != "digits") for value in values]
        if values[0] != values[1]:
            return f"data.{leaf}"
    return None


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return the configuration as nested dicts, ready for JSON."""
    return dataclasses.asdict(config)
