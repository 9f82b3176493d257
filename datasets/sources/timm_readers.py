"""List the images of timm's readers (folder, tar, hfds, torch), for reading in any order."""

import importlib.util
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deit.config.input_paths import check_root
from deit.config.sections.data import DataConfig
from deit.core.errors import ConfigError, DataError, SystemFault, first_line, raise_if_transient
from deit.datasets.sources.image_stores import FolderStore, ReaderStore, ShardStore
from deit.datasets.sources.listing import (
    Listing,
    OnProblem,
    SkippedFiles,
    SplitListing,
    build_listing,
    find_classes,
    find_images,
    is_hidden,
    is_image,
    named_splits,
    open_folder,
    raise_problem,
    scan_folder,
    split_folders,
    suffix_of,
)
from deit.datasets.sources.shards import check_end

_STREAMS = {
    "wds": "for WebDataset shards use --data.source shards",
    "tfds": "save the images as class folders and use --data.source folder",
    "hfids": "use hfds/{name}",
}


def list_reader(
    config: DataConfig, classes: tuple[str, ...], on_problem: OnProblem = raise_problem
) -> Listing:
    """List the images of a timm reader: data.reader is folder, tar, hfds/NAME or torch/NAME.

    Labels are assigned by class name in code point order, not in the order of the reader. Classes
    of folders and tars follow timm's rules. Images, hidden files, links and splits are recognized
    as in the other sources.

    classes: names to use; empty for all. Calls `on_problem` as `list_folder`. Raises ConfigError
    for an unknown reader or one that only streams, DataError if it fails, SystemFault if its
    library is missing.
    """
    kind, _, name = (config.reader or "").partition("/")
    if kind in _STREAMS:
        raise ConfigError(
            f"data.reader {config.reader}: only streams, so it cannot read images in the order "
            f"given by the seed; {_STREAMS[kind].format(name=name)}"
        )
    if kind not in _READERS:
        raise ConfigError(
            f"data.reader {config.reader}: should be folder, tar, hfds/NAME or torch/NAME"
        )
    skipped = SkippedFiles()
    try:
        store, splits = _READERS[kind](name, config, skipped, on_problem)
    except (ConfigError, DataError, SystemFault):
        raise
    except (Exception, SystemExit) as error:  # third-party readers raise errors of any type
        raise_if_transient(error, f"data.reader {config.reader}")
        raise DataError(
            f"data.reader {config.reader}: cannot read data.root {config.root} "
            f"({first_line(error)})"
        ) from None
    return build_listing(store, splits, find_classes(splits, classes, on_problem, skipped), skipped)


_Listed = tuple[Any, dict[str, SplitListing]]


def _create(name: str, root: Path, split: str = "train") -> Any:
    from timm.data.readers import create_reader

    return create_reader(name, str(root), split=split)


def _folders(
    name: str, config: DataConfig, skipped: SkippedFiles, on_problem: OnProblem
) -> _Listed:
    """List class folders by timm's rule: the innermost folder is the class."""
    root, splits, paths = Path(config.root), {}, []
    check_root(root)
    for split, folder in split_folders(root, skipped, on_problem).items():
        names = find_images(folder, skipped, on_problem)
        if any("/" not in name for name in names):
            raise DataError(f"{folder.path}: contains images outside class folders")
        splits[split] = SplitListing(folder.path, [name.split("/")[-2] for name in names], names)
        paths += [(folder.path / name).relative_to(root).as_posix() for name in names]
    return FolderStore(root, paths), splits


def _tars(name: str, config: DataConfig, skipped: SkippedFiles, on_problem: OnProblem) -> _Listed:
    """List a tar of class folders: ROOT itself, or ROOT/train.tar, ROOT/val.tar, ROOT/test.tar.

    By timm's rule the class is the innermost folder or, in a nested tar without folders, the name
    of that tar.
    """
    root, splits, members, ranges = Path(config.root), {}, [], []
    tars = {"train": root} if root.is_file() else _split_tars(root, skipped, on_problem)
    for index, (split, path) in enumerate(tars.items()):
        rows = []
        for member, outer in _members(path):
            *parts, file = member.name.split("/")
            if outer is not None:
                parts = [*os.path.splitext(outer.name)[0].split("/"), *parts]
            if any(map(is_hidden, [*parts, file])):
                continue
            if not is_image(member.name):
                skipped.add(member.name)
                continue
            label = next((part for part in reversed(parts) if part not in ("", ".")), None)
            if label is None:
                raise DataError(f"{path}: {member.name} is an image outside class folders")
            rows.append((member, outer, label))
        rows.sort(key=lambda row: row[0].name.split("/"))
        labels = [label for *_, label in rows]
        splits[split] = SplitListing(path, labels, [member.name for member, *_ in rows])
        members += splits[split].image_names
        ranges += [(index, _offset(member, outer), member.size) for member, outer, _ in rows]
    shards = [path.relative_to(root).as_posix() for path in tars.values()]
    return ShardStore(root, shards, members, ranges), splits


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarInfo | None]]:
    """Yield the regular members of an uncompressed tar file, each with its nested tar or None."""
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if not member.isreg() or member.issparse():
                continue
            if suffix_of(member.name) != ".tar":
                yield member, None
                continue
            with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                for inner_member in inner:
                    if inner_member.isreg() and not inner_member.issparse():
                        yield inner_member, member
        check_end(path, archive.offset)


