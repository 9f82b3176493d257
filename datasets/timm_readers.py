"""Lists what timm's readers find, for reading in any order: folders, tars, Hugging Face, torch."""

import importlib.util
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deit.config.data_section import DataConfig
from deit.core.errors import ConfigError, DataError, SystemFault, first_line, raise_transient
from deit.datasets.listing import (
    Listing,
    OnProblem,
    PassedOver,
    SplitListing,
    assemble,
    check_root,
    ending_of,
    find_images,
    is_hidden,
    is_image,
    look_into,
    named_splits,
    opened,
    refuse,
    split_folders,
)
from deit.datasets.shards import check_end
from deit.datasets.stores import FolderStore, ReaderStore, ShardStore

_STREAMS = {
    "wds": "WebDataset shards are read by --data.source shards",
    "tfds": "save the images as class folders and read those by --data.source folder",
    "hfids": "use hfds/{name}",
}


def list_reader(config: DataConfig, keep: tuple[str, ...], complain: OnProblem = refuse) -> Listing:
    """What a timm reader finds: `folder`, `tar`, `hfds/NAME` or `torch/NAME` in data.reader.

    Labels follow the class names, in code point order, and not the order of the reader. The classes
    of folders and tars follow timm's rule; what is an image, hidden, linked or a split is decided
    as for the other sources. Raises ConfigError for an unknown reader or one that only streams,
    DataError where it fails, SystemFault where its library is missing.
    """
    kind, _, name = (config.reader or "").partition("/")
    if kind in _STREAMS:
        raise ConfigError(
            f"data.reader {config.reader}: only streams, so it cannot keep the order that the seed "
            f"decides; {_STREAMS[kind].format(name=name)}"
        )
    if kind not in _READERS:
        raise ConfigError(
            f"data.reader {config.reader}: should be folder, tar, hfds/NAME or torch/NAME"
        )
    passed = PassedOver()
    try:
        store, found = _READERS[kind](name, config, passed, complain)
    except (ConfigError, DataError, SystemFault):
        raise
    except (Exception, SystemExit) as error:  # every reader raises its own
        raise_transient(error, f"data.reader {config.reader}")
        raise DataError(
            f"data.reader {config.reader}: cannot read data.root {config.root} "
            f"({first_line(error)})"
        ) from None
    return assemble(store, found, keep, complain, passed)


_Listed = tuple[Any, dict[str, SplitListing]]


def _create(name: str, root: Path, split: str = "train") -> Any:
    from timm.data.readers import create_reader

    return create_reader(name, str(root), split=split)


def _folders(name: str, config: DataConfig, passed: PassedOver, complain: OnProblem) -> _Listed:
    """timm's rule for folders: the innermost folder is the class."""
    root, found, paths = Path(config.root), {}, []
    check_root(root)
    for split, folder in split_folders(root, passed, complain).items():
        names = find_images(folder, passed, complain)
        if any("/" not in name for name in names):
            raise DataError(f"{folder.path}: has images outside class folders")
        found[split] = SplitListing(folder.path, [name.split("/")[-2] for name in names], names)
        paths += [(folder.path / name).relative_to(root).as_posix() for name in names]
    return FolderStore(root, paths), found


def _tars(name: str, config: DataConfig, passed: PassedOver, complain: OnProblem) -> _Listed:
    """A tar of class folders: ROOT itself, or ROOT/train.tar with ROOT/val.tar, ROOT/test.tar.

    timm's rule: the innermost folder is the class, or in a tar within the tar, without folders, the
    name of that one.
    """
    root, found, members, ranges = Path(config.root), {}, [], []
    tars = {"train": root} if root.is_file() else _split_tars(root, passed, complain)
    for number, (split, path) in enumerate(tars.items()):
        rows = []
        for member, outer in _members(path):
            *parts, file = member.name.split("/")
            if outer is not None:
                parts = [*os.path.splitext(outer.name)[0].split("/"), *parts]
            if any(map(is_hidden, [*parts, file])):
                continue
            if not is_image(member.name):
                passed.add(member.name)
                continue
            label = next((part for part in reversed(parts) if part not in ("", ".")), None)
            if label is None:
                raise DataError(f"{path}: {member.name} is an image outside class folders")
            rows.append((member, outer, label))
        rows.sort(key=lambda row: row[0].name.split("/"))
        labels = [label for *_, label in rows]
        found[split] = SplitListing(path, labels, [member.name for member, *_ in rows])
        members += found[split].names
        ranges += [(number, _offset(member, outer), member.size) for member, outer, _ in rows]
    shards = [path.relative_to(root).as_posix() for path in tars.values()]
    return ShardStore(root, shards, members, ranges), found


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarInfo | None]]:
    """The regular members of an uncompressed tar file, each with the tar in it that holds it."""
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if not member.isreg() or member.issparse():
                continue
            if ending_of(member.name) != ".tar":
                yield member, None
                continue
            with tarfile.open(fileobj=archive.extractfile(member), mode="r:") as inner:
                for one in inner:
                    if one.isreg() and not one.issparse():
                        yield one, member
        check_end(path, archive.offset)


