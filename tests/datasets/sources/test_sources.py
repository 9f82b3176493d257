"""Sources and splits: real digits, class folders, CIFAR's layout, classes by name."""

import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from deit.config.field_types import Source
from deit.config.sections.data import DataConfig
from deit.core.errors import DataError, SystemFault
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.sources.registry import SOURCES
from deit.datasets.splits import channel_statistics, load_splits, select_fraction
from tests.helpers.errors import raises
from tests.helpers.images import folder_data, write_class_folders
from tests.helpers.processes import ROOT

TINY = ROOT.parent / "shared" / "data" / "tiny-imagenet-200.part1of4.tar.xz"


def test_sources_match_configured_names():
    assert set(SOURCES) == set(Source.__args__)


def test_digits_have_fixed_stratified_split():
    pytest.importorskip("sklearn")
    splits = load_splits(DataConfig(source="digits", image_size=8))
    sizes = [len(split.labels) for split in (splits.train, splits.validation, splits.test)]
    assert sum(sizes) == 1797
    assert sizes == [1295, 143, 359]
    for split in (splits.train, splits.validation, splits.test):
        counts = torch.bincount(split.labels, minlength=10)
        assert counts.min() / counts.max() > 0.75
    assert splits.class_names == tuple("0123456789")
    assert splits.train.pixels.max() == 255
    again = load_splits(DataConfig(source="digits", image_size=8))
    assert splits.fingerprint == again.fingerprint
    other = load_splits(DataConfig(source="digits", image_size=8, split_seed=1))
    assert splits.fingerprint != other.fingerprint


def test_select_fraction_takes_share_of_every_class():
    labels, identities = torch.arange(103) % 5, torch.arange(103)
    taken = select_fraction(labels, identities, 0.2, 0, "validation")
    assert torch.bincount(labels[taken]).tolist() == [4] * 5
    assert not torch.equal(taken, select_fraction(labels, identities, 0.2, 0, "test"))
    assert not torch.equal(taken, select_fraction(labels, identities, 0.2, 1, "validation"))


def test_select_fraction_does_not_depend_on_order_or_other_classes():
    labels, identities = torch.arange(100) % 5, torch.arange(100) * 977
    taken = select_fraction(labels, identities, 0.3, 0, "test")
    order = torch.randperm(100)
    assert torch.equal(
        select_fraction(labels[order], identities[order], 0.3, 0, "test"), taken[order]
    )
    some = labels < 2
    assert torch.equal(select_fraction(labels[some], identities[some], 0.3, 0, "test"), taken[some])


def test_fewer_classes_keep_their_test_images():
    whole = load_splits(DataConfig(source="digits", image_size=8)).test
    some = load_splits(DataConfig(source="digits", image_size=8, classes=("0", "1", "7"))).test
    known = {pixels.numpy().tobytes() for pixels in whole.pixels}
    assert all(pixels.numpy().tobytes() in known for pixels in some.pixels)


def test_select_fraction_leaves_one_image_on_either_side():
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    for fraction in (0.01, 0.99):
        taken = select_fraction(labels, torch.arange(6), fraction, 0, "x")
        assert set(labels[taken].tolist()) == set(labels[~taken].tolist()) == {0, 1}


def test_class_of_one_image_raises(tmp_path):
    write_class_folders(tmp_path, images_per_class=1)
    with raises(DataError, "'ant'"):
        load_splits(folder_data(tmp_path))


def test_channel_statistics_equal_numpy():
    pixels = torch.randint(256, (20, 3, 5, 4), dtype=torch.uint8)
    mean, std = channel_statistics(pixels)
    scaled = pixels.numpy() / 255
    assert mean == pytest.approx(scaled.mean(axis=(0, 2, 3)))
    assert std == pytest.approx(scaled.std(axis=(0, 2, 3)))
    assert channel_statistics(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))[1] == (1.0, 1.0, 1.0)


def test_folder_classes_are_in_code_point_order(tmp_path):
    write_class_folders(tmp_path, classes=("10", "2", "Dog", "cat"))
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    splits = load_splits(folder_data(tmp_path))
    assert splits.class_names == ("10", "2", "Dog", "cat")
    assert len(splits.test.labels) == 16
    assert (len(splits.train.labels), len(splits.validation.labels)) == (12, 4)


def test_folder_validation_split_is_used_or_is_the_test_split(tmp_path):
    three = write_class_folders(tmp_path / "three", splits=("train", "val", "test"))
    assert [len(s.labels) for s in load_splits(folder_data(three))[1:4]] == [12, 12, 12]
    two = load_splits(folder_data(write_class_folders(tmp_path / "two", splits=("train", "val"))))
    assert [len(s.labels) for s in two[1:4]] == [9, 3, 12]


