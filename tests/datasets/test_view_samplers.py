"""The teacher's views in every view mode: equal in training and for stored targets."""

import dataclasses
from dataclasses import asdict

import numpy as np
import pytest
import torch

from deit.config.presets import AUGMENTATIONS, VIEW_MODES
from deit.config.sections.data import DataConfig
from deit.config.sections.optim import OptimConfig
from deit.config.sections.views import ViewsConfig
from deit.core.rng import Keys
from deit.datasets.decoding import center_square, open_image
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.loader import TrainLoader
from deit.datasets.resizing import resize
from deit.datasets.splits import load_splits
from deit.datasets.views import (
    ChannelStats,
    resize_and_center_crop,
    sample_random_crop,
    to_unit_float,
)
from tests.helpers.images import joined, write_image_folder

MEMORY = InMemoryImages(
    torch.randint(
        256, (40, 3, 20, 20), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    ),
    torch.arange(40) % 3,
)
RECIPE = ViewsConfig(**AUGMENTATIONS["deit"] | {"aug_repeats": 1}, eval_crop_pct=0.8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = write_image_folder(tmp_path_factory.mktemp("views") / "images")
    data = DataConfig(source="folder", root=str(root), storage="files", image_size=16)
    return load_splits(data).train


def views_of(mode, **changes):
    """Return the recipe's views in a view mode; its policy and erasing do not change."""
    fields = VIEW_MODES[mode].fields(asdict(RECIPE))
    return dataclasses.replace(RECIPE, **fields, **changes)


def loader(images, views, process=0, num_processes=1, **settings):
    return TrainLoader(
        images,
        3,
        views=views,
        optim=OptimConfig(batch_size=12),
        student_size=12,
        teacher_size=16,
        channel_stats=ChannelStats((0.5,) * 3, (0.2,) * 3),
        seed=5,
        process_index=process,
        num_processes=num_processes,
        decoded_size=16,
        **settings,
    )


def chosen(storage, files):
    return MEMORY if storage == "memory" else files


ONLINE = [mode for mode in VIEW_MODES if mode != "fix/ic_ens"]


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("storage", ["memory", "files"])
@pytest.mark.parametrize("mode", ONLINE)
def test_teacher_inputs_equal_teacher_images_of_training(mode, storage, repeats, files):
    images = chosen(storage, files)
    train_loader = loader(images, views_of(mode, aug_repeats=repeats))
    for epoch in (0, 3):
        batches = list(train_loader.epoch(epoch))
        images_seen = torch.cat([batch.teacher_images for batch in batches])
        rows = torch.cat([batch.target_rows for batch in batches])
        samples = torch.cat([batch.sample_ids for batch in batches])
        assert {batch.epoch for batch in batches} == {epoch}
        assert rows.max() < train_loader.rows_per_epoch
        # The inputs of one process are those of all, in batches of any size.
        single_process = loader(
            images, views_of(mode, aug_repeats=repeats), num_processes=3, process=1
        )
        inputs = list(single_process.teacher_inputs(epoch, rows, batch_size=10))
        assert torch.equal(torch.cat([part.images for part in inputs]), images_seen)
        assert torch.equal(torch.cat([part.views.sample_ids for part in inputs]), samples)
        assert torch.equal(torch.cat([part.views.target_rows for part in inputs]), rows)


@pytest.mark.parametrize("mode", ONLINE)
def test_view_modes_do_not_depend_on_processes(mode):
    expected = joined(loader(MEMORY, views_of(mode)).epoch(1))
    parts = [list(loader(MEMORY, views_of(mode), process, 3).epoch(1)) for process in range(3)]
    result = joined(block for blocks in zip(*parts) for block in blocks)
    assert all(torch.equal(*pair) for pair in zip(result, expected))


def student_of(mode, **changes):
    return next(loader(MEMORY, views_of(mode, **changes)).epoch(0))


@pytest.mark.parametrize("mode", ONLINE)
def test_view_modes_differ_as_documented(mode):
    batch = student_of(mode)
    resized = resize((batch.teacher_images * 255).round().to(torch.uint8), 12, 12, "bicubic")
    same = (to_unit_float(resized) - batch.images).abs().flatten(1).mean(dim=1)
    if VIEW_MODES[mode].teacher_view == "same":
        assert same.max() < 0.02  # two resizes of one view, mixed alike
    else:
        assert same.median() > 0.05
    assert views_of(mode).uses_mixing is (mode == "function-matching")


def test_student_views_do_not_depend_on_teacher_view():
    actual, expected = student_of("ind/ic"), student_of("same/ic")
    assert torch.equal(actual.images, expected.images)
    assert not torch.equal(actual.teacher_images, expected.teacher_images)


def test_independent_views_change_with_epoch_and_differ_from_student():
    train_loader = loader(MEMORY, ViewsConfig(crop="padded", teacher_view="independent", flip=0.0))
    first, second = ({}, {})
    for epoch, result in ((0, first), (1, second)):
        for batch in train_loader.epoch(epoch):
            result |= dict(zip(batch.sample_ids.tolist(), batch.teacher_images))
    both = set(first) & set(second)
    assert sum(torch.equal(first[i], second[i]) for i in both) < len(both) / 4


@pytest.mark.parametrize("storage", ["memory", "files"])
@pytest.mark.parametrize("mode", ["fix/rs", "fix/cc"])
def test_fixed_teacher_view_is_equal_in_every_epoch(mode, storage, files):
    images = chosen(storage, files)
    seen = {}
    train_loader = loader(images, views_of(mode, erasing_mode="mean"))
    for epoch in (0, 1, 7):
        for batch in train_loader.epoch(epoch):
            assert torch.equal(batch.target_rows, batch.sample_ids)
            for sample, view in zip(batch.sample_ids.tolist(), batch.teacher_images):
                assert torch.equal(seen.setdefault(sample, view), view)
    for sample, view in seen.items():
        if isinstance(images, EncodedImages):
            image = open_image(images.read(sample), images.name(sample))
            if mode == "fix/cc":
                expected = center_square(image, 20)[:, 2:18, 2:18]
            else:
                whole = np.array(image.resize((16, 16), 3))
                expected = torch.from_numpy(whole).permute(2, 0, 1)
        elif mode == "fix/cc":
            expected = resize_and_center_crop(images.pixels[sample][None], size=16, crop_pct=0.8)[0]
        else:
            expected = resize(images.pixels[sample][None], 16, 16, "bicubic")[0]
        assert torch.equal((view * 255).round().to(torch.uint8), expected)


@pytest.mark.parametrize("storage", ["memory", "files"])
def test_teacher_crops_differ_and_are_equal_in_every_epoch(storage, files):
    train_loader = loader(chosen(storage, files), views_of("fix/ic_ens"))
    rows = torch.tensor([3, 4, 30])

    def crop(index):
        (inputs,) = train_loader.teacher_inputs(0, rows, batch_size=3, repeat=index)
        assert torch.equal(inputs.views.sample_ids, rows)
        return inputs.images

    assert torch.equal(crop(5), crop(5))
    different = [crop(index)[0] for index in range(12)]
    assert len({view.numpy().tobytes() for view in different}) == 12
    # Crops and flips alone: no policy, no erased box.
    plain = loader(
        chosen(storage, files),
        views_of("fix/ic_ens", auto_augment="none", erasing_prob=0.0, randaugment_magnitude=9.0),
    )
    (inputs,) = plain.teacher_inputs(0, rows, batch_size=3, repeat=5)
    assert torch.equal(inputs.images, crop(5))


def test_rows_per_epoch_do_not_depend_on_batch_without_repeats():
    odd = InMemoryImages(MEMORY.pixels[:39], MEMORY.labels[:39])

    def rows(views, batch_size=12):
        return TrainLoader(
            odd,
            3,
            views=views,
            optim=OptimConfig(batch_size=batch_size),
            student_size=12,
            teacher_size=16,
            channel_stats=ChannelStats((0.5,) * 3, (0.2,) * 3),
            seed=5,
        ).rows_per_epoch

    assert rows(ViewsConfig()) == rows(ViewsConfig(), 8) == 39
    assert rows(ViewsConfig(mixup_alpha=1.0)) == 38
    assert rows(ViewsConfig(aug_repeats=3)) == 36
    assert rows(ViewsConfig(aug_repeats=3), 8) == 32
    assert rows(ViewsConfig(aug_repeats=3, teacher_view="center")) == 39


def test_loader_without_teacher_makes_no_teacher_images():
    train_loader = loader(MEMORY, views_of("same/ic"), with_teacher_images=False)
    expected = student_of("same/ic")
    batch = next(train_loader.epoch(0))
    assert batch.teacher_images is None
    assert torch.equal(batch.images, expected.images)


def test_random_crop_is_square_of_given_side():
    keys = Keys(3, 0, torch.arange(4000))
    boxes = sample_random_crop(keys, 20, 30, fraction=0.8)
    assert (boxes[:, 2:] == 16).all()
    tops, lefts = boxes[:, 0], boxes[:, 1]
    assert sorted(tops.unique().tolist()) == list(range(5))
    assert sorted(lefts.unique().tolist()) == list(range(15))
    counts = torch.bincount(tops).double()
    assert ((counts / 800 - 1).abs() < 0.15).all()
    whole = sample_random_crop(keys, 20, 20, fraction=1.0)
    assert whole.unique(dim=0).tolist() == [[0, 0, 20, 20]]
