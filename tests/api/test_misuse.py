"""Wrong use from Python: one clear error before any work, and no wrong result without an error."""

import dataclasses
import re

import numpy as np
import pytest
import timm
import torch
from torch import nn

import deit
from deit.core.console import quiet
from tests.helpers.errors import raises

NAMES = ("ant", "bee", "cat")
IMAGES = torch.randint(
    0, 256, (48, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
LABELS = torch.arange(48) % 3
PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1)}
CROP = {"crop": "padded", "crop_padding": 1, "flip": 0.0}
ConfigError = deit.errors.ConfigError


class MeanColor(nn.Module):
    def forward(self, images):
        return 40 * (images.mean(dim=(2, 3)) - 0.5)


def make_loader(images=IMAGES, labels=LABELS, **options):
    settings = {"batch_size": 16, "class_names": NAMES, "views": CROP, "device": "cpu"}
    return deit.TrainLoader.from_arrays(images, labels, **settings | options)


def make_teacher():
    return deit.load_teacher(MeanColor(), NAMES, **PLAIN)


def write(path, content, views=CROP, epochs=2):
    with quiet():
        deit.write_targets(
            make_loader(views=views), path, make_teacher(), epochs=epochs, content=content
        )
    return path


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return {content: write(folder / content, content) for content in ("full", "hard")}


def test_stored_targets_are_not_given_for_views_of_other_epochs(stores):
    """After the stored epochs, the same rows are other images: their targets would be wrong."""
    store, loader = deit.TargetStore.open(stores["full"]), make_loader()
    teacher = make_teacher()
    for batch in loader.epoch(1):
        assert torch.equal(store(batch)[0], teacher(batch.teacher_images).argmax(dim=1))
    for opened in (store, deit.TargetStore.open(stores["full"], loader)):
        with raises(deit.errors.DataError, stores["full"], "epoch 2", "epoch % 2"):
            opened(next(loader.epoch(2)))


def test_targets_of_fixed_views_serve_every_epoch(tmp_path):
    views = CROP | {"teacher_view": "resized"}
    loader, path = make_loader(views=views), write(tmp_path / "fixed", "full", views, epochs=1)
    store, teacher = deit.TargetStore.open(path, loader), make_teacher()
    for batch in loader.epoch(5):
        assert torch.equal(store(batch)[0], teacher(batch.teacher_images).argmax(dim=1))


def test_every_store_of_a_loader_is_checked(stores):
    loader = make_loader()
    first, second = (deit.TargetStore.open(stores[name], loader) for name in ("full", "hard"))
    first.checks = first.checks._replace(views=first.checks.views + 1)
    with raises(deit.errors.DataError, "is not the view that the teacher saw"):
        next(loader.epoch(0))
    first.checks = second.checks
    next(loader.epoch(1))


def test_stores_of_labels_make_an_ensemble_without_logits(stores):
    loader = make_loader()
    store = deit.TargetStore.open(stores["hard"], loader)
    batch = next(loader.epoch(0))
    output = deit.TeacherEnsemble([store])(batch)
    assert output.logits is None
    assert torch.equal(output.labels[:, 0], store(batch)[0])
    assert deit.TeacherEnsemble([store, store], mode="tokens")(batch).labels.shape == (16, 2)
    with raises(ConfigError, "mode", "labels only", "tokens"):
        deit.TeacherEnsemble([store, make_teacher()])(batch)


