"""Decoded batches of encoded images on the device, with the times of reading and of waiting."""

import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from deit.datasets.crops import Decoder, ReadRequest
from deit.datasets.decode_workers import Reader, ReadResult
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.stage_timer import StageTimer
from deit.datasets.view_samplers import ViewSampler


class DecodedBatches:
    """The readers of a loader, one for each set of decoders; their processes are kept.

    images: images in memory have no readers. stages: takes the times of reading and of waiting.
    """

    def __init__(
        self,
        images: EncodedImages | InMemoryImages,
        num_workers: int,
        device: torch.device,
        stages: StageTimer,
    ) -> None:
        self._images, self._num_workers = images, num_workers
        self._device, self._stages = device, stages
        self._readers: dict[tuple[Decoder, ...], Reader] = {}

    def read(
        self,
        samplers: Sequence[ViewSampler],
        requests: Iterable[ReadRequest],
        *,
        in_process: bool = False,
    ) -> Iterator[tuple[Tensor, ...]] | None:
        """Return an iterator over decoded batches on the device, one tensor per sampler; None for
        images in memory.

        in_process: without worker processes, for a few images. It raises as `Reader.read`.
        """
        if isinstance(self._images, InMemoryImages):
            return None
        decoders = tuple(sampler.decoder for sampler in samplers)
        if in_process:
            reader = Reader(self._images, decoders, num_workers=0, pin=False)
            return self._timed(reader.read(requests))
        reader = self._readers.get(decoders)
        if reader is None:
            pin = self._device.type == "cuda"
            reader = Reader(self._images, decoders, num_workers=self._num_workers, pin=pin)
            self._readers[decoders] = reader
        return self._timed(reader.read(requests))

    def close(self) -> None:
        """End the worker processes; the next `read` starts new ones."""
        for reader in self._readers.values():
            reader.close()

    def _timed(self, batches: Iterator[ReadResult]) -> Iterator[tuple[Tensor, ...]]:
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            num_images = len(batch.pixels[0])
            self._stages.add("waiting", num_images, time.perf_counter() - started)
            self._stages.add("reading", num_images, float(batch.seconds))
            yield tuple(pixels.to(self._device, non_blocking=True) for pixels in batch.pixels)
