"""The configuration of a run: frozen sections of typed fields."""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field


def _words(value: object) -> object:
    """Command-line text for a list: words with commas between; nothing for the empty list."""
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(",") if word.strip())
    return value


def _none(value: object) -> object:
    return None if isinstance(value, str) and value.lower() == "none" else value


def _listed(value: object) -> object:
    """As `_words`; one value alone is a list of one, and none of them an empty one."""
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        return ()
    listed = (value,) if isinstance(value, int | float) else _words(value)
    if not isinstance(listed, tuple | list):
        return listed
    return tuple("none" if str(item).lower() == "none" else item for item in listed)


def _each_or_none(value: object) -> object:
    listed = _listed(value)
    return tuple(_none(item) for item in listed) if isinstance(listed, tuple | list) else listed


def _names(value: object) -> object:
    """As `_words`; a whole number is a name as well: classes are called so."""
    listed = _words(value)
    if not isinstance(listed, tuple | list):
        return listed
    return tuple(str(item) if type(item) is int else item for item in listed)


def _names_or_none(value: object) -> object:
    """As `_names`; none of them where it says so."""
    return () if value is None or _none(value) is None else _names(value)


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
NamesOrNone = Annotated[tuple[str, ...], BeforeValidator(_names_or_none)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Range = Annotated[tuple[Positive, Positive], BeforeValidator(_words)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Colour = Annotated[
    tuple[Finite, Finite, Finite] | None, BeforeValidator(lambda v: _words(_none(v)))
]
StrTuple = Annotated[tuple[str, ...], BeforeValidator(_listed)]
"""None, one, or several, one for each teacher."""
OptionalCount = Annotated[Count | None, BeforeValidator(_none)]
OptNonNegativeInt = Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(_none)]
OptionalPositive = Annotated[Positive | None, BeforeValidator(_none)]
OptionalNonNegative = Annotated[NonNegative | None, BeforeValidator(_none)]
OptIntTuple = Annotated[tuple[Count | None, ...], BeforeValidator(_each_or_none)]
FloatTuple = Annotated[tuple[Finite, ...], BeforeValidator(_listed)]
FractionTuple = Annotated[tuple[Fraction, ...], BeforeValidator(_listed)]
ExpandedPath = Annotated[str, AfterValidator(os.path.expanduser)]
OptionalText = Annotated[str | None, BeforeValidator(_none)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(_listed)]

_STRICT = ConfigDict(extra="forbid")

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
CLASS_ORDERS = ("data", "sorted", "natural", "natural_cased", "caseless", "reversed")
"""Orders of the data's class names that teacher.classes knows by name."""

Source = Literal["digits", "mnist", "cifar10", "cifar100", "folder", "shards", "reader"]
Storage = Literal["auto", "memory", "files"]
Crop = Literal["none", "padded", "random", "random_resized"]
TeacherView = Literal["same", "independent", "resized", "center", "crops"]
Interpolation = Literal["bilinear", "bicubic"]
Policy = Literal["none", "randaugment", "three_augment", "autoaugment"]
ErasingFill = Literal["noise", "mean"]
LossKind = Literal["hard", "soft", "cross_entropy", "dkd", "none"]
DistillationHead = Literal["distillation", "class", "all"]
EnsembleMode = Literal["probabilities", "logits", "tokens"]
PosEmbedKernel = Literal["deit", "timm"]
Compile = Literal["none", "default", "reduce-overhead", "max-autotune"]
LinearBackend = Literal["auto", "torch", "onednn"]
MemoryFormats = Annotated[
    tuple[Literal["auto", "contiguous", "channels_last"], ...], BeforeValidator(_listed)
]
Trackers = Annotated[
    tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], BeforeValidator(_listed)
]
TrainableSet = Literal["all", "heads", "attention", "adapters"]
Adapters = Literal["none", "convpass", "convpass_attention"]
QatMode = Literal["none", "int8"]


