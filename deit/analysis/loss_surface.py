"""The loss of a network as a function of its free weights, with two derivatives."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from deit.core.errors import ConfigError, did_you_mean, shortened

Loss = Callable[[nn.Module, Any], Tensor]
"""(network, batch) -> mean over the batch, a scalar."""
Measure = Callable[[nn.Module, Any], Mapping[str, Tensor]]
"""(network, batch) -> means over the batch by name, scalars."""


class LossSurface:
    """A loss over all images of some batches, as a function of the free weights of a network.

    Points and directions are vectors [size] in the dtype and on the device of the network. The
    surface has a copy of the network, in evaluation mode and with the buffers of this moment, so
    the network itself is never touched. It computes without autocast, TF32 and bf16.

    Values and gradients go through any layer. Second derivatives need layers that PyTorch can
    differentiate twice: attention is one here, by its plain form; linear layers by oneDNN
    (`models/onednn_linear.py`) are not, so build the network without `use_onednn`.

    point: where the network stands. weights: which coordinate is which weight. images: how many.
    """

    def __init__(
        self,
        network: nn.Module,
        batches: Sequence[Any],
        loss: Loss,
        *,
        sizes: Sequence[int],
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        """batches: whatever the loss takes, on the network's device; sizes: how many images each
        has. The means of batches are weighted by them, so that cutting the images into other
        batches changes nothing but rounding. network, masks: as in `ParameterVector`; masked
        weights are 0 already. Raises ConfigError."""
        if not batches or len(batches) != len(sizes) or min(sizes) < 1:
            raise ConfigError(
                f"sizes {shortened(str(list(sizes)))}: each of {len(batches)} batches needs its "
                "number of images, at least 1"
            )
        self._network = copy.deepcopy(network).eval().requires_grad_(True)
        self._loss = loss
        self.images = sum(sizes)
        self._batches = [(batch, size / self.images) for batch, size in zip(batches, sizes)]
        self.weights = ParameterVector(self._network, masks)
        self.point = self.weights.vector_of(network)

    @property
    def size(self) -> int:
        """The number of free weights, n."""
        return self.weights.size

    def value(self, point: Tensor) -> float:
        """The loss at a point, the mean over all images."""

        def named(network: nn.Module, batch: Any) -> dict[str, Tensor]:
            return {"loss": self._loss(network, batch)}

        return self.evaluate(point, named)["loss"]

    @torch.no_grad()
    def evaluate(self, point: Tensor, measure: Measure) -> dict[str, float]:
        """Several numbers at a point in one pass, each the mean over all images."""
        self.weights.load(point)
        totals: dict[str, float] = {}
        with _exact(self.point.device.type):
            for batch, share in self._batches:
                for name, mean in measure(self._network, batch).items():
                    totals[name] = totals.get(name, 0.0) + share * float(mean)
        return totals

    def gradient(self, point: Tensor) -> Tensor:
        """The gradient of the loss at a point, [size]."""
        self.weights.load(point)
        parameters = list(self.weights.parameters.values())

        def slopes(batch: Any) -> Sequence[Tensor]:
            loss = self._loss(self._network, batch)
            return torch.autograd.grad(loss, parameters, materialize_grads=True)

        return self._summed(slopes)

    def hvp(self, vector: Tensor) -> Tensor:
        """The Hessian at `self.point` times a vector [size]; three to four times a gradient.

        The gradient of the gradient's product with the vector (Pearlmutter 1994), by two reverse
        passes: torch.func.hessian and jvp(jacrev) are wrong for the weights of a LayerNorm (by 8 %
        in torch 2.15). Memory: the graph of both passes over one batch. Raises ConfigError where a
        layer has no second derivative.
        """
        self.weights.load(self.point)
        parameters = list(self.weights.parameters.values())
        along = list(self.weights.unflatten(vector).values())

        def curve(batch: Any) -> Sequence[Tensor]:
            loss = self._loss(self._network, batch)
            slopes = torch.autograd.grad(
                loss, parameters, create_graph=True, materialize_grads=True
            )
            product = sum((slope * way).sum() for slope, way in zip(slopes, along))
            _check_twice(loss, product)
            if not product.requires_grad:  # the loss is linear in all weights
                return [torch.zeros_like(way) for way in along]
            return torch.autograd.grad(product, parameters, materialize_grads=True)

        # The fused kernels of attention have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            return self._summed(curve)

    @torch.enable_grad()
    def _summed(self, derivative: Callable[[Any], Sequence[Tensor]]) -> Tensor:
        """The mean over all images of a derivative, as a vector [size]."""
        total = torch.zeros_like(self.point)
        with _exact(self.point.device.type):
            for batch, share in self._batches:
                found = (tensor.detach() for tensor in derivative(batch))
                total += share * self.weights.flatten(dict(zip(self.weights.parameters, found)))
        return total


def _check_twice(loss: Tensor, product: Tensor) -> None:
    """Raises ConfigError if part of the second derivative would be missing in silence.

    A function marked `once_differentiable` has no second derivative. torch puts a node that raises
    into the second graph, but only if the gradient coming in depends on anything; and
    `autograd.grad` passes by what leads to none of its inputs, that node among them.
    """
    raises = any(node.name() == "torch::autograd::Error" for node in _graph(product))
    if raises or any(map(_is_marked, _graph(loss))):
        raise ConfigError(
            "a layer of the network has no second derivative (linear layers by oneDNN have none): "
            "build the network of PyTorch's own layers"
        )


def _is_marked(node: Node) -> bool:
    """Whether a function that ran forward, in Python, is marked once_differentiable."""
    marked = once_differentiable(_is_marked).__code__  # what every function so marked runs
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    while backward is not None and getattr(backward, "__code__", None) is not marked:
        backward = getattr(backward, "__wrapped__", None)
    return backward is not None


def _graph(result: Tensor) -> Iterator[Node]:
    """Every node that a result was computed by."""
    ahead, seen = [result.grad_fn], {None}
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            yield node
            ahead += [function for function, _ in node.next_functions]


@contextmanager
def _exact(device_type: str) -> Iterator[None]:
    """Products of 24 bits at least, whatever is allowed elsewhere."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.conv
    allowed = convolutions.fp32_precision
    try:
        torch.set_float32_matmul_precision("highest")
        convolutions.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        convolutions.fp32_precision = allowed
        torch.set_float32_matmul_precision(products)


