"""Training batches: the same sequence of global batches on any number of processes."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from deit.config.data_section import ViewsConfig
from deit.config.schema import OptimConfig
from deit.core.errors import ConfigError, DataError
from deit.core.rng import Keys, permutation
from deit.core.tensors import to_device_async
from deit.core.types import Batch
from deit.datasets.decode_workers import Reader, ReadResult
from deit.datasets.decoders import Decoder, ReadRequest
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.mixing import Mix, mix_images, mix_targets, sample_mix
from deit.datasets.resizing import resize
from deit.datasets.stage_timer import StageTimer
from deit.datasets.view_samplers import RandomView, ViewSampler, teacher_view_sampler
from deit.datasets.views import ChannelStats, ViewParameters, to_unit_float

_DRAWN_AT_ONCE = 4096  # views; they are small numbers, and drawing few costs as much as many
_SHOWN_AT_ONCE = 2 * 2**20  # bytes of views; smaller micro-batches are made together, likewise


class Sizes(NamedTuple):
    """Sides [px]: of the view that is drawn, and of what the networks get of it."""

    view: int
    student: int
    teacher: int


def view_sizes(student: int, teacher: int | None, source: int | None) -> Sizes:
    """One view for both networks, as large as the larger needs; each is sent a resize of it.

    teacher: its input, None without a teacher or where it takes any size. source: side of the
    images in memory, None for images on disk: a teacher larger than they are gains nothing from
    larger views, and enlarges what it gets itself.
    """
    wanted = student if teacher is None else teacher
    if source is not None:
        wanted = min(wanted, max(source, student))
    return Sizes(view=max(student, wanted), student=student, teacher=wanted)


class TeacherInput(NamedTuple):
    """What the teacher is shown.

    images: float32 [batch, 3, height, width] in [0, 1], after mixing.
    views: uint8 [batch, 3, height, width], the whole grey levels before mixing.
    mix: how the pairs are mixed; None where nothing is.
    samples, epoch, places: as in Batch.
    """

    images: Tensor
    views: Tensor
    mix: Mix | None
    sample_ids: Tensor
    epoch: int
    target_rows: Tensor


class _SampledViews(NamedTuple):
    """What a stretch of rows will look like."""

    samples: Tensor
    target_rows: Tensor
    student: ViewParameters
    teacher: ViewParameters | None
    mix: Mix | None

    def select(self, rows: slice) -> "_SampledViews":
        """Some of the rows, from an even one on."""
        pairs = slice(rows.start // 2, rows.stop // 2)
        return _SampledViews(
            self.samples[rows],
            self.target_rows[rows],
            self.student.select(rows),
            None if self.teacher is None else self.teacher.select(rows),
            None if self.mix is None else self.mix.select(pairs),
        )


def updates_of_epoch(images: int, batch_size: int) -> int:
    """The updates of an epoch of so many images."""
    return max(images // batch_size, 1)


class TrainLoader:
    """Micro-batches of training views for one process.

    Images in memory stay on the device; encoded ones are decoded and cropped by worker processes.

    Global batch b of an epoch is rows b * batch_size up to (b + 1) * batch_size, cut into
    accumulate * processes equal blocks. With `views.aug_repeats` r, a batch holds ceil(batch_size /
    r)
    images: the row at place p in it is image p modulo that number, repeat p divided by it, so that
    neighbours, which are mixed, are different images. The images left over at the end of an epoch
    are skipped; another order leaves out others in the next.
    """

    def __init__(
        self,
        images: InMemoryImages | EncodedImages,
        num_classes: int,
        *,
        views: ViewsConfig,
        optim: OptimConfig,
        sizes: Sizes,
        colours: ChannelStats,
        seed: int,
        process: int = 0,
        num_processes: int = 1,
        device: torch.device | str = "cpu",
        workers: int = 0,
        square: int | None = None,
        for_teacher: bool = True,
    ) -> None:
        """square: side [px] to which encoded images are decoded where no crop is cut from them as
        they are on disk (data.image_size); None: the view's. for_teacher: whether batches carry
        what the teacher sees.

        Raises ConfigError where the batch cannot be cut into equal (for mixing: even) blocks,
        and DataError where it needs more images than there are."""
        self.views = views
        self.num_processes = num_processes
        self.set_micro_batches(optim)
        self.number = len(images.labels)
        self.images_per_batch = -(-optim.batch_size // views.aug_repeats)
        if self.images_per_batch > self.number:
            raise DataError(
                f"optim.batch_size = {optim.batch_size}: takes {self.images_per_batch} images at "
                f"once, there are {self.number} for training; give a smaller batch or more data"
            )
        if views.uses_mixing and self.images_per_batch < 2:
            raise ConfigError(
                f"views.aug_repeats = {views.aug_repeats}: a batch of {optim.batch_size} would "
                "hold one "
                "image and mix it with itself; fewer repeats, a larger batch, or no mixing"
            )
        self.device = torch.device(device)
        self.stages = StageTimer(self.device)
        self.images = images
        self.labels = images.labels.to(self.device)
        self.num_classes = num_classes
        self.sizes = sizes
        self.square, self.channel_stats = square, colours
        self.seed = seed
        self.process = process
        self.workers = workers
        # An epoch keeps its number of views: with repeats it holds so many images fewer.
        self.steps_per_epoch = updates_of_epoch(self.number, optim.batch_size)
        self.images_per_epoch = self.steps_per_epoch * self.images_per_batch
        look = {"square": square, "colours": colours, "seed": seed}
        self.student_look = RandomView(images, views, size=sizes.view, **look)
        self.teacher_look = teacher_view_sampler(images, views, size=sizes.teacher, **look)
        self.for_teacher = for_teacher
        self.on_teacher_input: Callable[[TeacherInput], None] | None = None
        """Called with what is shown, where the teacher sees the student's views."""
        self.pixels = images.pixels.to(self.device) if isinstance(images, InMemoryImages) else None
        self._readers: dict[tuple[Decoder, ...], Reader] = {}

    def set_micro_batches(self, optim: OptimConfig) -> None:
        """Cut the same batches into other micro-batches. Raises ConfigError where they would not be
        equal (for mixing: even)."""
        blocks = self.num_processes * optim.grad_accum_steps
        block = optim.batch_size // blocks
        if optim.batch_size % blocks or (self.views.uses_mixing and block % 2):
            kind = "equal, even" if self.views.uses_mixing else "equal"
            raise ConfigError(
                f"optim.batch_size = {optim.batch_size}: cannot be cut into {kind} micro-batches "
                f"for {self.num_processes} processes and optim.grad_accum_steps "
                f"{optim.grad_accum_steps}"
            )
        self.optim, self.block = optim, block

    @property
    def rows_per_epoch(self) -> int:
        """Places in an epoch: how many answers of the teacher a store of it can hold.

        Without repeats they are all images (less one if that makes a pair), so that they do not
        depend on the batch; where the teacher's view is fixed, always all images.
        """
        if self.views.has_fixed_teacher_view:
            return self.number
        if self.views.aug_repeats > 1:
            return self.steps_per_epoch * self.optim.batch_size
        return self.number - self.number % 2 if self.views.uses_mixing else self.number

    def order(self, epoch: int) -> Tensor:
        """The images of an epoch in the order they are taken, int64 [number], on the CPU."""
        return permutation(self.seed, epoch, self.number)

    def epoch(self, epoch: int, *, done: int = 0) -> Iterator[Batch]:
        """This process's micro-batches of an epoch, `optim.grad_accum_steps` to an update.

        done: updates of it that lie behind; their images are not even read.
        """
        self.stages.reset()
        order = self.order(epoch)
        rows = self._rows()[done * self.optim.grad_accum_steps :]
        own = self.teacher_look if self.for_teacher else None
        looks = [self.student_look] + ([] if own is None else [own])
        wanted = (ReadRequest(epoch, *self._locate(order, block)) for block in rows)
        read = self._read(looks, wanted)
        together = 1
        if read is None:
            together = max(_SHOWN_AT_ONCE // (3 * self.sizes.view**2 * self.block), 1)
        for stretch in rows.split(max(_DRAWN_AT_ONCE // self.block // together, 1) * together):
            with self.stages.time("views", 0):
                drawn = self._draw(epoch, order, stretch.flatten(), own)
            for first in range(0, len(stretch), together):
                shown = slice(first * self.block, min(first + together, len(stretch)) * self.block)
                pixels = None if read is None else next(read)
                yield from self._show(epoch, drawn.select(shown), pixels, own)

    def teacher_inputs(
        self, epoch: int, places: Tensor, *, block: int, repeat: int = 0
    ) -> Iterator[TeacherInput]:
        """What the teacher is shown at some places of an epoch, in blocks of so many.

        places: int64 [number], on the CPU; with mixing whole pairs, 2k before 2k + 1, and an even
        block. repeat: which of the views of an image, where the teacher's view is fixed; the
        further ones may be read while the first is.
        """
        look = self.teacher_look or self.student_look
        order = None if self.views.has_fixed_teacher_view else self.order(epoch)
        located = self._locate(order, places, repeat)
        blocks = zip(*(part.split(block) for part in located))
        wanted = (ReadRequest(epoch, *part) for part in blocks)
        read = self._read([look], wanted)
        for stretch in torch.arange(len(places)).split(max(_DRAWN_AT_ONCE // block, 1) * block):
            samples, repeats = (to_device_async(part[stretch], self.device) for part in located)
            drawn, mix = (
                look.sample(epoch, samples, repeats),
                self._draw_mix(epoch, places[stretch]),
            )
            for first in range(0, len(stretch), block):
                rows = slice(first, min(first + block, len(stretch)))
                pixels = self.pixels[samples[rows]] if read is None else next(read)[0]
                views = look.apply(pixels, None if drawn is None else drawn.select(rows))
                pairs = None if mix is None else mix.select(slice(rows.start // 2, rows.stop // 2))
                images = self._as_seen(views, self.sizes.teacher, pairs)
                yield TeacherInput(
                    images, views, pairs, samples[rows], epoch, places[stretch][rows]
                )

    def close(self) -> None:
        """End the worker processes; what is read next starts others."""
        for reader in self._readers.values():
            reader.close()

    def _rows(self) -> Tensor:
        """The rows of an epoch that are this process's, int64 [micro-batches, block]."""
        rows = torch.arange(self.steps_per_epoch * self.optim.batch_size)
        rows = rows.view(-1, self.num_processes, self.block)
        return rows[:, self.process]

    def _locate(self, order: Tensor | None, rows: Tensor, repeat: int = 0) -> tuple[Tensor, Tensor]:
        """The image of each row, and which of its views it is; without an order rows are images."""
        if order is None:
            return rows, torch.full_like(rows, repeat)
        if self.views.aug_repeats == 1:
            return order[rows], torch.zeros_like(rows)
        batch, place = rows // self.optim.batch_size, rows % self.optim.batch_size
        image = batch * self.images_per_batch + place % self.images_per_batch
        return order[image], place // self.images_per_batch

    def _draw(
        self, epoch: int, order: Tensor, rows: Tensor, own: ViewSampler | None
    ) -> _SampledViews:
        found, repeats = self._locate(order, rows)
        samples, repeats = (
            to_device_async(found, self.device),
            to_device_async(repeats, self.device),
        )
        return _SampledViews(
            samples,
            found if self.views.has_fixed_teacher_view else rows,
            self.student_look.sample(epoch, samples, repeats),
            None if own is None else own.sample(epoch, samples, repeats),
            self._draw_mix(epoch, rows),
        )

    def _draw_mix(self, epoch: int, rows: Tensor) -> Mix | None:
        if not self.views.uses_mixing:
            return None
        pairs = Keys(self.seed, epoch, to_device_async(rows[::2] // 2, self.device))
        return sample_mix(pairs, views=self.views, size=self.sizes.student)

    def _read(
        self, looks: list[ViewSampler], wanted: Iterable[ReadRequest]
    ) -> Iterator[tuple[Tensor, ...]] | None:
        """Decoded blocks, for each look, on the device; None for images in memory. How long they
        took and were waited for is measured."""
        if isinstance(self.images, InMemoryImages):
            return None
        cutters = tuple(look.cutter for look in looks)
        reader = self._readers.get(cutters)
        if reader is None:
            pin = self.device.type == "cuda"
            reader = Reader(self.images, cutters, workers=self.workers, pin=pin)
            self._readers[cutters] = reader
        return self._measured(reader.read(wanted))

    def _measured(self, batches: Iterator[ReadResult]) -> Iterator[tuple[Tensor, ...]]:
        while True:
            started = time.perf_counter()
            read = next(batches, None)
            if read is None:
                return
            number = len(read.pixels[0])
            self.stages.add("waiting", number, time.perf_counter() - started)
            self.stages.add("reading", number, float(read.seconds))
            yield tuple(pixels.to(self.device, non_blocking=True) for pixels in read.pixels)

    def _show(
        self,
        epoch: int,
        drawn: _SampledViews,
        read: tuple[Tensor, ...] | None,
        own: ViewSampler | None,
    ) -> Iterator[Batch]:
        """Make the views of one or more micro-batches."""
        samples, mix = drawn.samples, drawn.mix
        with self.stages.time("views", len(samples)):
            pixels = self.pixels[samples] if read is None else read[0]
            views = self.student_look.apply(pixels, drawn.student)
            images = self._as_seen(views, self.sizes.student, mix)
            targets = one_hot(self.labels[samples], self.num_classes).float()
            if mix is not None:
                targets = mix_targets(targets, mix)
            teacher_images = None
            if self.for_teacher and own is not None:
                pixels = pixels if read is None else read[1]
                teacher_images = to_unit_float(own.apply(pixels, drawn.teacher))
            elif self.for_teacher and self.sizes.teacher == self.sizes.student:
                teacher_images = images
            elif self.for_teacher:
                teacher_images = self._as_seen(views, self.sizes.teacher, mix)
            if self.on_teacher_input is not None and self.teacher_look is None:
                self.on_teacher_input(
                    TeacherInput(images, views, mix, samples, epoch, drawn.target_rows)
                )
        parts = [part.split(self.block) for part in (images, targets, samples, drawn.target_rows)]
        taught = None if teacher_images is None else teacher_images.split(self.block)
        for index, (images, targets, samples, places) in enumerate(zip(*parts)):
            seen = None if taught is None else taught[index]
            yield Batch(images, seen, targets, samples, epoch, places)

    def _as_seen(self, views: Tensor, size: int, mix: Mix | None) -> Tensor:
        """Grey levels as a network gets them: resized, in [0, 1], mixed."""
        images = to_unit_float(resize(views, size, size, "bicubic"))
        return images if mix is None else mix_images(images, mix)