@dataclass(frozen=True)
class DataConfig:
    """The images and how they are split."""

    __pydantic_config__ = _STRICT
    source: Source = "digits"
    """Where the images come from. folder: an ImageFolder layout, with or without split folders
    (train, val or valid, test); shards: WebDataset tar files of KEY.jpg and KEY.cls; reader: a timm
    reader, see data.reader."""
    root: ExpandedPath = "data"
    """Folder of the images (unused by digits)."""
    reader: OptionalText = None
    """For source reader: folder, tar (a tar of class folders), hfds/NAME or torch/NAME."""
    download: bool = False
    """Allow downloading MNIST and CIFAR (checksums are verified) or the dataset of data.reader."""
    storage: Storage = "auto"
    """memory: uint8 squares of image_size. files: images stay encoded and each view decodes them
    (folder, shards, reader). auto: memory up to 2 GiB of squares, else files."""
    num_workers: OptNonNegativeInt = None
    """Decoding processes per training process, with storage files. Default: one per processor core,
    at most 8."""
    exclude_list: OptionalText = None
    """Text file of images to exclude, one name relative to root per line, as written by `deit
    scan`."""
    image_size: Count = 32
    """Side [px] of the square images kept in memory; views are cropped from these."""
    classes: Names = ()
    """Class names to keep, separated by commas, or @FILE, a text file (UTF-8, with or without a
    byte-order mark) with one name per line. Default: all."""
    unseen_classes: Names = ()
    """Classes, in the same format, without training or validation images: the student learns them
    from the teacher alone. The test split keeps them."""
    validation_fraction: Fraction = 0.1
    """Fraction of each training class used for model selection, unless the folder has a validation
    split."""
    test_fraction: Fraction = 0.2
    """Fraction of each class used as the test split of a folder without splits."""
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of each remaining training class that is used; below 1 to study scarce labels."""
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of all splits, separate from run.seed so that all seeds share their splits."""
    memory_fraction: Fraction = 0.5
    """Largest fraction of the free memory that decoded images may take."""


@dataclass(frozen=True)
class ViewsConfig:
    """What a network sees of an image in training: a function of (seed, epoch, sample)."""

    __pydantic_config__ = _STRICT
    crop: Crop = "none"
    """none; padded: shift by up to crop_padding; random: a square of crop_pct at a random position;
    random_resized: a box of random area and aspect ratio. Boxes are resized to the view."""
    crop_padding: Count = 4
    """Width of the zero border [px] for crop padded."""
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Side of the square for crop random, as a fraction of the image's shorter side."""
    crop_scale: Range = (0.08, 1.0)
    """Smallest and largest area of the box for crop random_resized, as a fraction of the image."""
    crop_ratio: Range = (0.75, 1.3333333333333333)
    """Smallest and largest aspect ratio of the box (width / height)."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation [degrees] in either direction."""
    interpolation: Interpolation = "bicubic"
    """Interpolation of crops, resizes, shears and rotations."""
    auto_augment: Policy = "none"
    """randaugment: timm's rand-m9-mstd0.5-inc1 with the next four settings; three_augment: DeiT
    III's; autoaugment: the ImageNet policy (Cubuk et al. 2019)."""
    randaugment_magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    """Mean magnitude of RandAugment, in 0 ... 10."""
    randaugment_magnitude_std: NonNegative = 0.5
    """Standard deviation of RandAugment's magnitude."""
    randaugment_num_ops: Count = 2
    """Operations that RandAugment applies to an image, one after the other."""
    randaugment_prob: Probability = 0.5
    """Probability that each of these operations is applied (timm: 0.5)."""
    color_jitter: Probability = 0.0
    """Brightness, contrast and saturation vary by up to this fraction (after auto_augment)."""
    erasing_prob: Probability = 0.0
    """Probability of random erasing (Zhong et al. 2017)."""
    erasing_mode: ErasingFill = "noise"
    """Content of an erased box: noise with the data's mean and standard deviation, or the mean
    color."""
    erasing_scale: Range = (0.02, 0.3333333333333333)
    """Smallest and largest area of the erased box, as a fraction of the image."""
    erasing_ratio: Range = (0.3, 3.3333333333333335)
    """Smallest and largest aspect ratio of the erased box."""
    aug_repeats: Annotated[int, Field(ge=1, lt=2**16)] = 1
    """Views of each image in a batch (repeated augmentation, Hoffer et al. 2020); DeiT uses 3. An
    epoch keeps its number of views, so it covers fewer images."""
    mixup_alpha: NonNegative = 0.0
    """Parameter of the Beta(alpha, alpha) distribution of the mixup weight; 0 disables mixup."""
    cutmix_alpha: NonNegative = 0.0
    """Parameter of the Beta(alpha, alpha) distribution of the kept area in cutmix; 0 disables
    cutmix."""
    mixup_prob: Probability = 1.0
    """Probability that a pair of samples is mixed at all."""
    mixup_switch_prob: Probability = 0.5
    """Probability that a mixed pair uses cutmix instead of mixup, if both are enabled."""
    teacher_view: TeacherView = "same"
    """What the teacher sees. same: the student's view; independent: another random view. Fixed
    views, the same in every epoch: resized: the whole image; center: its center; crops: the mean
    over teacher_num_crops."""
    teacher_num_crops: Annotated[int, Field(ge=1, lt=2**16)] = 1000
    """Crops of an image whose probabilities (at temperature 1) are averaged for teacher_view
    crops."""
    seed: Annotated[Annotated[int, Field(ge=0, lt=2**63)] | None, BeforeValidator(_none)] = None
    """Seed of order and views, so that runs of other seeds can share stored targets. Default:
    run.seed."""
    mean: Colour = None
    """Mean of the student's normalization, per channel. Default: of the training images."""
    std: Colour = None
    """Standard deviation of the student's normalization. Default: of the training images."""
    eval_crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Evaluation resizes to image size / this, then crops the center."""


@dataclass(frozen=True)
class StudentConfig:
    """The network that is trained."""

    __pydantic_config__ = _STRICT
    name: str = "deit_tiny"
    """deit_*: class and distillation token; vit_*: class token; a ConvNet; or timm:NAME."""
    image_size: Count = 32
    """Side [px] of the student's input."""
    patch_size: Count = 4
    """Side [px] of a patch (deit_* and vit_*)."""
    embed_dim: OptionalCount = None
    """Width of the tokens. Default: that of the named size (deit_* and vit_*)."""
    depth: Annotated[Annotated[int, Field(ge=1, le=1000)] | None, BeforeValidator(_none)] = None
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


