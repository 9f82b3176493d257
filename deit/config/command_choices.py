"""Choices and defaults of options, so that --help and checks do not import torch."""

from collections.abc import Iterable, Sequence

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
        raise ConfigError(
            f"{name} = {value}: should be one of {', '.join(known)}{did_you_mean(value, known)}"
        )


def check_at_least(name: str, value: float, least: float) -> None:
    """Raise ConfigError if a parameter is below its smallest value."""
    if not value >= least:
        raise ConfigError(f"{name} = {value:g}: should be at least {least:g}")


_MAX_EPOCHS = 2**32  # an epoch is a 32-bit word of the random streams


def check_epoch(epoch: int) -> None:
    """Raise ConfigError for an invalid index of an epoch."""
    if not 0 <= epoch < _MAX_EPOCHS:
        raise ConfigError(f"epoch = {epoch}: should be in 0 ... {_MAX_EPOCHS - 1}")


def check_amount(epochs: int | None, part: tuple[int, int]) -> None:
    """Raise ConfigError for an invalid number of epochs to store, or a part (index, number of
    parts) that does not exist."""
    if epochs is not None and not 0 < epochs < _MAX_EPOCHS:
        raise ConfigError(f"epochs = {epochs}: should be in 1 ... {_MAX_EPOCHS - 1}")
    if not 0 <= part[0] < part[1]:
        raise ConfigError(f"part = {part}: should be (index, number of parts), the index from 0")


def check_test_set(
    test_set: str | None, *, split: str, root: str | None, teacher: str | Sequence[str] | None
) -> None:
    """Raise ConfigError if a test set does not exist, or does not go with the other parameters of
    an evaluation."""
    if test_set is None:
        return
    check_choice("test_set", test_set, TEST_SETS)
    if teacher or split != "test":
        raise ConfigError(f"test_set = {test_set}: cannot be combined with teacher or split")
    if root is None:
        raise ConfigError(f"test_set = {test_set}: needs data.root, the folder of its images")
