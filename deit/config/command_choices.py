"""Choices and defaults of options, so that --help and checks do not import torch."""

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from os import PathLike, fspath
from os.path import expanduser
from pathlib import Path

from deit.core.errors import ConfigError, did_you_mean

EXPORT_PACKAGES: dict[str, tuple[str, ...]] = {
    "timm": (),
    "transformers": ("transformers",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "pt2": (),
}
"""Export formats, and the additional packages that each needs."""
QUANTIZATION_METHODS = ("static", "dynamic")
"""Where the ranges of activations are computed: on training images, or on each input batch."""
CALIBRATION_METHODS = ("minmax", "entropy", "percentile")
"""How a range is computed from the activations of training images."""
TEST_SETS = ("imagenet-real", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch")
"""Additional test sets for ImageNet models: ReaL, V2, A, R and Sketch."""
SPLITS = ("train", "validation", "test")
"""The parts of the images."""
EXPORT_IMAGES = 512
"""Test images that an export is compared with the run on."""
TOP_K = 5
"""Classes that a prediction lists for each head."""
NUM_VIEWS = 12
"""Views on a sheet of training views."""
NUM_QUERIES = 2048
"""Teacher outputs that the verification of a target store recomputes."""
PROFILED_STEPS = 10
"""Training steps that a profile times."""
RETRIES = 1
"""Retries of a run after a transient failure."""
TOP_POINTS = 5
"""Best points that a sweep prints."""


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise ConfigError if a parameter has a value that is not known."""
    if value not in (known := tuple(known)):
        advice = did_you_mean(value, known) if isinstance(value, str) else ""
        raise ConfigError(f"{name} = {value}: should be one of {', '.join(known)}{advice}")


def check_path(name: str, value: str | PathLike) -> str:
    """Return a path as text, with `~` replaced by the home directory.

    Raises ConfigError for a value of another type.
    """
    if not isinstance(value, str | PathLike):
        raise ConfigError(f"{name}: should be a path, str or Path; got {type(value).__name__}")
    return expanduser(fspath(value))


def check_paths(name: str, values: str | PathLike | Sequence[str | PathLike]) -> list[Path]:
    """Return one path or several as a list. Raises ConfigError for none and for other types."""
    paths = [values] if isinstance(values, str | PathLike) else values
    if not len(paths):
        raise ConfigError(f"{name}: should be at least one path")
    return [Path(check_path(name, path)) for path in paths]


def check_channels(name: str, values: Iterable[float]) -> tuple[float, float, float]:
    """Return the mean or standard deviation of each channel as numbers, for images in [0, 1].

    name: mean, or std, which should be positive. Raises ConfigError for others.
    """
    try:
        numbers = tuple(map(float, values))
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3:
        raise ConfigError(f"{name} = {values}: should be three numbers")
    if name == "std" and not min(numbers) > 0:
        raise ConfigError(f"std = {values}: should be positive")
    if name == "mean" and not 0 <= min(numbers) <= max(numbers) <= 1:
        raise ConfigError(
            f"mean = {values}: should be in [0, 1], as the images are; divide those for 0 ... 255 "
            "by 255, and std too"
        )
    return numbers


def check_at_least(name: str, value: float, least: float, *, integer: bool = True) -> None:
    """Raise ConfigError if a parameter is no number, or below its smallest value.

    integer: whether it is a number of something.
    """
    if isinstance(value, bool) or not isinstance(value, Integral if integer else Real):
        kind = "an integer" if integer else "a number"
        raise ConfigError(f"{name} = {value!r}: should be {kind} of at least {least:g}")
    if not value >= least:
        raise ConfigError(f"{name} = {value:g}: should be at least {least:g}")


def check_fraction(name: str, value: float) -> None:
    """Raise ConfigError if a parameter is not in (0, 1]."""
    if not (isinstance(value, Real) and 0 < value <= 1):
        raise ConfigError(f"{name} = {value!r}: should be above 0 and at most 1")


_MAX_EPOCHS = 2**32  # an epoch is a 32-bit word of the random streams


def check_epoch(epoch: int) -> None:
    """Raise ConfigError for an invalid index of an epoch."""
    if not isinstance(epoch, Integral) or not 0 <= epoch < _MAX_EPOCHS:
        raise ConfigError(f"epoch = {epoch!r}: should be an integer in 0 ... {_MAX_EPOCHS - 1}")


def check_content_name(content: str | None, name: str = "content") -> None:
    """Raise ConfigError unless the content of a target store is hard, full or top-K, or None."""
    text = str(content)
    count = text.removeprefix("top-")
    is_top = count != text == content and count.isdecimal() and count.isascii() and int(count) > 0
    if content not in (None, "hard", "full") and not is_top:
        separator = " " if name.startswith("--") else " = "
        raise ConfigError(
            f"{name}{separator}{content}: should be hard, full or top-K, as in top-10"
        )


def check_amount(epochs: int | None, part: tuple[int, int]) -> None:
    """Raise ConfigError for an invalid number of epochs to store, or a part (index, number of
    parts) that does not exist."""
    if epochs is not None and not (isinstance(epochs, Integral) and 0 < epochs < _MAX_EPOCHS):
        raise ConfigError(f"epochs = {epochs}: should be in 1 ... {_MAX_EPOCHS - 1}")
    if not 0 <= part[0] < part[1]:
        raise ConfigError(f"part = {part}: should be (index, number of parts), the index from 0")


def check_test_set(
    test_set: str | None, *, split: str, root: str | None, teacher: str | Sequence[str] | None
) -> None:
    """Raise ConfigError if a split or test set does not exist, or does not go with the other
    parameters of an evaluation."""
    check_choice("split", split, SPLITS)
    if test_set is None:
        return
    check_choice("test_set", test_set, TEST_SETS)
    if teacher or split != "test":
        raise ConfigError(f"test_set = {test_set}: cannot be combined with teacher or split")
    if root is None:
        raise ConfigError(f"test_set = {test_set}: needs data.root, the folder of its images")