@dataclass(frozen=True)
class InitConfig:
    """Initial weights of the student: those of another training, or random ones."""

    __pydantic_config__ = _STRICT
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


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen networks that the student learns from; several form an ensemble.

    With several teachers, a list holds one value per teacher in the order of source; a single value
    applies to all.
    """

    __pydantic_config__ = _STRICT
    source: StrTuple = ()
    """A run folder, a timm name or folder, a checkpoint file, or FILE.py:FUNCTION; several
    separated by commas."""
    architecture: StrTuple = ()
    """Network of a checkpoint file: a name that student.name accepts."""
    classes: NamesOrNone = ()
    """Classes of a teacher in the order of its outputs: names separated by commas, @FILE with one
    per line, or an order of the data's names: data (unchanged), sorted, natural (room2 before
    room10, as timm numbers folders), natural_cased, caseless or reversed. With several teachers,
    one @FILE, order or none each. Default: its own names, else the data's order."""
    image_size: OptIntTuple = ()
    """Side [px] of the teacher's input. Default: its training size."""
    mean: FloatTuple = ()
    """Mean of its normalization, three numbers per teacher. Default: that of its training."""
    std: FloatTuple = ()
    """Standard deviation of its normalization, in the same format."""
    weights: FloatTuple = ()
    """Weight of each teacher in the ensemble; only the proportions matter. Default: equal
    weights."""
    combine: EnsembleMode = "probabilities"
    """The ensemble's output: mean of the probabilities (at loss.temperature), mean of the logits,
    or tokens: not combined, each teacher has its own distillation token."""
    memory_format: MemoryFormats = ()
    """Memory format of a teacher's images: contiguous or channels_last; which one is faster depends
    on the network. Default, auto: the faster one by a measurement at the start of the run; a
    resumed run keeps it."""
    target_stores: StrTuple = ()
    """Stored teacher outputs (`deit targets write`) that replace the networks; with several
    teachers one per teacher, `none` for a live one, or one store of their combined outputs."""
    allow_near_chance: bool = False
    """Train even if the teacher is near chance on the validation split."""


