"""The cost of a network: parameters, multiply-accumulates, peak memory, images per second."""

import statistics
import time
import weakref
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deit.core.console import warn
from deit.models.parameters import count_parameters

_ROUNDS = 5
_ROUND_S = 0.4


class Cost(NamedTuple):
    """The cost of a network in evaluation mode."""

    parameters: int
    """Number of parameters."""
    gmacs: float
    """Multiply-accumulates of one image's forward pass [10**9], by `macs_of_image`; the paper's
    "FLOPs"."""
    memory_mb: float
    """Peak memory of weights and a batch's activations [10**6 bytes]."""
    images_per_s: float
    """Throughput without data loading, the median of several rounds."""
    spread: tuple[float, float]
    """Images per second of the slowest and of the fastest round."""


@torch.inference_mode()
def cost_of(network: nn.Module, *, side: int, batch: int = 64) -> Cost:
    """Measure a network in evaluation mode, on its device.

    side: of its images [px]. batch: images per forward pass.
    """
    network = network.eval()
    device = next(network.parameters()).device
    images = torch.rand(batch, 3, side, side, device=device)
    weights = sum(value.nbytes for value in network.state_dict().values())
    rates = _rates(network, images)
    return Cost(
        parameters=count_parameters(network),
        gmacs=macs_of_image(network, images[:1]) / 1e9,
        memory_mb=(weights + _activations(network, images)) / 1e6,
        images_per_s=statistics.median(rates),
        spread=(min(rates), max(rates)),
    )


@torch.inference_mode()
def macs_of_image(network: nn.Module, image: Tensor) -> int:
    """Return the multiply-accumulates of a forward pass of one image.

    Counts matrix products, convolutions, attention, recurrent layers and involutions as the
    network's code calls them, before a kernel is chosen. So the count does not depend on the
    device or the version of PyTorch. Logs a warning for other operations that may multiply
    matrices. image: a batch of one, float [1, 3, height, width], or another input of the network.

    >>> macs_of_image(nn.Linear(4, 3), torch.zeros(1, 4))  # 4 * 3
    12
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it runs an encoder layer as one operation
    try:
        with _MacCounter() as counter:
            network(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    if counter.unknown:
        warn(
            f"GMACs of {type(network).__name__}: do not include {', '.join(counter.unknown)}, "
            "which cannot be counted"
        )
    return counter.macs


def _matmul_macs(left: Tensor, right: Tensor, *rest: Any) -> int:
    """[..., rows, inner] times [..., inner, columns]; a vector is a matrix of one column."""
    return left.numel() * (right.shape[-1] if right.ndim > 1 else 1)


def _addmm_macs(added: Tensor, left: Tensor, right: Tensor, *rest: Any) -> int:
    return _matmul_macs(left, right)


def _linear_macs(inputs: Tensor, weight: Tensor, *rest: Any) -> int:
    """inputs: [..., in]; weight: [out, in]."""
    return inputs.numel() * (weight.shape[0] if weight.ndim > 1 else 1)


def _convolution_macs(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    *rest: Any,
    output: Tensor,
) -> int:
    """weight: [out, in / groups, *kernel], or transposed [in, out / groups, *kernel]. Each value of
    the output, or of the input if transposed, is a sum over all axes but the first."""
    return (inputs if transposed else output).numel() * prod(weight.shape[1:])


def _attention_macs(queries: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> int:
    """Both products of [..., queries, channels], [..., keys, channels] and [..., keys, value
    channels]; a mask does not reduce them."""
    channels = queries.shape[-1]
    return queries.numel() // channels * keys.shape[-2] * (channels + values.shape[-1])


def _recurrent_macs(inputs: Tensor, state: Any, weights: list[Tensor], *rest: Any) -> int:
    """inputs: [batch and steps in any order, in]; each step is multiplied by every matrix."""
    matrices = [weight for weight in weights if weight.ndim > 1]
    return inputs.shape[:-1].numel() * sum(matrix.numel() for matrix in matrices)


_MACS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::vdot"), _matmul_macs),
    **dict.fromkeys(("aten::addmm", "aten::baddbmm", "aten::addbmm", "aten::addmv"), _addmm_macs),
    **dict.fromkeys(
        ("aten::addmm_", "aten::baddbmm_", "aten::addbmm_", "aten::addmv_"), _addmm_macs
    ),
    **dict.fromkeys(("aten::linear", "mkldnn::_linear_pointwise"), _linear_macs),
    "aten::convolution": _convolution_macs,
    "aten::scaled_dot_product_attention": _attention_macs,
    **dict.fromkeys(
        ("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"), _recurrent_macs
    ),
    # The sum of an involution over the kernel's positions.
    **dict.fromkeys(("aten::addcmul", "aten::addcmul_"), lambda added, *rest: added.numel()),
}
"""Counts the multiply-accumulates of an operation from its arguments."""
_MOVES = {
    *("aten::cat", "aten::stack", "aten::copy_", "aten::index_put", "aten::index_put_"),
    *("aten::scatter", "aten::scatter_", "aten::scatter_add", "aten::scatter_add_"),
    *("aten::scatter_reduce", "aten::scatter_reduce_", "aten::index_add", "aten::index_add_"),
    *("aten::index_copy", "aten::index_copy_", "aten::masked_scatter", "aten::masked_scatter_"),
}
"""Operations on several matrices that multiply nothing, but have no tag of PyTorch for that."""


class _MacCounter(TorchDispatchMode):
    """Count multiply-accumulates within a context.

    In inference mode it gets the operations as the network's code calls them. Operations that are
    not in _MACS are decomposed if PyTorch can do so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0
        self.unknown: dict[str, None] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "_schema", function).name
        count = _MACS.get(name)
        if count is None:
            with self:
                output = function.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = function(*args, **kwargs)
        if count is _convolution_macs:
            self.macs += count(*args, **kwargs, output=output)
        elif count is not None:
            self.macs += count(*args, **kwargs)
        elif name not in _MOVES and _may_multiply(function, args, kwargs):
            self.unknown[name] = None
        return output


def _may_multiply(function: Any, args: tuple, kwargs: dict) -> bool:
    """Return whether an operation takes two or more matrices and is not pointwise."""
    matrices = [
        value
        for value in tree_leaves((args, kwargs))
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
    ]
    return len(matrices) > 1 and torch.Tag.pointwise not in getattr(function, "tags", ())


def _activations(network: nn.Module, images: Tensor) -> int:
    """Return the peak memory of a forward pass [bytes], without weights and images."""
    if images.device.type == "cuda":
        network(images)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        network(images)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _PeakMemoryCounter() as counter:
        network(images)
    return counter.peak


class _PeakMemoryCounter(TorchDispatchMode):
    """Count the bytes of the tensors that are created within a context and not yet released."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            storage = value.untyped_storage() if isinstance(value, Tensor) else None
            if storage is not None and storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.current += storage.nbytes()
                self.peak = max(self.peak, self.current)
                weakref.finalize(storage, self._release, storage._cdata, storage.nbytes())
        return output

    def _release(self, storage: int, nbytes: int) -> None:
        self.alive.discard(storage)
        self.current -= nbytes


def _rates(network: nn.Module, images: Tensor) -> list[float]:
    """Return the images per second of several rounds."""
    wait = torch.cuda.synchronize if images.device.type == "cuda" else lambda: None
    network(images)
    rates = []
    for _ in range(_ROUNDS):
        wait()
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < _ROUND_S:
            network(images)
            wait()
            done += len(images)
        rates.append(done / (time.perf_counter() - started))
    return rates
