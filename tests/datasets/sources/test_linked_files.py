"""Links, pipes and unreadable folders among the images."""

import os
import re

import pytest

from deit.core.errors import DataError
from deit.datasets.sources.registry import LISTINGS
from deit.datasets.splits import load_splits
from tests.helpers.errors import raises
from tests.helpers.image_sources.layouts import (
    PNG,
    file_names,
    skipped_notes,
    source_config,
    split_sizes,
    write_file,
    write_images,
    write_shard,
)

# Links.


@pytest.mark.fault("C26")
@pytest.mark.parametrize("way", ["folder", "folder reader"])
def test_images_behind_links_are_read(way, tmp_path):
    root = tmp_path / "data"
    config = write_images(way, root, {"train": "train"})
    for index in range(3):
        write_file(tmp_path / "lake" / "ant" / f"more{index}.png")
    # timm's class is the innermost folder.
    (root / "train" / "ant" / "ant").symlink_to(tmp_path / "lake" / "ant")
    (root / "train" / "bee" / "link.png").symlink_to(tmp_path / "lake" / "ant" / "more0.png")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "lake")
    (root / "val").symlink_to(tmp_path / "other" / "val")
    for name in file_names(2):
        write_file(tmp_path / "other" / "val" / name)
    assert split_sizes(config) == {"train": 8 + 3 + 1, "test": 4}
    listing = LISTINGS[config.source](config, ())
    assert "train/ant/ant/more2.png" in map(listing.store.key, range(len(listing.store)))
    assert all(listing.store.read(row) == PNG for row in range(len(listing.store)))


@pytest.mark.fault("C26")
def test_shards_behind_links_are_read(tmp_path):
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "lake" / "0.tar", file_names(4))
    (tmp_path / "data" / "train").symlink_to(tmp_path / "lake")
    assert split_sizes(source_config("shards", tmp_path / "data")) == {"train": 8}


@pytest.mark.fault("C26")
@pytest.mark.parametrize("way", ["folder", "folder reader"])
@pytest.mark.parametrize("target", [".", "..", "../..", "../../.."])
def test_cyclic_link_is_noted_and_not_followed(way, target, tmp_path):
    root = tmp_path / "data"
    config = write_images(way, root, {"train": "train"})
    (root / "train" / "ant" / "again").symlink_to(target)
    assert split_sizes(config) == {"train": 8}
    (note,) = skipped_notes(config)
    assert f"{root}/train/ant/again " in note
    assert " link " in note


@pytest.mark.fault("C26")
def test_mutual_links_terminate(tmp_path):
    config = write_images("folder", tmp_path / "data", {"train": "train"})
    for first, second in (("x", "y"), ("y", "x")):
        write_file(tmp_path / first / f"{first}.png")
        (tmp_path / first / second).symlink_to(tmp_path / second)
    (tmp_path / "data" / "train" / "ant" / "x").symlink_to(tmp_path / "x")
    assert split_sizes(config) == {"train": 8 + 2}
    assert re.search(r"\bx/y/x\b.* link\b", skipped_notes(config)[0])


@pytest.mark.fault("C26")
@pytest.mark.parametrize("folder", ["train/ant/more", "train/cow", "val"])
def test_broken_link_raises_with_name(folder, tmp_path):
    config = write_images("folder", tmp_path, {"train": "train"})
    (tmp_path / folder).symlink_to("/unmounted/lake")
    with raises(DataError, folder):
        split_sizes(config)


def test_image_with_broken_link_can_be_excluded(tmp_path):
    config = write_images("folder", tmp_path, {"train": "train"})
    (tmp_path / "train" / "ant" / "gone.png").symlink_to("/unmounted/x.png")
    with raises(DataError, "gone.png"):
        load_splits(config)
    bad = write_file(tmp_path / "bad.txt", b"train/ant/gone.png\n")
    load_splits(source_config("folder", tmp_path, exclude_list=str(bad)))


def test_other_file_with_broken_link_is_skipped(tmp_path):
    config = write_images("folder", tmp_path, {"train": "train"})
    (tmp_path / "train" / "ant" / "labels.csv").symlink_to("/unmounted/labels.csv")
    (note,) = skipped_notes(config)
    assert note.endswith(" 1 .csv")


@pytest.mark.fault("C26")
@pytest.mark.parametrize("linked", [False, True])
def test_pipe_raises_without_waiting(linked, tmp_path):
    config = write_images("folder", tmp_path / "data", {"train": "train"})
    folder = tmp_path / "data" / "train" / "ant" / "pipe.png"
    os.mkfifo(tmp_path / "pipe" if linked else folder)
    if linked:
        folder.symlink_to(tmp_path / "pipe")
    with raises(DataError, "pipe.png"):
        split_sizes(config)


def test_unreadable_folder_raises_with_name(tmp_path, monkeypatch):
    config = write_images("folder", tmp_path, {"train": "train"})
    (tmp_path / "train" / "ant" / "closed").mkdir()
    scan = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with raises(DataError, "ant/closed: ", "Permission denied"):
        split_sizes(config)
