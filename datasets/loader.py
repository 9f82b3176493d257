"""Training batches: the same sequence of global batches for any number of processes."""

from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from deit.config.arguments import checks_types
from deit.config.command_choices import check_at_least, check_epoch
from deit.config.schema import Config
from deit.config.sections.optim import OptimConfig
from deit.config.sections.views import ViewsConfig
from deit.core.errors import ConfigError
from deit.core.rng import Keys, permutation
from deit.core.tensors import as_device, to_device_async
from deit.core.types import Batch
from deit.datasets.crops import ReadRequest
from deit.datasets.decoded_batches import DecodedBatches
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.mixing import Mix, mix_images, mix_targets, sample_mix
from deit.datasets.resizing import resize
from deit.datasets.splits import Splits
from deit.datasets.stage_timer import StageTimer
from deit.datasets.view_batches import (
    SampledViews,
    TeacherInput,
    UnmixedViews,
    micro_batch_size,
    micro_batches,
    num_images_per_batch,
    num_steps_per_epoch,
)
from deit.datasets.view_samplers import (
    RandomView,
    ViewSampler,
    source_size,
    teacher_view_sampler,
    view_sizes,
)
from deit.datasets.views import ChannelStats, to_unit_float

_VIEWS_SAMPLED = 4096  # at most, at once: sampling a few parameters takes as long as many
_VIEW_BYTES = 2**21  # at most, at once: views of small micro-batches in memory are made together


