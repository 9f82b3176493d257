"""Lists images in class folders."""

import os
from pathlib import Path

from deit.config.data_section import DataConfig
from deit.core.errors import DataError
from deit.datasets.listing import (
    Folder,
    Listing,
    OnProblem,
    PassedOver,
    SplitListing,
    check_root,
    ending_of,
    find_images,
    instead,
    is_image,
    listed,
    look_into,
    refuse,
    resolve_classes,
    split_folders,
)
from deit.datasets.stores import FolderStore


def list_folder(config: DataConfig, keep: tuple[str, ...], complain: OnProblem = refuse) -> Listing:
    """Images in class folders: ROOT/train/CLASS/*, or ROOT/CLASS/* without splits.

    A validation and a test split are optional. A labelled validation split without a test is the
    final test, as is the custom with ImageNet; selection then uses a part of `train`.
    Classes are sorted by name in code point order. Hidden files and folders are ignored, links are
    followed, other files are counted. Complains of classes that differ between the splits and of an
    empty class; raises DataError on a missing or empty root.
    """
    root = Path(config.root)
    check_root(root)
    passed = PassedOver()
    splits = {
        split: (folder.path, _class_folders(folder, passed, complain))
        for split, folder in split_folders(root, passed, complain).items()
    }
    classes = tuple(splits["train"][1])
    wanted = tuple(name for name in classes if not keep or name in resolve_classes(keep, classes))
    found = {}
    for split, (folder, here) in splits.items():
        for name in wanted:
            if name not in here:
                complain(f"{folder}: no folder for class {name!r}, which the others have")
        for name in here:
            if name not in classes and not keep:
                complain(f"{folder / name}: this class has no training images")
        images: list[str] = []
        for name, inside in here.items():
            others = PassedOver(places=passed.places)
            members = find_images(inside, others, complain)
            if not members and name in wanted:
                complain(f"{inside.path}: no images in this class folder{instead(others)}")
            images += [f"{name}/{path}" for path in members]
            passed.files.update(others.files)
        found[split] = SplitListing(folder, [path.split("/")[0] for path in images], images)
    paths = [
        os.path.relpath(folder / path, root)
        for (folder, _), split in zip(splits.values(), found.values())
        for path in split.names
    ]
    return listed(FolderStore(root, paths), found, wanted, passed)


def _class_folders(folder: Folder, passed: PassedOver, complain: OnProblem) -> dict[str, Folder]:
    """The folders of the classes by name. Raises DataError where there is none."""
    classes, files = look_into(folder, passed, complain)
    if not classes:
        advice = ""
        if any(ending_of(name) == ".tar" for name in files):
            advice = "; tar shards are read by --data.source shards"
        elif any(map(is_image, files)):
            advice = (
                "; images without classes are for `deit predict` and belong elsewhere; if "
                f"{folder.path.name!r} is a class, move all classes into a folder `train`"
            )
        raise DataError(
            f"{folder.path}: no class folders; expected {folder.path}/CLASS/IMAGE{advice}"
        )
    loose = [name for name in files if is_image(name)]
    if loose:
        passed.places.append(
            f"{len(loose)} images outside the class folders ({folder.path / loose[0]})"
        )
    for name in files:
        if not is_image(name):
            passed.add(name)
    return classes