@pytest.mark.parametrize("content", ["ful", "top-0", "top-", "hard "])
def test_targets_of_unknown_content_are_not_written(tmp_path, content):
    with raises(ConfigError, "content", content, "top-10"):
        deit.write_targets(
            make_loader(), tmp_path / "out", make_teacher(), epochs=1, content=content
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("teachers", "options", "names"),
    [
        (MeanColor(), {}, ["teachers", "list", "MeanColor"]),
        ([MeanColor()], {}, ["teachers", "load_teacher", "MeanColor"]),
        (["resnet18"], {}, ["teachers", "str"]),
        ("ab", {}, ["teachers", "str"]),
        ([], {}, ["teachers", "at least one"]),
        ([len], {"weights": ["a"]}, ["weights"]),
        ([len, len], {"weights": [1, float("nan")]}, ["weights", 2]),
        ([len, len], {"weights": 2}, ["weights", 2]),
        ([len], {"temperature": 0}, ["temperature", 0]),
        ([len], {"mode": "mean"}, ["mode", "logits"]),
    ],
)
def test_ensembles_of_other_things_raise(teachers, options, names):
    with raises(ConfigError, *names):
        deit.TeacherEnsemble(teachers, **options)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"mean": (123.7, 116.3, 103.5), "std": (58.4, 57.1, 57.4)}, ["mean", "255"]),
        ({"mean": (0, 0, 0), "std": (1, 0, 1)}, ["std", "positive"]),
        ({"mean": (0.5,), "std": (1, 1, 1)}, ["mean"]),
        ({"mean": 0.5, "std": 0.5}, ["mean"]),
        ({"mean": ["a"] * 3, "std": (1, 1, 1)}, ["mean"]),
    ],
)
def test_normalization_of_another_scale_raises(options, names):
    for make in (
        lambda: deit.load_teacher(MeanColor(), NAMES, **options),
        lambda: deit.build_student("deit_micro", 3, **options, image_size=8),
        lambda: deit.make_views(IMAGES[:1], seed=0, epoch=0, sample_ids=[0], **options),
    ):
        with raises(ConfigError, *names):
            make()


def test_teacher_with_half_a_normalization_raises():
    network = timm.create_model("resnet18", num_classes=3)
    with raises(ConfigError, "mean", "std"):  # it would keep the network's own mean
        deit.load_teacher(network, NAMES, mean=(0, 0, 0))


