"""The types of configuration fields: the values of each, and the conversion of text to them."""

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field


def split_words(value: object) -> object:
    """Split text at commas; an empty text gives an empty tuple. Return other values unchanged."""
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(",") if word.strip())
    return value


def none_from_text(value: object) -> object:
    """Return None for the text `none`, and other values unchanged."""
    return None if isinstance(value, str) and value.lower() == "none" else value


def as_tuple(value: object) -> object:
    """Split text at commas; a single number gives a tuple of one, None and `none` an empty one."""
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        return ()
    items = (value,) if isinstance(value, int | float) else split_words(value)
    if not isinstance(items, tuple | list):
        return items
    return tuple("none" if str(item).lower() == "none" else item for item in items)


def each_or_none(value: object) -> object:
    """Convert a value as `as_tuple` does, and each `none` in it to None."""
    items = as_tuple(value)
    if not isinstance(items, tuple | list):
        return items
    return tuple(none_from_text(item) for item in items)


def _names(value: object) -> object:
    """Split text at commas; integers become text, because classes can be named 0, 1, ..."""
    items = split_words(value)
    if not isinstance(items, tuple | list):
        return items
    return tuple(str(item) if type(item) is int else item for item in items)


def _names_or_none(value: object) -> object:
    """Convert names as `_names` does; None and `none` give an empty tuple."""
    return () if value is None or none_from_text(value) is None else _names(value)


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
NamesOrNone = Annotated[tuple[str, ...], BeforeValidator(_names_or_none)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Range = Annotated[tuple[Positive, Positive], BeforeValidator(split_words)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
ChannelValues = Annotated[
    tuple[Finite, Finite, Finite] | None, BeforeValidator(lambda v: split_words(none_from_text(v)))
]
StrTuple = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
"""No value, one, or one for each teacher."""
OptionalCount = Annotated[Count | None, BeforeValidator(none_from_text)]
OptNonNegativeInt = Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(none_from_text)]
OptionalPositive = Annotated[Positive | None, BeforeValidator(none_from_text)]
OptionalNonNegative = Annotated[NonNegative | None, BeforeValidator(none_from_text)]
OptIntTuple = Annotated[tuple[Count | None, ...], BeforeValidator(each_or_none)]
FloatTuple = Annotated[tuple[Finite, ...], BeforeValidator(as_tuple)]
FractionTuple = Annotated[tuple[Fraction, ...], BeforeValidator(as_tuple)]
ExpandedPath = Annotated[str, AfterValidator(os.path.expanduser)]
OptionalText = Annotated[str | None, BeforeValidator(none_from_text)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(as_tuple)]


STRICT = ConfigDict(extra="forbid")


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
    tuple[Literal["auto", "contiguous", "channels_last"], ...], BeforeValidator(as_tuple)
]
Trackers = Annotated[
    tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], BeforeValidator(as_tuple)
]
TrainableSet = Literal["all", "heads", "attention", "adapters"]
Adapters = Literal["none", "convpass", "convpass_attention"]
QatMode = Literal["none", "int8"]