def _split_tars(root: Path, skipped: SkippedFiles, on_problem: OnProblem) -> dict[str, Path]:
    _, files = scan_folder(open_folder(root), skipped, on_problem)
    tars = {Path(name).stem: root / name for name in files if suffix_of(name) == ".tar"}
    splits = named_splits(tars, origin=f"data.root {root}")
    if "train" not in splits:
        raise DataError(
            f"data.root {root}: no train.tar; expected a folder with one, or the path of a tar file"
        )
    unused = [path for path in tars.values() if path not in splits.values()]
    skipped.paths += [f"{path} (a tar outside the splits)" for path in unused]
    return splits


def _offset(member: tarfile.TarInfo, outer: tarfile.TarInfo | None) -> int:
    """Return the offset of a member's bytes in the file, also for a nested tar."""
    return member.offset_data + (outer.offset_data if outer is not None else 0)


def _hugging_face(
    name: str, config: DataConfig, skipped: SkippedFiles, on_problem: OnProblem
) -> _Listed:
    """List a dataset of the Hub, or a local folder for `load_dataset`; cached in data.root."""
    if not Path(name).exists() and not config.download:
        raise DataError(
            f"data.reader {config.reader}: is loaded from the Hub (or its cache in data.root); "
            "allow that with --data.download"
        )
    # In a checkout, our folder `datasets` is importable too, but has no file as origin.
    library = importlib.util.find_spec("datasets")
    if library is None or library.origin is None:
        raise SystemFault(
            f"data.reader {config.reader}: the library datasets is missing; pip install datasets"
        )
    train = _create(f"hfds/{name}", Path(config.root))
    available = {"train": "train"} | {split: split for split in train.dataset.info.splits or {}}
    parts = named_splits(available, origin=f"data.reader {config.reader}")
    unused = sorted(set(available.values()) - set(parts.values()))
    skipped.paths += [f"{config.reader} {split} (not a split in use)" for split in unused]
    readers = {
        split: train
        if split == "train"
        else _create(f"hfds/{name}", Path(config.root), reader_split)
        for split, reader_split in parts.items()
    }
    listings = {}
    for split, reader in readers.items():
        names = _class_names(reader.class_to_idx)
        column = reader.dataset.remove_columns(reader.image_key)[reader.label_key]
        labels = [
            _class_name(label, names, f"{config.reader} {split}", n)
            for n, label in enumerate(column)
        ]
        listings[split] = SplitListing(
            f"{config.reader} {split}", labels, list(map(str, range(len(reader))))
        )
    return ReaderStore(config.reader, readers), listings


_TORCH = ("cifar10", "cifar100", "mnist", "fashion_mnist", "kmnist", "imagenet")


def _torchvision(
    name: str, config: DataConfig, skipped: SkippedFiles, on_problem: OnProblem
) -> _Listed:
    """List a torchvision dataset by timm's name; its validation split is the test split."""
    from timm.data import create_dataset

    if name not in _TORCH:
        raise ConfigError(f"data.reader torch/{name}: should be one of {', '.join(_TORCH)}")
    splits, listings = {}, {}
    for split, reader_split in (("train", "train"), ("test", "validation")):
        data = create_dataset(
            f"torch/{name}", config.root, split=reader_split, download=config.download
        )
        names = getattr(data, "wnids", data.classes)  # ImageNet's class names are not unique
        splits[split] = data
        listings[split] = SplitListing(
            f"{config.reader} {split}",
            [
                _class_name(int(label), dict(enumerate(names)), f"{config.reader} {split}", index)
                for index, label in enumerate(data.targets)
            ],
            list(map(str, range(len(data)))),
        )
    return ReaderStore(config.reader, splits), listings


def _class_name(label: Any, names: dict[int, str], origin: str, index: int) -> str:
    """Return the class name of a label, which can be a name. Raises DataError if it is unknown."""
    if isinstance(label, str):
        return label
    if label not in names:
        raise DataError(
            f"{origin}: image {index} has label {label}, but there are {len(names)} classes"
        )
    return names[label]


def _class_names(class_to_idx: dict[str, int]) -> dict[int, str]:
    return {index: name for name, index in class_to_idx.items()}


_READERS: dict[str, Callable[[str, DataConfig, SkippedFiles, OnProblem], _Listed]] = {
    "folder": _folders,
    "tar": _tars,
    "hfds": _hugging_face,
    "torch": _torchvision,
}
