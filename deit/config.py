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
Several = Annotated[tuple[str, ...], BeforeValidator(_listed)]
"""None, one, or several, one for each teacher."""
OptionalCount = Annotated[Count | None, BeforeValidator(_none)]
OptionalWhole = Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(_none)]
OptionalPositive = Annotated[Positive | None, BeforeValidator(_none)]
OptionalNonNegative = Annotated[NonNegative | None, BeforeValidator(_none)]
Sides = Annotated[tuple[Count | None, ...], BeforeValidator(_each_or_none)]
Numbers = Annotated[tuple[Finite, ...], BeforeValidator(_listed)]
Shares = Annotated[tuple[Fraction, ...], BeforeValidator(_listed)]
Place = Annotated[str, AfterValidator(os.path.expanduser)]
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
Fill = Literal["noise", "mean"]
Kind = Literal["hard", "soft", "cross_entropy", "dkd", "none"]
Through = Literal["distillation", "class", "all"]
Combine = Literal["probabilities", "logits", "tokens"]
Kernel = Literal["deit", "timm"]
Compile = Literal["none", "default", "reduce-overhead", "max-autotune"]
Linear = Literal["auto", "torch", "onednn"]
Layouts = Annotated[
    tuple[Literal["auto", "contiguous", "channels_last"], ...], BeforeValidator(_listed)
]
Trackers = Annotated[
    tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], BeforeValidator(_listed)
]
Trained = Literal["all", "heads", "attention", "adapters"]
Adapters = Literal["none", "convpass", "convpass_attention"]
Rounding = Literal["none", "int8"]


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are split."""

    __pydantic_config__ = _STRICT
    source: Source = "digits"
    """Where the images come from. folder: any ImageFolder layout, with splits by any usual name
    (train, val or valid, test) or without; shards: tar files of KEY.jpg and KEY.cls (WebDataset);
    reader: what timm reads, see data.reader."""
    root: Place = "data"
    """Folder of the images (not read by digits)."""
    reader: OptionalText = None
    """For source reader: folder, tar (a tar of class folders), hfds/NAME or torch/NAME."""
    download: bool = False
    """Allow MNIST and CIFAR (checksums are verified) or what data.reader names to be downloaded."""
    storage: Storage = "auto"
    """memory: uint8 squares of image_size. files: encoded until each view needs them (folder,
    shards, reader). auto: memory up to 2 GiB of squares, else files."""
    workers: OptionalWhole = None
    """Processes that decode images for one training process, with storage files. None: one for
    each of its processor cores, at most 8."""
    quarantine: OptionalText = None
    """Text file of images to leave out, one name below root a line, as `deit scan` writes it."""
    image_size: Count = 32
    """Side [px] of the square images kept in memory; views are cut from these."""
    classes: Names = ()
    """Class names to keep, with commas between, or @FILE, a text file (UTF-8, or with a byte-order
    mark) with one name a line. Empty: all."""
    held_out: Names = ()
    """Classes, named likewise, without a training or validation image: the student knows them by
    its teacher alone. The test split keeps them."""
    validation_fraction: Fraction = 0.1
    """Share of each training class set aside for model selection, unless the folder has one."""
    test_fraction: Fraction = 0.2
    """Share of each class set aside for the final number in a folder without splits."""
    train_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each remaining training class that is used: below 1 studies scarce labels."""
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of all splits, apart from run.seed so that seeds share their splits."""
    memory_fraction: Fraction = 0.5
    """Share of the free memory the decoded images may take."""


@dataclass(frozen=True)
class ViewsConfig:
    """What a network sees of an image in training: a function of (seed, epoch, sample)."""

    __pydantic_config__ = _STRICT
    crop: Crop = "none"
    """none; padded: shift by up to crop_padding; random: a square of crop_side anywhere;
    random_resized: cut a box of any size and shape. Boxes are resized to the view."""
    crop_padding: Count = 4
    """Border of zeros [px] around the image for crop padded."""
    crop_side: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Side of the square of crop random, as a share of the image's shorter side."""
    crop_scale: Range = (0.08, 1.0)
    """Smallest and largest area of the box, as a share of the image, for crop random_resized."""
    crop_ratio: Range = (0.75, 1.3333333333333333)
    """Narrowest and widest aspect ratio of the box (width / height)."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest rotation [degrees], either way."""
    interpolation: Interpolation = "bicubic"
    """How pixels between pixels are found, in crops, resizes, shears and rotations."""
    policy: Policy = "none"
    """randaugment: timm's rand-m9-mstd0.5-inc1 with the next four; three_augment: DeiT III's;
    autoaugment: the policy found on ImageNet (Cubuk et al. 2019)."""
    magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    """Mean magnitude of RandAugment, in 0 ... 10."""
    magnitude_std: NonNegative = 0.5
    """Standard deviation of RandAugment's magnitude."""
    layers: Count = 2
    """Operations of RandAugment an image may go through, one after the other."""
    layer_probability: Probability = 0.5
    """Probability that an image takes part in a layer of RandAugment (timm: 0.5)."""
    color_jitter: Probability = 0.0
    """Brightness, contrast and saturation vary by up to this share (after the policy)."""
    erasing: Probability = 0.0
    """Probability that a box of an image is erased (Zhong et al. 2017)."""
    erasing_fill: Fill = "noise"
    """What an erased box holds: noise of the data's mean and deviation, or the mean colour."""
    erasing_scale: Range = (0.02, 0.3333333333333333)
    """Smallest and largest area of the erased box, as a share of the image."""
    erasing_ratio: Range = (0.3, 3.3333333333333335)
    """Narrowest and widest aspect ratio of the erased box."""
    repeats: Annotated[int, Field(ge=1, lt=2**16)] = 1
    """Views of each image in a batch (repeated augmentation, Hoffer et al. 2020); DeiT has 3. An
    epoch keeps its number of views, so it sees fewer images."""
    mixup_alpha: NonNegative = 0.0
    """Beta(alpha, alpha) of the mixup weight; 0 switches mixup off."""
    cutmix_alpha: NonNegative = 0.0
    """Beta(alpha, alpha) of the kept area in cutmix; 0 switches cutmix off."""
    mix_probability: Probability = 1.0
    """Probability that a pair of samples is mixed at all."""
    cutmix_share: Probability = 0.5
    """Where both are on: probability that a mixed pair takes cutmix and not mixup."""
    teacher_view: TeacherView = "same"
    """What the teacher sees. same: the student's view; independent: one drawn apart; and always the
    same of an image: resized: all of it; center: its centre; crops: the mean of teacher_crops."""
    teacher_crops: Annotated[int, Field(ge=1, lt=2**16)] = 1000
    """Crops of an image over which teacher_view crops takes the mean answer (at temperature 1)."""
    seed: Annotated[Annotated[int, Field(ge=0, lt=2**63)] | None, BeforeValidator(_none)] = None
    """Seed of order and views, so that runs of other seeds can share stored targets. None:
    run.seed."""
    mean: Colour = None
    """Mean of the student's normalisation, per channel. None: of the training images."""
    std: Colour = None
    """Standard deviation of the student's normalisation. None: of the training images."""
    evaluation_crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Evaluation resizes to image size / this, then cuts the centre."""


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
    """Width of the tokens. None: that of the named size (deit_* and vit_*)."""
    depth: Annotated[Annotated[int, Field(ge=1, le=1000)] | None, BeforeValidator(_none)] = None
    """Number of blocks. None: that of the named size (deit_* and vit_*)."""
    num_heads: OptionalCount = None
    """Number of attention heads. None: that of the named size (deit_* and vit_*)."""
    block_heads: Counts = ()
    """Attention heads of each block where some were pruned, each as wide as before; one value: of
    all blocks. None: num_heads (deit_* and vit_*)."""
    block_hidden: Counts = ()
    """Hidden units of each block's MLP, likewise. None: four times embed_dim (deit_* and vit_*)."""
    share: Count = 1
    """Blocks in a row that share attention and MLP, with norms and a mixing of the heads of their
    own (MiniViT; deit_* and vit_*). Fewer parameters, the same arithmetic."""
    distillation_tokens: Count = 1
    """Distillation tokens with a head each; one for each teacher with teacher.combine tokens
    (deit_*)."""
    initialisation: Literal["timm", "scaled"] = "timm"
    """timm: 0.02 everywhere, as in the paper. scaled: for narrow students on few images, linear
    layers that keep the variance and a position embedding that counts (deit_* and vit_*)."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth rate of the last block, rising linearly from 0."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the activations that is dropped after the position embedding, attention and each
    linear layer of the MLP (deit_* and vit_*)."""
    adapters: Adapters = "none"
    """convpass: small convolutions beside attention and MLP of every block (Jie and Deng 2022);
    convpass_attention: beside attention alone; both begin as if they were not there (deit_* and
    vit_*)."""
    adapter_width: Count = 8
    """Channels within an adapter."""
    adapter_scale: Positive = 0.1
    """Factor of what adapters add; the paper searches 0.01, 0.1, 1, 10 and 100 for each task."""
    rounding: Rounding = "none"
    """int8: weights and inputs of linear layers and patches are rounded as the file of `deit
    quantize` rounds them, in training and evaluation (deit_* and vit_*)."""


