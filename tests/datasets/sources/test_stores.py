"""The same images from folders, shards and timm's readers: equal pixels, labels, names, splits."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from deit.config.sections.data import DataConfig
from deit.core.errors import DataError
from deit.datasets.images import EncodedImages
from deit.datasets.sources.image_stores import StringTable
from deit.datasets.sources.registry import SOURCES
from deit.datasets.splits import load_splits
from tests.helpers.errors import raises
from tests.helpers.image_sources.stores import (
    CLASSES,
    LAYOUTS,
    images,
    split_contents,
    write_splits,
)


def replace(config: DataConfig, **changes: object) -> DataConfig:
    return DataConfig(**{**vars(config), **changes})


@pytest.mark.fault("C15")
@pytest.mark.parametrize("way", LAYOUTS)
def test_every_source_has_the_same_images_and_splits(way, tmp_path):
    config = write_splits(way, tmp_path / "data")
    splits = load_splits(replace(config, storage="files"))
    assert isinstance(splits.train, EncodedImages)
    assert splits.class_names == CLASSES
    train, validation, test = split_contents(splits)
    assert test == {(name.split("/")[0], content) for name, content in images("val").items()}
    assert train | validation == {
        (name.split("/")[0], content) for name, content in images("train").items()
    }
    assert len(validation) == 4


@pytest.mark.parametrize("way", ["shards", "numbered shards", "folder reader"])
def test_every_source_splits_the_same_images(way, tmp_path):
    """The split depends on the name of an image, which is equal in folders and shards."""
    expected = write_splits("folder", tmp_path / "folder")
    other = write_splits(way, tmp_path / "other")
    result = [split_contents(load_splits(replace(c, storage="files"))) for c in (expected, other)]
    assert result[0] == result[1]


@pytest.mark.parametrize("way", LAYOUTS)
def test_memory_and_files_have_the_same_images(way, tmp_path):
    config = write_splits(way, tmp_path / "data")
    memory = load_splits(replace(config, storage="memory"))
    files = load_splits(replace(config, storage="files"))
    assert memory.train.labels.tolist() == files.train.labels.tolist()
    assert memory.mean == files.mean
    assert memory.std == files.std
    assert memory.fingerprint != files.fingerprint
    result = [any("data.storage" in note for note in splits.notes) for splits in (memory, files)]
    assert result == [False, True]


@pytest.mark.parametrize("way", LAYOUTS)
def test_fingerprint_is_kept_when_moved_and_changes_with_data(way, tmp_path):
    config = replace(write_splits(way, tmp_path / "here"), storage="files")
    before = load_splits(config).fingerprint
    (tmp_path / "here").rename(tmp_path / "there")
    moved = replace(config, root=str(tmp_path / "there"))
    assert load_splits(moved).fingerprint == before
    assert load_splits(replace(moved, split_seed=1)).fingerprint != before


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same_bytes(method, tmp_path):
    with ProcessPoolExecutor(2, mp_context=get_context(method)) as pool:
        for way in LAYOUTS:
            config = write_splits(way, tmp_path / way, ("train",))
            store = SOURCES[config.source](config, ()).train.store
            rows = list(range(len(store)))
            assert list(pool.map(store.read, rows, chunksize=5)) == list(map(store.read, rows))
            assert list(pool.map(store.name, rows, chunksize=5)) == list(map(store.name, rows))


@pytest.mark.parametrize("way", LAYOUTS)
def test_classes_are_selected_in_every_source(way, tmp_path):
    config = write_splits(way, tmp_path / "data")
    splits = load_splits(replace(config, classes=("cat", "10")))
    assert splits.class_names == ("10", "cat")
    assert len(splits.test.labels) == 20
    with raises(DataError, "'dog'"):
        load_splits(replace(config, classes=("dog",)))


def test_names_locate_the_image(tmp_path):
    for way, name in (
        ("folder", "train/10/0.png"),
        ("shards", "train/000.tar/10/0.png"),
        ("folder reader", "train/10/0.png"),
        ("tar reader", "train.tar/10/0.png"),
    ):
        root = tmp_path / way
        train = SOURCES[LAYOUTS[way][1]["source"]](write_splits(way, root, ("train",)), ()).train
        assert train.name(0) == f"{root}/{name}"


@pytest.mark.fault("E9")
def test_string_table_keeps_strings():
    texts = ["", "a", "ä/ö.png", "with\nline", b"\xff.png".decode(errors="surrogateescape"), ""]
    packed = StringTable(texts)
    assert [packed[index] for index in range(len(packed))] == texts
