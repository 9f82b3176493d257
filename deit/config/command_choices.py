"""Choices of options, so that --help and checks do not import torch."""

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
