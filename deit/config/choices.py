"""Names that options take, for --help and checks without importing torch."""

EXPORT_PACKAGES: dict[str, tuple[str, ...]] = {
    "timm": (),
    "transformers": ("transformers",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "pt2": (),
}
"""Export formats, and the packages that each needs beside our own."""
QUANTIZATION_METHODS = ("static", "dynamic")
"""Ways to choose the ranges of activations: from training images, or from every batch."""
CALIBRATION_METHODS = ("minmax", "entropy", "percentile")
"""Ways to choose a range from the values of training images."""
TEST_SETS = ("real", "v2", "a", "r", "sketch")
"""Other test sets of ImageNet: ReaL, V2, A, R and Sketch."""