def _split_tars(root: Path, passed: PassedOver, complain: OnProblem) -> dict[str, Path]:
    _, files = look_into(opened(root), passed, complain)
    tars = {Path(name).stem: root / name for name in files if ending_of(name) == ".tar"}
    splits = named_splits(tars, place=f"data.root {root}")
    if "train" not in splits:
        raise DataError(f"data.root {root}: no train.tar; expected one, or the path of a tar file")
    others = [path for path in tars.values() if path not in splits.values()]
    passed.places += [f"{path} (a tar beside the splits)" for path in others]
    return splits


def _offset(member: tarfile.TarInfo, outer: tarfile.TarInfo | None) -> int:
    """Where a member's bytes begin in the file, also in a tar within the tar."""
    return member.offset_data + (outer.offset_data if outer is not None else 0)


def _hugging_face(
    name: str, config: DataConfig, passed: PassedOver, complain: OnProblem
) -> _Listed:
    """A data set of the Hub, or a local folder that `load_dataset` takes; cached in data.root."""
    if not Path(name).exists() and not config.download:
        raise DataError(
            f"data.reader {config.reader}: comes from the Hub (or its cache in data.root); allow "
            "that with --data.download"
        )
    # In a checkout, our own folder of that name is importable too: it has no file of its own.
    library = importlib.util.find_spec("datasets")
    if library is None or library.origin is None:
        raise SystemFault(
            f"data.reader {config.reader}: Hugging Face's library is missing; pip install datasets"
        )
    train = _create(f"hfds/{name}", Path(config.root))
    offered = {"train": "train"} | {split: split for split in train.dataset.info.splits or {}}
    parts = named_splits(offered, place=f"data.reader {config.reader}")
    others = sorted(set(offered.values()) - set(parts.values()))
    passed.places += [f"{config.reader} {split} (beside the splits)" for split in others]
    readers = {
        split: train if split == "train" else _create(f"hfds/{name}", Path(config.root), theirs)
        for split, theirs in parts.items()
    }
    found = {}
    for split, reader in readers.items():
        names = _names(reader.class_to_idx)
        column = reader.dataset.remove_columns(reader.image_key)[reader.label_key]
        labels = [
            _class(label, names, f"{config.reader} {split}", n) for n, label in enumerate(column)
        ]
        found[split] = SplitListing(
            f"{config.reader} {split}", labels, list(map(str, range(len(reader))))
        )
    return ReaderStore(config.reader, readers), found


_TORCH = ("cifar10", "cifar100", "mnist", "fashion_mnist", "kmnist", "imagenet")


def _torchvision(name: str, config: DataConfig, passed: PassedOver, complain: OnProblem) -> _Listed:
    """A data set of torchvision by timm's name for it; its evaluation split is the test."""
    from timm.data import create_dataset

    if name not in _TORCH:
        raise ConfigError(f"data.reader torch/{name}: should be one of {', '.join(_TORCH)}")
    splits, found = {}, {}
    for split, theirs in (("train", "train"), ("test", "validation")):
        data = create_dataset(f"torch/{name}", config.root, split=theirs, download=config.download)
        names = getattr(data, "wnids", data.classes)  # ImageNet: its words are not unique
        splits[split] = data
        found[split] = SplitListing(
            f"{config.reader} {split}",
            [
                _class(int(label), dict(enumerate(names)), f"{config.reader} {split}", number)
                for number, label in enumerate(data.targets)
            ],
            list(map(str, range(len(data)))),
        )
    return ReaderStore(config.reader, splits), found


def _class(label: Any, names: dict[int, str], where: str, number: int) -> str:
    """The class of an image; a text is its own name. Raises DataError at a number without one."""
    if isinstance(label, str):
        return label
    if label not in names:
        raise DataError(f"{where}: image {number} has the label {label}, of {len(names)} classes")
    return names[label]


def _names(class_to_idx: dict[str, int]) -> dict[int, str]:
    return {index: name for name, index in class_to_idx.items()}


_READERS: dict[str, Callable[[str, DataConfig, PassedOver, OnProblem], _Listed]] = {
    "folder": _folders,
    "tar": _tars,
    "hfds": _hugging_face,
    "torch": _torchvision,
}
