"""The same images from folders, shards and timm's readers: same pixels, labels, names, splits."""

import gzip
import importlib.util
import io
import re
import tarfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deit.config.data_section import DataConfig
from deit.core.errors import ConfigError, DataError, SystemFault
from deit.datasets.images import EncodedImages
from deit.datasets.listing import PassedOver
from deit.datasets.shards import read_index
from deit.datasets.sources import SOURCES
from deit.datasets.splits import Splits, load_splits
from deit.datasets.stores import ReaderStore, StringTable
from tests.helpers.errors import raises

CLASSES = ("10", "2", "Dog", "cat")  # in code point order; timm would have 2 before 10


def png(generator: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    pixels = generator.integers(256, size=(9, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def images(split: str, number: int = 10) -> dict[str, bytes]:
    """CLASS/INDEX.png -> content."""
    generator = np.random.default_rng(len(split))
    return {f"{name}/{index}.png": png(generator) for name in CLASSES for index in range(number)}


def add(archive: tarfile.TarFile, name: str, content: bytes = b"", **facts: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for fact, value in facts.items():
        setattr(member, fact, value)
    archive.addfile(member, io.BytesIO(content))


def write_folder(root: Path, split: str = "train") -> None:
    for name, content in images(split).items():
        path = root / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_shards(root: Path, split: str = "train", *, numbers: bool = False) -> None:
    """Two shards; the classes as names, or as the lines of a classes.txt in its own order."""
    order = ("cat", "2", "10", "Dog")
    (root / split).mkdir(parents=True)
    everything = list(images(split).items())
    for shard in range(2):
        with tarfile.open(root / split / f"{shard:03}.tar", "w") as archive:
            for name, content in everything[shard::2]:
                key, label = name.removesuffix(".png"), name.split("/")[0]
                add(archive, f"{key}.json", b"{}")
                add(archive, f"{key}.cls", str(order.index(label) if numbers else label).encode())
                add(archive, name, content)
    if numbers:
        (root / "classes.txt").write_text("\n".join(order) + "\n")


def write_tar(root: Path, split: str = "train") -> None:
    root.mkdir(exist_ok=True)
    with tarfile.open(root / f"{split}.tar", "w") as archive:
        for name, content in images(split).items():
            add(archive, f"./{name}", content)


WAYS = {
    "folder": (write_folder, {"source": "folder"}),
    "shards": (write_shards, {"source": "shards"}),
    "numbered shards": (lambda *a: write_shards(*a, numbers=True), {"source": "shards"}),
    "folder reader": (write_folder, {"source": "reader", "reader": "folder"}),
    "tar reader": (write_tar, {"source": "reader", "reader": "tar"}),
}


def lay_out(way: str, root: Path, splits: tuple[str, ...] = ("train", "val")) -> DataConfig:
    write, fields = WAYS[way]
    for split in splits:
        write(root, split)
    return DataConfig(root=str(root), image_size=8, **fields)


def contents(splits: Splits) -> list[set[tuple[str, bytes]]]:
    """For each split, class name and bytes of each image."""
    return [
        {
            (splits.class_names[label], split.read(index))
            for index, label in enumerate(split.labels.tolist())
        }
        for split in (splits.train, splits.validation, splits.test)
    ]


def replace(config: DataConfig, **changes: object) -> DataConfig:
    return DataConfig(**{**vars(config), **changes})


@pytest.mark.fault("C15")
@pytest.mark.parametrize("way", WAYS)
def test_every_way_has_the_same_classes_images_labels_and_test_images(way, tmp_path):
    config = lay_out(way, tmp_path / "data")
    splits = load_splits(replace(config, storage="files"))
    assert isinstance(splits.train, EncodedImages)
    assert splits.class_names == CLASSES
    train, validation, test = contents(splits)
    assert test == {(name.split("/")[0], content) for name, content in images("val").items()}
    assert train | validation == {
        (name.split("/")[0], content) for name, content in images("train").items()
    }
    assert len(validation) == 4


@pytest.mark.parametrize("way", ["shards", "numbered shards", "folder reader"])
def test_the_same_images_are_set_aside_however_they_lie(way, tmp_path):
    """By the name of the image, which folder and shards share."""
    expected = lay_out("folder", tmp_path / "folder")
    other = lay_out(way, tmp_path / "other")
    found = [contents(load_splits(replace(c, storage="files"))) for c in (expected, other)]
    assert found[0] == found[1]


@pytest.mark.parametrize("way", WAYS)
def test_in_memory_and_as_files_are_the_same_images(way, tmp_path):
    config = lay_out(way, tmp_path / "data")
    memory = load_splits(replace(config, storage="memory"))
    files = load_splits(replace(config, storage="files"))
    assert memory.train.labels.tolist() == files.train.labels.tolist()
    assert memory.mean == files.mean
    assert memory.std == files.std
    assert memory.fingerprint != files.fingerprint
    told = [any("data.storage" in note for note in splits.notes) for splits in (memory, files)]
    assert told == [False, True]


@pytest.mark.parametrize("way", WAYS)
def test_a_moved_data_set_has_the_same_fingerprint_and_a_changed_one_another(way, tmp_path):
    config = replace(lay_out(way, tmp_path / "here"), storage="files")
    before = load_splits(config).fingerprint
    (tmp_path / "here").rename(tmp_path / "there")
    moved = replace(config, root=str(tmp_path / "there"))
    assert load_splits(moved).fingerprint == before
    assert load_splits(replace(moved, split_seed=1)).fingerprint != before


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same_bytes(method, tmp_path):
    with ProcessPoolExecutor(2, mp_context=get_context(method)) as pool:
        for way in WAYS:
            config = lay_out(way, tmp_path / way, ("train",))
            store = SOURCES[config.source](config, ()).train.store
            rows = list(range(len(store)))
            assert list(pool.map(store.read, rows, chunksize=5)) == list(map(store.read, rows))
            assert list(pool.map(store.name, rows, chunksize=5)) == list(map(store.name, rows))


@pytest.mark.parametrize("way", WAYS)
def test_classes_can_be_chosen_everywhere(way, tmp_path):
    config = lay_out(way, tmp_path / "data")
    splits = load_splits(replace(config, classes=("cat", "10")))
    assert splits.class_names == ("10", "cat")
    assert len(splits.test.labels) == 20
    with raises(DataError, "'dog'"):
        load_splits(replace(config, classes=("dog",)))


def test_names_lead_to_the_image(tmp_path):
    for way, name in (
        ("folder", "train/10/0.png"),
        ("shards", "train/000.tar/10/0.png"),
        ("folder reader", "train/10/0.png"),
        ("tar reader", "train.tar/10/0.png"),
    ):
        root = tmp_path / way
        train = SOURCES[WAYS[way][1]["source"]](lay_out(way, root, ("train",)), ()).train
        assert train.name(0) == f"{root}/{name}"


@pytest.mark.fault("E9")
def test_many_texts_are_kept_as_they_are():
    texts = ["", "a", "ä/ö.png", "with\nline", b"\xff.png".decode(errors="surrogateescape"), ""]
    packed = StringTable(texts)
    assert [packed[index] for index in range(len(packed))] == texts


# Shards.


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            add(archive, name, content)
    return path


IMAGE = png(np.random.default_rng(3))
GOOD = {"a.png": IMAGE, "a.cls": b"ant", "b.png": IMAGE, "b.cls": b"bee"}


def load(root: Path, **changes: object) -> Splits:
    return load_splits(DataConfig(source="shards", root=str(root), image_size=8, **changes))


def test_shards_without_splits_are_carved(tmp_path):
    members = {}
    for index in range(20):
        members |= {f"{index:03}.jpg": IMAGE, f"{index:03}.cls": str(index % 2).encode()}
    shard(tmp_path / "part-000.tar", members)
    splits = load(tmp_path)
    assert splits.class_names == ("0", "1")
    assert [len(split.labels) for split in splits[1:4]] == [14, 2, 4]


def test_keys_that_come_again_in_every_shard_are_told_apart(tmp_path):
    members = {}
    for index in range(10):
        members |= {f"{index:03}.jpg": IMAGE, f"{index:03}.cls": str(index % 2).encode()}
    for number in range(4):
        shard(tmp_path / f"{number}.tar", members)
    config = DataConfig(source="shards", root=str(tmp_path))
    assert len(set(SOURCES["shards"](config, ()).identities.tolist())) == 40


@pytest.mark.fault("C20")
def test_hostile_members_are_neither_read_nor_extracted(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(IMAGE)
    path = tmp_path / "data" / "0.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        add(archive, "link.png", type=tarfile.SYMTYPE, linkname=str(secret))
        add(archive, "link.cls", b"ant")
        add(archive, "hard.png", type=tarfile.LNKTYPE, linkname="../secret.png")
        add(archive, "pipe.png", type=tarfile.FIFOTYPE)
        add(archive, "device.png", type=tarfile.CHRTYPE)
        add(archive, "folder.png", type=tarfile.DIRTYPE)
        add(archive, "__MACOSX/._a.png", IMAGE)
        add(archive, "../outside.png", IMAGE)
        add(archive, "../outside.cls", b"ant")
        add(archive, "/absolute.png", IMAGE)
        add(archive, "/absolute.cls", b"bee")
    problems: list[str] = []
    passed = PassedOver()
    names = [sample.member for sample in read_index(path, problems.append, passed)]
    assert names == ["../outside.png", "/absolute.png"]  # bytes of this tar, whatever they say
    (problem,) = problems
    assert problem.startswith(f"{path}: ")
    assert "link.cls" in problem
    assert (list(passed.files.values()), passed.places) == ([4], [])
    assert sorted(tmp_path.rglob("*")) == [path.parent, path, secret]


def flip_header(content: bytes) -> bytes:
    """Damage the header of the third member, in its checksum."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        offset = archive.getmembers()[2].offset
    return content[: offset + 150] + b"99" + content[offset + 152 :]


BROKEN = {
    "gzip inside": (gzip.compress, ()),
    "truncated": (lambda content: content[:1400], ()),
    "end missing": (lambda content: content[:4096], ("4096",)),
    "flipped header": (flip_header, ("2048",)),
    "no tar": (lambda content: b"hello" * 500, ()),
    "empty file": (lambda content: b"", ()),
}


@pytest.mark.fault("C21")
@pytest.mark.parametrize("damage", BROKEN)
def test_a_damaged_shard_is_refused_by_name(damage, tmp_path):
    path = shard(tmp_path / "0.tar", GOOD)
    change, places = BROKEN[damage]
    path.write_bytes(change(path.read_bytes()))
    with raises(DataError, path, *places) as refused:
        load(tmp_path)
    assert ".cls" not in str(refused.value)  # as below, where members are missing in a sound one


@pytest.mark.fault("C17")
@pytest.mark.parametrize(
    ("members", "names"),
    [
        ({**GOOD, "c.png": IMAGE}, ("0.tar", "c.png", "c.cls")),
        ({**GOOD, "c.png": IMAGE, "c.cls": b" "}, ("0.tar", "c.png", "c.cls")),
        ({**GOOD, "c.cls": b"ant"}, ("0.tar", "c.cls")),
        ({**GOOD, "a.jpg": IMAGE}, ("0.tar", "'a'", "a.png", "a.jpg")),
        ({"a.png": IMAGE, "a.cls": b"-1"}, ("0.tar", "a.png", "-1")),
        ({"note.txt": b"hello"}, ("1 .txt",)),
    ],
)
def test_a_sample_that_is_not_whole_is_refused(members, names, tmp_path):
    shard(tmp_path / "0.tar", members)
    with raises(DataError, tmp_path, *names):
        load(tmp_path)


@pytest.mark.fault("C17")
def test_class_numbers_are_checked_against_the_list(tmp_path):
    shard(tmp_path / "0.tar", {"a.png": IMAGE, "a.cls": b"0", "b.png": IMAGE, "b.cls": b"7"})
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    with raises(DataError, "0.tar", "b.png", "'7'", "classes.txt"):
        load(tmp_path)
    (tmp_path / "classes.txt").write_text("ant\nant\n")
    with raises(DataError, tmp_path / "classes.txt"):
        load(tmp_path)


@pytest.mark.fault("C21")
def test_compressed_and_misplaced_shards_are_refused_with_advice(tmp_path):
    path = shard(tmp_path / "a" / "0.tar", GOOD)
    (tmp_path / "a" / "1.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    with raises(DataError, tmp_path / "a" / "1.tar.gz"):
        load(tmp_path / "a")
    misplaced = shard(tmp_path / "b" / "imagenet-val-000.tar", GOOD)
    with raises(DataError, misplaced, "'val'"):
        load(tmp_path / "b")
    shard(tmp_path / "c" / "train" / "0.tar", GOOD)
    (tmp_path / "c" / "val").mkdir()
    with raises(DataError, f"{tmp_path / 'c' / 'val'}/*.tar"):
        load(tmp_path / "c")
    with raises(DataError, "--data.source"):
        load_splits(DataConfig(source="folder", root=str(tmp_path / "a")))


@pytest.mark.fault("C24")
def test_a_shard_that_shrinks_later_is_named(tmp_path):
    path = shard(tmp_path / "0.tar", GOOD)
    train = SOURCES["shards"](DataConfig(source="shards", root=str(tmp_path)), ()).train
    path.write_bytes(path.read_bytes()[:600])
    with raises(DataError, "0.tar", "a.png"):
        train.read(0)
    path.unlink()
    with raises(DataError, "0.tar", "a.png"):
        train.read(0)


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
def test_readers_without_random_access_are_refused_with_advice(reader, names, tmp_path):
    with raises(ConfigError, f"data.reader {reader}", *names):
        load_splits(DataConfig(source="reader", reader=reader, root=str(tmp_path)))


def test_what_a_reader_cannot_find_is_said(tmp_path):
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
    found = importlib.util.find_spec("datasets")
    return found is not None and found.origin is not None


def test_a_tar_in_a_tar_is_read_by_its_offsets(tmp_path):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as archive:
        for index in range(5):
            add(archive, f"{index}.png", IMAGE + bytes([index]))
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        for name in ("ant", "bee"):
            add(archive, f"{name}.tar", inner.getvalue())
    config = DataConfig(source="reader", reader="tar", root=str(tmp_path / "data.tar"))
    loaded = SOURCES["reader"](config, ())
    assert loaded.class_names == ("ant", "bee")
    assert sorted(loaded.train.read(row) for row in range(10)) == sorted(
        IMAGE + bytes([index]) for index in (*range(5), *range(5))
    )
    assert not list(tmp_path.glob("*.pickle"))


@pytest.mark.fault("C14")
def test_timms_readers_skip_what_hides_too(tmp_path):
    write_folder(tmp_path)
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (tmp_path / "train" / name).mkdir()
        (tmp_path / "train" / name / "0.png").write_bytes(IMAGE)
    config = DataConfig(source="reader", reader="folder", root=str(tmp_path))
    assert SOURCES["reader"](config, ()).class_names == CLASSES


class FakeDigits:
    """A torchvision data set in miniature: pictures, and targets beside them."""

    classes = ("zero", "one")
    targets = [0, 1, 1, 0]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("L", (5, 4), 10 * index), self.targets[index]


def test_pictures_of_a_torch_reader_are_encoded_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr("timm.data.create_dataset", lambda *args, **options: FakeDigits())
    config = DataConfig(source="reader", reader="torch/mnist", root=str(tmp_path), storage="files")
    loaded = SOURCES["reader"](config, ())
    assert loaded.class_names == ("one", "zero")
    assert loaded.train.labels.tolist() == [1, 0, 0, 1]
    with Image.open(io.BytesIO(loaded.test.read(3))) as image:
        assert (image.mode, image.size, image.getpixel((0, 0))) == ("L", (5, 4), 30)
    assert loaded.test.name(3) == "torch/mnist: test/3"


@pytest.mark.skipif(not _has_hugging_face(), reason="Hugging Face's datasets is not installed")
def test_a_hugging_face_data_set_is_the_same_images(tmp_path):
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
    train, validation, test = contents(splits)
    assert test == {(name.split("/")[0], content) for name, content in images("test").items()}
    assert len(train | validation) == 40
    store, rows = splits.train.store, list(range(8))
    for method in ("fork", "spawn"):
        with ProcessPoolExecutor(2, mp_context=get_context(method)) as pool:
            assert list(pool.map(store.read, rows)) == list(map(store.read, rows))


def test_labels_point_into_the_sorted_names(tmp_path):
    config = lay_out("folder reader", tmp_path, ("train",))
    train = SOURCES["reader"](config, ()).train
    names = [Path(train.name(index)).parent.name for index in range(len(train.labels))]
    assert [CLASSES[label] for label in train.labels] == names
    assert torch.bincount(train.labels).tolist() == [10] * 4


def leave(*arguments, **options):
    raise SystemExit(0)


def test_a_reader_that_ends_the_program_is_named(monkeypatch):
    """Its code 0 would be that of a command that is done."""
    monkeypatch.setattr("timm.data.create_dataset", leave)
    with raises(DataError, "data.reader torch/mnist", "data.root"):
        SOURCES["reader"](DataConfig(source="reader", reader="torch/mnist", root="."), ())
    rows = type("Rows", (), {"__len__": lambda rows: 1, "__getitem__": leave})()
    with raises(DataError, "torch/x: train/0"):
        ReaderStore("torch/x", {"train": rows}).read(0)


@pytest.mark.fault("C17")
@pytest.mark.parametrize("label", [-100, -1, 2])
def test_a_label_without_a_class_is_named(label, monkeypatch):
    digits = FakeDigits()
    monkeypatch.setattr("timm.data.create_dataset", lambda *args, **options: digits)
    config = DataConfig(source="reader", reader="torch/mnist", root=".", storage="files")
    assert SOURCES["reader"](config, ()).class_names == ("one", "zero")
    digits.targets = [0] * 17 + [label]
    with raises(DataError, "torch/mnist train") as refused:
        SOURCES["reader"](config, ())
    numbers = map(int, re.findall(r"-?\b\d+\b", str(refused.value)))
    assert sorted(numbers) == sorted([17, label, len(digits.classes)])
