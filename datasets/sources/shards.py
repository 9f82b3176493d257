"""List images in tar shards in WebDataset's layout, for reading in any order."""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from deit.config.input_paths import check_root
from deit.config.sections.data import DataConfig
from deit.core.console import progress
from deit.core.errors import DataError, first_line, raise_if_transient
from deit.core.file_reading import read_lines
from deit.datasets.decoding import EXTENSIONS
from deit.datasets.sources.image_stores import ShardStore
from deit.datasets.sources.listing import (
    SPLIT_NAMES,
    Folder,
    Listing,
    OnProblem,
    SkippedFiles,
    SplitListing,
    build_listing,
    find_classes,
    has_classes_or_shards,
    is_hidden,
    raise_problem,
    scan_folder,
    split_folders,
    suffix_of,
)

IMAGE_FIELDS = frozenset(ending.removeprefix(".") for ending in EXTENSIONS)
_COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz)$")
_SAMPLE = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)")
_LABEL_BYTES = 1024
_CLASSES = "classes.txt"


class Sample(NamedTuple):
    """An image in a shard: name of its member, offset and size [bytes], and content of its .cls."""

    member: str
    offset: int
    size: int
    label: str


def list_shards(
    config: DataConfig, classes: tuple[str, ...], on_problem: OnProblem = raise_problem
) -> Listing:
    """List the samples of tar shards: ROOT/train/*.tar, or ROOT/*.tar without splits.

    ROOT/val and ROOT/test are used as with class folders. A sample consists of KEY.jpg (or another
    image suffix) and KEY.cls. KEY.cls contains a class name or an index, from 0, of a line in
    `classes.txt`, next to the shards or in ROOT; without that file the index is the class name.
    The shards are indexed once, so that images can be read in any order without extracting them.

    Calls `on_problem` for damaged or compressed shards, images without label and labels without
    image. Raises NotFoundError or DataError as `list_folder`.
    """
    root = Path(config.root)
    check_root(root, "*.tar")
    skipped = SkippedFiles()
    folders = split_folders(root, skipped, on_problem)
    shards = {
        split: _shards(folder, root, on_problem, skipped) for split, folder in folders.items()
    }
    paths = [path for split in shards.values() for path in split]
    indexed = {}
    for path in progress(paths, total=len(paths), title=f"indexing the shards of {root}"):
        try:
            indexed[path] = list(read_index(path, on_problem, skipped))
        except (OSError, tarfile.TarError, ValueError) as error:
            raise_if_transient(error, path)
            indexed[path] = []
            on_problem(
                f"{path}: not a complete, uncompressed tar file ({first_line(error)}); download it "
                "again or decompress it"
            )
    samples = [sample for path in paths for sample in indexed[path]]
    numbered = all(sample.label.isdecimal() for sample in samples)
    # Names are usually unique over all shards; then images keep their splits after resharding.
    unique = all(
        len({sample.member for path in split for sample in indexed[path]})
        == sum(len(indexed[path]) for path in split)
        for split in shards.values()
    )
    splits = {}
    for split, folder in folders.items():
        names = _class_list(folder.path, root)
        rows = [(path, sample) for path in shards[split] for sample in indexed[path]]
        splits[split] = SplitListing(
            folder.path,
            [_class_name(path, sample, names, numbered, on_problem) for path, sample in rows],
            [sample.member if unique else f"{path.name}/{sample.member}" for path, sample in rows],
        )
    store = ShardStore(
        root,
        [path.relative_to(root).as_posix() for path in paths],
        [sample.member for sample in samples],
        [
            (index, sample.offset, sample.size)
            for index, path in enumerate(paths)
            for sample in indexed[path]
        ],
    )
    return build_listing(store, splits, find_classes(splits, classes, on_problem, skipped), skipped)


def _shards(folder: Folder, root: Path, on_problem: OnProblem, skipped: SkippedFiles) -> list[Path]:
    folders, files = scan_folder(folder, skipped, on_problem)
    skipped.paths += [
        f"{inner.path} (a folder next to the shards)"
        for inner in folders.values()
        if has_classes_or_shards(inner)
    ]
    shards = []
    for name in files:
        if _COMPRESSED.search(name):
            on_problem(
                f"{folder.path / name}: compressed, so its images cannot be read in any order; "
                "decompress it to a .tar file (images are compressed already)"
            )
        elif suffix_of(name) == ".tar":
            shards.append(folder.path / name)
        elif name != _CLASSES:
            skipped.add(name)
    if not shards:
        raise DataError(f"{folder.path}: no shards; expected {folder.path}/*.tar")
    for path in shards:
        split_names = set(re.split(r"[^a-z]+", path.stem.lower())) & set(SPLIT_NAMES)
        if folder.path == root and split_names:
            on_problem(
                f"{path}: its name contains {min(split_names)!r}; move the shards of different "
                f"splits to {root}/train, {root}/val and {root}/test"
            )
    return shards


def read_index(path: Path, on_problem: OnProblem, skipped: SkippedFiles) -> Iterator[Sample]:
    """Yield the samples of a shard in the order of their images.

    Members that are neither image nor class, or not regular files, are counted in `skipped`.
    Raises OSError or tarfile.TarError if the file is damaged, truncated or compressed.
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
                skipped.files["links, sparse files or devices"] += 1
            elif field in IMAGE_FIELDS:
                images.setdefault(key, []).append(member)
            elif field == "cls":
                content = archive.extractfile(member).read(_LABEL_BYTES)
                labels[key] = content.decode("utf-8-sig", errors="replace").strip()
            else:
                skipped.add(member.name)
                others[key] = member.name
        check_end(path, archive.offset)
    for key, members in images.items():
        if len(members) > 1:
            names = ", ".join(member.name for member in members)
            on_problem(
                f"{path}: {len(members)} images for the key {key!r} ({names}); one is expected"
            )
        elif not labels.get(key):
            on_problem(f"{path}: {members[0].name} has no class; expected {key}.cls")
        else:
            yield Sample(members[0].name, members[0].offset_data, members[0].size, labels[key])
    for key in labels.keys() - images.keys():
        other = f"; {others[key]} is not a supported image" if key in others else ""
        on_problem(f"{path}: {key}.cls has no image{other}")


def check_end(path: Path, offset: int) -> None:
    """Raise tarfile.ReadError if a tar file has no end mark (a block of zeros) at `offset`.

    tarfile itself treats a damaged header as the end of the file.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"ends at byte {offset} without an end mark")
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"damaged at byte {offset}")


def _class_list(folder: Path, root: Path) -> list[str] | None:
    """Return the lines of classes.txt next to the shards or in the root; None without one."""
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
            raise DataError(
                f"{path}: should contain one class name per line, without empty or repeated ones"
            )
        return names
    return None


def _class_name(
    path: Path, sample: Sample, names: list[str] | None, numbered: bool, on_problem: OnProblem
) -> str:
    """Return the class name of a sample. numbered: whether all labels are numbers."""
    label = str(int(sample.label)) if numbered else sample.label
    if names is not None and numbered and int(label) < len(names):
        return names[int(label)]
    if names is not None and (numbered or label not in names):
        on_problem(f"{path}: {sample.member} has class {label!r}, which is not in classes.txt")
    elif re.fullmatch(r"-\d+", label):
        on_problem(f"{path}: {sample.member} has class index {label}; indices start at 0")
    return label
