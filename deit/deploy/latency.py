"""How long several networks take for a batch, measured in turns."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_LEAST, _MOST = 10, 200
"""Turns: as many as give deciles a meaning, and as many as change them no more."""
_WARM_S = 0.05


class Latency(NamedTuple):
    """Milliseconds a batch takes: median, first and ninth decile; of how many turns."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    turns: int


def latencies(
    networks: dict[str, Callable[[Tensor], object]], images: Tensor, *, seconds: float
) -> dict[str, Latency]:
    """Measure networks beside each other, by name.

    images: the batch that all are given. seconds: about how long all of it takes; at least ten
    turns are made. In each turn every network is called, in an order that moves on: what else the
    machine does, its clock and its heat meet all of them alike. Before a call of less than 50 ms
    goes one that is not measured: it brings the weights back into the caches, where steady use has
    them.
    """
    names = list(networks)
    taken: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for turn in range(_MOST):
        if turn >= _LEAST and time.perf_counter() > end:
            break
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            network = networks[name]
            if not taken[name] or taken[name][-1] < 1000 * _WARM_S:
                network(images)
            started = time.perf_counter()
            network(images)
            taken[name].append(1000 * (time.perf_counter() - started))
    return {name: _summary(times) for name, times in taken.items()}


def _summary(times: list[float]) -> Latency:
    levels = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    median, low, high = torch.tensor(times, dtype=torch.float64).quantile(levels).tolist()
    return Latency(median, low, high, len(times))