class ParameterVector:
    """Which coordinate of a vector [size] is which weight of a network.

    Each parameter counts once, however many modules share it, and whatever its requires_grad says;
    of those with a mask the weights where it is True are coordinates, and the others are 0.

    size: how many there are. stretches: where in a vector each parameter lies, by its name.
    parameters: those of the network, by name, in the order of the vector.
    """

    def __init__(self, network: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        """network: all of its parameters float32, or all float64. masks: bool, shaped like the
        parameters they are named after. Raises ConfigError."""
        self.network = network
        self.parameters = dict(network.named_parameters())
        _check_dtypes(self.parameters)
        self._masks = _checked(masks or {}, self.parameters)
        self.size = 0
        self.stretches: dict[str, slice] = {}
        for name, parameter in self.parameters.items():
            free = int(self._masks[name].sum()) if name in self._masks else parameter.numel()
            self.stretches[name] = slice(self.size, self.size + free)
            self.size += free
        if not self.size:
            raise ConfigError("masks: no free weight is left; at least one should be True")

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The free entries of tensors shaped like the parameters, as a new vector [size]."""
        pieces = [
            tensors[name][self._masks[name]] if name in self._masks else tensors[name].flatten()
            for name in self.parameters
        ]
        return torch.cat(pieces)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector [size] as new tensors shaped like the parameters, 0 outside the masks."""
        tensors = {name: torch.zeros_like(own) for name, own in self.parameters.items()}
        self._fill(tensors, vector)
        return tensors

    @torch.no_grad()
    def load(self, point: Tensor) -> None:
        """Write a point [size] into the network."""
        self._fill(self.parameters, point)

    def _fill(self, tensors: Mapping[str, Tensor], vector: Tensor) -> None:
        if vector.shape != (self.size,):
            raise ConfigError(f"a vector {list(vector.shape)}: should be [{self.size}]")
        for name, tensor in tensors.items():
            piece = vector[self.stretches[name]].to(tensor)
            if name in self._masks:
                tensor.masked_scatter_(self._masks[name], piece)
            else:
                tensor.copy_(piece.view_as(tensor))

    def vector_of(self, network: nn.Module) -> Tensor:
        """Where a network of the same make stands: a vector [size].

        Raises ConfigError if parameters differ by name or shape, if a weight outside the masks is
        not 0, or if buffers differ: with ours, its weights would be another network.
        """
        theirs = dict(network.named_parameters())
        if theirs.keys() != self.parameters.keys():
            missing = sorted(theirs.keys() ^ self.parameters.keys())[0]
            raise ConfigError(
                f"{missing}: only one of two networks has it: no point of this surface"
            )
        tensors = {name: theirs[name].detach().to(own) for name, own in self.parameters.items()}
        for name, tensor in tensors.items():
            if tensor.shape != self.parameters[name].shape:
                shapes = f"{list(tensor.shape)}, not {list(self.parameters[name].shape)}"
                raise ConfigError(f"{name}: is {shapes}: no point of this surface")
            outside = int(tensor[~self._masks[name]].count_nonzero()) if name in self._masks else 0
            if outside:
                raise ConfigError(
                    f"{name}: {outside} weights outside the mask are not 0; multiply by the mask"
                )
        self._check_buffers(dict(network.named_buffers()))
        return self.flatten(tensors)

    def _check_buffers(self, theirs: Mapping[str, Tensor]) -> None:
        for name, own in self.network.named_buffers():
            # What is no float counts batches, and changes no answer in evaluation mode.
            if not own.is_floating_point():
                continue
            if name not in theirs or not torch.equal(own, theirs[name].to(own)):
                raise ConfigError(
                    f"{name}: differs between the networks: running statistics of BatchNorm, or "
                    "the normalisation of images; build a surface for each"
                )


def _check_dtypes(parameters: Mapping[str, Tensor]) -> None:
    dtypes = {parameter.dtype for parameter in parameters.values()}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
        kinds = ", ".join(sorted(map(str, dtypes))) or "no kind"
        raise ConfigError(f"parameters of {kinds}: should be all float32, or all float64")


def _checked(masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks, each on the device of its parameter."""
    for name, mask in masks.items():
        if name not in parameters:
            raise ConfigError(
                f"a mask for {name}: no such parameter{did_you_mean(name, parameters)}"
            )
        if mask.dtype != torch.bool or mask.shape != parameters[name].shape:
            raise ConfigError(
                f"the mask of {name} is {mask.dtype} {list(mask.shape)}: should be "
                f"torch.bool {list(parameters[name].shape)}"
            )
    return {name: mask.to(parameters[name].device) for name, mask in masks.items()}