def test_folder_without_splits_is_split_twice(tmp_path):
    write_class_folders(tmp_path, splits=(".",), images_per_class=10)
    splits = load_splits(folder_data(tmp_path))
    assert [len(s.labels) for s in splits[1:4]] == [21, 3, 6]
    assert len(splits.notes) == 2


def test_images_are_center_squares_of_configured_size(tmp_path):
    write_class_folders(tmp_path, size=(40, 20))
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (10, 0, 30, 20))
    image.save(tmp_path / "train" / "ant" / "0.png")
    image.convert("L").save(tmp_path / "train" / "ant" / "1.png")
    splits = load_splits(folder_data(tmp_path, validation_fraction=0.01))
    assert splits.train.pixels.shape[1:] == (3, 8, 8)
    blue = torch.tensor([0, 0, 255], dtype=torch.uint8)
    everywhere = torch.cat([splits.train.pixels, splits.validation.pixels])
    assert any(
        torch.equal(pixels[:, 4, 4], blue) and pixels[2].min() > 200 for pixels in everywhere
    )


def test_classes_are_selected_by_list_or_file(tmp_path):
    write_class_folders(tmp_path)
    assert load_splits(folder_data(tmp_path, classes=("cat", "ant"))).class_names == ("ant", "cat")
    names = tmp_path / "names.tsv"
    names.write_text("bee\tan insect\ncat\ta pet\n")
    assert load_splits(folder_data(tmp_path, classes=(f"@{names}",))).class_names == ("bee", "cat")
    with raises(DataError, "'beee'"):
        load_splits(folder_data(tmp_path, classes=("beee",)))
    digits = DataConfig(source="digits", image_size=8, classes=("3", "7"))
    splits = load_splits(digits)
    assert splits.class_names == ("3", "7")
    assert set(splits.test.labels.tolist()) == {0, 1}


def test_train_fraction_keeps_other_splits(tmp_path):
    write_class_folders(tmp_path, images_per_class=20)
    whole, scarce = (
        load_splits(folder_data(tmp_path)),
        load_splits(folder_data(tmp_path, train_fraction=0.5)),
    )
    assert len(scarce.train.labels) == len(whole.train.labels) // 2
    assert torch.equal(whole.validation.pixels, scarce.validation.pixels)
    assert torch.equal(whole.test.pixels, scarce.test.pixels)


