"""The section `views`: the augmented views of training images."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, Field

from deit.config.field_types import (
    STRICT,
    ChannelValues,
    Count,
    Crop,
    ErasingFill,
    Interpolation,
    NonNegative,
    Policy,
    Probability,
    Range,
    TeacherView,
    none_from_text,
)


@dataclass(frozen=True)
class ViewsConfig:
    """The augmented views of an image in training; each is a function of (seed, epoch, sample)."""

    __pydantic_config__ = STRICT
    crop: Crop = "none"
    """none: no crop; padded: a shift by up to crop_padding; random: a square of crop_pct at
    a random position; random_resized: a box of random area and aspect ratio. Crops are resized to
    the input size."""
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
    """randaugment: timm's rand-m9-mstd0.5-inc1, with the values of the randaugment_* fields;
    three_augment: 3-Augment of DeiT III; autoaugment: the ImageNet policy (Cubuk et al. 2019)."""
    randaugment_magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    """Mean magnitude of RandAugment, from 0 to 10."""
    randaugment_magnitude_std: NonNegative = 0.5
    """Standard deviation of RandAugment's magnitude."""
    randaugment_num_ops: Count = 2
    """Number of operations that RandAugment draws for an image."""
    randaugment_prob: Probability = 0.5
    """Probability that each drawn operation is applied."""
    color_jitter: Probability = 0.0
    """Largest change of brightness, contrast and saturation, as a fraction; applied after
    auto_augment."""
    erasing_prob: Probability = 0.0
    """Probability of random erasing (Zhong et al. 2017)."""
    erasing_mode: ErasingFill = "noise"
    """Content of an erased box. noise: with the mean and standard deviation of the data; mean: the
    mean color."""
    erasing_scale: Range = (0.02, 0.3333333333333333)
    """Smallest and largest area of the erased box, as a fraction of the image."""
    erasing_ratio: Range = (0.3, 3.3333333333333335)
    """Smallest and largest aspect ratio of the erased box."""
    aug_repeats: Annotated[int, Field(ge=1, lt=2**16)] = 1
    """Views of each image in a batch (repeated augmentation, Hoffer et al. 2020); DeiT uses 3. The
    number of views per epoch does not change, so an epoch covers fewer images."""
    mixup_alpha: NonNegative = 0.0
    """Mixup weights are drawn from Beta(mixup_alpha, mixup_alpha); 0 disables mixup."""
    cutmix_alpha: NonNegative = 0.0
    """The fraction of the area that cutmix keeps is drawn from Beta(cutmix_alpha, cutmix_alpha); 0
    disables cutmix."""
    mixup_prob: Probability = 1.0
    """Probability that a pair of images is mixed."""
    mixup_switch_prob: Probability = 0.5
    """Probability that a mixed pair uses cutmix instead of mixup, if both are enabled."""
    teacher_view: TeacherView = "same"
    """The teacher's view. same: the student's view; independent: another random view; resized: the
    whole image; center: the center crop; crops: the mean of the teacher's outputs for
    teacher_num_crops random crops. The last three do not change between epochs."""
    teacher_num_crops: Annotated[int, Field(ge=1, lt=2**16)] = 1000
    """Number of crops of an image for teacher_view crops; their probabilities (at temperature 1)
    are averaged."""
    seed: Annotated[
        Annotated[int, Field(ge=0, lt=2**63)] | None, BeforeValidator(none_from_text)
    ] = None
    """Seed of the order of images and of their views; set it to share stored targets between runs
    with different run.seed. Default: run.seed."""
    mean: ChannelValues = None
    """Mean of the student's normalization, three numbers. Default: that of the training images."""
    std: ChannelValues = None
    """Standard deviation of the student's normalization, three numbers. Default: that of the
    training images."""
    eval_crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Evaluation resizes images to student.image_size / eval_crop_pct and crops the center."""

    @property
    def has_fixed_teacher_view(self) -> bool:
        """Whether the teacher's view of an image is the same in every epoch."""
        return self.teacher_view in ("resized", "center", "crops")

    @property
    def crops_a_box(self) -> bool:
        """Whether a view is a random box of the image, resized to the view's size."""
        return self.crop in ("random", "random_resized")

    @property
    def uses_mixing(self) -> bool:
        """Whether training views can be mixed (mixup or cutmix)."""
        return (self.mixup_alpha > 0 or self.cutmix_alpha > 0) and self.mixup_prob > 0
