"""A network as float ONNX made one of 8-bit integers: which nodes, which ranges, how much noise.

Both methods keep weights as int8 with a scale for each output channel, activations as uint8 with
one scale a tensor. `static` fixes the scales of activations by a calibration and writes
QuantizeLinear and DequantizeLinear around each node; `dynamic` lets the file find them in every
batch. Normalisations, softmax and GELU stay float, and so does what linear layers put out: rounding
that as well costs 2 to 4 dB and time (docs/compression.md). The convolutions of a ConvNet put out
integers: only so ONNX Runtime computes them in integers.
"""

import math
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from deit.deploy.int8_layers import METHODS, QuantizableLayers, by_onnxruntime

CALIBRATIONS = {
    "minmax": {},
    # By default as many bins as levels: nothing to choose from.
    "entropy": {"num_bins": 512, "num_quantized_bins": 128},
    "percentile": {"num_bins": 2048, "symmetric": False},
}
"""How a range follows from what was seen, with what ONNX Runtime is to be told beside."""


def calibrate(
    prepared: Path, batches: Iterable[Tensor], *, how: str, percentile: float | None = None
) -> Any:
    """The ranges of activations over images, as ONNX Runtime's quantizer takes them.

    prepared: as `prepare` wrote it. batches: normalised images [batch, 3, side, side]; only one of
    them at a time is held with its activations. how: of CALIBRATIONS. percentile: of `percentile`,
    the share of values [%] inside the range.
    """
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    methods = {"minmax": CalibrationMethod.MinMax, "entropy": CalibrationMethod.Entropy}
    methods["percentile"] = CalibrationMethod.Percentile
    told = CALIBRATIONS[how] | ({} if percentile is None else {"percentile": percentile})
    with tempfile.TemporaryDirectory(prefix="deit-") as folder, by_onnxruntime("calibrate"):
        calibrator = create_calibrator(
            prepared,
            METHODS["static"],
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=methods[how],
            extra_options=told,
        )
        for batch in batches:
            calibrator.collect_data(_Once(batch))
        return calibrator.compute_data()


def ranges_from_training(
    prepared: Path, layers: QuantizableLayers, ranges: dict[str, Tensor]
) -> Any:
    """The ranges of activations as training left them, as ONNX Runtime's quantizer takes them.

    ranges: float32 [2], the lowest and the highest value of an input, by the layer's name.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import TensorsData

    graph = onnx.load(prepared).graph
    constants = {one.name for one in graph.initializer}
    heard = {
        node.name: next(name for name in node.input[:2] if name not in constants)
        for node in graph.node
        if node.op_type in METHODS["static"]
    }
    found = {
        heard[node]: tuple(one.numpy().astype("float32") for one in ranges[layer])
        for layer in ranges
        for node in layers.nodes[layer]
    }
    return TensorsData(CalibrationMethod.MinMax, found)


class _Once:
    """One batch, as ONNX Runtime reads what it calibrates on."""

    def __init__(self, images: Tensor) -> None:
        self.left = [{"pixel_values": images.numpy()}]

    def get_next(self) -> dict[str, Any] | None:
        """What is asked next; None when all was."""
        return self.left.pop() if self.left else None


def write_int8(
    prepared: Path,
    target: Path,
    layers: QuantizableLayers,
    chosen: list[str],
    *,
    ranges: Any | None,
    reduce_range: bool,
) -> None:
    """Write the graph with the chosen layers in integers, with the metadata of the float one.

    ranges: as `calibrated` found them; None: dynamic. reduce_range: weights of 7 bits. Raises
    CheckpointError where ONNX Runtime cannot.
    """
    import onnx

    nodes = [node for name in chosen for node in layers.nodes[name]]
    alone = list(layers.operations.values()).count("Conv") == 1  # it cuts patches: nothing is won
    if ranges is None:  # there each Gemm is first made a MatMul and an Add
        nodes += [f"{node}_MatMul" for node in nodes]
    told = onnx.load(prepared).metadata_props
    metadata = {one.key: one.value for one in told if not one.key.startswith("onnx.")}
    with by_onnxruntime("quantize"):
        if ranges is None:
            _dynamic(prepared, target, nodes, reduce_range=reduce_range)
        else:
            floats = METHODS["static"] if alone else METHODS["dynamic"]
            _static(prepared, target, nodes, ranges, floats, reduce_range=reduce_range)
    model = onnx.load(target)
    _drop_unused_opsets(model)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, target)


def _dynamic(prepared: Path, target: Path, nodes: list[str], *, reduce_range: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        str(prepared),
        str(target),
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=reduce_range,
        weight_type=QuantType.QInt8,
        nodes_to_quantize=nodes,
        extra_options={"MatMulConstBOnly": False},  # the nodes are named
    )


def _static(
    prepared: Path,
    target: Path,
    nodes: list[str],
    ranges: Any,
    floats: tuple[str, ...],
    *,
    reduce_range: bool,
) -> None:
    """What quantize_static does after its calibration, which would be made anew for each of several
    choices of layers. (In this mode its option MatMulConstBOnly is ignored: the nodes are named.)
    floats: operations that put out floats.
    """
    import onnx
    from onnxruntime.quantization import QDQQuantizer, QuantType

    quantizer = QDQQuantizer(
        onnx.load(prepared),
        True,  # per channel
        reduce_range,
        QuantType.QInt8,
        QuantType.QUInt8,  # signed ones leave the convolutions of x86 without a fast kernel
        ranges,
        nodes,
        [],
        list(METHODS["static"]),
        {"OpTypesToExcludeOutputQuantization": list(floats)},
    )
    quantizer.quantize_model()
    quantizer.model.save_model_to_file(str(target), False)


def _drop_unused_opsets(model: Any) -> None:
    """Leave out the operation sets that no node is of: other runtimes need not know them."""
    used = {node.domain for node in model.graph.node} | {""}
    kept = [one for one in model.opset_import if one.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def signal_to_noise(reference: Tensor, found: Tensor) -> float:
    """10 log10 of the power of a tensor over that of its difference from another [dB]; infinite
    where they are equal."""
    reference, found = reference.double(), found.double()
    noise = (found - reference).square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(max(reference.square().sum().item() / noise, sys.float_info.min))
