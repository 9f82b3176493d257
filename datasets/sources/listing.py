"""List the encoded images of a dataset: class, split and location of each."""

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
    did_you_mean,
    filename_bytes,
    format_counts,
    name_problem,
    raise_if_transient,
    single_line,
)
from deit.datasets.decoding import EXTENSIONS
from deit.datasets.images import ImageStore

T = TypeVar("T")
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
    """Files and folders of a dataset that are not read, collected for messages.

    files: number of files by suffix. paths: folders and links, each with the reason.
    """

    files: Counter[str] = field(default_factory=Counter)
    paths: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count a file by its suffix."""
        self.files[suffix_of(name) or "other files"] += 1

    def notes(self, *, max_paths: int | None = 4) -> tuple[str, ...]:
        """Return a line for all files and one for each of the first paths; None: for all paths."""
        notes = [f"skipped: {format_counts(self.files)}"] if self.files else []
        notes += [f"not read: {path}" for path in self.paths[:max_paths]]
        more = 0 if max_paths is None else len(self.paths) - max_paths
        return tuple([*notes, f"not read: {more} more"] if more > 0 else notes)


class Listing(NamedTuple):
    """The images of a store.

    labels: int64 [images], an index into the class names; -1 for a class that is not used.
    name_hashes: int64 [images] in [0, 2**32), of the names of the images. Images are split by
    them, so that an image stays in its split when others are added or removed.
    splits: the indices of the images in `train`, and in `validation` and `test` if they exist (see
    `named_splits`), int64.
    """

    class_names: tuple[str, ...]
    store: ImageStore
    labels: Tensor
    name_hashes: Tensor
    splits: dict[str, Tensor]
    skipped: SkippedFiles


class SplitListing(NamedTuple):
    """The images of one split, in the order of the store.

    origin: names the split in messages, such as its folder. image_classes: the class name of each
    image. image_names: the name of each image within the split.
    """

    origin: Path | str
    image_classes: Sequence[str]
    image_names: Sequence[str]


def raise_problem(problem: str) -> None:
    """Raise DataError: the OnProblem that stops at the first problem."""
    raise DataError(problem)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder belongs to a system or program and not to the data.

    Such as .git, ._a.png, .ipynb_checkpoints, __MACOSX, Thumbs.db. The parts `.` and `..` of paths
    in archives are not hidden.
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
        raise_if_transient(error, path)
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
        raise_if_transient(error, folder.path)
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
            raise_if_transient(error, entry.path)
            on_problem(f"{entry.path}: not readable ({error.strerror})")
    return folders, files


def find_images(
    folder: Folder, skipped: SkippedFiles, on_problem: OnProblem = raise_problem
) -> list[str]:
    """Return the image files in a folder at any depth, as sorted paths relative to it.

    Other files are added to `skipped`. Calls `on_problem` as `scan_folder` does.
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
    """Return the folders of the splits as `named_splits`, or {"train": ROOT} without splits.

    Other folders with class folders or shards are added to `skipped`. Raises DataError if two
    folders are the same split, or if there are splits but no training split.
    """
    root_folder = open_folder(root)
    problems: list[str] = []
    skipped_in_root = SkippedFiles()
    folders, files = scan_folder(root_folder, skipped_in_root, problems.append)
    if not any(name.lower() in SPLITS["train"] for name in folders):
        split = next((name for name in folders if name.lower() in SPLIT_NAMES), None)
        if split is not None:
            raise DataError(
                f"data.root {root}: {split!r} looks like a split, not a class; rename the folder "
                f"of the training images to {root}/train"
            )
        return {"train": root_folder}  # the caller scans it and reports its problems
    for problem in problems:
        on_problem(problem)
    skipped.paths += skipped_in_root.paths
    splits = named_splits(folders, origin=f"data.root {root}")
    split_paths = {folder.path for folder in splits.values()}
    skipped.paths += [
        f"{folder.path} (images outside the splits; splits are named "
        f"{', '.join(names[0] for names in SPLITS.values())})"
        for folder in folders.values()
        if folder.path not in split_paths and has_classes_or_shards(folder)
    ]
    outside = [name for name in files if is_image(name) or suffix_of(name) == ".tar"]
    if outside:
        skipped.paths.append(f"{len(outside)} files outside the splits ({root / outside[0]})")
    return splits