@dataclass(frozen=True)
class StartConfig:
    """What the student starts from: the weights of another training, or random ones."""

    __pydantic_config__ = _STRICT
    source: OptionalText = None
    """A run folder of ours, a timm or transformers folder, a weight file, or a timm name. None:
    random weights."""
    heads: Literal["keep", "new", "zero"] = "keep"
    """keep: classes are matched by name, or must be as many where the weights name none. new:
    random heads, for other classes; zero: heads of zeros, likewise."""
    kernel: Kernel = "deit"
    """How a position embedding is resized: bicubic as DeiT's code does it, or as timm, with
    antialiasing."""
    masks: str = "keep"
    """Which weights are zero and stay so. keep: those that are pruned in source; none; or a file of
    masks (`deit tickets`)."""
    update: Annotated[int, Field(ge=0)] = 0
    """The update at which training begins: schedule, order and views of those before it are passed
    over (rewinding, Frankle et al. 2020)."""


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen networks whose answers the student learns; several are an ensemble.

    With several, a list holds one value for each in the order of source; a single value is for all.
    """

    __pydantic_config__ = _STRICT
    source: Several = ()
    """A run folder of ours, a timm name or folder, a checkpoint file, or FILE.py:FUNCTION; several
    with commas between."""
    architecture: Several = ()
    """Network of a checkpoint file: a name that student.name accepts."""
    classes: NamesOrNone = ()
    """Classes of a teacher in the order of its answers: names with commas between, @FILE with one
    a line, or an order of the data's names: data (as they are), sorted, natural (room2 before
    room10, as timm numbers folders), natural_cased, caseless or reversed. Of several teachers one
    @FILE, order or none each. None: its own names, else the data's order."""
    image_size: Sides = ()
    """Side [px] of the teacher's input. None: what it was trained at."""
    mean: Numbers = ()
    """Mean of its normalisation, three numbers a teacher. None: what it was trained with."""
    std: Numbers = ()
    """Standard deviation of its normalisation, likewise."""
    weight: Numbers = ()
    """Weight of each teacher in the ensemble; only their proportion counts. None: all the same."""
    combine: Combine = "probabilities"
    """The ensemble's answer: mean of the probabilities (at loss.temperature), mean of the logits,
    or tokens: none, each teacher has a distillation token of its own."""
    layout: Layouts = ()
    """How images lie in a teacher's memory: contiguous, or channels_last, in which some networks
    compute faster and some slower. None, auto: what measures faster as the run begins; a resumed
    run keeps to it."""
    targets: Several = ()
    """Stores of answers (`deit targets write`) that replace the networks; with several teachers
    one for each, `none` for one that answers itself, or one of their combined answers."""
    allow_weak: bool = False
    """Go on although the teacher is near chance on the validation split."""


