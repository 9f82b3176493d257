"""What a network costs: parameters, arithmetic of an image, memory of a batch, images a second."""

import statistics
import time
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from deit.models.linear import FLOPS

_ROUNDS = 5
_ROUND_S = 0.4


class Cost(NamedTuple):
    """parameters: their number. gmacs: multiply-accumulates of one image's forward pass [10**9],
    of matrix products, convolutions and attention (an involution's sums are not among them); the
    paper's "FLOPs". memory_mb: the most that
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
    wanted = [one for one in network.parameters() if one.requires_grad]
    network.requires_grad_(False)  # the counter trips over parameters that modules hand on
    with FlopCounterMode(display=False, custom_mapping=FLOPS) as counted:
        network(images[:1])
    for one in wanted:
        one.requires_grad_(True)
    weights = sum(value.nbytes for value in network.state_dict().values())
    rates = _rates(network, images)
    return Cost(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        gmacs=counted.get_total_flops() / 2 / 1e9,
        memory_mb=(weights + _activations(network, images)) / 1e6,
        images_per_s=statistics.median(rates),
        spread=(min(rates), max(rates)),
    )


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