def has_classes_or_shards(folder: Folder) -> bool:
    """Return whether a folder contains shards (tar files) or class folders (with images).

    Problems are ignored, since the folder is possibly not part of the data.
    """

    def scan(folder: Folder) -> tuple[dict[str, Folder], list[str]]:
        return scan_folder(folder, SkippedFiles(), lambda problem: None)

    folders, files = scan(folder)
    return any(suffix_of(name) == ".tar" for name in files) or any(
        is_image(name) for inner in folders.values() for name in scan(inner)[1]
    )


def named_splits(items: dict[str, T], *, origin: str) -> dict[str, T]:
    """Return the items that are named like a split, by its name in SPLITS.

    Without a test split, the validation split becomes `test`, as is usual for ImageNet. origin:
    names the items in messages. Raises DataError if two items are the same split.
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


def check_classes(
    classes: Sequence[str], class_names: Sequence[str], *, field: str = "data.classes"
) -> None:
    """Raise DataError, with the field, if the data lacks one of the classes.

    class_names: of all classes in the data.
    """
    for name in classes:
        if name not in class_names:
            advice = did_you_mean(name, class_names)
            raise DataError(f"{field}: no class {name!r} in the data{advice}")


def find_classes(
    splits: dict[str, SplitListing],
    selected_classes: tuple[str, ...],
    on_problem: OnProblem,
    skipped: SkippedFiles,
) -> tuple[str, ...]:
    """Return the names of the classes of the training images, sorted.

    selected_classes: those to use; empty for all. Calls `on_problem` for classes that differ
    between the splits. Raises DataError if there are no training images or a class is unknown.
    """
    class_names = sorted(set(splits["train"].image_classes))
    if not class_names:
        raise DataError(f"{splits['train'].origin}: no images{skipped_note(skipped)}")
    check_classes(selected_classes, class_names)
    selected = set(selected_classes or class_names)
    for split in splits.values():
        present = set(split.image_classes)
        for name in sorted(selected - present):
            on_problem(f"{split.origin}: no images of class {name!r}, which other splits have")
        if not selected_classes:
            for name in sorted(present - selected):
                on_problem(f"{split.origin}: class {name!r} has no training images")
    return tuple(name for name in class_names if name in selected)


def skipped_note(skipped: SkippedFiles) -> str:
    """Return the number of skipped files, as the end of a message about missing images."""
    return f" (skipped: {format_counts(skipped.files)})" if skipped.files else ""


def build_listing(
    store: ImageStore,
    split_listings: dict[str, SplitListing],
    class_names: tuple[str, ...],
    skipped: SkippedFiles,
) -> Listing:
    """Return the listing of all splits.

    class_names: the classes to use, in the order of their labels. Raises DataError for a name that
    the files of a run cannot store.
    """
    _check_class_names(split_listings, class_names)
    label_of = {name: label for label, name in enumerate(class_names)}
    labels = torch.tensor(
        [
            label_of.get(name, -1)
            for split in split_listings.values()
            for name in split.image_classes
        ]
    )
    name_hashes = torch.tensor(
        [
            zlib.crc32(filename_bytes(name))
            for split in split_listings.values()
            for name in split.image_names
        ]
    )
    splits, start = {}, 0
    for name, split in split_listings.items():
        indices = torch.arange(start, start + len(split.image_classes))
        splits[name] = indices[labels[indices] >= 0]
        start += len(split.image_classes)
    return Listing(class_names, store, labels, name_hashes, splits, skipped)


def _check_class_names(
    split_listings: dict[str, SplitListing], class_names: tuple[str, ...]
) -> None:
    """Raise DataError for class names that a configuration or a table cannot store."""
    for name in class_names:
        if problem := name_problem(name):
            origin = split_listings["train"].origin
            raise DataError(f"{origin}: class '{single_line(name)}': its name {problem}; rename it")
