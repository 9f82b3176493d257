"""Batches of views at each stage: sampled, before mixing, as an input of a network; and sizes."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from deit.config.command_choices import check_at_least
from deit.config.sections.optim import OptimConfig
from deit.config.sections.views import ViewsConfig
from deit.core.errors import ConfigError, DataError
from deit.core.types import Batch
from deit.datasets.mixing import Mix
from deit.datasets.views import ViewParameters


class UnmixedViews(NamedTuple):
    """A batch of views before mixing, which a teacher's output is a function of.

    pixels: uint8 [batch, 3, height, width].
    mix: the mixing of the pairs; None without mixing.
    sample_ids, epoch, target_rows: as in Batch.
    """

    pixels: Tensor
    mix: Mix | None
    sample_ids: Tensor
    epoch: int
    target_rows: Tensor


class TeacherInput(NamedTuple):
    """A batch of the teacher's input.

    images: float32 [batch, 3, height, width] in [0, 1]: the views after mixing.
    """

    images: Tensor
    views: UnmixedViews


class SampledViews(NamedTuple):
    """The view parameters of consecutive rows of an epoch, one for each sampler.

    samples: int64 [rows], the index of each image, on the device. target_rows: as in Batch.
    """

    samples: Tensor
    target_rows: Tensor
    parameters: tuple[ViewParameters | None, ...]
    mix: Mix | None

    def select(self, rows: slice) -> "SampledViews":
        """Return the parameters of some rows; the first must be even."""
        pairs = slice(rows.start // 2, rows.stop // 2)
        return SampledViews(
            self.samples[rows],
            self.target_rows[rows],
            tuple(None if values is None else values.select(rows) for values in self.parameters),
            None if self.mix is None else self.mix.select(pairs),
        )


def micro_batch_size(optim: OptimConfig, views: ViewsConfig, num_processes: int) -> int:
    """Return the number of views in a micro-batch of one process.

    Raises ConfigError if the micro-batches would not be equal (with mixing: even).

    >>> micro_batch_size(OptimConfig(batch_size=64, grad_accum_steps=2), ViewsConfig(), 4)
    8
    """
    check_at_least("num_processes", num_processes, 1)
    parts = num_processes * optim.grad_accum_steps
    size = optim.batch_size // parts
    if optim.batch_size % parts or (views.uses_mixing and size % 2):
        kind = "equal, even" if views.uses_mixing else "equal"
        raise ConfigError(
            f"optim.batch_size = {optim.batch_size}: cannot be divided into {kind} micro-batches "
            f"for {num_processes} processes and optim.grad_accum_steps {optim.grad_accum_steps}"
        )
    return size


def micro_batches(batch: Batch, size: int) -> Iterator[Batch]:
    """Divide a batch into micro-batches of this size, which share its memory."""
    images, teacher_images, targets, sample_ids, epoch, target_rows = batch
    parts = [part.split(size) for part in (images, targets, sample_ids, target_rows)]
    teacher_parts = None if teacher_images is None else teacher_images.split(size)
    for index, (images, targets, sample_ids, target_rows) in enumerate(zip(*parts)):
        teacher_part = None if teacher_parts is None else teacher_parts[index]
        yield Batch(images, teacher_part, targets, sample_ids, epoch, target_rows)


def num_steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Return the number of training steps of an epoch, at least 1.

    >>> num_steps_per_epoch(1294, batch_size=32)  # 14 images are left over
    40
    """
    return max(num_images // batch_size, 1)


def num_images_per_batch(batch_size: int, views: ViewsConfig, num_images: int) -> int:
    """Return the number of different images in a batch: each has views.aug_repeats views.

    Raises DataError if there are fewer images, and ConfigError if an image would be mixed with
    itself.

    >>> num_images_per_batch(128, ViewsConfig(aug_repeats=3), num_images=1000)
    43
    """
    count = -(-batch_size // views.aug_repeats)
    if count > num_images:
        raise DataError(
            f"optim.batch_size = {batch_size}: needs {count} images, but there are {num_images} "
            "for training; use a smaller batch or more data"
        )
    if views.uses_mixing and count < 2:
        raise ConfigError(
            f"views.aug_repeats = {views.aug_repeats}: a batch of {batch_size} would contain a "
            "single image and mix it with itself; use fewer repeats, a larger batch or no mixing"
        )
    return count