class TrainLoader:
    """Micro-batches of training views for one process.

    Images in memory are kept on the device; encoded images are decoded and cropped by worker
    processes.

    An epoch is a sequence of rows; each row is one view of one image. Global batch b has rows
    b * batch_size to (b + 1) * batch_size, divided into grad_accum_steps * num_processes equal
    micro-batches. Images that do not fill a batch at the end of an epoch are skipped; the order
    changes with every epoch.

    With `views.aug_repeats` r, a batch has n = ceil(batch_size / r) images: its row p is repeat
    p // n of its image p % n. So neighboring rows, which are mixed, are different images.

    student_size, teacher_size: sides of their inputs [px]; None for a teacher that accepts any
    size. decoded_size: side [px] to which encoded images are decoded (data.image_size), unless a
    random crop is taken from the full-resolution image; default: that of the view. channel_stats:
    of the training images, for fill colors and erasing. seed: of order and views. num_workers:
    decoding processes, for encoded images. with_teacher_images: whether batches contain the images
    of the teachers. process_index, num_processes: of this process, which gets its own part of each
    global batch.

    Attributes to read: images, num_classes, views, optim, channel_stats, seed, process_index,
    num_processes, device, num_workers and with_teacher_images are the parameters. class_names: in
    the order of the labels. splits: the images of all splits; None unless made by `from_config`,
    `from_folder` or `from_arrays`. labels: int64 [images], on the device. pixels: uint8 [images, 3,
    side, side], on the device; None for encoded images. mean, std: for `build_student`. num_images:
    of the training split. steps_per_epoch: global batches of an epoch. micro_batch_size: views in
    each batch of `epoch`. images_per_batch, images_per_epoch: different images in a global batch
    and in an epoch. sizes: of the views. student_sampler, teacher_sampler: make the views; None for
    a teacher that gets the student's. stages: times of this epoch. on_views: None or a function,
    called with the views of one or more micro-batches if the teacher gets the student's; otherwise
    with its views of the first rows of an epoch.

    >>> images = InMemoryImages(torch.zeros(20, 3, 8, 8, dtype=torch.uint8), torch.arange(20) % 2)
    >>> loader = TrainLoader(
    ...     images, num_classes=2, views=ViewsConfig(), optim=OptimConfig(batch_size=8),
    ...     student_size=8, seed=0, channel_stats=ChannelStats((0.5,) * 3, (0.25,) * 3))
    >>> [tuple(batch.images.shape) for batch in loader.epoch(0)]
    [(8, 3, 8, 8), (8, 3, 8, 8)]
    """

    @checks_types
    def __init__(
        self,
        images: InMemoryImages | EncodedImages,
        num_classes: int,
        *,
        views: ViewsConfig,
        optim: OptimConfig,
        student_size: int,
        teacher_size: int | None = None,
        decoded_size: int | None = None,
        channel_stats: ChannelStats,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        with_teacher_images: bool = True,
    ) -> None:
        """Raises ConfigError if a batch cannot be divided into equal (with mixing: even)
        micro-batches, and DataError if it needs more images than there are."""
        self.views, self.num_workers = views, num_workers
        self.process_index, self.num_processes = process_index, num_processes
        self.set_micro_batches(optim)
        self.num_images = len(images.labels)
        self.images_per_batch = num_images_per_batch(optim.batch_size, views, self.num_images)
        self.device = as_device(device)
        self.stages = StageTimer(self.device)
        self.images, self.with_teacher_images = images, with_teacher_images
        self.labels = images.labels.to(self.device)
        self.num_classes, self.seed = num_classes, seed
        source = source_size(images, views, decoded_size)
        self.sizes = sizes = view_sizes(student_size, teacher_size, source)
        self.channel_stats, (self.mean, self.std) = channel_stats, channel_stats
        # An epoch keeps its number of views: with repeats it covers fewer images.
        self.steps_per_epoch = num_steps_per_epoch(self.num_images, optim.batch_size)
        self.images_per_epoch = self.steps_per_epoch * self.images_per_batch
        settings = {"source": source, "channel_stats": channel_stats, "seed": seed}
        self.student_sampler = RandomView(views, size=sizes.view, **settings)
        self.teacher_sampler = teacher_view_sampler(views, size=sizes.teacher, **settings)
        self.on_views: Callable[[UnmixedViews], None] | None = None
        self.pixels = images.pixels.to(self.device) if isinstance(images, InMemoryImages) else None
        self._decoded = DecodedBatches(images, num_workers, self.device, self.stages)
        self.class_names = tuple(map(str, range(num_classes)))
        self.splits: Splits | None = None

    @classmethod
    @checks_types
    def from_config(
        cls,
        config: Config | str | PathLike,
        *,
        teacher_size: int | None = None,
        device: torch.device | str = "cpu",
        process_index: int | None = None,
        num_processes: int | None = None,
        with_teacher_images: bool = True,
    ) -> "TrainLoader":
        """Return the loader of a configuration's training views, with its `splits`.

        config: or the name of a recipe. teacher_size: side [px] of the teacher's input; None: any.
        device: of the batches: cpu, cuda, cuda:INDEX, or auto for a GPU if there is one.
        process_index, num_processes: default: those of torch.distributed. with_teacher_images:
        whether batches have the teacher's images; False for stored targets. Raises ConfigError,
        DataError and SystemFault as `train`.
        """
        from deit.datasets.loader_factories import loader_from_config

        process, images = (process_index, num_processes), with_teacher_images
        return loader_from_config(config, teacher_size, device, process, images)

    @classmethod
    @checks_types
    def from_folder(
        cls,
        root: str | PathLike,
        *,
        image_size: int,
        batch_size: int,
        views: ViewsConfig | dict[str, Any] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> "TrainLoader":
        """Return the loader of the training views of a folder of class folders.

        root: as data.root of source folder. image_size: side of the views [px]. options: of
        `from_config`. Raises as `from_config`.
        """
        from deit.datasets.loader_factories import loader_from_folder

        return loader_from_folder(root, image_size, batch_size, views, seed, **options)

    @classmethod
    @checks_types
    def from_arrays(
        cls,
        images: Any,
        labels: Any,
        *,
        batch_size: int,
        class_names: Sequence[str] | None = None,
        image_size: int | None = None,
        views: ViewsConfig | dict[str, Any] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> "TrainLoader":
        """Return the loader of the training views of images in memory.

        images: tensor or array, uint8 [images, 3, side, side], RGB. labels: integers [images].
        class_names: default: the labels as text. image_size: side of the views [px]; default: that
        of the images. options: of `from_config`, and validation: a pair (images, labels) that
        measures teachers. Raises ConfigError and DataError.
        """
        from deit.datasets.loader_factories import loader_from_arrays

        return loader_from_arrays(
            images, labels, batch_size, class_names, image_size, views, seed, **options
        )

    @checks_types
    def set_micro_batches(self, optim: OptimConfig) -> None:
        """Divide the same batches into other micro-batches.

        Raises ConfigError if they would not be equal (with mixing: even).
        """
        size = micro_batch_size(optim, self.views, self.num_processes)
        self.optim, self.micro_batch_size = optim, size

    def __len__(self) -> int:
        """Return the number of this process's micro-batches in an epoch."""
        return self.steps_per_epoch * self.optim.grad_accum_steps

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch for which teacher outputs can be stored.

        All images if the teacher's view is fixed. Otherwise, without repeats, all images (with
        mixing, an even number), so that the rows do not depend on the batch size.
        """
        if self.views.has_fixed_teacher_view:
            return self.num_images
        if self.views.aug_repeats > 1:
            return self.steps_per_epoch * self.optim.batch_size
        return self.num_images - self.num_images % 2 if self.views.uses_mixing else self.num_images

    def __iter__(self) -> Iterator[Batch]:
        """Raises ConfigError: the views of every epoch are others, so `epoch` needs its number."""
        raise ConfigError(
            "loader: has no iterator of its own, because the views change with the epoch; use "
            "`for batch in loader.epoch(epoch)`, with the epoch from 0 on"
        )

    def order(self, epoch: int) -> Tensor:
        """Return the order of the images in an epoch, by the seed: int64 [images], on the CPU."""
        check_epoch(epoch)
        return permutation(self.seed, epoch, self.num_images)

    def epoch(self, epoch: int, *, start_step: int = 0) -> Iterator[Batch]:
        """Yield this process's micro-batches of an epoch, `optim.grad_accum_steps` per step.

        epoch: from 0 on. start_step: skip the steps before it; their images are not read. Raises
        ConfigError for other numbers, DataError for an image that cannot be read, and WorkerLost
        for a decoding process that was killed.
        """
        check_epoch(epoch)  # now, not at the first batch
        check_at_least("start_step", start_step, 0)
        return self._epoch(int(epoch), int(start_step))

    def _epoch(self, epoch: int, start_step: int) -> Iterator[Batch]:
        self.stages.reset()
        order = self.order(epoch)
        rows = self._rows()[start_step * self.optim.grad_accum_steps :]
        samplers = [self.student_sampler]
        if self.with_teacher_images and self.teacher_sampler is not None:
            samplers.append(self.teacher_sampler)
        if self.on_views is not None and self.teacher_sampler is not None:
            self.on_views(self._first_teacher_views(epoch))
        requests = (ReadRequest(epoch, *self._locate(order, batch)) for batch in rows)
        decoded = self._decoded.read(samplers, requests)
        size, at_once = self.micro_batch_size, 1  # micro-batches whose views are made together
        if decoded is None:
            at_once = max(_VIEW_BYTES // (3 * self.sizes.view**2 * size), 1)
        num_sampled = _VIEWS_SAMPLED // size // at_once * at_once
        for chunk in rows.split(max(num_sampled, at_once)):
            with self.stages.time("views", 0):  # no images: `_make_batches` counts them
                flat = chunk.flatten()
                sampled = self._sample(epoch, flat, *self._locate(order, flat), samplers)
            for first in range(0, len(chunk), at_once):
                part = sampled.select(slice(first * size, (first + at_once) * size))
                pixels = None if decoded is None else next(decoded)
                yield from self._make_batches(epoch, part, pixels, samplers)

    @checks_types
    def teacher_inputs(
        self,
        epoch: int,
        rows: Tensor,
        *,
        batch_size: int,
        repeat: int = 0,
        in_process: bool = False,
    ) -> Iterator[TeacherInput]:
        """Yield the teacher's input for some rows of an epoch, in batches.

        rows: int64 [n], on the CPU; with mixing whole pairs, 2k before 2k + 1, and an even
        batch_size. repeat: which view of an image, if the teacher's view is fixed; can be called
        for several repeats at the same time. in_process: decode without worker processes. Raises
        DataError for an image that cannot be read.
        """
        sampler = self.teacher_sampler or self.student_sampler
        order = None if self.views.has_fixed_teacher_view else self.order(epoch)
        images, repeats = self._locate(order, rows, repeat)
        batches = zip(images.split(batch_size), repeats.split(batch_size))
        requests = (ReadRequest(epoch, *batch) for batch in batches)
        decoded = self._decoded.read([sampler], requests, in_process=in_process)
        num_sampled = max(_VIEWS_SAMPLED // batch_size, 1) * batch_size
        for start in range(0, len(rows), num_sampled):
            chunk = slice(start, start + num_sampled)
            sampled = self._sample(epoch, rows[chunk], images[chunk], repeats[chunk], [sampler])
            for first in range(0, len(sampled.samples), batch_size):
                batch = sampled.select(slice(first, first + batch_size))
                (pixels,) = (self.pixels[batch.samples],) if decoded is None else next(decoded)
                views = sampler.apply(pixels, *batch.parameters)
                yield TeacherInput(
                    self._to_input(views, self.sizes.teacher, batch.mix),
                    UnmixedViews(views, batch.mix, batch.samples, epoch, batch.target_rows),
                )

    def _first_teacher_views(self, epoch: int) -> UnmixedViews:
        """Return the teacher's own views of the first rows of an epoch, as they are stored."""
        stored_epoch = 0 if self.views.has_fixed_teacher_view else epoch
        rows = torch.arange(min(self.num_images, 2))
        (inputs,) = self.teacher_inputs(stored_epoch, rows, batch_size=2, in_process=True)
        return inputs.views._replace(epoch=epoch)

    def close(self) -> None:
        """End the worker processes; the next epoch starts new ones."""
        self._decoded.close()

    def _rows(self) -> Tensor:
        """Return this process's rows of an epoch, int64 [micro-batches, micro_batch_size]."""
        rows = torch.arange(self.steps_per_epoch * self.optim.batch_size)
        rows = rows.view(-1, self.num_processes, self.micro_batch_size)
        return rows[:, self.process_index]

    def _locate(self, order: Tensor | None, rows: Tensor, repeat: int = 0) -> tuple[Tensor, Tensor]:
        """Return the image index and repeat of each row; without an order, rows are images."""
        if order is None:
            return rows, torch.full_like(rows, repeat)
        if self.views.aug_repeats == 1:
            return order[rows], torch.zeros_like(rows)
        batch, index = rows // self.optim.batch_size, rows % self.optim.batch_size
        position = batch * self.images_per_batch + index % self.images_per_batch
        return order[position], index // self.images_per_batch

    def _sample(
        self,
        epoch: int,
        rows: Tensor,
        images: Tensor,
        repeats: Tensor,
        samplers: list[ViewSampler],
    ) -> SampledViews:
        """Sample the views of rows of an epoch. images, repeats: of each row, from `_locate`."""
        samples = to_device_async(images, self.device)
        repeats = to_device_async(repeats, self.device)
        mix = None
        if self.views.uses_mixing:
            pairs = Keys(self.seed, epoch, to_device_async(rows[::2] // 2, self.device))
            mix = sample_mix(pairs, views=self.views, size=self.sizes.student)
        return SampledViews(
            samples,
            images if self.views.has_fixed_teacher_view else rows,
            tuple(sampler.sample(epoch, samples, repeats) for sampler in samplers),
            mix,
        )

    def _make_batches(
        self,
        epoch: int,
        sampled: SampledViews,
        decoded: tuple[Tensor, ...] | None,
        samplers: list[ViewSampler],
    ) -> Iterator[Batch]:
        """Make the views of one or more micro-batches. decoded: the pixels for each sampler."""
        samples, target_rows, parameters, mix = sampled
        with self.stages.time("views", len(samples)):
            pixels = (self.pixels[samples],) * len(samplers) if decoded is None else decoded
            views, *teacher_views = (
                sampler.apply(*inputs) for sampler, *inputs in zip(samplers, pixels, parameters)
            )
            images = self._to_input(views, self.sizes.student, mix)
            targets = one_hot(self.labels[samples], self.num_classes).float()
            if mix is not None:
                targets = mix_targets(targets, mix)
            teacher_images = None
            if teacher_views:
                teacher_images = to_unit_float(teacher_views[0])
            elif self.with_teacher_images:
                same = self.sizes.teacher == self.sizes.student
                teacher_images = images if same else self._to_input(views, self.sizes.teacher, mix)
            if self.on_views is not None and self.teacher_sampler is None:
                self.on_views(UnmixedViews(views, mix, samples, epoch, target_rows))
        batch = Batch(images, teacher_images, targets, samples, epoch, target_rows)
        yield from micro_batches(batch, self.micro_batch_size)

    def _to_input(self, views: Tensor, size: int, mix: Mix | None) -> Tensor:
        """Convert views to a network's input: resized, in [0, 1], mixed."""
        images = to_unit_float(resize(views, size, size, "bicubic"))
        return images if mix is None else mix_images(images, mix)
