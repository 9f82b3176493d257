"""The loss of a network as a function of its free weights, with first and second derivatives."""

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
"""(network, batch) -> mean loss over the batch, a scalar."""
Measure = Callable[[nn.Module, Any], Mapping[str, Tensor]]
"""(network, batch) -> named means over the batch, scalars."""


class LossSurface:
    """The mean loss over all images of some batches, as a function of a network's free weights.

    Points and directions are vectors [size] with the dtype and on the device of the network. The
    surface works on a copy of the network in evaluation mode, with the buffers it had at that
    moment; the network itself is never modified. It computes without autocast, TF32 and bf16.

    Values and gradients work with any layer. Second derivatives need layers that PyTorch can
    differentiate twice. Attention is computed without a fused kernel for that. oneDNN linear layers
    (`models/onednn_linear.py`) have no second derivative, so build the network without
    `use_onednn`.

    point: the weights of the network. weights: the mapping of coordinates to weights. images: total
    number of images.

    >>> network, images = nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [3.0]])
    >>> surface = LossSurface(  # the mean of (w x)^2 is 5 w^2
    ...     network, [images], lambda network, images: network(images).square().mean(), sizes=[2])
    >>> point = torch.tensor([2.0])
    >>> surface.value(point), surface.gradient(point).item(), surface.hvp(torch.ones(1)).item()
    (20.0, 20.0, 10.0)
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
        """Copy the network and check the masks.

        batches: any input of the loss, on the network's device. sizes: number of images of each
        batch. Batch means are weighted by them, so that other batches of the same images change
        rounding only. network, masks: as in `ParameterVector`; masked weights must already be 0.
        Raises ConfigError for invalid sizes, masks or dtypes.
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
        """Return the loss at a point [size], the mean over all images."""

        def measure(network: nn.Module, batch: Any) -> dict[str, Tensor]:
            return {"loss": self._loss(network, batch)}

        return self.evaluate(point, measure)["loss"]

    @torch.no_grad()
    def evaluate(self, point: Tensor, measure: Measure) -> dict[str, float]:
        """Return several values at a point [size] in one pass, each the mean over all images."""
        self.weights.load(point)
        totals: dict[str, float] = {}
        with _full_precision(self.point.device.type):
            for batch, share in self._batches:
                for name, mean in measure(self._network, batch).items():
                    totals[name] = totals.get(name, 0.0) + share * float(mean)
        return totals

    def gradient(self, point: Tensor) -> Tensor:
        """Return the gradient of the loss at a point [size], [size]."""
        self.weights.load(point)
        parameters = list(self.weights.parameters.values())

        def batch_gradient(batch: Any) -> Sequence[Tensor]:
            loss = self._loss(self._network, batch)
            return torch.autograd.grad(loss, parameters, materialize_grads=True)

        return self._mean_over_images(batch_gradient)

    def hvp(self, vector: Tensor) -> Tensor:
        """Return the product of the Hessian at `self.point` with a vector [size].

        It is the gradient of the inner product of gradient and vector (Pearlmutter 1994), computed
        by two reverse passes. torch.func.hessian and jvp(jacrev) are wrong for the weights of a
        LayerNorm (by 8 % in torch 2.15). Time: three to four gradients. Memory: the graph of both
        passes over one batch. Raises ConfigError if a layer has no second derivative.
        """
        self.weights.load(self.point)
        parameters = list(self.weights.parameters.values())
        direction = list(self.weights.unflatten(vector).values())

        def batch_product(batch: Any) -> Sequence[Tensor]:
            loss = self._loss(self._network, batch)
            gradients = torch.autograd.grad(
                loss, parameters, create_graph=True, materialize_grads=True
            )
            slope = sum((grad * part).sum() for grad, part in zip(gradients, direction))
            _check_twice_differentiable(loss, slope)
            if not slope.requires_grad:  # the loss is linear in all weights
                return [torch.zeros_like(part) for part in direction]
            return torch.autograd.grad(slope, parameters, materialize_grads=True)

        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            return self._mean_over_images(batch_product)

    @torch.enable_grad()
    def _mean_over_images(self, derivative: Callable[[Any], Sequence[Tensor]]) -> Tensor:
        """Return the mean of a derivative over all images, [size]."""
        total = torch.zeros_like(self.point)
        with _full_precision(self.point.device.type):
            for batch, share in self._batches:
                tensors = (tensor.detach() for tensor in derivative(batch))
                total += share * self.weights.flatten(dict(zip(self.weights.parameters, tensors)))
        return total


def _check_twice_differentiable(loss: Tensor, slope: Tensor) -> None:
    """Raise ConfigError if a part of the second derivative would silently be missing.

    A function marked `once_differentiable` has no second derivative. For it torch adds a node to
    the second graph that raises an error, but only if the incoming gradient depends on anything.
    `autograd.grad` skips nodes that lead to none of its inputs, this one included.
    """
    raises = any(node.name() == "torch::autograd::Error" for node in _graph_nodes(slope))
    if raises or any(map(_is_once_differentiable, _graph_nodes(loss))):
        raise ConfigError(
            "a layer of the network has no second derivative (oneDNN linear layers have none): "
            "build the network from PyTorch's own layers"
        )


