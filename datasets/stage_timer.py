"""How long the stages of a loader take, measured without making a device wait."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class StageTimer:
    """Seconds and images of each named stage since the last reset."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forget everything: an epoch begins."""
        self.images: dict[str, int] = {}
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def add(self, stage: str, images: int, seconds: float) -> None:
        """Count images and the seconds they took somewhere else."""
        self.images[stage] = self.images.get(stage, 0) + images
        self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds

    @contextmanager
    def time(self, stage: str, images: int) -> Iterator[None]:
        """Measure what happens inside; on a GPU by its own clock, read after the epoch."""
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
        """Seconds by stage."""
        for stage, first, last in self._events:
            last.synchronize()
            self._seconds[stage] += first.elapsed_time(last) / 1000
        self._events = []
        return dict(self._seconds)

    def rates(self) -> dict[str, float]:
        """Images per second by stage; a stage that took no time is left out."""
        return {
            stage: self.images[stage] / seconds
            for stage, seconds in self.seconds().items()
            if seconds > 0
        }
