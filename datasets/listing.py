"""What lies in a data set of encoded images: which image, which class, which split."""

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

Part = TypeVar("Part")
OnProblem = Callable[[str], None]
"""Takes what is wrong with the layout: raises it, or collects it and lets the listing go on."""

SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""What a split may be called, in any case; the words are those of Hugging Face's datasets."""

SPLIT_NAMES = tuple(name for names in SPLITS.values() for name in names)

_OF_SYSTEMS = frozenset(
    (
        *("__macosx", "__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
        *("@eadir", "$recycle.bin", "system volume information", "lost+found"),
    )
)


@dataclass
class PassedOver:
    """What is there and is not read, so that it can be named.

    files: how many, by the ending of their names. places: folders and the like, each with a reason.
    """

    files: Counter[str] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count a file by its ending."""
        self.files[ending_of(name) or "other files"] += 1

    def notes(self, *, most: int | None = 4) -> tuple[str, ...]:
        """A line for the files and one for each place, of many places the first."""
        notes = [f"passed over: {counted(self.files)}"] if self.files else []
        notes += [f"not read: {place}" for place in self.places[:most]]
        more = 0 if most is None else len(self.places) - most
        return tuple([*notes, f"not read: {more} more"] if more > 0 else notes)


class Listing(NamedTuple):
    """The images of a store.

    labels: int64 [positions], an index into the class names; -1: of a class that is not kept.
    identities: int64 [positions] in [0, 2**32), of an image's own name alone, so that an image
    keeps its place in the splits whatever comes and goes around it.
    splits: int64 positions of `train`, and of `validation` and `test` where there are such.
    passed: what is beside them and is not read.
    """

    class_names: tuple[str, ...]
    store: ImageStore
    labels: Tensor
    identities: Tensor
    splits: dict[str, Tensor]
    passed: PassedOver


class SplitListing(NamedTuple):
    """The images of one split, in the order of the store.

    place: where they lie, for messages. classes: the class name of each. names: what each is
    called within the split.
    """

    place: Path | str
    classes: Sequence[str]
    names: Sequence[str]


def refuse(problem: str) -> None:
    """The strict way to complain. Raises DataError."""
    raise DataError(problem)


def _ignore(problem: str) -> None:
    """For a first look at what may not be read at all."""


def check_root(root: Path, layout: str = "CLASS/IMAGE") -> None:
    """Refuse a root folder that is not there. layout: of what is below its splits. Raises
    NotFoundError."""
    if not root.is_dir():
        raise NotFoundError(
            f"data.root {root}: no such folder; expected {root}/train/{layout} (--data.root says "
            "where the images are)"
        )


def is_hidden(name: str) -> bool:
    """Whether a file or folder is a system's or a program's and none of the user's: .git, ._a.png,
    .ipynb_checkpoints, __MACOSX, Thumbs.db."""
    hidden = name.startswith(".") or name.lower() in _OF_SYSTEMS
    return hidden and name not in (".", "..")


def ending_of(name: str) -> str:
    """The ending of a file name in lower case with its dot, or an empty string: a version or a
    sentence behind a dot is none."""
    ending = os.path.splitext(name)[1].lower()
    return ending if re.fullmatch(r"\.(?=.*[a-z])[a-z0-9_]{1,10}", ending) else ""


def is_image(name: str) -> bool:
    """Whether a name ends as that of an image file."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


class Folder(NamedTuple):
    """A folder and the folders that it is in, as (device, inode), for links that lead back."""

    path: Path
    around: frozenset[tuple[int, int]]


def opened(path: Path) -> Folder:
    """A folder to begin with. Raises DataError where it cannot be read."""
    try:
        places = [os.stat(place) for place in (path, *path.resolve().parents)]
    except OSError as error:
        raise_transient(error, path)
        raise DataError(f"{path}: not readable ({error.strerror})") from None
    return Folder(path, frozenset((place.st_dev, place.st_ino) for place in places))


def look_into(
    folder: Folder, passed: PassedOver, complain: OnProblem = refuse
) -> tuple[dict[str, Folder], list[str]]:
    """The folders in a folder by their names, and the names of its files; both in order, without
    hidden ones.

    Links are followed, as timm and torchvision do. A link to a folder that it is in is noted in
    `passed`. Complains of what cannot be read, and of a link to nothing that may be meant as a
    folder; one with the ending of a file is a file, which reading finds missing.
    """
    folders: dict[str, Folder] = {}
    files: list[str] = []
    try:
        with os.scandir(folder.path) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise_transient(error, folder.path)
        complain(f"{folder.path}: not readable ({error.strerror})")
        return folders, files
    for entry in entries:
        if is_hidden(entry.name):
            continue
        try:
            if entry.is_dir():
                about = entry.stat()
                one = (about.st_dev, about.st_ino)
                if entry.is_symlink() and one in folder.around:
                    passed.places.append(f"{entry.path} (a link to a folder that it is in)")
                else:
                    folders[entry.name] = Folder(folder.path / entry.name, folder.around | {one})
            elif entry.is_file():
                files.append(entry.name)
            elif os.path.exists(entry.path):
                complain(f"{entry.path}: neither a file nor a folder; remove it")
            elif ending_of(entry.name):
                files.append(entry.name)
            else:
                target = os.readlink(entry.path)
                complain(f"{entry.path}: a link to nothing ({target}); mend or remove it")
        except OSError as error:
            raise_transient(error, entry.path)
            complain(f"{entry.path}: not readable ({error.strerror})")
    return folders, files


def find_images(folder: Folder, passed: PassedOver, complain: OnProblem = refuse) -> list[str]:
    """The image files in a folder at any depth, relative to it, in the order of their names; what
    else is there is counted in `passed`. Complains as `look_into` does."""
    found: list[str] = []
    waiting = [("", folder)]
    while waiting:
        place, here = waiting.pop()
        folders, files = look_into(here, passed, complain)
        waiting += [(f"{place}{name}/", inner) for name, inner in folders.items()]
        for name in files:
            if is_image(name):
                found.append(f"{place}{name}")
            else:
                passed.add(name)
    return sorted(found, key=lambda path: path.split("/"))


def split_folders(
    root: Path, passed: PassedOver, complain: OnProblem = refuse
) -> dict[str, Folder]:
    """The folders of the splits by SPLITS, or ROOT as `train`.

    A labelled validation split without a test is the test, as is the custom with ImageNet. A folder
    beside the splits with images of classes or shards in it is noted in `passed`. Raises DataError
    where two folders are the same split, or where there are splits and none to train on.
    """
    whole = opened(root)
    folders, files = look_into(whole, PassedOver(), _ignore)
    if not any(name.lower() in SPLITS["train"] for name in folders):
        split = next((name for name in folders if name.lower() in SPLIT_NAMES), None)
        if split is not None:
            raise DataError(
                f"data.root {root}: {split!r} looks like a split and not a class; name the folder "
                f"of the training images {root}/train"
            )
        return {"train": whole}
    folders, files = look_into(whole, passed, complain)
    splits = named_splits(folders, place=f"data.root {root}")
    read = {folder.path for folder in splits.values()}
    passed.places += [
        f"{folder.path} (images beside the splits; a split is named "
        f"{', '.join(names[0] for names in SPLITS.values())})"
        for folder in folders.values()
        if folder.path not in read and holds_images(folder)
    ]
    loose = [name for name in files if is_image(name) or ending_of(name) == ".tar"]
    if loose:
        passed.places.append(f"{len(loose)} files beside the splits ({root / loose[0]})")
    return splits


def holds_images(folder: Folder) -> bool:
    """Whether classes or shards are in a folder: images in one of its folders, or tar files."""
    folders, files = look_into(folder, PassedOver(), _ignore)
    return any(ending_of(name) == ".tar" for name in files) or any(
        is_image(name)
        for inner in folders.values()
        for name in look_into(inner, PassedOver(), _ignore)[1]
    )


def named_splits(offered: dict[str, Part], *, place: str) -> dict[str, Part]:
    """`train`, `validation` and `test` out of what has such names by SPLITS, one of them `train`.

    Without a test the validation split is the test. place: where they are, for the message. Raises
    DataError where two are the same split.
    """
    parts: dict[str, Part] = {}
    for split, names in SPLITS.items():
        mine = [name for name in offered if name.lower() in names]
        if len(mine) > 1:
            raise DataError(
                f"{place}: {' and '.join(map(repr, mine))} are both the {split} split by their "
                "names; rename or move all but one"
            )
        if mine:
            parts[split] = offered[mine[0]]
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
    return parts


def resolve_classes(
    keep: tuple[str, ...], names: Sequence[str], *, field: str = "data.classes"
) -> set[str]:
    """The wanted classes; raises DataError, with the field, for one the data does not have."""
    for name in keep:
        if name not in names:
            raise DataError(f"{field}: no class {name!r} in the data{did_you_mean(name, names)}")
    return set(keep)


def assemble(
    store: ImageStore,
    found: dict[str, SplitListing],
    keep: tuple[str, ...],
    complain: OnProblem,
    passed: PassedOver,
) -> Listing:
    """The listing of all splits; the classes are those of the training images, by name, in code
    point order.

    keep: class names, empty for all. Complains of classes that differ between the splits.
    """
    trained = sorted(set(found["train"].classes))
    if not trained:
        raise DataError(f"{found['train'].place}: no images{instead(passed)}")
    wanted = resolve_classes(keep, trained) if keep else set(trained)
    for split in found.values():
        here = set(split.classes)
        for name in sorted(wanted - here):
            complain(f"{split.place}: no images of class {name!r}, which the others have")
        for name in sorted(here - set(trained)) if not keep else ():
            complain(f"{split.place}: class {name!r} has no training images")
    return listed(store, found, tuple(name for name in trained if name in wanted), passed)


def instead(passed: PassedOver) -> str:
    """What is where images are missing, as the end of a message."""
    return f" ({counted(passed.files)} passed over)" if passed.files else ""


def listed(
    store: ImageStore,
    found: dict[str, SplitListing],
    class_names: tuple[str, ...],
    passed: PassedOver,
) -> Listing:
    """The listing for classes that are known already. Raises DataError for a name that no file of
    a run could hold."""
    _check_names(found, class_names)
    label_of = {name: label for label, name in enumerate(class_names)}
    labels = torch.tensor(
        [label_of.get(name, -1) for split in found.values() for name in split.classes]
    )
    identities = torch.tensor(
        [zlib.crc32(bytes_of(name)) for split in found.values() for name in split.names]
    )
    splits, start = {}, 0
    for name, split in found.items():
        rows = torch.arange(start, start + len(split.classes))
        splits[name] = rows[labels[rows] >= 0]
        start += len(split.classes)
    return Listing(class_names, store, labels, identities, splits, passed)


def _check_names(found: dict[str, SplitListing], class_names: tuple[str, ...]) -> None:
    """Refuse names of classes that a configuration or a table could not hold."""
    for name in class_names:
        if trouble := name_problem(name):
            place = found["train"].place
            raise DataError(f"{place}: the class '{in_line(name)}': its name {trouble}; rename it")