@dataclass(frozen=True)
class LossConfig:
    """The loss: label term, teacher term, and which head each applies to."""

    __pydantic_config__ = _STRICT
    kind: LossKind = "hard"
    """hard: the teacher's argmax (DeiT eq. 3); soft: its distribution (eq. 2); cross_entropy: the
    same without the teacher's entropy; dkd: decoupled (Zhao et al. 2022); none: labels only."""
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


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    __pydantic_config__ = _STRICT
    epochs: Count = 300
    """Passes over the training images."""
    batch_size: Count = 1024
    """Global batch size: images per step over all processes and accumulation."""
    grad_accum_steps: Count = 1
    """Micro-batches per step on each process."""
    lr: Positive = 5e-4
    """Peak learning rate, before scaling by lr_base_batch_size."""
    lr_base_batch_size: OptionalCount = 512
    """The peak is lr * batch_size / this. None: lr is not scaled."""
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
    """Largest global gradient norm. Default: no clipping."""
    trainable: TrainableSet = "all"
    """Which weights are trained: all; heads; attention: heads and attention layers; adapters: heads
    and adapters (see student.adapters). With heads and adapters the rest is frozen, in evaluation
    mode; with adapters it is also not saved again, so checkpoints need init.weights at its
    place."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate factor per layer, from the heads down; 1: the same for all."""
    ema_epochs: NonNegative = 0.0
    """Horizon of the exponential moving average of the weights [epochs]; 0 disables it."""


@dataclass(frozen=True)
class RunConfig:
    """Seed, hardware, evaluation and checkpoint intervals."""

    __pydantic_config__ = _STRICT
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Determines initial weights, order, views and drop path."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a CUDA device if there is one, else the CPU."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: the value of `accelerate launch --mixed_precision`, else fp32."""
    linear_backend: LinearBackend = "auto"
    """Implementation of the student's linear layers on a CPU in fp32: torch, or oneDNN called
    directly. auto: oneDNN if it is much faster at the start of the run; a resumed run keeps it."""
    compile: Compile = "none"
    """Mode of torch.compile for student and teachers: default fuses; reduce-overhead also records
    CUDA graphs, for small batches; max-autotune benchmarks kernels first. none: eager."""
    activation_checkpointing: bool = False
    """Recompute the activations of the student's blocks in the backward pass. Bit-identical; a
    fraction of the memory for about a third more compute."""
    sharding: Literal["none", "fsdp", "hsdp"] = "none"
    """Shard the student, its gradients, AdamW's state and the EMA over all processes (fsdp) or the
    processes of each node (hsdp), for students that do not fit one GPU."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """bf16: processes exchange gradients rounded to bfloat16, half the bytes."""
    eval_every_epochs: Count = 1
    """Epochs between evaluations on the validation split; the last epoch is always evaluated."""
    eval_batch_size: Count = 256
    """Images per process in an evaluation step."""
    save_every_steps: OptionalCount = None
    """Steps between checkpoints within an epoch. Default: only at the end of each epoch."""
    num_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Checkpoints to keep; at least 2, so that a damaged one is never the only one."""
    keep_steps: Counts = ()
    """Steps whose checkpoints are kept in addition, for example to rewind to."""
    auto_micro_batch: bool = False
    """Double optim.grad_accum_steps until a micro-batch fits the memory, before the first step; the
    batch size stays the same."""
    max_nonfinite_steps: Count = 10
    """Largest number of consecutive steps that may be skipped because loss or gradient is not
    finite."""
    trackers: Trackers = ()
    """Trackers that log metrics in addition to the run folder: tensorboard, wandb, mlflow,
    trackio."""
    timeout_s: Seconds = 300.0
    """Seconds after which a process that does not answer counts as lost."""


