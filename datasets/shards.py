"""Lists images in tar shards, as WebDataset writes them, for reading in any order."""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from deit.config.data_section import DataConfig
from deit.core.console import progress
from deit.core.errors import DataError, first_line, raise_transient
from deit.core.file_reading import read_lines
from deit.datasets.decoding import EXTENSIONS
from deit.datasets.listing import (
    SPLIT_NAMES,
    Folder,
    Listing,
    OnProblem,
    PassedOver,
    SplitListing,
    assemble,
    check_root,
    ending_of,
    holds_images,
    is_hidden,
    look_into,
    refuse,
    split_folders,
)
from deit.datasets.stores import ShardStore

IMAGE_FIELDS = frozenset(ending.removeprefix(".") for ending in EXTENSIONS)
_COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz)$")
_SAMPLE = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")
_LABEL_BYTES = 1024
_CLASSES = "classes.txt"


class Sample(NamedTuple):
    """An image in a shard: its member's name, where its bytes lie, and what its .cls says."""

    member: str
    offset: int
    size: int
    label: str


def list_shards(config: DataConfig, keep: tuple[str, ...], complain: OnProblem = refuse) -> Listing:
    """Tar shards of samples KEY.jpg (or another ending of images) and KEY.cls: ROOT/train/*.tar, or
    ROOT/*.tar without splits; ROOT/val and ROOT/test as with class folders.

    KEY.cls holds a number (a line of `classes.txt` beside the shards or in ROOT, from 0; without
    that file the number is the name) or a class name. Other fields are counted. The shards are
    indexed once, so that images are read in any order, without extracting anything.
    Complains of damaged and compressed shards, of images without label and labels without image.
    """
    root = Path(config.root)
    check_root(root, "*.tar")
    passed = PassedOver()
    folders = split_folders(root, passed, complain)
    shards = {split: _shards(folder, root, complain, passed) for split, folder in folders.items()}
    paths = [path for split in shards.values() for path in split]
    indexed = {}
    for path in progress(paths, total=len(paths), title=f"indexing the shards of {root}"):
        try:
            indexed[path] = list(read_index(path, complain, passed))
        except (OSError, tarfile.TarError, ValueError) as error:
            raise_transient(error, path)
            indexed[path] = []
            complain(
                f"{path}: not a complete, uncompressed tar file ({first_line(error)}); fetch or "
                "unpack it"
            )
    samples = [sample for path in paths for sample in indexed[path]]
    numbered = all(sample.label.isdecimal() for sample in samples)
    # Names within a shard are usually unique over all of them, and then survive resharding.
    unique = all(
        len({sample.member for path in split for sample in indexed[path]})
        == sum(len(indexed[path]) for path in split)
        for split in shards.values()
    )
    found = {}
    for split, folder in folders.items():
        names = _class_list(folder.path, root)
        mine = [(path, sample) for path in shards[split] for sample in indexed[path]]
        found[split] = SplitListing(
            folder.path,
            [_class_name(path, sample, names, numbered, complain) for path, sample in mine],
            [sample.member if unique else f"{path.name}/{sample.member}" for path, sample in mine],
        )
    store = ShardStore(
        root,
        [path.relative_to(root).as_posix() for path in paths],
        [sample.member for sample in samples],
        [
            (number, sample.offset, sample.size)
            for number, path in enumerate(paths)
            for sample in indexed[path]
        ],
    )
    return assemble(store, found, keep, complain, passed)


def _shards(folder: Folder, root: Path, complain: OnProblem, passed: PassedOver) -> list[Path]:
    folders, files = look_into(folder, passed, complain)
    passed.places += [
        f"{inner.path} (a folder beside the shards)"
        for inner in folders.values()
        if holds_images(inner)
    ]
    shards = []
    for name in files:
        if _COMPRESSED.search(name):
            complain(
                f"{folder.path / name}: compressed, so its images cannot be read in any order; "
                "unpack it to a .tar (the images in it are compressed already)"
            )
        elif ending_of(name) == ".tar":
            shards.append(folder.path / name)
        elif name != _CLASSES:
            passed.add(name)
    if not shards:
        raise DataError(f"{folder.path}: no shards; expected {folder.path}/*.tar")
    for path in shards:
        words = set(re.split(r"[^a-z]+", path.stem.lower())) & set(SPLIT_NAMES)
        if folder.path == root and words:
            complain(
                f"{path}: the name says {min(words)!r}; shards of different splits go to "
                f"{root}/train, {root}/val and {root}/test"
            )
    return shards


def read_index(path: Path, complain: OnProblem, passed: PassedOver) -> Iterator[Sample]:
    """The samples of a shard in the order of their images. Only regular members count, and those
    that are neither image nor class are counted in `passed`.

    Raises OSError or tarfile.TarError where the file is damaged, cut short or compressed.
    """
    images: dict[str, list[tarfile.TarInfo]] = {}
    labels: dict[str, str] = {}
    others: dict[str, str] = {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.isdir() or any(map(is_hidden, member.name.split("/"))):
                continue
            match = _SAMPLE.fullmatch(member.name)
            key, field = (match[1], match[2].lower()) if match else (member.name, "")
            if not member.isreg() or member.issparse():
                passed.files["links, sparse files or devices"] += 1
            elif field in IMAGE_FIELDS:
                images.setdefault(key, []).append(member)
            elif field == "cls":
                content = archive.extractfile(member).read(_LABEL_BYTES)
                labels[key] = content.decode("utf-8-sig", errors="replace").strip()
            else:
                passed.add(member.name)
                others[key] = member.name
        check_end(path, archive.offset)
    for key, members in images.items():
        if len(members) > 1:
            names = ", ".join(member.name for member in members)
            complain(
                f"{path}: {len(members)} images for the key {key!r} ({names}); one is expected"
            )
        elif not labels.get(key):
            complain(f"{path}: {members[0].name} has no class; expected {key}.cls")
        else:
            yield Sample(members[0].name, members[0].offset_data, members[0].size, labels[key])
    for key in labels.keys() - images.keys():
        instead = f"; {others[key]} is none that is read" if key in others else ""
        complain(f"{path}: {key}.cls has no image beside it{instead}")


def check_end(path: Path, offset: int) -> None:
    """Raise tarfile.ReadError where a tar file ends before its end mark: tarfile takes a damaged
    header for the end, and only a block of zeros really is."""
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"ends at byte {offset} without an end mark")
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"damaged at byte {offset}")


def _class_list(folder: Path, root: Path) -> list[str] | None:
    """The lines of classes.txt beside the shards or in the root."""
    for path in (folder / _CLASSES, root / _CLASSES):
        try:
            names = read_lines(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not readable ({first_line(error)})") from None
        while names and not names[-1]:
            names.pop()
        if "" in names or len(set(names)) < len(names):
            raise DataError(f"{path}: should hold one class name a line, none empty or twice")
        return names
    return None


def _class_name(
    path: Path, sample: Sample, names: list[str] | None, numbered: bool, complain: OnProblem
) -> str:
    """The class of a sample by name; numbered: every label of the data is a number."""
    label = str(int(sample.label)) if numbered else sample.label
    if names is not None and numbered and int(label) < len(names):
        return names[int(label)]
    if names is not None and (numbered or label not in names):
        complain(f"{path}: {sample.member} is of class {label!r}, not in classes.txt")
    elif re.fullmatch(r"-\d+", label):
        complain(f"{path}: {sample.member} has the class number {label}; they count from 0")
    return label
