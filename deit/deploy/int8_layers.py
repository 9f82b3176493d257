"""Find the layers of a network that can be quantized, and their nodes in its ONNX graph."""

import ast
import contextlib
import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from deit.core.errors import CheckpointError, ConfigError, DeitError, first_line, raise_if_transient
from deit.models.surgery.weight_sharing import MixedAttention

METHODS = {"static": ("MatMul", "Gemm", "Conv"), "dynamic": ("MatMul", "Gemm")}
"""The operations that each method quantizes. A convolution with dynamic ranges is several times
slower than a float one."""

_NETWORK = "student.network."
_SCOPES = "pkg.torch.onnx.name_scopes"
_PRODUCTS = ("query_key", "attention_value")
_OPERATIONS = {nn.Linear: "Gemm", nn.Conv2d: "Conv"}
_MAX_NAMES = 24


class QuantizableLayers(NamedTuple):
    """The layers of a graph that can be quantized, by their names in the network.

    nodes: names of the layer's nodes in the graph; `products` are included. products: the layers
    that multiply two activations, such as blocks.0.attn.query_key. weights: number of weights of
    each layer, 0 for a product. operations: the ONNX operation of each layer. parameters: number of
    float constants in the graph.
    """

    nodes: dict[str, tuple[str, ...]]
    products: tuple[str, ...]
    weights: dict[str, int]
    operations: dict[str, str]
    parameters: int


def layers_of(network: nn.Module) -> QuantizableLayers:
    """Predict what `prepare` will find in the graph of one of our networks without adapters.

    The nodes are unknown without the graph; `parameters` are those of the network.
    """
    modules = dict(network.named_modules())
    operations = {
        name: operation
        for name, module in modules.items()
        for kind, operation in _OPERATIONS.items()
        if isinstance(module, kind)
    }
    products = tuple(f"{name}.{product}" for name in attentions(network) for product in _PRODUCTS)
    weights = {name: modules[name].weight.numel() for name in operations}
    weights |= dict.fromkeys(products, 0)
    operations |= dict.fromkeys(products, "MatMul")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return QuantizableLayers(
        dict.fromkeys(operations, ()), products, weights, operations, parameters
    )


def attentions(network: nn.Module) -> list[str]:
    """Return the names of the attention layers, each of which has two products of activations."""
    return [
        name
        for name, module in network.named_modules()
        if hasattr(module, "qkv") or isinstance(module, MixedAttention)
    ]


def prepare(source: Path, target: Path) -> QuantizableLayers:
    """Write a float graph with known shapes and folded constants, as quantization needs it.

    source: as deit.deploy.export_formats.write_onnx_with_metadata writes it. Raises
    CheckpointError if ONNX Runtime fails.
    """
    import onnx
    from onnxruntime.quantization import quant_pre_process

    scopes = {node.name: _scopes(node) for node in onnx.load(source).graph.node}
    with by_onnxruntime("prepare"):
        quant_pre_process(str(source), str(target))
    return _layers(onnx.load(target), scopes)


def _scopes(node: Any) -> list[str]:
    """Return the modules that a node was exported from, the outermost first."""
    scopes = next((prop.value for prop in node.metadata_props if prop.key == _SCOPES), "[]")
    return [name for name in ast.literal_eval(scopes) if name.startswith(_NETWORK)]


def _layers(model: Any, scopes: dict[str, list[str]]) -> QuantizableLayers:
    import onnx

    sizes = {
        constant.name: math.prod(constant.dims)
        for constant in model.graph.initializer
        if constant.data_type == onnx.TensorProto.FLOAT
    }
    layers = QuantizableLayers({}, (), {}, {}, sum(sizes.values()))
    for node in model.graph.node:
        if node.op_type not in METHODS["static"]:
            continue
        module = (scopes.get(node.name) or [""])[-1].removeprefix(_NETWORK)
        weight = next((name for name in node.input[:2] if name in sizes), None)
        if weight is None:
            index = sum(name.startswith(f"{module}.") for name in layers.products)
            layer = f"{module}.{_PRODUCTS[index] if index < 2 else f'product_{index + 1}'}"
            layers = layers._replace(products=(*layers.products, layer))
        else:
            # A folded batch norm leaves a convolution in the norm's module, so its weight has the
            # right name. Equal weights share one name, so otherwise the module has the right one.
            names = (_layer_of_weight(weight), module)
            if node.op_type != "Conv":
                names = names[::-1]
            layer = next(filter(None, names), node.name)
        layers.nodes[layer] = (*layers.nodes.get(layer, ()), node.name)
        layers.weights[layer] = sizes.get(weight, 0)
        layers.operations[layer] = node.op_type
    return layers


def _layer_of_weight(weight: str) -> str:
    """Return the layer that a weight is named after; "" if it has another name."""
    if not (weight.startswith(_NETWORK) and weight.endswith(".weight")):
        return ""
    return weight.removeprefix(_NETWORK).removesuffix(".weight")


def choose(
    layers: QuantizableLayers, *, method: str, attention: bool, exclude: str | None
) -> list[str]:
    """Return the layers to quantize, in their order.

    method: a key of METHODS. attention: whether to include products of two activations. exclude: a
    regular expression that matches whole names of layers, which stay float. Raises ConfigError if
    it matches none or all of them, or if the method does not cover most of the network.
    """
    candidates = [name for name, kind in layers.operations.items() if kind in METHODS[method]]
    if not covers_enough(layers, method):
        raise ConfigError(
            f"method = {method}: does not quantize convolutions, which have most weights of this "
            "network; use method static"
        )
    candidates = [name for name in candidates if attention or name not in layers.products]
    if exclude is None:
        return candidates
    chosen = [name for name in candidates if not re.fullmatch(exclude, name)]
    if len(chosen) == len(candidates):
        raise ConfigError(
            f"exclude = {exclude}: does not match the whole name of any layer (.* matches "
            f"anything); the layers are {_shorten(candidates)}"
        )
    if not chosen:
        raise ConfigError(f"exclude = {exclude}: leaves no layer to quantize")
    return chosen


def covers_enough(layers: QuantizableLayers, method: str) -> bool:
    """Return whether a method quantizes at least half of the weights."""
    names = [name for name, kind in layers.operations.items() if kind in METHODS[method]]
    return 2 * sum(layers.weights[name] for name in names) >= sum(layers.weights.values())


def _shorten(names: list[str]) -> str:
    """Return the names on one line; of the blocks, which are equal, only the first."""
    listed = [name for name in names if not re.match(r"blocks\.[1-9]", name)][:_MAX_NAMES]
    num_more = len(names) - len(listed)
    return ", ".join(listed) + (f" and {num_more} more" if num_more else "")


@contextlib.contextmanager
def by_onnxruntime(action: str) -> Iterator[None]:
    """Hide what ONNX Runtime's tools print, and turn their errors into CheckpointError.

    action: a verb for the message. Errors unrelated to the network, such as a full disk, are raised
    as such.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except DeitError:
        raise  # from reading the images
    except Exception as error:  # ONNX Runtime's tools raise types of their own
        raise_if_transient(error, "ONNX Runtime")
        raise CheckpointError(
            f"ONNX Runtime cannot {action} this network ({type(error).__name__}: "
            f"{first_line(error)})"
        ) from error
