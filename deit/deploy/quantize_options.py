"""The options of a quantization and their checks; no torch."""

import re
from dataclasses import dataclass

from deit.config.arguments import check_fields
from deit.config.command_choices import (
    CALIBRATION_METHODS,
    QUANTIZATION_METHODS,
    check_at_least,
    check_choice,
)
from deit.core.errors import ConfigError

CALIBRATION_IMAGES = 128
CALIBRATION_METHOD = "minmax"
PERCENTILE = 99.99


@dataclass(frozen=True)
class QuantizeOptions:
    """The options of a quantization.

    method: static (activation ranges are calibrated on training images) or dynamic (they are
    computed for each batch). The static method takes calibration_images, the number of training
    images (default: CALIBRATION_IMAGES); calibration_method, one of CALIBRATION_METHODS (default:
    CALIBRATION_METHOD); and percentile [%], for the method of that name (default: PERCENTILE).
    quantize_attention: also quantize the products of two activations. exclude: a regular expression
    for the names of layers that stay float. max_drop: the largest drop of top-1 on the test images
    [percentage points]. sensitivity: also measure accuracy with each layer quantized alone.

    >>> QuantizeOptions(percentile=99.9).range_method, QuantizeOptions().num_images
    ('percentile', 128)
    """

    method: str = "static"
    calibration_images: int | None = None
    calibration_method: str | None = None
    percentile: float | None = None
    quantize_attention: bool = False
    exclude: str | None = None
    max_drop: float = 1.0
    sensitivity: bool = False

    @property
    def num_images(self) -> int:
        """The number of images to calibrate on."""
        return CALIBRATION_IMAGES if self.calibration_images is None else self.calibration_images

    @property
    def range_method(self) -> str:
        """The calibration method; a percentile implies its method."""
        default = CALIBRATION_METHOD if self.percentile is None else "percentile"
        return self.calibration_method or default

    @property
    def range_percentile(self) -> float | None:
        """The percentile of the calibration; None for the other methods."""
        if self.range_method != "percentile":
            return None
        return PERCENTILE if self.percentile is None else self.percentile


def check_options(options: QuantizeOptions) -> None:
    """Raise ConfigError if an option has an invalid value."""
    check_fields(options)
    check_choice("method", options.method, QUANTIZATION_METHODS)
    if options.calibration_method is not None:
        check_choice("calibration_method", options.calibration_method, CALIBRATION_METHODS)
    for name in ("calibration_images", "calibration_method", "percentile"):
        value = getattr(options, name)
        if options.method == "dynamic" and value is not None:
            raise ConfigError(
                f"{name} = {value}: the dynamic method does not calibrate; leave it out"
            )
    check_at_least("calibration_images", options.num_images, 1)
    percentile = options.percentile
    if percentile is not None and not 50 < percentile <= 100:
        raise ConfigError(f"percentile = {percentile:g}: should be above 50, at most 100")
    if not 0 <= options.max_drop <= 100:
        raise ConfigError(f"max_drop = {options.max_drop:g}: should be in 0 ... 100")
    if percentile is not None and options.range_method != "percentile":
        raise ConfigError(
            f"percentile = {percentile:g}: is for calibration_method percentile, not "
            f"{options.range_method}"
        )
    try:
        re.compile(options.exclude or "")
    except re.error as error:
        raise ConfigError(
            f"exclude = {options.exclude}: is not a regular expression ({error})"
        ) from None
