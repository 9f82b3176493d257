"""Stores that are written and read in your own loop: edited teachers, parts, threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import deit
from deit.distill import target_format
from tests.helpers.errors import raises
from tests.helpers.own_loop.parts import (
    CROP,
    NAMES,
    PLAIN,
    MeanColor,
    make_loader,
    make_teacher,
)


class Edited(MeanColor):
    """A teacher whose code changes, but not its weights."""

    sign = 1

    def forward(self, images):
        return self.sign * super().forward(images)


def test_targets_of_an_edited_teacher_are_not_used(tmp_path, monkeypatch):
    loader, teacher = make_loader(), deit.load_teacher(Edited(), NAMES, **PLAIN)
    deit.write_targets(loader, tmp_path / "targets", teacher, epochs=2)
    same = deit.write_targets(loader, tmp_path / "targets", teacher, epochs=2)
    assert same.record_format.epochs == 2
    monkeypatch.setattr(Edited, "sign", -1)
    with raises(deit.errors.DataError, tmp_path / "targets", "agree"):
        deit.write_targets(loader, tmp_path / "targets", teacher, epochs=2)


def test_half_of_the_targets_of_an_edited_teacher_is_not_completed(tmp_path, monkeypatch):
    monkeypatch.setattr(target_format, "_MIN_ROWS_PER_SHARD", 48)
    loader, teacher = make_loader(), deit.load_teacher(Edited(), NAMES, **PLAIN)
    half = deit.write_targets(loader, tmp_path / "targets", teacher, epochs=2, part=(0, 2))
    assert half is None
    monkeypatch.setattr(Edited, "sign", -1)
    for _ in range(2):  # also after the error
        with raises(deit.errors.DataError, tmp_path / "targets", "agree"):
            deit.write_targets(loader, tmp_path / "targets", teacher, epochs=2)
        with raises(deit.errors.DataError, "incomplete"):
            deit.TargetStore.open(tmp_path / "targets", loader)
    monkeypatch.setattr(Edited, "sign", 1)
    for shard in (tmp_path / "targets" / "shards").glob("*1.bin"):
        shard.unlink()
    whole = deit.write_targets(loader, tmp_path / "targets", teacher, epochs=2)
    assert torch.equal(whole(next(loader.epoch(1)))[0], teacher_labels(loader, teacher))


def test_one_shard_of_an_edited_teacher_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(target_format, "_MIN_ROWS_PER_SHARD", 32)
    loader, teacher = make_loader(), deit.load_teacher(Edited(), NAMES, **PLAIN)
    monkeypatch.setattr(Edited, "sign", -1)
    deit.write_targets(loader, tmp_path / "targets", teacher, epochs=40, part=(29, 60))
    monkeypatch.setattr(Edited, "sign", 1)
    with raises(deit.errors.DataError, "agree"):
        deit.write_targets(loader, tmp_path / "targets", teacher, epochs=40)


def teacher_labels(loader, teacher):
    """Return the predicted classes of the first views of epoch 1."""
    return teacher(next(loader.epoch(1)).images).argmax(dim=1)


def test_a_store_of_a_loader_can_be_opened_many_times(tmp_path):
    loader = make_loader()
    deit.write_targets(loader, tmp_path / "targets", make_teacher(), epochs=1)
    for _ in range(1200):
        store = deit.TargetStore.open(tmp_path / "targets", loader)
    for batch in loader.epoch(0):
        store(batch)


@pytest.mark.parametrize("with_images", [True, False])
@pytest.mark.parametrize("view", ["same", "independent", "resized", "center", "crops"])
def test_a_view_of_each_epoch_is_checked(view, with_images, tmp_path):
    options = {
        "views": CROP | {"teacher_view": view, "teacher_num_crops": 2},
        "with_teacher_images": with_images,
    }
    loader, teacher = make_loader(**options), make_teacher()
    is_fixed = loader.views.has_fixed_teacher_view
    deit.write_targets(loader, tmp_path / "out", teacher, epochs=1 if is_fixed else 2)
    store = deit.TargetStore.open(tmp_path / "out", loader)
    for epoch in (0, 1, 0, 1):
        for batch in loader.epoch(epoch):
            labels, _ = store(batch)
            assert (batch.teacher_images is not None) == with_images
            if with_images and view != "crops":
                assert torch.equal(labels, teacher(batch.teacher_images).argmax(dim=1))
    store.checks = store.checks._replace(views=store.checks.views + 1)
    for epoch in (0, 0):  # also the second time
        with raises(deit.errors.DataError, tmp_path / "out", "is not the view"):
            next(loader.epoch(epoch))


def test_store_has_no_targets_of_negative_epochs(tmp_path):
    for view in ("same", "resized"):
        loader = make_loader(views=CROP | {"teacher_view": view})
        deit.write_targets(loader, tmp_path / view, make_teacher(), epochs=1)
        store = deit.TargetStore.open(tmp_path / view, loader)
        with raises(deit.errors.DataError, tmp_path / view, "epoch -1"):
            store(next(loader.epoch(0))._replace(epoch=-1))


def test_labels_of_functions_are_in_range(tmp_path):
    ensemble = deit.TeacherEnsemble([lambda batch: (batch.sample_ids, None)])
    batch = next(make_loader().epoch(0))
    with raises(deit.errors.ConfigError, "teacher", "0 ... 2"):
        deit.DistillationLoss("hard", head="class")(
            torch.zeros(16, 3), torch.arange(16) % 3, ensemble(batch)
        )


def test_teacher_without_finite_outputs_leaves_no_folder(tmp_path):
    class Broken(MeanColor):
        def forward(self, images):
            return super().forward(images) * float("nan")

    teacher = deit.load_teacher(Broken(), NAMES, **PLAIN)
    with raises(deit.errors.NumericsError, "not finite"):
        deit.write_targets(make_loader(), tmp_path / "out", teacher, epochs=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(2, 3, 16, 8), (2, 3, 8, 16), (2, 3, 9, 8)])
def test_teacher_of_a_size_takes_square_images(shape):
    teacher = deit.load_teacher(MeanColor(), NAMES, image_size=8, **PLAIN)
    with raises(deit.errors.ConfigError, "teacher", "square", list(shape)):
        teacher(torch.rand(shape))
    any_size = make_teacher()
    assert any_size(torch.rand(shape)).shape == (2, 3)


@pytest.mark.parametrize("names", [("ant", "ant", "cat"), ("ant", "bee", "ant")])
def test_classes_of_a_teacher_have_different_names(names):
    with raises(deit.errors.ConfigError, "class_names", "'ant'", "different"):
        deit.load_teacher(MeanColor(), names, **PLAIN)
    with raises(deit.errors.ConfigError, "class_names", "different"):
        make_loader(class_names=names)


def test_teacher_with_two_classes_of_a_name_is_refused():
    network = MeanColor()
    network.class_names = ("ant", "ant", "bee")
    with raises(deit.errors.DataError, "MeanColor", 2, "'ant'", "teacher.classes"):
        deit.load_teacher(network, ("ant", "bee"), **PLAIN)
    assert deit.load_teacher(network, ("bee",), **PLAIN).class_indices == [2]


@pytest.mark.parametrize("view", ["independent", "resized"])
def test_loader_does_not_mix_beside_views_of_the_teacher(view):
    """The teacher would see one image, and the student two."""
    with raises(deit.errors.ConfigError, "views.teacher_view", view, "mixing"):
        make_loader(views=CROP | {"teacher_view": view, "mixup_alpha": 0.8})


def test_threads_share_a_store(tmp_path):
    loader, teacher = make_loader(), make_teacher()
    store = deit.write_targets(loader, tmp_path / "targets", teacher, epochs=2)
    batches = [next(loader.epoch(epoch)) for epoch in (0, 1)]
    expected = [store(batch)[1] for batch in batches]

    def read(index):
        return all(torch.equal(store(batches[index])[1], expected[index]) for _ in range(500))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(read, (0, 1, 0, 1)))
