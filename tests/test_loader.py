"""The order of an epoch and the batches of any number of processes."""

import pytest
import torch

from deit.config import OptimConfig, ViewsConfig
from deit.datasets.loader import TrainLoader
from deit.datasets.sources import Images
from deit.errors import ConfigError, DataError

IMAGES = Images(torch.randint(256, (53, 3, 8, 8), dtype=torch.uint8), torch.arange(53) % 4)
MIXED = ViewsConfig(crop="padded", crop_padding=1, mixup_alpha=0.8, cutmix_alpha=1.0)


def loader(process=0, num_processes=1, accumulate=1, batch_size=16, views=MIXED, seed=5):
    return TrainLoader(
        IMAGES,
        4,
        views=views,
        optim=OptimConfig(batch_size=batch_size, accumulate=accumulate),
        image_size=8,
        seed=seed,
        process=process,
        num_processes=num_processes,
    )


def global_batches(num_processes, accumulate, epoch=3):
    """All micro-batches of an epoch, put together to global batches."""
    parts = [
        list(loader(process, num_processes, accumulate).epoch(epoch))
        for process in range(num_processes)
    ]
    together = []
    for step in range(len(parts[0]) // accumulate):
        blocks = [
            parts[process][step * accumulate + part]
            for part in range(accumulate)
            for process in range(num_processes)
        ]
        together.append([torch.cat(field) for field in zip(*blocks)])
    return together


@pytest.mark.parametrize(("num_processes", "accumulate"), [(1, 2), (2, 1), (2, 2), (4, 1), (8, 1)])
def test_any_layout_sees_the_same_global_batches(num_processes, accumulate):
    expected, found = global_batches(1, 1), global_batches(num_processes, accumulate)
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected):
        assert torch.equal(ours[2], theirs[2])  # samples
        assert torch.equal(ours[1], theirs[1])  # targets, mixed with the same partner and weight
        assert torch.allclose(ours[0], theirs[0], atol=1e-6)  # images


def test_an_epoch_sees_each_image_at_most_once_and_the_order_changes():
    first, second = (torch.cat([b.samples for b in loader().epoch(e)]) for e in (0, 1))
    assert len(first) == 48
    assert len(first.unique()) == 48
    assert not torch.equal(first, second)
    again = torch.cat([b.samples for b in loader().epoch(0)])
    assert torch.equal(first, again)
    other = torch.cat([b.samples for b in loader(seed=6).epoch(0)])
    assert not torch.equal(first, other)


def test_targets_are_the_labels_where_nothing_is_mixed():
    for batch in loader(views=ViewsConfig()).epoch(0):
        assert torch.equal(batch.targets.argmax(dim=1), IMAGES.labels[batch.samples])
        assert torch.equal(batch.targets.sum(dim=1), torch.ones(16))
        assert batch.targets.max(dim=1).values.eq(1).all()


def test_mixed_targets_are_distributions_over_the_labels_of_the_pair():
    for batch in loader().epoch(0):
        assert torch.allclose(batch.targets.sum(dim=1), torch.ones(16))
        labels = IMAGES.labels[batch.samples]
        for row, target in enumerate(batch.targets):
            assert set(target.nonzero().squeeze(1).tolist()) <= {
                labels[row].item(),
                labels[row ^ 1].item(),
            }


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(ConfigError, match="3 processes"):
        loader(num_processes=3)
    with pytest.raises(ConfigError, match="even"):
        loader(num_processes=8, accumulate=2)
    with pytest.raises(DataError, match="more than the 53 training images"):
        loader(batch_size=64)
