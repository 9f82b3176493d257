"""Lists what timm's readers find, for reading in any order: folders, tars, Hugging Face, torch."""

import importlib.util
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deit.config import DataConfig
from deit.datasets.listing import (
    Complain,
    Found,
    Listing,
    assemble,
    is_hidden,
    named_splits,
    refuse,
    split_folders,
)
from deit.datasets.stores import FolderStore, ReaderStore, ShardStore
from deit.errors import ConfigError, DataError, EnvironmentFault, reason_of

_STREAMS = {
    "wds": "WebDataset shards are read by --data.source shards",
    "tfds": "save the images as class folders or shards",
    "hfids": "use hfds/NAME",
}


def list_reader(config: DataConfig, keep: tuple[str, ...], complain: Complain = refuse) -> Listing:
    """What a timm reader finds: `folder`, `tar`, `hfds/NAME` or `torch/NAME` in data.reader.

    Labels follow the class names, in code point order, and not the order of the reader. Raises
    ConfigError for an unknown reader or one that only streams, DataError where it fails,
    EnvironmentFault where its library is missing.
    """
    kind, _, name = (config.reader or "").partition("/")
    if kind in _STREAMS:
        raise ConfigError(
            f"data.reader {config.reader}: only streams, so it cannot keep the order that the seed "
            f"decides; {_STREAMS[kind]}"
        )
    if kind not in _READERS:
        raise ConfigError(
            f"data.reader {config.reader}: should be folder, tar, hfds/NAME or torch/NAME"
        )
    try:
        store, found = _READERS[kind](name, config)
    except (ConfigError, DataError, EnvironmentFault):
        raise
    except Exception as error:  # every reader raises its own
        raise DataError(
            f"data.reader {config.reader}: cannot read data.root {config.root} ({reason_of(error)})"
        ) from None
    return assemble(store, found, keep, complain)


def _create(name: str, root: Path, split: str = "train", **options: Any) -> Any:
    from timm.data.readers import create_reader

    return create_reader(name, str(root), split=split, **options)


def _folders(name: str, config: DataConfig) -> tuple[FolderStore, dict[str, Found]]:
    """timm's own rule for folders: the innermost folder is the class."""
    root, found, paths = Path(config.root), {}, []
    if not root.is_dir():
        raise DataError(
            f"data.root {root}: no such folder; expected {root}/train/CLASS/IMAGE (--data.root: "
            "where the images lie)"
        )
    for split, folder in split_folders(root).items():
        reader = _create("", folder)
        names = _names(reader.class_to_idx)
        rows = [
            (path, names[label])
            for path, (_, label) in zip(reader.filenames(), reader.samples)
            if not any(map(is_hidden, path.split("/")))
        ]
        rows.sort(key=lambda row: row[0].split("/"))  # the order of `folder`, not of timm's version
        if any("/" not in path for path, _ in rows):
            raise DataError(f"{folder}: has images outside class folders")
        found[split] = Found(folder, [label for _, label in rows], [path for path, _ in rows])
        paths += [(folder / path).relative_to(root).as_posix() for path, _ in rows]
    return FolderStore(root, paths), found


def _tars(name: str, config: DataConfig) -> tuple[ShardStore, dict[str, Found]]:
    """A tar of class folders: ROOT itself, or ROOT/train.tar with ROOT/val.tar, ROOT/test.tar."""
    root, found, members, ranges = Path(config.root), {}, [], []
    tars = {"train": root} if root.is_file() else _split_tars(root)
    for number, (split, path) in enumerate(tars.items()):
        # Its index may be cached as a pickle beside the data: none is read or written.
        reader = _create("", path, cache_tarinfo=False)
        names = _names(reader.class_name_to_idx)
        rows = [
            (member, outer, names[int(label)])
            for (member, _, outer), label in zip(reader.samples, reader.targets)
            if not any(map(is_hidden, member.name.split("/")))
        ]
        rows.sort(key=lambda row: row[0].name.split("/"))
        labels = [label for *_, label in rows]
        found[split] = Found(path, labels, [member.name for member, *_ in rows])
        members += found[split].names
        ranges += [(number, _offset(member, outer), member.size) for member, outer, _ in rows]
    shards = [path.relative_to(root).as_posix() for path in tars.values()]
    return ShardStore(root, shards, members, ranges), found


def _split_tars(root: Path) -> dict[str, Path]:
    tars = {path.stem: path for path in sorted(root.glob("*.tar"))}
    if "train" not in tars:
        raise DataError(f"data.root {root}: no train.tar; expected one, or the path of a tar file")
    return named_splits(tars)


def _offset(member: tarfile.TarInfo, outer: tarfile.TarInfo | None) -> int:
    """Where a member's bytes begin in the file, also in a tar within the tar."""
    return member.offset_data + (outer.offset_data if outer is not None else 0)


def _hugging_face(name: str, config: DataConfig) -> tuple[ReaderStore, dict[str, Found]]:
    """A data set of the Hub, or a local folder that `load_dataset` takes; cached in data.root."""
    if not Path(name).exists() and not config.download:
        raise DataError(
            f"data.reader {config.reader}: comes from the Hub (or its cache in data.root); allow "
            "that with --data.download"
        )
    # In a checkout, our own folder of that name is importable too: it has no file of its own.
    library = importlib.util.find_spec("datasets")
    if library is None or library.origin is None:
        raise EnvironmentFault(
            f"data.reader {config.reader}: Hugging Face's library is missing; pip install datasets"
        )
    train = _create(f"hfds/{name}", Path(config.root))
    offered = {"train": "train"} | {split: split for split in train.dataset.info.splits or {}}
    parts = named_splits(offered, validation=("validation", "val", "valid"))
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
        found[split] = Found(f"{config.reader} {split}", labels, list(map(str, range(len(reader)))))
    return ReaderStore(config.reader, readers), found


_TORCH = ("cifar10", "cifar100", "mnist", "fashion_mnist", "kmnist", "imagenet")


def _torchvision(name: str, config: DataConfig) -> tuple[ReaderStore, dict[str, Found]]:
    """A data set of torchvision by timm's name for it; its evaluation split is the test."""
    from timm.data import create_dataset

    if name not in _TORCH:
        raise ConfigError(f"data.reader torch/{name}: should be one of {', '.join(_TORCH)}")
    splits, found = {}, {}
    for split, theirs in (("train", "train"), ("test", "validation")):
        data = create_dataset(f"torch/{name}", config.root, split=theirs, download=config.download)
        names = getattr(data, "wnids", data.classes)  # ImageNet: its words are not unique
        splits[split] = data
        found[split] = Found(
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


_READERS: dict[str, Callable[[str, DataConfig], tuple[Any, dict[str, Found]]]] = {
    "folder": _folders,
    "tar": _tars,
    "hfds": _hugging_face,
    "torch": _torchvision,
}
