"""Measure the time of a loader's stages without synchronizing the device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StageTimer:
    """Seconds and number of images of each named stage since the last reset."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Reset all stages, at the start of an epoch."""
        self.images: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def add(self, stage: str, images: int, seconds: float) -> None:
        """Add images and seconds that were measured elsewhere."""
        self.images[stage] = self.images.get(stage, 0) + images
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    @contextmanager
    def time(self, stage: str, images: int) -> Iterator[None]:
        """Measure the time of this context; on a GPU by CUDA events, read after the epoch."""
        if self.device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((stage, first, last))
            self.add(stage, images, 0.0)
            return
        started = time.perf_counter()
        yield
        self.add(stage, images, time.perf_counter() - started)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each stage; waits for the device."""
        for stage, first, last in self._events:
            last.synchronize()
            self._seconds[stage] += first.elapsed_time(last) / 1000
        self._events = []
        return dict(self._seconds)

    def rates(self) -> dict[str, float]:
        """Return the images per second of each stage that took any time."""
        return {
            stage: self.images[stage] / seconds
            for stage, seconds in self.seconds().items()
            if seconds > 0
        }