@dataclass(frozen=True)
class LossConfig:
    """The objective: labels, teacher, and which head hears which."""

    __pydantic_config__ = _STRICT
    kind: Kind = "hard"
    """hard: the teacher's argmax (DeiT eq. 3); soft: its distribution (eq. 2); cross_entropy: the
    same without the teacher's entropy; dkd: decoupled (Zhao et al. 2022); none: labels."""
    through: Through = "distillation"
    """Head that learns from the teacher; all: every head the student has."""
    distillation_weight: NonNegative = 0.5
    """Weight of the teacher's term."""
    label_weight: OptionalNonNegative = None
    """Weight of the label's term. None: what distillation_weight leaves of 1."""
    distillation_warmup: NonNegative = 0.0
    """Epochs over which the teacher's term grows from nothing to its weight."""
    temperature: Positive = 1.0
    """Temperature of the soft objectives, applied to both logits."""
    standardise: bool = False
    """Give each row of logits mean 0 and deviation 1 before the temperature (Sun et al. 2024)."""
    target_weight: NonNegative = 1.0
    """dkd: weight of how sure the teacher is of the true class (alpha)."""
    others_weight: NonNegative = 8.0
    """dkd: weight of what it says of the other classes (beta)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Smoothing of the true labels; the teacher's are never smoothed."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    __pydantic_config__ = _STRICT
    epochs: Count = 300
    """Passes over the training images."""
    batch_size: Count = 1024
    """Global batch: images per update over all processes and accumulation."""
    accumulate: Count = 1
    """Micro-batches per update on each process."""
    lr: Positive = 5e-4
    """Peak learning rate, before lr_reference_batch."""
    lr_reference_batch: OptionalCount = 512
    """The peak is lr * batch_size / this. None: lr as it stands."""
    warmup_epochs: NonNegative = 5.0
    """Epochs of linear warm-up."""
    warmup_lr: NonNegative = 1e-6
    """Learning rate of the first update (not scaled)."""
    min_lr: NonNegative = 1e-5
    """Learning rate after the last update (not scaled)."""
    decay_at: Shares = ()
    """Shares of all updates after which the learning rate falls to a tenth; none: a half cosine
    from the end of the warm-up to min_lr."""
    weight_decay: NonNegative = 0.05
    """Decoupled decay; not on biases, norms, tokens and position embedding."""
    independent_decay: bool = False
    """Decay by weight_decay times the schedule, whatever the learning rate (big_vision's rule);
    else by weight_decay times the learning rate (torch's)."""
    algorithm: Literal["adamw", "sgd"] = "adamw"
    """adamw; sgd: with momentum, and the decay added to the gradient."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """sgd: share of the last update's direction that the next one keeps."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's second moment."""
    clip_norm: OptionalPositive = None
    """Largest global gradient norm. None: no clipping."""
    trained: Trained = "all"
    """What is trained: all; heads (the rest frozen, in evaluation mode); attention: with the heads
    every attention layer; adapters: heads and adapters (see student.adapters), the rest frozen, in
    evaluation mode, and not saved again: checkpoints need start.source where it is."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the learning rate from a layer to the one before it, counted from the heads; 1: the
    same for all."""
    ema_epochs: NonNegative = 0.0
    """Horizon of the weight average [epochs]; 0 switches it off."""


@dataclass(frozen=True)
class RunConfig:
    """Seed, device and rhythm of the run."""

    __pydantic_config__ = _STRICT
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides initial weights, order, views and drop path."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a CUDA device where there is one, else the processor."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: what `accelerate launch --mixed_precision` says, else fp32."""
    linear: Linear = "auto"
    """Who computes the student's linear layers on a CPU in fp32: torch, or oneDNN called directly.
    auto: the faster by far as the run begins, else torch; a resumed run keeps to it."""
    compile: Compile = "none"
    """Mode of torch.compile for student and teachers: default fuses; reduce-overhead also records
    CUDA graphs, which pays with small batches; max-autotune tries kernels first. none: eager."""
    recompute: bool = False
    """Forget what the student's blocks computed, compute it again in the backward pass: the same
    bits for a fraction of the memory and a third more arithmetic."""
    shard: Literal["none", "full", "node"] = "none"
    """Divide the student, its gradients, AdamW's state and the average among all processes (full)
    or those of each node (node), where together they do not fit a GPU."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """bf16: processes exchange their gradients in half the bytes, rounded to bfloat16."""
    evaluate_every: Count = 1
    """Epochs between evaluations on the validation split; the last epoch always counts."""
    evaluation_batch: Count = 256
    """Images per process in an evaluation step."""
    save_every: OptionalCount = None
    """Updates between checkpoints within an epoch; None: one at the end of each epoch alone."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Checkpoints that stay: a damaged one must never be the only one."""
    keep_updates: Counts = ()
    """Updates whose checkpoints stay beside these, to go back to."""
    fit_memory: bool = False
    """Halve the micro-batches (optim.accumulate twice as large) until one fits, before the first
    update; the batch stays."""
    max_skipped: Count = 10
    """Updates in a row that may be left out because loss or gradient is not finite."""
    trackers: Trackers = ()
    """Where metrics go besides the run folder: tensorboard, wandb, mlflow, trackio."""
    timeout: Seconds = 300.0
    """Seconds after which a process that does not answer counts as lost."""


@dataclass(frozen=True)
class Config:
    """Everything that decides the result of a run."""

    __pydantic_config__ = _STRICT
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    start: StartConfig = field(default_factory=StartConfig)
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


RESUMABLE = (
    "data.root",
    "data.download",
    "data.memory_fraction",
    "data.workers",
    "teacher.targets",  # that it is the same store is told by its digest
    "teacher.source",  # and the same teacher by that of its weights
    "optim.accumulate",  # the batch stays
    "run.device",
    "teacher.layout",
    "run.linear",
    "run.compile",
    "run.recompute",
    "run.shard",
    "run.evaluation_batch",
    "run.save_every",
    "run.keep_checkpoints",
    "run.keep_updates",
    "run.fit_memory",
    "run.max_skipped",
    "run.trackers",
    "run.timeout",
)
"""Settings that say where and how to compute, not what: a resumed run may change them."""


OF_IMAGES = ("source", "root", "reader", "classes", "quarantine", "split_seed")
OF_IMAGES += ("validation_fraction", "test_fraction")
"""Fields of the data that say which images are in which split."""


def other_images(one: DataConfig, other: DataConfig) -> str | None:
    """The field by which two have other images in their splits; None where they have the same."""
    for leaf in OF_IMAGES:
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


def code_of(teacher: TeacherConfig) -> tuple[str, ...]:
    """The sources of teachers that are somebody's code, FILE.py:FUNCTION."""
    return tuple(source for source in teacher.source if source is not None and ".py:" in source)


def width_of(student: StudentConfig) -> int:
    """The width of a ViT of ours: its own, or that of the named size."""
    return student.embed_dim or SIZES[student.name.split("_")[1]]["embed_dim"]


def heads_in(student: StudentConfig) -> int:
    """The attention heads of a ViT of ours: its own, or those of the named size."""
    return student.num_heads or SIZES[student.name.split("_")[1]]["num_heads"]


def depth_of(student: StudentConfig) -> int:
    """The blocks of a ViT of ours: its own, or those of the named size."""
    return student.depth or SIZES[student.name.split("_")[1]]["depth"]


def heads_of_blocks(student: StudentConfig) -> tuple[int, ...]:
    """The attention heads of each block of a ViT of ours."""
    return _of_blocks(student.block_heads or (heads_in(student),), depth_of(student))


def hidden_of_blocks(student: StudentConfig) -> tuple[int, ...]:
    """The hidden units of each block's MLP of a ViT of ours."""
    return _of_blocks(student.block_hidden or (4 * width_of(student),), depth_of(student))


def _of_blocks(values: tuple[int, ...], depth: int) -> tuple[int, ...]:
    return values * depth if len(values) == 1 else values


def fixed(views: ViewsConfig) -> bool:
    """Whether the teacher sees an image always the same way."""
    return views.teacher_view in ("resized", "center", "crops")


def views_seed(config: Config) -> int:
    """The seed of order and views."""
    return config.run.seed if config.views.seed is None else config.views.seed


def label_weight(loss: LossConfig) -> float:
    """The weight of the label's term."""
    return 1 - loss.distillation_weight if loss.label_weight is None else loss.label_weight


def mixes(views: ViewsConfig) -> bool:
    """Whether any training view is mixed with its partner."""
    return (views.mixup_alpha > 0 or views.cutmix_alpha > 0) and views.mix_probability > 0


def peak_lr(optim: OptimConfig) -> float:
    """The learning rate after warm-up: lr * batch_size / lr_reference_batch."""
    if optim.lr_reference_batch is None:
        return optim.lr
    return optim.lr * optim.batch_size / optim.lr_reference_batch
