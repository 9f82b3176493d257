"""The sections of a configuration about images: which, and how a network sees them in training."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, Field

from deit.config.fields import (
    STRICT,
    Colour,
    Count,
    Crop,
    ErasingFill,
    ExpandedPath,
    Fraction,
    Interpolation,
    Names,
    NonNegative,
    OptionalText,
    OptNonNegativeInt,
    Policy,
    Probability,
    Range,
    Source,
    Storage,
    TeacherView,
    none_from_text,
)


@dataclass(frozen=True)
class DataConfig:
    """The images and how they are split."""

    __pydantic_config__ = STRICT
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

    __pydantic_config__ = STRICT
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
    seed: Annotated[
        Annotated[int, Field(ge=0, lt=2**63)] | None, BeforeValidator(none_from_text)
    ] = None
    """Seed of order and views, so that runs of other seeds can share stored targets. Default:
    run.seed."""
    mean: Colour = None
    """Mean of the student's normalization, per channel. Default: of the training images."""
    std: Colour = None
    """Standard deviation of the student's normalization. Default: of the training images."""
    eval_crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Evaluation resizes to image size / this, then crops the center."""

    @property
    def has_fixed_teacher_view(self) -> bool:
        """Whether the teacher sees an image the same way in every epoch."""
        return self.teacher_view in ("resized", "center", "crops")

    @property
    def uses_mixing(self) -> bool:
        """Whether any training view is mixed with its partner."""
        return (self.mixup_alpha > 0 or self.cutmix_alpha > 0) and self.mixup_prob > 0
