"""The ranges of activations for int8: calibrated on images, or observed in training."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from deit.deploy.int8_layers import METHODS, QuantizableLayers, by_onnxruntime

CALIBRATIONS = {
    "minmax": {},
    # The default has as many bins as levels, which leaves nothing to optimize.
    "entropy": {"num_bins": 512, "num_quantized_bins": 128},
    "percentile": {"num_bins": 2048, "symmetric": False},
}
"""How a range is computed from activations, with the options of ONNX Runtime for it."""


def calibrate(
    prepared: Path, batches: Iterable[Tensor], *, method: str, percentile: float | None = None
) -> Any:
    """Return the ranges of activations over images, as ONNX Runtime's quantizer takes them.

    prepared: a file written by `prepare`. batches: normalized images [batch, 3, side, side]; the
    activations of one batch at a time are in memory. method: a key of CALIBRATIONS. percentile: for
    that method, the share of values [%] inside the range. Raises CheckpointError if ONNX Runtime
    fails.
    """
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    options = CALIBRATIONS[method] | ({} if percentile is None else {"percentile": percentile})
    with tempfile.TemporaryDirectory(prefix="deit-") as folder, by_onnxruntime("calibrate"):
        calibrator = create_calibrator(
            prepared,
            METHODS["static"],
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=methods[method],
            extra_options=options,
        )
        for batch in batches:
            calibrator.collect_data(_SingleBatch(batch))
        return calibrator.compute_data()


def ranges_from_training(
    prepared: Path, layers: QuantizableLayers, ranges: dict[str, Tensor]
) -> Any:
    """Return ranges observed in training, as ONNX Runtime's quantizer takes them.

    ranges: float32 [2], the lowest and the highest value of a layer's input, by the layer's name.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import TensorsData

    graph = onnx.load(prepared).graph
    constants = {constant.name for constant in graph.initializer}
    inputs = {
        node.name: next(name for name in node.input[:2] if name not in constants)
        for node in graph.node
        if node.op_type in METHODS["static"]
    }
    by_tensor = {
        inputs[node]: tuple(bound.numpy().astype("float32") for bound in ranges[layer])
        for layer in ranges
        for node in layers.nodes[layer]
    }
    return TensorsData(CalibrationMethod.MinMax, by_tensor)


class _SingleBatch:
    """One batch, as a data reader of ONNX Runtime."""

    def __init__(self, images: Tensor) -> None:
        self.remaining = [{"pixel_values": images.numpy()}]

    def get_next(self) -> dict[str, Any] | None:
        """Return the batch once, then None."""
        return self.remaining.pop() if self.remaining else None