def test_teacher_module_gets_images_of_its_own_size():
    sizes = {"img_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes)
    assert deit.load_teacher(network, NAMES).image_size == 8
    student = deit.build_student("deit_micro", 3, **PLAIN, image_size=8, patch_size=2)
    assert deit.load_teacher(student, NAMES)(IMAGES[:2] / 255).shape == (2, 3)


@pytest.mark.parametrize("count", [0, -1, "3", NAMES, 2.0])
def test_students_of_other_numbers_of_classes_raise(count):
    with raises(ConfigError, "num_classes"):
        deit.build_student("deit_micro", count, **PLAIN, image_size=8)


def test_arrays_and_lists_are_images_labels_and_ids():
    expected = next(make_loader().epoch(0))
    batch = next(make_loader(IMAGES.numpy(), LABELS.tolist(), class_names=np.array(NAMES)).epoch(0))
    assert torch.equal(batch.images, expected.images)
    views = [
        deit.make_views(images, given, seed=0, epoch=0, sample_ids=ids)
        for images in (IMAGES[:3], IMAGES[:3].numpy())
        for given in (deit.ViewsConfig(**CROP), CROP)
        for ids in ([4, 5, 6], range(4, 7), np.arange(4, 7, dtype=np.int32))
    ]
    assert all(torch.equal(view, views[0]) for view in views)


@pytest.mark.parametrize(
    ("images", "labels", "options", "field"),
    [
        (None, LABELS, {}, "images"),
        (IMAGES, ["a"] * 48, {}, "labels"),
        (IMAGES.permute(0, 2, 3, 1), LABELS, {}, "images"),
        (IMAGES, LABELS, {"class_names": ("ant", "ant", "cat")}, "class_names"),
        (IMAGES, LABELS, {"process_index": 2, "num_processes": 2}, "process_index"),
        (IMAGES, LABELS, {"process_index": -1, "num_processes": 2}, "process_index"),
        (IMAGES, LABELS, {"process_index": "a", "num_processes": 2}, "process_index"),
        (IMAGES, LABELS, {"num_processes": 0}, "num_processes"),
        (IMAGES, LABELS, {"class_names": ()}, "class_names"),
        (IMAGES[:0], LABELS[:0], {}, "images"),
        (IMAGES, LABELS, {"teacher_size": 0}, "teacher_size"),
    ],
)
def test_loaders_of_other_arrays_raise(images, labels, options, field):
    with raises(ConfigError) as caught:
        make_loader(images, labels, **options)
    assert {problem.field.rstrip(":") for problem in caught.value.problems} == {field}


@pytest.mark.parametrize(
    "options",
    [{"sample_ids": [0.0]}, {"sample_ids": ["a"]}, {"epoch": -1}, {"size": 0}, {"views": {"x": 1}}],
)
def test_views_of_other_values_raise(options):
    with raises(ConfigError):
        deit.make_views(IMAGES[:1], **{"seed": 0, "epoch": 0, "sample_ids": [0]} | options)


def test_views_of_no_images_are_empty():
    assert deit.make_views(IMAGES[:0], seed=0, epoch=0, sample_ids=[]).shape == (0, 3, 8, 8)


def test_loader_without_an_epoch_raises():
    loader = make_loader()
    with raises(ConfigError, "loader.epoch(epoch)"):
        for _ in loader:
            pass
    for epoch in (None, -1, 1.5, "0", 2**32):
        with raises(ConfigError, f"epoch = {epoch!r}"):
            loader.epoch(epoch)
    for step in (None, -1, 1.5):
        with raises(ConfigError, "start_step"):
            loader.epoch(0, start_step=step)


def test_attributes_of_a_loader_are_documented():
    documented = set(re.findall(r"\w+", deit.TrainLoader.__doc__))
    assert {name for name in vars(make_loader()) if not name.startswith("_")} <= documented


@pytest.mark.parametrize("processes", [1, 2])
def test_length_of_a_loader_is_its_number_of_batches(processes):
    loader = make_loader(process_index=0, num_processes=processes)
    loader.set_micro_batches(dataclasses.replace(loader.optim, grad_accum_steps=2))
    assert len(loader) == len(list(loader.epoch(0)))


def test_recipes_take_configurations_and_sections():
    config = deit.recipe("digits", optim={"epochs": 4})
    changed = deit.recipe(config, loss=deit.LossConfig("soft", temperature=2.0))
    assert (changed.loss.kind, changed.loss.temperature, changed.optim.epochs) == ("soft", 2.0, 4)
    assert deit.recipe(config) == config
    with raises(ConfigError, "optim.epochs"):
        deit.recipe(config, optim={"epochs": 0})


@pytest.mark.parametrize("value", [3, None, {"a": 1}])
def test_other_types_than_paths_raise(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = deit.recipe("digits", loss="none")
    calls = [
        lambda: deit.recipe(value),
        lambda: deit.train(value, "out"),
        lambda: deit.train(config, value),
        lambda: deit.load_run(value),
        lambda: deit.finetune(value, "out"),
        lambda: deit.compare(value, "out"),
        lambda: deit.compare("digits", value),
        lambda: deit.SweepResult(value),
        lambda: deit.load_teacher(value, NAMES),
        lambda: deit.TargetStore.open(value),
        lambda: deit.write_targets(value, "out"),
        lambda: deit.write_targets(make_loader(), value, make_teacher(), epochs=1),
        lambda: deit.TrainLoader.from_config(value),
        lambda: deit.TrainLoader.from_folder(value, image_size=8, batch_size=4),
    ]
    for call in calls:
        with raises(ConfigError, type(value).__name__):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("callbacks", [print, None, ["print"], "print"])
def test_callbacks_that_are_no_functions_raise_before_work(callbacks, tmp_path):
    with raises(ConfigError, "callbacks", "list of functions"):
        deit.train(deit.recipe("digits", loss="none"), tmp_path / "run", callbacks=callbacks)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seeds", [3, (), (-1,), (0, 0), ("a",), (True,), (0.5,)])
def test_seeds_that_are_no_different_integers_raise_before_work(seeds, tmp_path):
    with raises(ConfigError, "seeds"):
        deit.compare("digits", tmp_path / "out", seeds=seeds)
    for arms in ("distilled", 3):
        with raises(ConfigError, f"arms = {arms!r}", "list"):
            deit.compare("digits", tmp_path / "out", arms=arms)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["parallel", "retries"])
@pytest.mark.parametrize("value", [-1, 1.5, "2", None, True])
def test_numbers_of_runs_are_checked_before_work(name, value, tmp_path):
    calls = (
        lambda: deit.compare("digits", tmp_path / "out", **{name: value}),
        lambda: deit.sweep("table-3", tmp_path / "out", **{name: value}),
    )
    for call in calls:
        with raises(ConfigError, name):
            call()
    assert not list(tmp_path.iterdir())


def test_targets_of_many_classes_are_whole(tmp_path):
    """A loop may use them at any temperature."""
    loader = make_loader(class_names=tuple(map(str, range(101))))
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 101))
    teacher = deit.load_teacher(linear, loader.class_names, image_size=8, **PLAIN)
    store = deit.write_targets(loader, tmp_path / "targets", teacher, epochs=1)
    assert store.record_format.content == "full"


