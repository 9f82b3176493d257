"""Measure the latency of several networks in interleaved turns."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_MIN_TURNS, _MAX_TURNS = 10, 200
"""Deciles need at least ten values; more than 200 do not change them."""
_WARM_UP_BELOW_S = 0.05


class Latency(NamedTuple):
    """The time of a batch [ms]: median, first and ninth decile, over `turns` calls."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    turns: int


def latencies(
    networks: dict[str, Callable[[Tensor], object]], images: Tensor, *, seconds: float
) -> dict[str, Latency]:
    """Measure the latency of networks on one batch, by name.

    images: the batch. seconds: the approximate total time; at least ten turns are run.

    Each turn calls every network once, in an order that rotates, so that other load, clock and
    temperature affect all of them equally. A call of less than 50 ms follows an untimed one, which
    brings the weights back into the caches, as in steady use.
    """
    names = list(networks)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for turn in range(_MAX_TURNS):
        if turn >= _MIN_TURNS and time.perf_counter() > end:
            break
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            network = networks[name]
            if not times[name] or times[name][-1] < 1000 * _WARM_UP_BELOW_S:
                network(images)
            started = time.perf_counter()
            network(images)
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: _summary(values) for name, values in times.items()}


def _summary(times: list[float]) -> Latency:
    levels = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    median, low, high = torch.tensor(times, dtype=torch.float64).quantile(levels).tolist()
    return Latency(median, low, high, len(times))