def _is_once_differentiable(node: Node) -> bool:
    """Return whether the Python function of a node is marked once_differentiable."""
    # The decorator returns the same wrapper code for every function.
    wrapper_code = once_differentiable(_is_once_differentiable).__code__
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    while backward is not None and getattr(backward, "__code__", None) is not wrapper_code:
        backward = getattr(backward, "__wrapped__", None)
    return backward is not None


def _graph_nodes(result: Tensor) -> Iterator[Node]:
    """Yield every node of the autograd graph of a result."""
    pending, seen = [result.grad_fn], {None}
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            yield node
            pending += [function for function, _ in node.next_functions]


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Disable autocast, TF32 and bf16 products, whatever the global settings allow."""
    matmul_precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.conv
    conv_precision = convolutions.fp32_precision
    try:
        torch.set_float32_matmul_precision("highest")
        convolutions.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        convolutions.fp32_precision = conv_precision
        torch.set_float32_matmul_precision(matmul_precision)


class ParameterVector:
    """The mapping between the free weights of a network and a vector [size].

    Each parameter counts once, even if several modules share it, and independently of its
    requires_grad. Of a parameter with a mask, the weights where the mask is True are coordinates
    and the others are 0.

    size: number of free weights. slices: the part of the vector that belongs to each parameter, by
    name. parameters: the parameters of the network, by name, in the order of the vector.
    """

    def __init__(self, network: nn.Module, masks: Mapping[str, Tensor] | None = None) -> None:
        """Check the masks and assign coordinates to weights.

        network: its parameters must be all float32 or all float64. masks: bool, by parameter name,
        with the shape of the parameter. Raises ConfigError for other dtypes, for masks that fit no
        parameter, or if no weight is free.
        """
        self.network = network
        self.parameters = dict(network.named_parameters())
        _check_dtypes(self.parameters)
        self._masks = _check_masks(masks or {}, self.parameters)
        self.size = 0
        self.slices: dict[str, slice] = {}
        for name, parameter in self.parameters.items():
            free = int(self._masks[name].sum()) if name in self._masks else parameter.numel()
            self.slices[name] = slice(self.size, self.size + free)
            self.size += free
        if not self.size:
            raise ConfigError("masks: no free weight is left; at least one should be True")

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the free entries of tensors shaped like the parameters, as a new vector [size]."""
        pieces = [
            tensors[name][self._masks[name]] if name in self._masks else tensors[name].flatten()
            for name in self.parameters
        ]
        return torch.cat(pieces)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Return a vector [size] as new tensors shaped like the parameters, 0 where masked."""
        tensors = {name: torch.zeros_like(weight) for name, weight in self.parameters.items()}
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
            piece = vector[self.slices[name]].to(tensor)
            if name in self._masks:
                tensor.masked_scatter_(self._masks[name], piece)
            else:
                tensor.copy_(piece.view_as(tensor))

    def vector_of(self, network: nn.Module) -> Tensor:
        """Return the weights of a network with the same architecture as a vector [size].

        Raises ConfigError if parameters differ in name or shape, if a weight outside the masks is
        not 0, or if buffers differ, because the surface evaluates all weights with its own buffers.
        """
        other = dict(network.named_parameters())
        if other.keys() != self.parameters.keys():
            missing = sorted(other.keys() ^ self.parameters.keys())[0]
            raise ConfigError(
                f"{missing}: only one of the two networks has this parameter; a loss surface needs "
                "networks of the same architecture"
            )
        tensors = {
            name: other[name].detach().to(weight) for name, weight in self.parameters.items()
        }
        for name, tensor in tensors.items():
            if tensor.shape != self.parameters[name].shape:
                raise ConfigError(
                    f"{name}: has shape {list(tensor.shape)}, should have "
                    f"{list(self.parameters[name].shape)}; a loss surface needs networks of the "
                    "same architecture"
                )
            nonzero = int(tensor[~self._masks[name]].count_nonzero()) if name in self._masks else 0
            if nonzero:
                raise ConfigError(
                    f"{name}: {nonzero} weights outside the mask are not 0; multiply by the mask"
                )
        self._check_buffers(dict(network.named_buffers()))
        return self.flatten(tensors)

    def _check_buffers(self, other: Mapping[str, Tensor]) -> None:
        """Raise ConfigError if a floating-point buffer differs from that of this network."""
        for name, buffer in self.network.named_buffers():
            # Integer buffers count batches; they do not affect outputs in evaluation mode.
            if not buffer.is_floating_point():
                continue
            if name not in other or not torch.equal(buffer, other[name].to(buffer)):
                raise ConfigError(
                    f"{name}: differs between the networks (running statistics of BatchNorm, or "
                    "the normalization of images); build a surface for each network"
                )


def _check_dtypes(parameters: Mapping[str, Tensor]) -> None:
    dtypes = {parameter.dtype for parameter in parameters.values()}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
        listed = ", ".join(sorted(map(str, dtypes))) or "no dtype"
        raise ConfigError(f"parameters of {listed}: should be all float32, or all float64")


def _check_masks(
    masks: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the masks, each on the device of its parameter.

    Raises ConfigError for a mask without a parameter, or of another dtype or shape.
    """
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
