"""List the images of a dataset that stay encoded: class, split and location of each."""

import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from deit.core.errors import (
    DataError,
    NotFoundError,
    bytes_of,
    counted,
    did_you_mean,
    in_line,
    name_problem,
    raise_transient,
)
from deit.datasets.decoding import EXTENSIONS
from deit.datasets.images import ImageStore

T = TypeVar("Part")
OnProblem = Callable[[str], None]
"""Handles a problem of the data: raises DataError, or collects the message and continues."""

SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names of split folders, case-insensitive; the keywords of Hugging Face's datasets."""

SPLIT_NAMES = tuple(name for names in SPLITS.values() for name in names)

_SYSTEM_FILES = frozenset(
    (
        *("__macosx", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
        *("@eadir", "$recycle.bin", "system volume information", "lost+found"),
    )
)


@dataclass
class SkippedFiles:
    """What a dataset contains that is not read, for messages.

    files: their number by suffix. paths: folders and the like, each with the reason.
    """

    files: Counter[str] = field(default_factory=Counter)
    paths: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count a file by its suffix."""
        self.files[suffix_of(name) or "other files"] += 1

    def notes(self, *, most: int | None = 4) -> tuple[str, ...]:
        """Return a line for all files and one for each path, at most `most` of them."""
        notes = [f"skipped: {counted(self.files)}"] if self.files else []
        notes += [f"not read: {path}" for path in self.paths[:most]]
        more = 0 if most is None else len(self.paths) - most
        return tuple([*notes, f"not read: {more} more"] if more > 0 else notes)


class Listing(NamedTuple):
    """The images of a store.

    labels: int64 [positions], an index into the class names; -1 for a class that is not used.
    identities: int64 [positions] in [0, 2**32), a hash of the image's name, so that an image stays
    in its split when others are added or removed.
    splits: int64 positions of `train`, and of `validation` and `test` if they exist.
    skipped: what is not read.
    """

    class_names: tuple[str, ...]
    store: ImageStore
    labels: Tensor
    identities: Tensor
    splits: dict[str, Tensor]
    skipped: SkippedFiles


class SplitListing(NamedTuple):
    """The images of one split, in the order of the store.

    origin: of the images, for messages. classes: the class name of each image. names: the name of
    each image within the split.
    """

    origin: Path | str
    classes: Sequence[str]
    names: Sequence[str]


def raise_problem(problem: str) -> None:
    """Raise a problem as DataError (an OnProblem)."""
    raise DataError(problem)


def _ignore_problem(problem: str) -> None:
    """Ignore a problem, in folders that are possibly not part of the data."""


def check_root(root: Path, layout: str = "CLASS/IMAGE") -> None:
    """Raise NotFoundError if the root folder is missing. layout: expected within a split."""
    if not root.is_dir():
        raise NotFoundError(
            f"data.root {root}: no such folder; expected {root}/train/{layout} (set the location "
            "of the images with --data.root)"
        )


def is_hidden(name: str) -> bool:
    """Return whether a file or folder belongs to a system or program and not to the data.

    Such as .git, ._a.png, .ipynb_checkpoints, __MACOSX, Thumbs.db.
    """
    hidden = name.startswith(".") or name.lower() in _SYSTEM_FILES
    return hidden and name not in (".", "..")


def suffix_of(name: str) -> str:
    """Return the suffix of a file name, in lower case with its dot, or an empty string.

    A version number or a longer text after a dot is not a suffix.
    """
    suffix = os.path.splitext(name)[1].lower()
    return suffix if re.fullmatch(r"\.(?=.*[a-z])[a-z0-9_]{1,10}", suffix) else ""


def is_image(name: str) -> bool:
    """Return whether a file name has the suffix of an image file."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


class Folder(NamedTuple):
    """A folder, with itself and its parents as (device, inode), to detect cyclic links."""

    path: Path
    ancestors: frozenset[tuple[int, int]]


def open_folder(path: Path) -> Folder:
    """Return a Folder for a path. Raises DataError if it cannot be read."""
    try:
        stats = [os.stat(folder) for folder in (path, *path.resolve().parents)]
    except OSError as error:
        raise_transient(error, path)
        raise DataError(f"{path}: not readable ({error.strerror})") from None
    return Folder(path, frozenset((stat.st_dev, stat.st_ino) for stat in stats))


def scan_folder(
    folder: Folder, skipped: SkippedFiles, on_problem: OnProblem = raise_problem
) -> tuple[dict[str, Folder], list[str]]:
    """Return the subfolders of a folder by name, and the names of its files, both sorted.

    Hidden ones are omitted. Links are followed, as in timm and torchvision; a link to a parent
    folder is added to `skipped`. Calls `on_problem` for what cannot be read, and for a broken link
    without a suffix. A broken link with a suffix counts as a file, so that reading it fails.
    """
    folders: dict[str, Folder] = {}
    files: list[str] = []
    try:
        with os.scandir(folder.path) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        raise_transient(error, folder.path)
        on_problem(f"{folder.path}: not readable ({error.strerror})")
        return folders, files
    for entry in entries:
        if is_hidden(entry.name):
            continue
        try:
            if entry.is_dir():
                stat = entry.stat()
                inode = (stat.st_dev, stat.st_ino)
                if entry.is_symlink() and inode in folder.ancestors:
                    skipped.paths.append(f"{entry.path} (a link to one of its parent folders)")
                else:
                    ancestors = folder.ancestors | {inode}
                    folders[entry.name] = Folder(folder.path / entry.name, ancestors)
            elif entry.is_file():
                files.append(entry.name)
            elif os.path.exists(entry.path):
                on_problem(f"{entry.path}: neither a file nor a folder; remove it")
            elif suffix_of(entry.name):
                files.append(entry.name)
            else:
                target = os.readlink(entry.path)
                on_problem(f"{entry.path}: a broken link (to {target}); repair or remove it")
        except OSError as error:
            raise_transient(error, entry.path)
            on_problem(f"{entry.path}: not readable ({error.strerror})")
    return folders, files


def find_images(
    folder: Folder, skipped: SkippedFiles, on_problem: OnProblem = raise_problem
) -> list[str]:
    """Return the image files in a folder at any depth, as sorted paths relative to it.

    Other files are counted in `skipped`. Calls `on_problem` as `scan_folder` does.
    """
    images: list[str] = []
    pending = [("", folder)]
    while pending:
        prefix, current = pending.pop()
        folders, files = scan_folder(current, skipped, on_problem)
        pending += [(f"{prefix}{name}/", inner) for name, inner in folders.items()]
        for name in files:
            if is_image(name):
                images.append(f"{prefix}{name}")
            else:
                skipped.add(name)
    return sorted(images, key=lambda path: path.split("/"))


def split_folders(
    root: Path, skipped: SkippedFiles, on_problem: OnProblem = raise_problem
) -> dict[str, Folder]:
    """Return the folders of the splits by their names in SPLITS, or ROOT as `train`.

    Without a test split, the validation split is the test split, as is usual for ImageNet. Other
    folders with images of classes or shards are added to `skipped`. Raises DataError if two
    folders are the same split, or if there are splits but no training split.
    """
    root_folder = open_folder(root)
    folders, files = scan_folder(root_folder, SkippedFiles(), _ignore_problem)
    if not any(name.lower() in SPLITS["train"] for name in folders):
        split = next((name for name in folders if name.lower() in SPLIT_NAMES), None)
        if split is not None:
            raise DataError(
                f"data.root {root}: {split!r} looks like a split, not a class; rename the folder "
                f"of the training images to {root}/train"
            )
        return {"train": root_folder}
    folders, files = scan_folder(root_folder, skipped, on_problem)
    splits = named_splits(folders, origin=f"data.root {root}")
    read = {folder.path for folder in splits.values()}
    skipped.paths += [
        f"{folder.path} (images outside the splits; splits are named "
        f"{', '.join(names[0] for names in SPLITS.values())})"
        for folder in folders.values()
        if folder.path not in read and contains_images(folder)
    ]
    outside = [name for name in files if is_image(name) or suffix_of(name) == ".tar"]
    if outside:
        skipped.paths.append(f"{len(outside)} files outside the splits ({root / outside[0]})")
    return splits


def contains_images(folder: Folder) -> bool:
    """Return whether a folder contains shards (tar files) or classes (subfolders with images)."""
    folders, files = scan_folder(folder, SkippedFiles(), _ignore_problem)
    return any(suffix_of(name) == ".tar" for name in files) or any(
        is_image(name)
        for inner in folders.values()
        for name in scan_folder(inner, SkippedFiles(), _ignore_problem)[1]
    )


def named_splits(items: dict[str, T], *, origin: str) -> dict[str, T]:
    """Select the items named like `train`, `validation` and `test` (see SPLITS).

    Without a test split, the validation split is the test split. origin: for the message. Raises
    DataError if two items are the same split.
    """
    splits: dict[str, T] = {}
    for split, aliases in SPLITS.items():
        names = [name for name in items if name.lower() in aliases]
        if len(names) > 1:
            raise DataError(
                f"{origin}: {' and '.join(map(repr, names))} are both names of the {split} split; "
                "rename or move all but one"
            )
        if names:
            splits[split] = items[names[0]]
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")
    return splits


def resolve_classes(
    classes: tuple[str, ...], names: Sequence[str], *, field: str = "data.classes"
) -> set[str]:
    """Return the set of classes. Raises DataError, with the field, if the data lacks one.

    names: of all classes in the data.
    """
    for name in classes:
        if name not in names:
            raise DataError(f"{field}: no class {name!r} in the data{did_you_mean(name, names)}")
    return set(classes)


def assemble(
    store: ImageStore,
    splits: dict[str, SplitListing],
    classes: tuple[str, ...],
    on_problem: OnProblem,
    skipped: SkippedFiles,
) -> Listing:
    """Return the listing of all splits, with the classes of the training images, sorted by name.

    classes: names to use; empty for all. Calls `on_problem` for classes that differ between the
    splits. Raises DataError if there are no training images or a class is unknown.
    """
    names = sorted(set(splits["train"].classes))
    if not names:
        raise DataError(f"{splits['train'].origin}: no images{skipped_note(skipped)}")
    selected = resolve_classes(classes, names) if classes else set(names)
    for split in splits.values():
        present = set(split.classes)
        for name in sorted(selected - present):
            on_problem(f"{split.origin}: no images of class {name!r}, which other splits have")
        for name in sorted(present - set(names)) if not classes else ():
            on_problem(f"{split.origin}: class {name!r} has no training images")
    return build_listing(store, splits, tuple(name for name in names if name in selected), skipped)


def skipped_note(skipped: SkippedFiles) -> str:
    """Return the number of skipped files, as the end of a message about missing images."""
    return f" (skipped: {counted(skipped.files)})" if skipped.files else ""


def build_listing(
    store: ImageStore,
    split_listings: dict[str, SplitListing],
    class_names: tuple[str, ...],
    skipped: SkippedFiles,
) -> Listing:
    """Return the listing for known classes.

    Raises DataError for a class name that the files of a run cannot store.
    """
    _check_class_names(split_listings, class_names)
    label_of = {name: label for label, name in enumerate(class_names)}
    labels = torch.tensor(
        [label_of.get(name, -1) for split in split_listings.values() for name in split.classes]
    )
    identities = torch.tensor(
        [zlib.crc32(bytes_of(name)) for split in split_listings.values() for name in split.names]
    )
    splits, start = {}, 0
    for name, split in split_listings.items():
        rows = torch.arange(start, start + len(split.classes))
        splits[name] = rows[labels[rows] >= 0]
        start += len(split.classes)
    return Listing(class_names, store, labels, identities, splits, skipped)


def _check_class_names(
    split_listings: dict[str, SplitListing], class_names: tuple[str, ...]
) -> None:
    """Raise DataError for class names that a configuration or a table cannot store."""
    for name in class_names:
        if problem := name_problem(name):
            origin = split_listings["train"].origin
            raise DataError(f"{origin}: class '{in_line(name)}': its name {problem}; rename it")
