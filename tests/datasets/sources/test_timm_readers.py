"""Images from timm's readers: Hugging Face and torch datasets, nested tars, wrong labels."""

import importlib.util
import io
import re
import tarfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from PIL import Image

from deit.config.sections.data import DataConfig
from deit.core.errors import ConfigError, DataError, SystemFault
from deit.datasets.sources.image_stores import ReaderStore
from deit.datasets.sources.registry import SOURCES
from deit.datasets.splits import load_splits
from tests.helpers.errors import raises
from tests.helpers.image_sources.stores import (
    CLASSES,
    IMAGE,
    add_member,
    images,
    split_contents,
    write_folder,
    write_splits,
)

# Readers.


@pytest.mark.parametrize(
    ("reader", "names"),
    [
        ("wds/imagenet", ("--data.source shards",)),
        ("tfds/mnist", ("--data.source folder",)),
        ("hfids/mnist", ("hfds/mnist",)),
        ("webdataset", ("hfds/NAME", "torch/NAME")),
        ("torch/places365", ("cifar10", "cifar100")),
    ],
)
def test_streaming_reader_raises_with_remedy(reader, names, tmp_path):
    with raises(ConfigError, f"data.reader {reader}", *names):
        load_splits(DataConfig(source="reader", reader=reader, root=str(tmp_path)))


def test_missing_data_of_reader_raises(tmp_path):
    def read(reader: str, **changes: object) -> None:
        load_splits(DataConfig(source="reader", reader=reader, root=str(tmp_path), **changes))

    with raises(DataError, "--data.download"):
        read("hfds/mnist")
    with raises(DataError, "data.root"):
        read("torch/cifar10")
    with raises(DataError, "train.tar"):
        read("tar")
    (tmp_path / "notes.txt").write_text("no image")
    with raises(DataError, tmp_path, "1 .txt"):
        read("folder")
    if not _has_hugging_face():
        with raises(SystemFault, "data.reader hfds/mnist", "pip install datasets"):
            read("hfds/mnist", download=True)


def _has_hugging_face() -> bool:
    result = importlib.util.find_spec("datasets")
    return result is not None and result.origin is not None


def test_nested_tar_is_read_by_offsets(tmp_path):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as archive:
        for index in range(5):
            add_member(archive, f"{index}.png", IMAGE + bytes([index]))
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        for name in ("ant", "bee"):
            add_member(archive, f"{name}.tar", inner.getvalue())
    config = DataConfig(source="reader", reader="tar", root=str(tmp_path / "data.tar"))
    loaded = SOURCES["reader"](config, ())
    assert loaded.class_names == ("ant", "bee")
    assert sorted(loaded.train.read(row) for row in range(10)) == sorted(
        IMAGE + bytes([index]) for index in (*range(5), *range(5))
    )
    assert not list(tmp_path.glob("*.pickle"))


@pytest.mark.fault("C14")
def test_timm_readers_skip_hidden_files(tmp_path):
    write_folder(tmp_path)
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / "train" / name).mkdir()
        (tmp_path / "train" / name / "0.png").write_bytes(IMAGE)
    config = DataConfig(source="reader", reader="folder", root=str(tmp_path))
    assert SOURCES["reader"](config, ()).class_names == CLASSES


class FakeDigits:
    """A small replacement of a torchvision dataset: images and targets."""

    classes = ("zero", "one")
    targets = [0, 1, 1, 0]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("L", (5, 4), 10 * index), self.targets[index]


def test_images_of_torch_reader_are_encoded_losslessly(tmp_path, monkeypatch):
    monkeypatch.setattr("timm.data.create_dataset", lambda *args, **options: FakeDigits())
    config = DataConfig(source="reader", reader="torch/mnist", root=str(tmp_path), storage="files")
    loaded = SOURCES["reader"](config, ())
    assert loaded.class_names == ("one", "zero")
    assert loaded.train.labels.tolist() == [1, 0, 0, 1]
    with Image.open(io.BytesIO(loaded.test.read(3))) as image:
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("L", (5, 4), 30)
    assert loaded.test.name(3) == "torch/mnist: test/3"


@pytest.mark.skipif(not _has_hugging_face(), reason="Hugging Face's datasets is not installed")
def test_hugging_face_dataset_has_the_same_images(tmp_path):
    write_folder(tmp_path / "data")
    write_folder(tmp_path / "data", "test")
    config = DataConfig(
        source="reader",
        reader=f"hfds/{tmp_path / 'data'}",
        root=str(tmp_path / "cache"),
        storage="files",
        image_size=8,
    )
    splits = load_splits(config)
    assert splits.class_names == CLASSES
    train, validation, test = split_contents(splits)
    assert test == {(name.split("/")[0], content) for name, content in images("test").items()}
    assert len(train | validation) == 40
    store, rows = splits.train.store, list(range(8))
    for method in ("fork", "spawn"):
        with ProcessPoolExecutor(2, mp_context=get_context(method)) as pool:
            assert list(pool.map(store.read, rows)) == list(map(store.read, rows))


def test_labels_index_sorted_names(tmp_path):
    config = write_splits("folder reader", tmp_path, ("train",))
    train = SOURCES["reader"](config, ()).train
    names = [Path(train.name(index)).parent.name for index in range(len(train.labels))]
    assert [CLASSES[label] for label in train.labels] == names
    assert torch.bincount(train.labels).tolist() == [10] * 4


def leave(*arguments, **options):
    raise SystemExit(0)


def test_reader_that_exits_raises_with_name(monkeypatch):
    """Its exit code 0 would look like that of a finished command."""
    monkeypatch.setattr("timm.data.create_dataset", leave)
    with raises(DataError, "data.reader torch/mnist", "data.root"):
        SOURCES["reader"](DataConfig(source="reader", reader="torch/mnist", root="."), ())
    rows = type("Rows", (), {"__len__": lambda rows: 1, "__getitem__": leave})()
    with raises(DataError, "torch/x: train/0"):
        ReaderStore("torch/x", {"train": rows}).read(0)


@pytest.mark.fault("C17")
@pytest.mark.parametrize("label", [-100, -1, 2])
def test_label_without_class_raises(label, monkeypatch):
    digits = FakeDigits()
    monkeypatch.setattr("timm.data.create_dataset", lambda *args, **options: digits)
    config = DataConfig(source="reader", reader="torch/mnist", root=".", storage="files")
    assert SOURCES["reader"](config, ()).class_names == ("one", "zero")
    digits.targets = [0] * 17 + [label]
    with raises(DataError, "torch/mnist train") as refused:
        SOURCES["reader"](config, ())
    numbers = map(int, re.findall(r"-?\b\d+\b", str(refused.value)))
    assert sorted(numbers) == sorted([17, label, len(digits.classes)])
