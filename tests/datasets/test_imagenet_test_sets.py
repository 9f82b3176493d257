"""ImageNet's other test sets: their classes, labels and refusals."""

import re
from functools import cache

import pytest
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet

from deit.config.command_choices import TEST_SETS
from deit.core.errors import DataError
from deit.datasets.sources.imagenet_test_sets import SYNSET_FILES, load_test_set
from tests.helpers.errors import raises
from tests.helpers.images import imagenet_classes, write_class_images


@cache
def synsets():
    return tuple(ImageNetInfo().label_names())


def test_synset_files_equal_test_sets_of_command_line():
    assert tuple(SYNSET_FILES) == TEST_SETS


@pytest.mark.parametrize(
    ("name", "num_classes"), [("imagenet-a", 200), ("imagenet-r", 200), ("imagenet-sketch", 1000)]
)
def test_load_test_set_has_its_classes_and_labels(name, num_classes, tmp_path):
    expected = imagenet_classes(name)
    assert len(expected) == num_classes
    root = write_class_images(tmp_path / name, expected)
    test_set = load_test_set(name, str(root), synsets())
    assert len(test_set.class_indices) == num_classes
    assert {synsets()[column] for column in test_set.class_indices} == set(expected)
    # The correct class of every image is that of its folder.
    for row in (0, num_classes // 2, num_classes - 1):
        column = test_set.class_indices[int(test_set.accepted[row].long().argmax())]
        assert f"/{synsets()[column]}/" in test_set.images.name(row).replace("\\", "/")
        assert test_set.accepted[row].sum() == 1


def test_load_test_set_v2_folders_are_numbers(tmp_path):
    root = write_class_images(tmp_path / "v2", [str(label) for label in range(1000)])
    test_set = load_test_set("imagenet-v2", str(root), synsets())
    assert test_set.class_indices == tuple(range(1000))
    for row in (0, 11, 999):
        label = int(test_set.images.name(row).replace("\\", "/").split("/")[-2])
        assert int(test_set.accepted[row].long().argmax()) == label


def test_load_test_set_network_with_few_classes_skips_other_images(tmp_path):
    expected = imagenet_classes("imagenet-a")
    root = write_class_images(tmp_path / "a", expected)
    known = (expected[7], "n00000000", expected[3])
    test_set = load_test_set("imagenet-a", str(root), known)
    assert test_set.class_indices == (0, 2)
    assert len(test_set.images.labels) == 2
    assert re.findall(r"\d+", test_set.note) == ["2", "200", "2", "200"]  # images, then classes


def test_load_test_set_real_accepts_several_classes(tmp_path):
    names = [f"ILSVRC2012_val_{index + 1:08d}.JPEG" for index in range(50_000)]
    labels = RealLabelsImagenet(names).real_labels
    ambiguous = next(name for name in names if len(labels[name]) > 1)
    unlabeled = next(name for name in names if not labels[name])
    single = next(name for name in names if len(labels[name]) == 1)
    root = write_class_images(tmp_path / "real", synsets())
    for file in root.rglob("a.png"):
        file.rename(file.with_name(single))
    folder = root / synsets()[0]
    for name in (ambiguous, unlabeled):
        Image.new("RGB", (4, 4)).save(folder / name)
    test_set = load_test_set("imagenet-real", str(root), synsets())
    assert len(test_set.images.labels) == 1001  # without the unlabeled image
    rows = {test_set.images.name(row).rpartition("/")[2]: row for row in range(1001)}
    accepted = test_set.accepted[rows[ambiguous]]
    assert accepted.nonzero().flatten().tolist() == sorted(labels[ambiguous])
    (folder / ambiguous).rename(folder / "other.JPEG")
    with raises(DataError, "other.JPEG", names[0]):
        load_test_set("imagenet-real", str(root), synsets())


def test_load_test_set_other_folder_raises(tmp_path):
    root = write_class_images(tmp_path / "cats", ["cat", "dog"])
    with raises(DataError, "'cat'"):
        load_test_set("imagenet-a", str(root), synsets())
    complete = write_class_images(tmp_path / "a", imagenet_classes("imagenet-a"))
    with raises(DataError, "test set imagenet-a", "'ant'"):
        load_test_set("imagenet-a", str(complete), ("ant", "bee"))