@dataclass(frozen=True)
class Config:
    """Everything that decides the result of a run."""

    __pydantic_config__ = _STRICT
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    init: InitConfig = field(default_factory=InitConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def replace(self, **sections: dict[str, Any] | object) -> "Config":
        """Return a copy with some fields of some sections replaced.

        sections: by section name, a dict of field values, or a whole new section.
        Raises TypeError on an unknown section or field. Values are checked when a run begins.

        Example: `digits().replace(optim={"lr": 1e-3})`.
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
    "teacher.target_stores",  # that it is the same store is told by its digest
    "teacher.source",  # and the same teacher by that of its weights
    "optim.grad_accum_steps",  # the batch stays
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
"""Settings that say where and how to compute, not what: a resumed run may change them."""


SPLIT_FIELDS = ("source", "root", "reader", "classes", "exclude_list", "split_seed")
SPLIT_FIELDS += ("validation_fraction", "test_fraction")
"""Fields of the data that say which images are in which split."""


def differing_split_field(one: DataConfig, other: DataConfig) -> str | None:
    """The field by which two have other images in their splits; None where they have the same."""
    for leaf in SPLIT_FIELDS:
        values = [getattr(data, leaf) for data in (one, other)]
        if leaf == "root":
            values = [os.path.realpath(value) * (one.source != "digits") for value in values]
        if values[0] != values[1]:
            return f"data.{leaf}"
    return None


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain nested values, ready for JSON."""
    return dataclasses.asdict(config)


def has_distillation_token(student: StudentConfig) -> bool:
    """Whether the named student carries a distillation token."""
    return student.name.startswith("deit_") or "distilled" in student.name


def is_transformer(student: StudentConfig) -> bool:
    """Whether the name is one of our ViT sizes, so that patch and width fields apply."""
    return student.name.startswith(("deit_", "vit_"))


def code_sources(teacher: TeacherConfig) -> tuple[str, ...]:
    """The sources of teachers that are somebody's code, FILE.py:FUNCTION."""
    return tuple(source for source in teacher.source if source is not None and ".py:" in source)


def width_of(student: StudentConfig) -> int:
    """The width of a ViT of ours: its own, or that of the named size."""
    return student.embed_dim or SIZES[student.name.split("_")[1]]["embed_dim"]


def num_heads(student: StudentConfig) -> int:
    """The attention heads of a ViT of ours: its own, or those of the named size."""
    return student.num_heads or SIZES[student.name.split("_")[1]]["num_heads"]


def depth_of(student: StudentConfig) -> int:
    """The blocks of a ViT of ours: its own, or those of the named size."""
    return student.depth or SIZES[student.name.split("_")[1]]["depth"]


def heads_of_blocks(student: StudentConfig) -> tuple[int, ...]:
    """The attention heads of each block of a ViT of ours."""
    return _of_blocks(student.heads_per_block or (num_heads(student),), depth_of(student))


def hidden_of_blocks(student: StudentConfig) -> tuple[int, ...]:
    """The hidden units of each block's MLP of a ViT of ours."""
    return _of_blocks(student.mlp_hidden_per_block or (4 * width_of(student),), depth_of(student))


def _of_blocks(values: tuple[int, ...], depth: int) -> tuple[int, ...]:
    return values * depth if len(values) == 1 else values


def has_fixed_teacher_view(views: ViewsConfig) -> bool:
    """Whether the teacher sees an image always the same way."""
    return views.teacher_view in ("resized", "center", "crops")


def views_seed(config: Config) -> int:
    """The seed of order and views."""
    return config.run.seed if config.views.seed is None else config.views.seed


def label_weight(loss: LossConfig) -> float:
    """The weight of the label's term."""
    return 1 - loss.distillation_weight if loss.label_weight is None else loss.label_weight


def uses_mixing(views: ViewsConfig) -> bool:
    """Whether any training view is mixed with its partner."""
    return (views.mixup_alpha > 0 or views.cutmix_alpha > 0) and views.mixup_prob > 0


def peak_lr(optim: OptimConfig) -> float:
    """The learning rate after warm-up: lr * batch_size / lr_reference_batch."""
    if optim.lr_base_batch_size is None:
        return optim.lr
    return optim.lr * optim.batch_size / optim.lr_base_batch_size
