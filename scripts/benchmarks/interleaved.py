"""Measure two sides in turns, so that a slow phase of the machine affects both."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from deit.core.console import info


class Case(NamedTuple):
    """A row of a benchmark: its name and a function for each side that makes endless batches.

    ahead: batches that are ready at the start of a turn, which are not counted.
    """

    name: str
    deit: Callable[[], Iterator[int]]
    baseline: Callable[[], Iterator[int]]
    peer: str
    ahead: int = 0


@cache
def photographs(num_images: int, side: int) -> np.ndarray:
    """Return random crops of scikit-learn's two photographs, uint8 [num_images, side, side, 3]."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(array) for array in load_sample_images().images]
    generator = np.random.default_rng(0)
    crops = []
    for index in range(num_images):
        photo = photos[index % len(photos)]
        extent = int(generator.integers(min(side, 200), min(photo.size)))
        left = int(generator.integers(photo.width - extent + 1))
        top = int(generator.integers(photo.height - extent + 1))
        crop = photo.crop((left, top, left + extent, top + extent))
        crops.append(np.array(crop.resize((side, side), Image.Resampling.BICUBIC)))
    return np.stack(crops)


def rate(batches: Iterator[int], seconds: float) -> float:
    """Return the images per second over at least `seconds`, including queued work of a GPU."""
    started, num_images = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        num_images += next(batches)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return num_images / (time.perf_counter() - started)


def measure(case: Case, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Measure both sides in turns; return the medians and the ratios of the turns.

    The time to the first step (or batch) includes building data, networks, workers and compilation.
    """
    starts, sides = [], []
    for make in (case.deit, case.baseline):
        started = time.perf_counter()
        sides.append(make())
        next(sides[-1])
        starts.append(time.perf_counter() - started)
    pairs = []
    for _ in range(rounds):
        turns = []
        for side in sides:
            for _ in range(case.ahead):  # made by workers while the other side was measured
                next(side)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # do not count work that is still queued
            turns.append(rate(side, seconds))
        pairs.append(turns)
    ratios = [a / b for a, b in pairs]
    deit_rate, peer_rate = (statistics.median(values) for values in zip(*pairs))
    for side in sides:
        side.close()
    return {
        "name": case.name,
        "peer": case.peer,
        "ours_images_per_s": deit_rate,
        "peer_images_per_s": peer_rate,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ours_first_step_s": starts[0],
        "peer_first_step_s": starts[1],
        "n": rounds,
    }


def run_cases(
    cases: dict[str, Callable[[str], Case]], rounds: int, seconds: float, name_part: str
) -> list[dict[str, Any]]:
    """Measure the cases whose names contain `name_part`, one after another."""
    rows = []
    cases = {name: case for name, case in cases.items() if name_part in name}
    for index, (name, case) in enumerate(cases.items(), start=1):
        row = measure(case(name), rounds=rounds, seconds=seconds)
        rows.append(row)
        info(
            f"{index}/{len(cases)} {row['name']}: {row['ours_images_per_s']:.0f} images/s, "
            f"{row['peer']} {row['peer_images_per_s']:.0f}, ratio {row['ratio']:.2f}"
        )
    return rows
