"""Quantize a float ONNX network to int8: the ranges of activations, and the graph.

Both methods use int8 weights with a scale per output channel, and uint8 activations with a scale
per tensor. `static` fixes the scales of activations by a calibration and writes QuantizeLinear and
DequantizeLinear around each node; `dynamic` computes them in every batch. Normalization, softmax
and GELU stay float, and so do the outputs of linear layers: quantizing these too costs 2 to 4 dB
and time (docs/explanation/int8.md). The convolutions of a ConvNet have integer outputs: ONNX
Runtime needs that to compute them in integers.
"""

import math
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from deit.deploy.int8_layers import METHODS, QuantizableLayers, by_onnxruntime


def write_int8(
    prepared: Path,
    target: Path,
    layers: QuantizableLayers,
    chosen: list[str],
    *,
    ranges: Any | None,
    reduce_range: bool,
) -> None:
    """Write the graph with the chosen layers in int8, with the metadata of the float graph.

    ranges: as `calibrate` returns them; None: dynamic. reduce_range: 7-bit weights. Raises
    CheckpointError if ONNX Runtime fails.
    """
    import onnx

    nodes = [node for name in chosen for node in layers.nodes[name]]
    # A single convolution is the patch embedding: an integer output would not make it faster.
    is_single = list(layers.operations.values()).count("Conv") == 1
    if ranges is None:  # ONNX Runtime replaces each Gemm by a MatMul and an Add first
        nodes += [f"{node}_MatMul" for node in nodes]
    props = onnx.load(prepared).metadata_props
    metadata = {prop.key: prop.value for prop in props if not prop.key.startswith("onnx.")}
    with by_onnxruntime("quantize"):
        if ranges is None:
            _write_dynamic(prepared, target, nodes, reduce_range=reduce_range)
        else:
            float_outputs = METHODS["static"] if is_single else METHODS["dynamic"]
            _write_static(prepared, target, nodes, ranges, float_outputs, reduce_range=reduce_range)
    model = onnx.load(target)
    _drop_unused_opsets(model)
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, target)


def _write_dynamic(prepared: Path, target: Path, nodes: list[str], *, reduce_range: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        str(prepared),
        str(target),
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=reduce_range,
        weight_type=QuantType.QInt8,
        nodes_to_quantize=nodes,
        extra_options={"MatMulConstBOnly": False},  # nodes_to_quantize selects instead
    )


def _write_static(
    prepared: Path,
    target: Path,
    nodes: list[str],
    ranges: Any,
    float_outputs: tuple[str, ...],
    *,
    reduce_range: bool,
) -> None:
    """Do what quantize_static does after its calibration.

    quantize_static itself would calibrate again for each selection of layers. (QDQQuantizer ignores
    the option MatMulConstBOnly; the list of nodes selects instead.) float_outputs: operations whose
    outputs stay float.
    """
    import onnx
    from onnxruntime.quantization import QDQQuantizer, QuantType

    quantizer = QDQQuantizer(
        onnx.load(prepared),
        True,  # per channel
        reduce_range,
        QuantType.QInt8,
        QuantType.QUInt8,  # with int8 activations, convolutions have no fast kernel on x86
        ranges,
        nodes,
        [],
        list(METHODS["static"]),
        {"OpTypesToExcludeOutputQuantization": list(float_outputs)},
    )
    quantizer.quantize_model()
    quantizer.model.save_model_to_file(str(target), False)


def _drop_unused_opsets(model: Any) -> None:
    """Remove operator sets without nodes, so that other runtimes do not have to know them."""
    used = {node.domain for node in model.graph.node} | {""}
    opsets = [opset for opset in model.opset_import if opset.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(opsets)


def signal_to_noise(reference: Tensor, noisy: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio of a tensor [dB]; infinity if they are equal.

    10 log10 of the power of `reference` over the power of the difference.

    >>> import torch
    >>> round(signal_to_noise(torch.full((4,), 10.0), torch.full((4,), 11.0)), 3)  # power 100 to 1
    20.0
    """
    reference, noisy = reference.double(), noisy.double()
    noise = (noisy - reference).square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(max(reference.square().sum().item() / noise, sys.float_info.min))
