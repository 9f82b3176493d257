"""Lists images in class folders."""

import os
from pathlib import Path

from deit.config import DataConfig
from deit.datasets.decoding import EXTENSIONS
from deit.datasets.listing import (
    SPLIT_NAMES,
    Complain,
    Found,
    Listing,
    is_hidden,
    known,
    listed,
    refuse,
    split_folders,
)
from deit.datasets.stores import FolderStore
from deit.errors import DataError


def list_folder(config: DataConfig, keep: tuple[str, ...], complain: Complain = refuse) -> Listing:
    """Images in class folders: ROOT/train/CLASS/*, or ROOT/CLASS/* without splits.

    ROOT/val (or validation) and ROOT/test are optional. A labelled `val` without a `test` is the
    final test, as is the custom with ImageNet; selection then uses a part of `train`.
    Classes are sorted by name in code point order. Hidden files and folders are ignored.
    Complains of classes that differ between the splits and of an empty class; raises DataError on
    a missing or empty root.
    """
    root = Path(config.root)
    if not root.is_dir():
        raise DataError(
            f"data.root {root}: no such folder; expected {root}/train/CLASS/IMAGE (--data.root: "
            "where the images lie)"
        )
    folders = split_folders(root)
    classes = _class_folders(folders["train"])
    if folders["train"] is root:
        _check_no_splits(root, classes)
    wanted = tuple(name for name in classes if not keep or name in known(keep, classes))
    found = {}
    for split, folder in folders.items():
        here = _class_folders(folder)
        for name in wanted:
            if name not in here:
                complain(f"{folder}: no folder for class {name!r}, which the others have")
        for name in here:
            if name not in classes and not keep:
                complain(f"{folder / name}: this class has no training images")
        images: list[str] = []
        for name in here:
            members = _images(folder, name, complain)
            if not members and name in wanted:
                complain(f"{folder / name}: no images in this class folder")
            images += members
        found[split] = Found(folder, [path.split("/")[0] for path in images], images)
    paths = [
        os.path.relpath(folder / path, root)
        for folder, split in zip(folders.values(), found.values())
        for path in split.names
    ]
    return listed(FolderStore(root, paths), found, wanted)


def _class_folders(folder: Path) -> tuple[str, ...]:
    names = sorted(
        child.name for child in folder.iterdir() if child.is_dir() and not is_hidden(child.name)
    )
    if not names:
        shards = (
            "; tar shards are read by --data.source shards" if any(folder.glob("*.tar")) else ""
        )
        raise DataError(f"{folder}: no class folders; expected {folder}/CLASS/IMAGE{shards}")
    return tuple(names)


def _check_no_splits(root: Path, classes: tuple[str, ...]) -> None:
    split = next((name for name in classes if name.lower() in SPLIT_NAMES), None)
    if split is not None:
        raise DataError(
            f"data.root {root}: {split!r} looks like a split and not a class; name the folder of "
            f"the training images {root}/train"
        )


def _images(folder: Path, name: str, complain: Complain) -> list[str]:
    """The image files of a class at any depth, relative to the folder, in the order of their
    names."""

    def unreadable(error: OSError) -> None:
        complain(f"{error.filename}: not readable ({error.strerror})")

    found = []
    for place, inner, files in os.walk(folder / name, onerror=unreadable):
        inner[:] = [child for child in inner if not is_hidden(child)]
        relative = os.path.relpath(place, folder)
        found += [
            f"{relative}/{file}"
            for file in files
            if os.path.splitext(file)[1].lower() in EXTENSIONS and not is_hidden(file)
        ]
    return sorted(found, key=lambda path: path.split("/"))