@pytest.mark.fault("C13", "C15", "C16")
@pytest.mark.parametrize(
    ("damage", "names"),
    [
        ("missing", ["data.root {root}"]),
        ("empty", ["{root}/CLASS/IMAGE"]),
        ("empty class", ["{root}/train/bee: "]),
        ("corrupt", ["{root}/train/bee/1.png: ", "10 bytes"]),
        ("truncated", ["{root}/train/bee/1.png: ", "truncated"]),
        ("class missing in test", ["{root}/test: ", "'bee'"]),
    ],
)
def test_damaged_folder_raises_with_name(tmp_path, damage, names):
    root = tmp_path / "data"
    if damage == "empty":
        root.mkdir()
    elif damage != "missing":
        write_class_folders(root)
        victim = root / "train" / "bee"
        if damage == "empty class":
            for file in victim.iterdir():
                file.unlink()
        elif damage == "corrupt":
            (victim / "1.png").write_bytes(b"no picture")
        elif damage == "truncated":
            content = (victim / "1.png").read_bytes()
            (victim / "1.png").write_bytes(content[: len(content) // 2])
        else:
            for file in (root / "test" / "bee").iterdir():
                file.unlink()
            (root / "test" / "bee").rmdir()
    with raises(DataError, *(name.format(root=root) for name in names)):
        load_splits(folder_data(root))


def test_images_exceeding_memory_raise_before_resizing(tmp_path):
    write_class_folders(tmp_path)
    with raises(SystemFault, "data.image_size"):
        load_splits(folder_data(tmp_path, memory_fraction=1e-12))


def test_splits_and_classes_without_training_images_raise(tmp_path):
    write_class_folders(tmp_path / "a", splits=("eval", "testing"))
    with raises(DataError, "'eval'"):
        load_splits(folder_data(tmp_path / "a"))
    write_class_folders(tmp_path / "b")
    write_class_folders(tmp_path / "b", classes=("zebra",), splits=("test",))
    with raises(DataError, tmp_path / "b" / "test" / "zebra"):
        load_splits(folder_data(tmp_path / "b"))
    assert load_splits(folder_data(tmp_path / "b", classes=("ant", "bee"))).class_names == (
        "ant",
        "bee",
    )
    write_class_folders(tmp_path / "c", classes=("ant",))
    with raises(DataError, "'ant'"):
        load_splits(folder_data(tmp_path / "c"))


def key(splits, split, index):
    encoded = getattr(splits, split)
    return encoded.store.key(int(encoded.positions[index]))


def keys(splits):
    """Return the files of the images of each split."""
    return {
        split: {key(splits, split, index) for index in range(len(getattr(splits, split).labels))}
        for split in ("train", "validation", "test")
    }


def test_storage_selects_memory_or_files(tmp_path, monkeypatch):
    write_class_folders(tmp_path, images_per_class=6)
    assert isinstance(load_splits(folder_data(tmp_path)).train, InMemoryImages)
    assert isinstance(load_splits(folder_data(tmp_path, storage="memory")).train, InMemoryImages)
    assert isinstance(load_splits(folder_data(tmp_path, storage="files")).train, EncodedImages)
    monkeypatch.setattr("deit.datasets.splits.AUTO_BYTES", 36 * 3 * 8 * 8 - 1)
    assert isinstance(load_splits(folder_data(tmp_path)).train, EncodedImages)
    assert isinstance(load_splits(folder_data(tmp_path, storage="memory")).train, InMemoryImages)
    monkeypatch.setattr("deit.datasets.splits.AUTO_BYTES", 36 * 3 * 8 * 8)
    assert isinstance(load_splits(folder_data(tmp_path)).train, InMemoryImages)


@pytest.mark.parametrize("storage", ["auto", "memory"])
def test_free_memory_does_not_change_storage(tmp_path, storage):
    """Otherwise processes and resumptions of a run would disagree: it raises with the remedy."""
    write_class_folders(tmp_path)
    with raises(SystemFault, "data.storage", "data.image_size"):
        load_splits(folder_data(tmp_path, storage=storage, memory_fraction=1e-12))
    assert load_splits(folder_data(tmp_path, storage="files", memory_fraction=1e-12)).notes


def test_mean_and_std_of_many_files_are_of_a_sample(tmp_path, monkeypatch):
    write_class_folders(tmp_path, images_per_class=20)
    whole = load_splits(folder_data(tmp_path, storage="memory"))
    monkeypatch.setattr("deit.datasets.splits._MEASURED", 30)
    files = load_splits(folder_data(tmp_path, storage="files"))
    assert any(re.search(r"\bmean\b.*\bstd\b.* 30 ", note) for note in files.notes)
    assert files.mean == pytest.approx(whole.mean, abs=0.02)
    assert files.mean != whole.mean
    assert files.mean == load_splits(folder_data(tmp_path, storage="files")).mean


@pytest.mark.fault("C1")
def test_excluded_image_is_removed_and_others_keep_their_split(tmp_path):
    write_class_folders(tmp_path / "data", images_per_class=20, splits=("train",))
    files = {"storage": "files", "train_fraction": 0.5}
    before = load_splits(folder_data(tmp_path / "data", **files))
    bad = {key(before, split, 0) for split in ("train", "validation", "test")}
    for name in bad:
        (tmp_path / "data" / name).write_bytes(b"")
    listed = tmp_path / "bad.txt"
    listed.write_text("# why\n\n" + "\n".join(bad) + "\n")
    after = load_splits(folder_data(tmp_path / "data", **files, exclude_list=str(listed)))
    assert keys(after) == {split: names - bad for split, names in keys(before).items()}
    assert any(re.search(rf"exclude list.* 3 .*{re.escape(str(listed))}", x) for x in after.notes)
    assert after.fingerprint != before.fingerprint
    memory = load_splits(folder_data(tmp_path / "data", exclude_list=str(listed)))
    assert sum(len(split.labels) for split in memory[1:4]) == 60 - 3


@pytest.mark.parametrize("listed", ["ant/0.png", "data/train/ant/0.png"])
def test_exclude_list_of_another_layout_names_the_image(listed, tmp_path):
    write_class_folders(tmp_path / "data")
    (tmp_path / "bad.txt").write_text(f"{listed}\n")
    with raises(DataError, f"{listed!r} is not in the data, which has 'train/ant/0.png'", "layout"):
        load_splits(folder_data(tmp_path / "data", exclude_list=str(tmp_path / "bad.txt")))


def test_exclude_list_of_other_data_raises(tmp_path):
    write_class_folders(tmp_path / "data")
    listed = tmp_path / "bad.txt"
    listed.write_text("train/ant/77.png\n")
    with raises(DataError, "'train/ant/77.png'"):
        load_splits(folder_data(tmp_path / "data", exclude_list=str(listed)))
    with raises(DataError, "nothing.txt"):
        load_splits(folder_data(tmp_path / "data", exclude_list=str(tmp_path / "nothing.txt")))
    listed.write_text("".join(f"train/ant/{index}.png\n" for index in range(4)))
    with raises(DataError, "'ant'", "data.exclude_list"):
        load_splits(folder_data(tmp_path / "data", exclude_list=str(listed)))
    # Of a class that is not kept, a name is still a name of the data.
    load_splits(folder_data(tmp_path / "data", exclude_list=str(listed), classes=("bee", "cat")))


@pytest.mark.fault("C14")
def test_system_files_are_no_images_or_classes(tmp_path):
    write_class_folders(tmp_path / "data")
    train = tmp_path / "data" / "train"
    for name in (".ipynb_checkpoints", "__MACOSX", "ant/.ipynb_checkpoints", "ant/__MACOSX"):
        (train / name).mkdir()
        (train / name / "0.png").write_bytes(b"no picture")
    (train / "ant" / "._0.png").write_bytes(b"no picture")
    (train / "ant" / "Thumbs.db").write_bytes(b"no picture")
    (tmp_path / "elsewhere").mkdir()
    (train / "bee").rename(tmp_path / "elsewhere" / "bees")
    (train / "bee").symlink_to(tmp_path / "elsewhere" / "bees", target_is_directory=True)
    splits = load_splits(folder_data(tmp_path / "data"))
    assert splits.class_names == ("ant", "bee", "cat")
    assert [len(split.labels) for split in splits[1:4]] == [9, 3, 12]


def test_images_in_subfolders_belong_to_class_folder(tmp_path):
    write_class_folders(tmp_path)
    deep = tmp_path / "train" / "ant" / "more" / "of them"
    deep.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(deep / "x.PNG")
    splits = load_splits(folder_data(tmp_path, storage="files"))
    assert "train/ant/more/of them/x.PNG" in set.union(*keys(splits).values())


def test_memory_limit_of_container_is_used(tmp_path, monkeypatch):
    write_class_folders(tmp_path)
    monkeypatch.setattr("deit.core.host_memory.cgroup_headroom", lambda: [1000])
    with raises(SystemFault, "data.image_size 8", "data.memory_fraction"):
        load_splits(folder_data(tmp_path))


def test_enlarging_beyond_memory_raises_for_every_source():
    config = DataConfig(source="digits", image_size=64, memory_fraction=1e-12)
    with raises(SystemFault, "data.image_size"):
        load_splits(config)


def test_train_fraction_keeps_every_class(tmp_path):
    write_class_folders(tmp_path, images_per_class=2)
    with raises(DataError, "'ant'", " 2 ", " 3 ", "data.classes"):
        load_splits(folder_data(tmp_path, train_fraction=0.5))


@pytest.mark.parametrize("source", ["cifar10", "cifar100"])
def test_missing_cifar_raises_with_path_and_remedy(tmp_path, source):
    with raises(DataError, tmp_path, "md5", "--data.download"):
        load_splits(DataConfig(source=source, root=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_images_of_configured_size_keep_their_pixels(tmp_path):
    images = []
    for index in range(6):
        images.append(tmp_path / f"{index}.jpg")
        noise = torch.randint(256, (4, 4, 3), dtype=torch.uint8).numpy()
        Image.fromarray(noise).resize((32, 32)).save(images[-1], quality=75)
    for copy in ("train/airplane", "train/bird"):
        (tmp_path / "small" / copy).mkdir(parents=True)
        for image in images:
            (tmp_path / "small" / copy / image.name).write_bytes(image.read_bytes())
    splits = load_splits(
        DataConfig(source="folder", root=str(tmp_path / "small" / "train"), image_size=32)
    )
    expected = np.array(Image.open(images[0]).convert("RGB"))
    everywhere = torch.cat([s.pixels for s in splits[1:4]]).permute(0, 2, 3, 1).numpy()
    assert any(np.array_equal(expected, result) for result in everywhere)


@pytest.mark.skipif(not TINY.is_file(), reason=f"no {TINY}")
def test_tiny_imagenet_folders_are_read(tmp_path):
    """Train and val of an ImageNet subset: val is the test split, validation is part of train."""
    with tarfile.open(TINY) as archive:
        for index, member in enumerate(archive):
            archive.extract(member, tmp_path, filter="data")
            if index == 1900:
                break
    root = tmp_path / "tiny-imagenet-200"
    classes = sorted(child.name for child in (root / "train").iterdir())[:2]
    (root / "val").mkdir(exist_ok=True)
    for name in classes:
        (root / "val" / name).mkdir(exist_ok=True)
        source = next((root / "train" / name).glob("*.JPEG"))
        (root / "val" / name / "copy.JPEG").write_bytes(source.read_bytes())
    splits = load_splits(
        DataConfig(source="folder", root=str(root), image_size=64, classes=tuple(classes))
    )
    assert splits.class_names == tuple(classes)
    assert classes[0].startswith("n0")
    assert len(splits.train.labels) == 9 * len(splits.validation.labels)
    assert splits.train.pixels.shape[1:] == (3, 64, 64)
