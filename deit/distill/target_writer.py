"""Compute the teachers' outputs for the shards of a target store and write them."""

import time
from collections.abc import Callable
from contextlib import closing

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from deit.core.console import format_duration, info, progress
from deit.core.fault_injection import fault_point
from deit.core.signals import GracefulStop
from deit.core.types import TeacherOutput
from deit.datasets.loader import TrainLoader
from deit.datasets.view_batches import TeacherInput, UnmixedViews
from deit.distill.target_format import RecordFormat, encode, view_checksum
from deit.distill.target_shards import ShardedTargetWriter, TargetShard
from deit.distill.teacher_ensemble import TeacherEnsemble, teacher_query

_UNMIXED_WEIGHT = 0.9  # a mixed view counts as one image above this weight


def shards_of(part: tuple[int, int], num_shards: int, accelerator: Accelerator) -> list[int]:
    """Return the shards that this process writes of a part (index from 0, number of parts)."""
    processes = accelerator.num_processes
    index, num_parts = part[0] * processes + accelerator.process_index, part[1] * processes
    shards = [shard for shard in range(num_shards) if shard % num_parts == index]
    if not shards:
        info(f"this part is empty: there are {num_shards} shards for {num_parts} parts")
    return shards


def write_all(writer: "TargetWriter", accelerator: Accelerator) -> None:
    """Write a process's shards; a signal stops all processes together."""
    num_batches = torch.tensor([writer.num_batches], device=accelerator.device)
    most = int(accelerator.gather(num_batches).max())
    with GracefulStop(accelerator) as interruption:
        writer.write(interruption)
        # Each of these calls is collective, so all processes make the same number of them: a signal
        # to a process with more batches stops this one as well.
        for _ in range(most - writer.num_batches):
            interruption.raise_if_stopped()
        interruption.raise_if_stopped(now=True)


class TargetWriter:
    """Computes the teachers' outputs for missing shards and writes them.

    missing: the shards to write. num_batches: how many batches of at most `batch_size` views they
    take.
    """

    def __init__(
        self,
        store: ShardedTargetWriter,
        shards: list[int],
        loader: TrainLoader,
        ensemble: TeacherEnsemble,
        labels: Tensor,
        batch_size: int,
    ) -> None:
        """shards: of this process. labels: of the training images, int64 [N]."""
        self.store = store
        self.record_format = store.record_format
        self.loader = loader
        self.ensemble = ensemble
        self.query = teacher_query(loader, ensemble)
        self.labels = labels
        self.batch_size = batch_size
        self.missing = [shard for shard in shards if not store.path(shard).is_file()]
        if len(self.missing) < len(shards):
            num_written = len(shards) - len(self.missing)
            info(f"{num_written} of {len(shards)} shards are already written")
        ranges = [rows for shard in self.missing for rows in self.record_format.epoch_ranges(shard)]
        self.num_rows = sum(last - first for _, first, last in ranges)
        self.num_batches = sum(-(-(last - first) // batch_size) for _, first, last in ranges)

    def check_teacher(self) -> None:
        """Compute the outputs of the first missing batch. Raises NumericsError naming the images if
        one is not finite."""
        for shard in self.missing[:1]:
            epoch, first, last = self.record_format.epoch_ranges(shard)[0]
            rows = torch.arange(first, min(first + self.batch_size, last))
            for inputs in self.loader.teacher_inputs(epoch, rows, batch_size=self.batch_size):
                self.query(inputs)
        self.ensemble.check()

    def write(self, interruption: GracefulStop) -> None:
        """Write the missing shards. Raises StoppedBySignal between two batches."""
        steps = progress(range(self.num_batches), total=self.num_batches, title="writing targets")

        def before_batch() -> None:
            next(steps, None)
            fault_point("teacher")
            interruption.raise_if_stopped()

        started = time.monotonic()
        with closing(steps):
            for shard in self.missing:
                with interruption.interruptible():
                    targets = self._compute(shard, interruption, before_batch)
                self.store.commit(shard, targets)
        seconds = time.monotonic() - started
        if self.num_rows:
            info(
                f"computed {self.num_rows} teacher outputs in {format_duration(seconds)}: "
                f"{self.num_rows / seconds:.0f} images/s"
            )

    def _compute(
        self, shard: int, interruption: GracefulStop, before_batch: Callable[[], None]
    ) -> TargetShard:
        """Return a shard. Raises NumericsError naming the images if an output is not finite."""
        records, checksums, num_correct, num_unmixed = [], [], 0, 0
        for epoch, first, last in self.record_format.epoch_ranges(shard):
            rows = torch.arange(first, last)
            batches = self.loader.teacher_inputs(epoch, rows, batch_size=self.batch_size)
            for inputs in interruption.iterate(batches):
                before_batch()
                outputs = self.query(inputs)
                batch_records, batch_checksums = encode_batch(self.record_format, inputs, outputs)
                records.append(batch_records)
                checksums += batch_checksums
                unmixed = _is_unmixed(inputs.views)
                correct = outputs.labels[:, 0].cpu() == self.labels[inputs.views.sample_ids.cpu()]
                num_correct += int((correct & unmixed).sum())
                num_unmixed += int(unmixed.sum())
        self.ensemble.check()
        view_checksums = np.array(checksums, "<u4")
        return TargetShard(np.concatenate(records), view_checksums, num_correct, num_unmixed)


def encode_batch(
    record_format: RecordFormat, inputs: TeacherInput, outputs: TeacherOutput
) -> tuple[np.ndarray, list[int]]:
    """Return the records of a batch, and the checksums of the checked views in it."""
    indices = record_format.checked_indices(inputs.views.target_rows)
    checksums = [view_checksum(inputs.views, index) for index in indices]
    return encode(record_format, outputs.logits[:, 0]), checksums


def _is_unmixed(views: UnmixedViews) -> Tensor:
    """Return which views are (almost) one image, bool [rows], on the CPU."""
    if views.mix is None:
        return torch.ones(len(views.target_rows), dtype=torch.bool)
    return (views.mix.lam > _UNMIXED_WEIGHT).repeat_interleave(2).cpu()
