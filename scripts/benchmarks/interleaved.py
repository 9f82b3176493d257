"""Two sides measured in turns, so that a busy moment of the machine meets both."""

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
    """One row: what is compared, and for each side a function that makes batches without end."""

    name: str
    ours: Callable[[], Iterator[int]]
    theirs: Callable[[], Iterator[int]]
    peer: str
    ahead: int = 0  # batches that lie ready when a turn begins: not counted


@cache
def photographs(number: int, side: int) -> np.ndarray:
    """Real image content without a download: parts of scikit-learn's two photographs, uint8
    [number, side, side, 3]."""
    from sklearn.datasets import load_sample_images

    pictures = [Image.fromarray(array) for array in load_sample_images().images]
    generator = np.random.default_rng(0)
    parts = []
    for index in range(number):
        picture = pictures[index % len(pictures)]
        extent = int(generator.integers(min(side, 200), min(picture.size)))
        left = int(generator.integers(picture.width - extent + 1))
        top = int(generator.integers(picture.height - extent + 1))
        part = picture.crop((left, top, left + extent, top + extent))
        parts.append(np.array(part.resize((side, side), Image.Resampling.BICUBIC)))
    return np.stack(parts)


def rate(batches: Iterator[int], seconds: float) -> float:
    """Images per second over so many seconds, with what a GPU still has to do then."""
    started, number = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        number += next(batches)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return number / (time.perf_counter() - started)


def measured(case: Case, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Both sides in turns; the ratio of each turn, so that a busy moment meets both. And what the
    first update (or batch) of each took, with all that is built for it: data, networks, workers,
    compilation."""
    starts, sides = [], []
    for make in (case.ours, case.theirs):
        began = time.perf_counter()
        sides.append(make())
        next(sides[-1])
        starts.append(time.perf_counter() - began)
    pairs = []
    for _ in range(rounds):
        turns = []
        for side in sides:
            for _ in range(case.ahead):  # what a worker made while the other side was measured
                next(side)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # nor what of it is still queued
            turns.append(rate(side, seconds))
        pairs.append(turns)
    ratios = [one / other for one, other in pairs]
    mine, other = (statistics.median(values) for values in zip(*pairs))
    for side in sides:
        side.close()
    return {
        "name": case.name,
        "peer": case.peer,
        "ours_images_per_s": mine,
        "peer_images_per_s": other,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ours_first_update_s": starts[0],
        "peer_first_update_s": starts[1],
        "n": rounds,
    }


def run_cases(
    cases: dict[str, Callable[[str], Case]], rounds: int, seconds: float, wanted: str
) -> list[dict[str, Any]]:
    """Measure those cases whose name holds the wanted text, one after the other."""
    rows = []
    cases = {name: case for name, case in cases.items() if wanted in name}
    for number, (name, case) in enumerate(cases.items(), start=1):
        row = measured(case(name), rounds=rounds, seconds=seconds)
        rows.append(row)
        info(
            f"{number}/{len(cases)} {row['name']}: {row['ours_images_per_s']:.0f} images/s, "
            f"{row['peer']} {row['peer_images_per_s']:.0f}, ratio {row['ratio']:.2f}"
        )
    return rows
