"""Tar shards: splits; damaged, hostile or misplaced shards raise errors with their names."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from deit.config.sections.data import DataConfig
from deit.core.errors import DataError
from deit.datasets.sources.listing import SkippedFiles
from deit.datasets.sources.registry import SOURCES
from deit.datasets.sources.shards import read_index
from deit.datasets.splits import Splits, load_splits
from tests.helpers.errors import raises
from tests.helpers.image_sources.stores import IMAGE, add_member

# Shards.


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            add_member(archive, name, content)
    return path


GOOD = {"a.png": IMAGE, "a.cls": b"ant", "b.png": IMAGE, "b.cls": b"bee"}


def load(root: Path, **changes: object) -> Splits:
    return load_splits(DataConfig(source="shards", root=str(root), image_size=8, **changes))


def test_shards_without_splits_are_split(tmp_path):
    members = {}
    for index in range(20):
        members |= {f"{index:03}.jpg": IMAGE, f"{index:03}.cls": str(index % 2).encode()}
    shard(tmp_path / "part-000.tar", members)
    splits = load(tmp_path)
    assert splits.class_names == ("0", "1")
    assert [len(split.labels) for split in splits[1:4]] == [14, 2, 4]


def test_repeated_keys_of_shards_are_distinct(tmp_path):
    members = {}
    for index in range(10):
        members |= {f"{index:03}.jpg": IMAGE, f"{index:03}.cls": str(index % 2).encode()}
    for i in range(4):
        shard(tmp_path / f"{i}.tar", members)
    config = DataConfig(source="shards", root=str(tmp_path))
    assert len(set(SOURCES["shards"](config, ()).identities.tolist())) == 40


@pytest.mark.fault("C20")
def test_hostile_members_are_neither_read_nor_extracted(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(IMAGE)
    path = tmp_path / "data" / "0.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        add_member(archive, "link.png", type=tarfile.SYMTYPE, linkname=str(secret))
        add_member(archive, "link.cls", b"ant")
        add_member(archive, "hard.png", type=tarfile.LNKTYPE, linkname="../secret.png")
        add_member(archive, "pipe.png", type=tarfile.FIFOTYPE)
        add_member(archive, "device.png", type=tarfile.CHRTYPE)
        add_member(archive, "folder.png", type=tarfile.DIRTYPE)
        add_member(archive, "__MACOSX/._a.png", IMAGE)
        add_member(archive, "../outside.png", IMAGE)
        add_member(archive, "../outside.cls", b"ant")
        add_member(archive, "/absolute.png", IMAGE)
        add_member(archive, "/absolute.cls", b"bee")
    problems: list[str] = []
    passed = SkippedFiles()
    names = [sample.member for sample in read_index(path, problems.append, passed)]
    assert names == ["../outside.png", "/absolute.png"]  # only bytes of this tar are read
    (problem,) = problems
    assert problem.startswith(f"{path}: ")
    assert "link.cls" in problem
    assert (list(passed.files.values()), passed.paths) == ([4], [])
    assert sorted(tmp_path.rglob("*")) == [path.parent, path, secret]


def flip_header(content: bytes) -> bytes:
    """Damage the checksum in the header of the third member."""
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
def test_damaged_shard_raises_with_name(damage, tmp_path):
    path = shard(tmp_path / "0.tar", GOOD)
    change, rows = BROKEN[damage]
    path.write_bytes(change(path.read_bytes()))
    with raises(DataError, path, *rows) as refused:
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
def test_incomplete_sample_raises(members, names, tmp_path):
    shard(tmp_path / "0.tar", members)
    with raises(DataError, tmp_path, *names):
        load(tmp_path)


@pytest.mark.fault("C17")
def test_class_index_outside_list_raises(tmp_path):
    shard(tmp_path / "0.tar", {"a.png": IMAGE, "a.cls": b"0", "b.png": IMAGE, "b.cls": b"7"})
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    with raises(DataError, "0.tar", "b.png", "'7'", "classes.txt"):
        load(tmp_path)
    (tmp_path / "classes.txt").write_text("ant\nant\n")
    with raises(DataError, tmp_path / "classes.txt"):
        load(tmp_path)


@pytest.mark.fault("C21")
def test_compressed_and_misplaced_shards_raise_with_remedy(tmp_path):
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
def test_shard_truncated_later_raises_with_name(tmp_path):
    path = shard(tmp_path / "0.tar", GOOD)
    train = SOURCES["shards"](DataConfig(source="shards", root=str(tmp_path)), ()).train
    path.write_bytes(path.read_bytes()[:600])
    with raises(DataError, "0.tar", "a.png"):
        train.read(0)
    path.unlink()
    with raises(DataError, "0.tar", "a.png"):
        train.read(0)
