"""What of a network can become integers: nodes of its ONNX graph, by the network's own names."""

import ast
import contextlib
import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from deit.core.errors import CheckpointError, ConfigError, DeitError, first_line, raise_transient
from deit.models.surgery.weight_sharing import MixedAttention

METHODS = {"static": ("MatMul", "Gemm", "Conv"), "dynamic": ("MatMul", "Gemm")}
"""Which operations each method puts into integers: a convolution whose ranges are found in every
batch is several times slower than a float one."""

_NETWORK = "student.network."
_SCOPES = "pkg.torch.onnx.name_scopes"
_PRODUCTS = ("query_key", "attention_value")
_KINDS = {nn.Linear: "Gemm", nn.Conv2d: "Conv"}
_SHOWN = 24


class QuantizableLayers(NamedTuple):
    """What of a graph can become integers.

    nodes: the graph's nodes by the layer's name in the network, in their order; with `products`.
    products: those of the layers that multiply two activations, such as blocks.0.attn.query_key.
    weights: numbers in the weight of each layer, 0 of a product. operations: what each layer is in
    ONNX. parameters: numbers in the float constants of the graph.
    """

    nodes: dict[str, tuple[str, ...]]
    products: tuple[str, ...]
    weights: dict[str, int]
    operations: dict[str, str]
    parameters: int


def layers_of(network: nn.Module) -> QuantizableLayers:
    """What `prepare` will find in the graph of a network of ours without adapters, as far as that
    is known without the graph: no nodes, and as parameters those of the network."""
    own = dict(network.named_modules())
    operations = {
        name: operation
        for name, module in own.items()
        for kind, operation in _KINDS.items()
        if isinstance(module, kind)
    }
    products = tuple(f"{name}.{one}" for name in attentions(network) for one in _PRODUCTS)
    weights = {name: own[name].weight.numel() for name in operations} | dict.fromkeys(products, 0)
    operations |= dict.fromkeys(products, "MatMul")
    parameters = sum(one.numel() for one in network.parameters())
    return QuantizableLayers(
        dict.fromkeys(operations, ()), products, weights, operations, parameters
    )


def attentions(network: nn.Module) -> list[str]:
    """The names of the layers of attention, each of which multiplies activations twice."""
    return [
        name
        for name, module in network.named_modules()
        if hasattr(module, "qkv") or isinstance(module, MixedAttention)
    ]


def prepare(source: Path, target: Path) -> QuantizableLayers:
    """Write a float graph with known shapes and folded constants, as quantizing needs it.

    source: as deit.deploy.formats writes it. Raises CheckpointError where ONNX Runtime cannot.
    """
    import onnx
    from onnxruntime.quantization import quant_pre_process

    scopes = {node.name: _scopes(node) for node in onnx.load(source).graph.node}
    with by_onnxruntime("prepare"):
        quant_pre_process(str(source), str(target))
    return _layers(onnx.load(target), scopes)


def _scopes(node: Any) -> list[str]:
    """The modules that a node was exported from, from the outermost to the innermost."""
    told = next((one.value for one in node.metadata_props if one.key == _SCOPES), "[]")
    return [name for name in ast.literal_eval(told) if name.startswith(_NETWORK)]


def _layers(model: Any, scopes: dict[str, list[str]]) -> QuantizableLayers:
    import onnx

    float_kind = onnx.TensorProto.FLOAT
    held = {one.name: one for one in model.graph.initializer if one.data_type == float_kind}
    sizes = {name: math.prod(one.dims) for name, one in held.items()}
    found = QuantizableLayers({}, (), {}, {}, sum(sizes.values()))
    for node in model.graph.node:
        if node.op_type not in METHODS["static"]:
            continue
        module = (scopes.get(node.name) or [""])[-1].removeprefix(_NETWORK)
        weight = next((name for name in node.input[:2] if name in sizes), None)
        if weight is None:
            before = sum(name.startswith(f"{module}.") for name in found.products)
            layer = f"{module}.{_PRODUCTS[before] if before < 2 else f'product_{before + 1}'}"
            found = found._replace(products=(*found.products, layer))
        else:
            # A folded batch norm leaves a convolution in the norm's module; a weight that is equal
            # to another may have its name.
            names = (_named(weight), module) if node.op_type == "Conv" else (module, _named(weight))
            layer = next(filter(None, names), node.name)
        found.nodes[layer] = (*found.nodes.get(layer, ()), node.name)
        found.weights[layer] = sizes.get(weight, 0)
        found.operations[layer] = node.op_type
    return found


def _named(weight: str) -> str:
    """The layer by the name of its weight, where that is the network's own; else empty."""
    own = weight.startswith(_NETWORK) and weight.endswith(".weight")
    return weight.removeprefix(_NETWORK).removesuffix(".weight") if own else ""


def choose(
    layers: QuantizableLayers, *, method: str, attention: bool, exclude: str | None
) -> list[str]:
    """The layers that become integers, in their order.

    attention: products of two activations too. exclude: a regular expression that names layers
    whole, to stay float. Raises ConfigError where it names none, or all of them, and where the
    method would leave most of the network as it is.
    """
    able = [name for name, kind in layers.operations.items() if kind in METHODS[method]]
    if not covers_enough(layers, method):
        raise ConfigError(
            f"--method {method}: keeps convolutions in float, and they hold most weights of this "
            "network; use --method static"
        )
    able = [name for name in able if attention or name not in layers.products]
    if exclude is None:
        return able
    kept = [name for name in able if not re.fullmatch(exclude, name)]
    if len(kept) == len(able):
        raise ConfigError(
            f"--exclude {exclude}: is the whole name of no layer (.* stands for anything); there "
            f"are {_shortened(able)}"
        )
    if not kept:
        raise ConfigError(f"--exclude {exclude}: leaves no layer to quantize")
    return kept


def covers_enough(layers: QuantizableLayers, method: str) -> bool:
    """Whether a method puts at least half of the weights into integers."""
    able = [name for name, kind in layers.operations.items() if kind in METHODS[method]]
    return 2 * sum(layers.weights[name] for name in able) >= sum(layers.weights.values())


def _shortened(names: list[str]) -> str:
    """The names on one line: of alike blocks the first, and no more than a person reads."""
    shown = [name for name in names if not re.match(r"blocks\.[1-9]", name)][:_SHOWN]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


@contextlib.contextmanager
def by_onnxruntime(does: str) -> Iterator[None]:
    """Without what its tools print; where they fail, by errors of any type, a CheckpointError, but
    not of what says nothing of the network."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except DeitError:
        raise  # of an image that it was given
    except Exception as error:  # ONNX Runtime's tools raise types of their own
        raise_transient(error, "ONNX Runtime")
        raise CheckpointError(
            f"ONNX Runtime cannot {does} this network ({type(error).__name__}: {first_line(error)})"
        ) from error
