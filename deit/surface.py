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

from deit.errors import ConfigError
from deit.free_weights import ParameterVector
from deit.text import shortened

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
    (`models/linear.py`) are not, so build the network without `use_onednn`.

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
        batches changes nothing but rounding. network, masks: as in `FreeWeights`; masked weights
        are 0 already. Raises ConfigError.
        """
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
