"""Training batches: the same sequence of global batches on any number of processes."""

from collections.abc import Iterator

import torch
from torch.nn.functional import one_hot

from deit.config import OptimConfig, ViewsConfig, mixes
from deit.datasets.mixing import apply_mix, sample_mix
from deit.datasets.sources import Images
from deit.datasets.views import training_views
from deit.errors import ConfigError, DataError
from deit.keys import Keys, permutation
from deit.records import Batch


class TrainLoader:
    """Micro-batches of training views for one process; images stay on the device.

    Row t of an epoch is sample order[t]; global batch b is rows b * batch_size up to
    (b + 1) * batch_size, cut into accumulate * processes equal blocks. The rows left over at the
    end of an epoch are skipped; another order leaves out others in the next.
    """

    def __init__(
        self,
        images: Images,
        num_classes: int,
        *,
        views: ViewsConfig,
        optim: OptimConfig,
        image_size: int,
        seed: int,
        process: int = 0,
        num_processes: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises ConfigError where the batch cannot be cut into equal (for mixing: even) blocks,
        and DataError where it exceeds the training images."""
        blocks = num_processes * optim.accumulate
        self.block = optim.batch_size // blocks
        if optim.batch_size % blocks or (mixes(views) and self.block % 2):
            kind = "equal, even" if mixes(views) else "equal"
            raise ConfigError(
                f"optim.batch_size = {optim.batch_size}: cannot be cut into {kind} micro-batches "
                f"for {num_processes} processes and optim.accumulate {optim.accumulate}"
            )
        if optim.batch_size > len(images.labels):
            raise DataError(
                f"optim.batch_size = {optim.batch_size}: more than the {len(images.labels)} "
                "training images; give a smaller batch or more data"
            )
        self.pixels = images.pixels.to(device)
        self.labels = images.labels.to(device)
        self.num_classes = num_classes
        self.views = views
        self.optim = optim
        self.image_size = image_size
        self.seed = seed
        self.process = process
        self.num_processes = num_processes
        self.steps_per_epoch = len(images.labels) // optim.batch_size

    def order(self, epoch: int) -> torch.Tensor:
        """The samples of an epoch in the order of their rows, int64 [number], on the CPU."""
        return permutation(self.seed, epoch, len(self.labels))

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """This process's micro-batches of an epoch, `optim.accumulate` to an update."""
        order = self.order(epoch).to(self.pixels.device)
        for step in range(self.steps_per_epoch):
            for part in range(self.optim.accumulate):
                block = part * self.num_processes + self.process
                first = step * self.optim.batch_size + block * self.block
                yield self._batch(epoch, first, order[first : first + self.block])

    def _batch(self, epoch: int, first_row: int, samples: torch.Tensor) -> Batch:
        keys = Keys(self.seed, epoch, samples)
        images = training_views(self.pixels[samples], keys, views=self.views, size=self.image_size)
        targets = one_hot(self.labels[samples], self.num_classes).float()
        if mixes(self.views):
            pairs = torch.arange(len(samples) // 2, device=samples.device) + first_row // 2
            mix = sample_mix(
                Keys(self.seed, epoch, pairs),
                views=self.views,
                height=self.image_size,
                width=self.image_size,
            )
            images, targets = apply_mix(images, targets, mix)
        return Batch(images, targets, samples)