def never_predicted():
    """Return labels that the teacher gets wrong, each of them."""
    return (make_teacher()(IMAGES / 255).argmax(dim=1) + 1) % 3


def test_teacher_near_chance_is_noticed_without_validation_images(tmp_path, capsys):
    loader, teacher = make_loader(labels=never_predicted()), make_teacher()
    deit.write_targets(loader, tmp_path / "targets", teacher, epochs=1)
    assert "near chance" in capsys.readouterr().err


def test_teacher_is_measured_on_validation_arrays(tmp_path):
    labels = never_predicted()
    loader = make_loader(validation=(IMAGES.numpy(), labels))
    assert torch.equal(loader.splits.validation.labels, labels)
    with raises(deit.errors.DataError, "MeanColor", "teacher.classes reversed"):
        deit.write_targets(loader, tmp_path / "targets", make_teacher(), epochs=2)
    assert not (tmp_path / "targets").exists()


@pytest.mark.parametrize(
    ("validation", "names"),
    [
        (IMAGES, ["validation", "pair"]),
        ((IMAGES, LABELS + 1), ["validation labels", "0 ... 2"]),
        ((IMAGES, LABELS[1:]), ["validation labels", "[48]"]),
        ((IMAGES / 255, LABELS), ["validation images", "uint8"]),
        ((IMAGES[..., :4], LABELS), ["validation images", "square"]),
    ],
)
def test_validation_arrays_of_another_form_raise(validation, names):
    with raises(ConfigError, *names):
        make_loader(validation=validation)


NORMALIZED = (IMAGES / 255 - 0.45) / 0.225


@pytest.mark.parametrize(
    ("images", "names"),
    [
        (IMAGES, ["uint8", "/ 255"]),
        (IMAGES.float(), ["[0, 1]", "255"]),
        (NORMALIZED, ["[0, 1]", "-2 to 2.44"]),
        (next(make_loader().epoch(0)), ["Batch"]),
    ],
)
def test_teacher_takes_images_from_0_to_1_only(images, names):
    with raises(ConfigError, *names):
        make_teacher()(images)


GRAY = torch.rand(5, 28, 28)
OTHER_LAYOUTS = [
    (GRAY, "repeat gray images"),
    (GRAY[:, None], "repeat gray images"),
    (GRAY[:3], "image[None]"),  # as one image with three channels
    (torch.rand(5, 28, 28, 3), "move the channels"),
    (torch.rand(5, 4, 28, 28), "[5, 4, 28, 28]"),
]


@pytest.mark.parametrize(("images", "advice"), OTHER_LAYOUTS)
def test_images_of_other_layouts_raise_with_what_to_do(images, advice):
    student = deit.build_student("deit_micro", 3, image_size=28, patch_size=4, **PLAIN)
    pixels, labels = (255 * images).to(torch.uint8), torch.arange(len(images))
    calls = (
        lambda: student(images),
        lambda: make_teacher()(images),
        lambda: make_loader(pixels.numpy(), labels),
        lambda: deit.make_views(pixels, seed=0, epoch=0, sample_ids=labels),
    )
    for call in calls:
        with raises(ConfigError, advice):
            call()


def test_student_takes_floats_only():
    student = deit.build_student("deit_micro", 3, image_size=8, patch_size=2, **PLAIN)
    with raises(ConfigError, "uint8", "/ 255"):
        student(IMAGES)


def test_ensemble_takes_batches_only():
    with raises(ConfigError, "batch", "teacher(images)"):
        deit.TeacherEnsemble([make_teacher()])(IMAGES / 255)
