"""Training batches: the same sequence of global batches on any number of processes."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from deit.config import OptimConfig, ViewsConfig, mixes
from deit.datasets.images import Encoded, Images
from deit.datasets.mixing import Mix, mix_images, mix_targets, sample_mix
from deit.datasets.reading import Crops, Reader, Squares, Wanted
from deit.datasets.resizing import resize
from deit.datasets.stages import Stages
from deit.datasets.views import Colours, ViewParameters, apply_views, sample_views, unit
from deit.errors import ConfigError, DataError
from deit.keys import Keys, permutation
from deit.records import Batch

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


class _Drawn(NamedTuple):
    """What a stretch of rows will look like."""

    samples: Tensor
    repeats: Tensor
    views: ViewParameters
    mix: Mix | None

    def select(self, rows: slice) -> "_Drawn":
        """Some of the rows, from an even one on."""
        pairs = slice(rows.start // 2, rows.stop // 2)
        return _Drawn(
            self.samples[rows],
            self.repeats[rows],
            self.views.select(rows),
            None if self.mix is None else self.mix.select(pairs),
        )


class TrainLoader:
    """Micro-batches of training views for one process.

    Images in memory stay on the device; encoded ones are decoded and cropped by worker processes.

    Global batch b of an epoch is rows b * batch_size up to (b + 1) * batch_size, cut into
    accumulate * processes equal blocks. With `views.repeats` r, a batch holds ceil(batch_size / r)
    images: the row at place p in it is image p modulo that number, repeat p divided by it, so that
    neighbours, which are mixed, are different images. The images left over at the end of an epoch
    are skipped; another order leaves out others in the next.
    """

    def __init__(
        self,
        images: Images | Encoded,
        num_classes: int,
        *,
        views: ViewsConfig,
        optim: OptimConfig,
        sizes: Sizes,
        colours: Colours,
        seed: int,
        process: int = 0,
        num_processes: int = 1,
        device: torch.device | str = "cpu",
        workers: int = 0,
        square: int | None = None,
    ) -> None:
        """square: side [px] to which encoded images are decoded where no crop is cut from them as
        they are on disk (data.image_size); None: the view's.

        Raises ConfigError where the batch cannot be cut into equal (for mixing: even) blocks,
        and DataError where it needs more images than there are."""
        blocks = num_processes * optim.accumulate
        self.block = optim.batch_size // blocks
        if optim.batch_size % blocks or (mixes(views) and self.block % 2):
            kind = "equal, even" if mixes(views) else "equal"
            raise ConfigError(
                f"optim.batch_size = {optim.batch_size}: cannot be cut into {kind} micro-batches "
                f"for {num_processes} processes and optim.accumulate {optim.accumulate}"
            )
        self.number = len(images.labels)
        self.images_per_batch = -(-optim.batch_size // views.repeats)
        if self.images_per_batch > self.number:
            raise DataError(
                f"optim.batch_size = {optim.batch_size}: takes {self.images_per_batch} images at "
                f"once, there are {self.number} for training; give a smaller batch or more data"
            )
        if mixes(views) and self.images_per_batch < 2:
            raise ConfigError(
                f"views.repeats = {views.repeats}: a batch of {optim.batch_size} would hold one "
                "image and mix it with itself; fewer repeats, a larger batch, or no mixing"
            )
        self.device = torch.device(device)
        self.stages = Stages(self.device)
        self.labels = images.labels.to(self.device)
        self.num_classes = num_classes
        self.views = views
        self.optim = optim
        self.sizes = sizes
        self.colours = colours
        self.seed = seed
        self.process = process
        self.num_processes = num_processes
        # An epoch keeps its number of views: with repeats it holds so many images fewer.
        self.steps_per_epoch = max(self.number // optim.batch_size, 1)
        self.images_per_epoch = self.steps_per_epoch * self.images_per_batch
        self.pixels, self.reader = None, None
        if isinstance(images, Encoded):
            cropped = views.crop == "random_resized"
            cutter = (
                Crops(images, views=views, size=sizes.view, seed=seed)
                if cropped
                else Squares(images, square or sizes.view)
            )
            self.reader = Reader(cutter, workers=workers, pin=self.device.type == "cuda")
            self.source_size = sizes.view if cropped else square or sizes.view
            if cropped:  # by the workers, whose images have sizes of their own
                self.views = replace(views, crop="none")
        else:
            self.pixels = images.pixels.to(self.device)
            self.source_size = images.pixels.shape[-1]

    def order(self, epoch: int) -> Tensor:
        """The images of an epoch in the order they are taken, int64 [number], on the CPU."""
        return permutation(self.seed, epoch, self.number)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """This process's micro-batches of an epoch, `optim.accumulate` to an update."""
        self.stages.reset()
        order = self.order(epoch)
        rows = self._rows()
        read = self._read(epoch, order, rows) if self.reader is not None else None
        together = 1
        if read is None:
            together = max(_SHOWN_AT_ONCE // (3 * self.sizes.view**2 * self.block), 1)
        for stretch in rows.split(max(_DRAWN_AT_ONCE // self.block // together, 1) * together):
            with self.stages.time("views", 0):
                drawn = self._draw(epoch, order, stretch.flatten())
            for first in range(0, len(stretch), together):
                shown = slice(first * self.block, min(first + together, len(stretch)) * self.block)
                batch = self._show(drawn.select(shown), None if read is None else next(read))
                yield from map(Batch._make, zip(*(part.split(self.block) for part in batch)))

    def _rows(self) -> Tensor:
        """The rows of an epoch that are this process's, int64 [micro-batches, block]."""
        rows = torch.arange(self.steps_per_epoch * self.optim.batch_size)
        rows = rows.view(-1, self.num_processes, self.block)
        return rows[:, self.process]

    def _locate(self, order: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The image of each row, and which of its views it is."""
        batch, place = rows // self.optim.batch_size, rows % self.optim.batch_size
        image = batch * self.images_per_batch + place % self.images_per_batch
        return order[image], place // self.images_per_batch

    def _draw(self, epoch: int, order: Tensor, rows: Tensor) -> _Drawn:
        samples, repeats = (part.to(self.device) for part in self._locate(order, rows))
        keys = Keys(self.seed, epoch, samples, repeats)
        size = self.source_size
        views = sample_views(keys, self.views, height=size, width=size, size=self.sizes.view)
        mix = None
        if mixes(self.views):
            pairs = Keys(self.seed, epoch, (rows[::2] // 2).to(self.device))
            mix = sample_mix(pairs, views=self.views, size=self.sizes.student)
        return _Drawn(samples, repeats, views, mix)

    def _read(self, epoch: int, order: Tensor, rows: Tensor) -> Iterator[Tensor]:
        """Decoded micro-batches, on the device; how long they took and were waited for."""
        wanted = [Wanted(epoch, *self._locate(order, block)) for block in rows]
        batches = self.reader.read(wanted)
        while True:
            started = time.perf_counter()
            read = next(batches, None)
            if read is None:
                return
            number = len(read.pixels)
            self.stages.add("waiting", number, time.perf_counter() - started)
            self.stages.add("reading", number, float(read.seconds))
            yield read.pixels.to(self.device, non_blocking=True)

    def _show(self, drawn: _Drawn, pixels: Tensor | None) -> Batch:
        """Make the views of one or more micro-batches."""
        samples = drawn.samples
        with self.stages.time("views", len(samples)):
            if pixels is None:
                pixels = self.pixels[samples]
            views = apply_views(
                pixels, drawn.views, self.views, size=self.sizes.view, colours=self.colours
            )
            targets = one_hot(self.labels[samples], self.num_classes).float()
            images = unit(self._resized(views, self.sizes.student))
            same = self.sizes.teacher == self.sizes.student
            teacher_images = images if same else unit(self._resized(views, self.sizes.teacher))
            if drawn.mix is not None:
                images, targets = mix_images(images, drawn.mix), mix_targets(targets, drawn.mix)
                teacher_images = images if same else mix_images(teacher_images, drawn.mix)
        return Batch(images, teacher_images, targets, samples)

    def _resized(self, views: Tensor, size: int) -> Tensor:
        return resize(views, size, size, "bicubic")
