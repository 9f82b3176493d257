"""What a network costs: parameters, arithmetic of an image, memory of a batch, images a second."""

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
    """parameters: their number. gmacs: multiply-accumulates of one image's forward pass [10**9],
    as `macs_of_image` counts them; the paper's "FLOPs". memory_mb: the most that
    weights and a batch's activations take at once [10**6 bytes]. images_per_s: of the network
    alone, on images that are there already: the median of several rounds; their spread: the
    slowest and the fastest."""

    parameters: int
    gmacs: float
    memory_mb: float
    images_per_s: float
    spread: tuple[float, float]


@torch.inference_mode()
def cost_of(network: nn.Module, *, side: int, batch: int = 64) -> Cost:
    """Measure a network in evaluation mode where it lies. side: of its images [px]."""
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
    """Multiply-accumulates of a forward pass: of matrix products, convolutions, attention,
    recurrent layers and involutions.

    They are those that the network's definition asks for. Counted before a kernel is chosen, they
    do not depend on the device, the processor or the version of PyTorch. Warns of an operation that
    may multiply matrices and is not among those that are counted. image: a batch of one, or what
    the network takes of one.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # else a whole encoder layer is one operation
    try:
        with _Products() as counted:
            network(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    if counted.unknown:
        warn(
            f"GMACs of {type(network).__name__}: without those of {', '.join(counted.unknown)}, "
            "which cannot be counted"
        )
    return counted.macs


def _of_matrices(left: Tensor, right: Tensor, *rest: Any) -> int:
    """[..., rows, inner] times [..., inner, columns]; of a vector as of a matrix of one column."""
    return left.numel() * (right.shape[-1] if right.ndim > 1 else 1)


def _of_added(added: Tensor, left: Tensor, right: Tensor, *rest: Any) -> int:
    return _of_matrices(left, right)


def _of_linear(inputs: Tensor, weight: Tensor, *rest: Any) -> int:
    """inputs: [..., in]; weight: [out, in]."""
    return inputs.numel() * (weight.shape[0] if weight.ndim > 1 else 1)


def _of_convolution(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    *rest: Any,
    made: Tensor,
) -> int:
    """weight: [out, in / groups, *kernel], transposed [in, out / groups, *kernel]: each value of
    the output, or of the input, meets all but the first axis."""
    return (inputs if transposed else made).numel() * prod(weight.shape[1:])


def _of_attention(queries: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> int:
    """[..., queries, channels] with [..., keys, channels] and [..., keys, channels of a value]: of
    both products. A mask saves none of them."""
    channels = queries.shape[-1]
    return queries.numel() // channels * keys.shape[-2] * (channels + values.shape[-1])


def _of_recurrent(inputs: Tensor, state: Any, weights: list[Tensor], *rest: Any) -> int:
    """inputs: [batch and steps in any order, in]: each step meets every matrix."""
    return inputs.shape[:-1].numel() * sum(one.numel() for one in weights if one.ndim > 1)


_MACS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::vdot"), _of_matrices),
    **dict.fromkeys(("aten::addmm", "aten::baddbmm", "aten::addbmm", "aten::addmv"), _of_added),
    **dict.fromkeys(("aten::addmm_", "aten::baddbmm_", "aten::addbmm_", "aten::addmv_"), _of_added),
    **dict.fromkeys(("aten::linear", "mkldnn::_linear_pointwise"), _of_linear),
    "aten::convolution": _of_convolution,
    "aten::scaled_dot_product_attention": _of_attention,
    **dict.fromkeys(("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"), _of_recurrent),
    # An involution's sum over places.
    **dict.fromkeys(("aten::addcmul", "aten::addcmul_"), lambda added, *rest: added.numel()),
}
"""How the arithmetic of an operation is counted: (its arguments) -> multiply-accumulates. Those
that attention, recurrent and linear layers ask for are whole, as the network wrote them."""
_MOVES = {
    *("aten::cat", "aten::stack", "aten::copy_", "aten::index_put", "aten::index_put_"),
    *("aten::scatter", "aten::scatter_", "aten::scatter_add", "aten::scatter_add_"),
    *("aten::scatter_reduce", "aten::scatter_reduce_", "aten::index_add", "aten::index_add_"),
    *("aten::index_copy", "aten::index_copy_", "aten::masked_scatter", "aten::masked_scatter_"),
}
"""Operations of several matrices without products, which do not say so by a tag."""


class _Products(TorchDispatchMode):
    """Counts what is multiplied within it. In inference mode it sees operations as the network
    wrote them; what it does not know is taken apart as far as PyTorch says of what it is made."""

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
                made = function.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        made = function(*args, **kwargs)
        if count is _of_convolution:
            self.macs += count(*args, **kwargs, made=made)
        elif count is not None:
            self.macs += count(*args, **kwargs)
        elif name not in _MOVES and _may_multiply(function, args, kwargs):
            self.unknown[name] = None
        return made


def _may_multiply(function: Any, args: tuple, kwargs: dict) -> bool:
    """Whether an operation takes two matrices or more, and not value by value."""
    matrices = [
        value
        for value in tree_leaves((args, kwargs))
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
    ]
    return len(matrices) > 1 and torch.Tag.pointwise not in getattr(function, "tags", ())


def _activations(network: nn.Module, images: Tensor) -> int:
    """The most bytes that a forward pass holds at once beside weights and images."""
    if images.device.type == "cuda":
        network(images)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        network(images)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _Held() as held:
        network(images)
    return held.most


class _Held(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it and not yet let go."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            storage = value.untyped_storage() if isinstance(value, Tensor) else None
            if storage is not None and storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._let_go, storage._cdata, storage.nbytes())
        return made

    def _let_go(self, storage: int, nbytes: int) -> None:
        self.alive.discard(storage)
        self.now -= nbytes


def _rates(network: nn.Module, images: Tensor) -> list[float]:
    """Images a second, in each of several rounds."""
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
