"""The order of an epoch, and its batches for any number of processes."""

import dataclasses
import re

import pytest
import torch

from deit.config.presets import AUGMENTATIONS
from deit.config.sections.optim import OptimConfig
from deit.config.sections.views import ViewsConfig
from deit.core.errors import ConfigError, DataError
from deit.datasets.images import InMemoryImages
from deit.datasets.loader import TrainLoader
from deit.datasets.view_samplers import Sizes, view_sizes
from deit.datasets.views import ChannelStats
from tests.helpers.errors import raises

IMAGES = InMemoryImages(torch.randint(256, (53, 3, 8, 8), dtype=torch.uint8), torch.arange(53) % 4)
MIXED = ViewsConfig(crop="padded", crop_padding=1, mixup_alpha=0.8, cutmix_alpha=1.0)
FULL = dataclasses.replace(MIXED, crop="random_resized", **AUGMENTATIONS["deit"])


def loader(
    process=0,
    num_processes=1,
    accumulate=1,
    batch_size=16,
    views=MIXED,
    seed=5,
    images=IMAGES,
    student_size=8,
    teacher_size=8,
    **settings,
):
    return TrainLoader(
        images,
        4,
        views=views,
        optim=OptimConfig(batch_size=batch_size, grad_accum_steps=accumulate),
        student_size=student_size,
        teacher_size=teacher_size,
        channel_stats=ChannelStats((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
        seed=seed,
        process_index=process,
        num_processes=num_processes,
        **settings,
    )


def joined(blocks):
    """Return the fields of several batches, each as one tensor."""
    fields = ("images", "teacher_images", "targets", "sample_ids", "target_rows")
    return [torch.cat([getattr(block, field) for block in blocks]) for field in fields]


def global_batches(num_processes, accumulate, views, epoch=3):
    """Return all micro-batches of an epoch, combined to global batches."""
    parts = [
        list(loader(process, num_processes, accumulate, views=views).epoch(epoch))
        for process in range(num_processes)
    ]
    combined = []
    for step in range(len(parts[0]) // accumulate):
        blocks = [
            parts[process][step * accumulate + part]
            for part in range(accumulate)
            for process in range(num_processes)
        ]
        combined.append(joined(blocks))
    return combined


@pytest.mark.fault("A20")
@pytest.mark.parametrize("views", [MIXED, FULL], ids=["mixed", "full"])
@pytest.mark.parametrize(("num_processes", "accumulate"), [(1, 2), (2, 1), (2, 2), (4, 1), (8, 1)])
def test_global_batches_do_not_depend_on_processes(num_processes, accumulate, views):
    expected = global_batches(1, 1, views)
    result = global_batches(num_processes, accumulate, views)
    assert len(result) == len(expected) == 3
    for actual, reference in zip(result, expected):
        # Images, the teacher's images, targets (same partner and weight), samples.
        assert all(torch.equal(*parts) for parts in zip(actual, reference))


@pytest.mark.parametrize("repeats", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [2, 14, 16])
@pytest.mark.parametrize("count", [7, 16, 53, 255])
def test_repeats_give_more_views_of_fewer_images(count, batch_size, repeats):
    images = InMemoryImages(
        torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8), torch.arange(count)
    )
    views = ViewsConfig(crop="padded", crop_padding=3, aug_repeats=repeats)
    unique = -(-batch_size // repeats)
    if unique > count:
        with raises(DataError, f"optim.batch_size = {batch_size}", unique, count):
            loader(images=images, views=views, batch_size=batch_size)
        return
    train_loader = TrainLoader(
        images,
        count,
        views=views,
        optim=OptimConfig(batch_size=batch_size),
        student_size=8,
        channel_stats=ChannelStats((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
        seed=1,
    )
    batches = list(train_loader.epoch(0))
    assert len(batches) == train_loader.steps_per_epoch == max(count // batch_size, 1)
    all_ids = []
    for batch in batches:
        assert len(batch.sample_ids) == batch_size
        counts = batch.sample_ids.unique(return_counts=True)[1]
        assert len(counts) == unique
        assert counts.max() <= repeats
        assert counts.max() - counts.min() <= 1 or batch_size % unique
        if unique > 1:  # neighbors are mixed with each other
            assert (batch.sample_ids[::2] != batch.sample_ids[1::2]).all()
        all_ids += batch.sample_ids.unique().tolist()
    # No image comes back in another batch of the epoch.
    assert len(all_ids) == len(set(all_ids)) == train_loader.images_per_epoch


def test_image_is_never_mixed_with_itself():
    with raises(ConfigError, "views.aug_repeats"):
        loader(views=dataclasses.replace(MIXED, aug_repeats=16))
    loader(views=ViewsConfig(aug_repeats=16))


def test_repeated_views_differ_and_first_equals_view_without_repeats():
    views = ViewsConfig(crop="padded", crop_padding=3, aug_repeats=2)
    plain = dataclasses.replace(views, aug_repeats=1)
    twice = next(loader(views=views).epoch(0))
    assert torch.equal(twice.sample_ids[:8], twice.sample_ids[8:])
    assert not torch.equal(twice.images[:8], twice.images[8:])
    once = next(loader(views=plain).epoch(0))
    assert torch.equal(once.images[:8], twice.images[:8])


def test_teacher_gets_same_views_at_its_size():
    sizes = view_sizes(student=8, teacher=16, source=16)
    assert sizes == Sizes(view=16, student=8, teacher=16, source=16)
    pixels = torch.randint(256, (53, 3, 16, 16), dtype=torch.uint8)
    views = dataclasses.replace(FULL, erasing_prob=0.0, auto_augment="none")
    large = InMemoryImages(pixels, IMAGES.labels)
    both = next(loader(images=large, teacher_size=16, views=views).epoch(0))
    assert both.images.shape[-1] == 8
    assert both.teacher_images.shape[-1] == 16
    smaller = torch.nn.functional.avg_pool2d(both.teacher_images, 2)
    # The same crops, flips, weights and regions: what differs is the filter.
    assert (smaller - both.images).abs().mean() < 0.06
    shuffled = (smaller.roll(2, dims=0) - both.images).abs().mean()
    assert shuffled > 3 * (smaller - both.images).abs().mean()
    same = next(loader(images=large, student_size=16, teacher_size=16, views=views).epoch(0))
    assert torch.equal(same.teacher_images, same.images)
    assert torch.equal(same.targets[:, 0] > 0, both.targets[:, 0] > 0)


@pytest.mark.parametrize(
    ("student", "teacher", "source", "expected"),
    [
        (32, None, 32, (32, 32, 32)),
        (32, 32, 40, (32, 32, 32)),
        (64, 72, 72, (72, 64, 72)),
        (64, 32, 64, (64, 64, 32)),
        (32, 224, 32, (32, 32, 32)),  # nothing to gain from enlarging: the teacher does it itself
        (224, 384, None, (384, 224, 384)),
        (64, 32, 32, (64, 64, 32)),
    ],
)
def test_view_sizes_by_hand(student, teacher, source, expected):
    assert view_sizes(student, teacher, source) == Sizes(*expected, source)


def test_loader_memory_does_not_grow_with_epochs():
    import gc

    def tensors():
        gc.collect()
        return [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]

    # Tensors of other tests are held, so that none of them is freed between the counts.
    others, train_loader = tensors(), loader(views=FULL)

    def after(epoch):
        for _ in train_loader.epoch(epoch):
            pass
        return sum(tensor.numel() for tensor in tensors())

    assert after(0) == after(1) == after(7)
    del others


def test_view_time_is_measured():
    train_loader = loader()
    assert train_loader.stages.rates() == {}
    list(train_loader.epoch(0))
    assert train_loader.stages.images["views"] == 48
    assert train_loader.stages.rates()["views"] > 0
    list(train_loader.epoch(1))
    assert train_loader.stages.images["views"] == 48  # of this epoch


def test_epoch_has_each_image_at_most_once_in_new_order():
    first, second = (torch.cat([b.sample_ids for b in loader().epoch(e)]) for e in (0, 1))
    assert len(first) == 48
    assert len(first.unique()) == 48
    assert not torch.equal(first, second)
    again = torch.cat([b.sample_ids for b in loader().epoch(0)])
    assert torch.equal(first, again)
    other = torch.cat([b.sample_ids for b in loader(seed=6).epoch(0)])
    assert not torch.equal(first, other)


def test_unmixed_targets_are_one_hot_labels():
    for batch in loader(views=ViewsConfig()).epoch(0):
        assert torch.equal(batch.targets.argmax(dim=1), IMAGES.labels[batch.sample_ids])
        assert torch.equal(batch.targets.sum(dim=1), torch.ones(16))
        assert batch.targets.max(dim=1).values.eq(1).all()


def test_mixed_targets_are_distributions_over_labels_of_pair():
    for batch in loader().epoch(0):
        assert torch.allclose(batch.targets.sum(dim=1), torch.ones(16))
        labels = IMAGES.labels[batch.sample_ids]
        for row, target in enumerate(batch.targets):
            assert set(target.nonzero().squeeze(1).tolist()) <= {
                labels[row].item(),
                labels[row ^ 1].item(),
            }


@pytest.mark.fault("C19")
def test_indivisible_batch_raises():
    for processes, accumulate in ((3, 1), (8, 2)):
        with raises(ConfigError, "optim.batch_size", "optim.grad_accum_steps") as refused:
            loader(num_processes=processes, accumulate=accumulate)
        numbers = map(int, re.findall(r"\b\d+\b", str(refused.value)))
        assert sorted(numbers) == sorted([16, processes, accumulate])
    loader(num_processes=8, accumulate=2, views=ViewsConfig())  # micro-batches of one, not mixed
    with raises(DataError, "optim.batch_size = 64", len(IMAGES.labels)):
        loader(batch_size=64)
