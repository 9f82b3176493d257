"""What lies in a data set of encoded images: which image, which class, which split."""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from deit.datasets.images import Store
from deit.errors import DataError
from deit.text import breaks_line, bytes_of, in_line, name_trouble, nearest

Part = TypeVar("Part")
Complain = Callable[[str], None]
"""Takes what is wrong with the layout: raises it, or collects it and lets the listing go on."""

SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test", "testing", "eval")


class Listing(NamedTuple):
    """The images of a store.

    labels: int64 [positions], an index into the class names; -1: of a class that is not kept.
    identities: int64 [positions] in [0, 2**32), of an image's own name alone, so that an image
    keeps its place in the splits whatever comes and goes around it.
    splits: int64 positions of `train`, and of `validation` and `test` where there are such.
    """

    class_names: tuple[str, ...]
    store: Store
    labels: Tensor
    identities: Tensor
    splits: dict[str, Tensor]


class Found(NamedTuple):
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


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's: .git, ._a.png, .ipynb_checkpoints,
    __MACOSX."""
    return name.startswith((".", "__")) and name not in (".", "..")


def split_folders(root: Path) -> dict[str, Path]:
    """The folders of the splits: ROOT/train, val (or validation) and test, or ROOT as `train`.

    A labelled `val` without a `test` is the test, as is the custom with ImageNet.
    """
    folders = {child.name: child for child in root.iterdir() if child.is_dir()}
    return named_splits(folders) if "train" in folders else {"train": root}


def named_splits(
    offered: dict[str, Part], validation: tuple[str, ...] = ("val", "validation")
) -> dict[str, Part]:
    """`train`, `validation` and `test` out of what has such names.

    validation: the names it may have, the first that is there counts; without a `test` it is the
    test.
    """
    parts = {
        "train": offered["train"],
        "validation": next((offered[name] for name in validation if name in offered), None),
        "test": offered.get("test"),
    }
    if parts["test"] is None:
        parts = {"train": parts["train"], "test": parts["validation"]}
    return {split: part for split, part in parts.items() if part is not None}


def known(keep: tuple[str, ...], names: Sequence[str], *, field: str = "data.classes") -> set[str]:
    """The wanted classes; raises DataError, with the field, for one the data does not have."""
    for name in keep:
        if name not in names:
            raise DataError(f"{field}: no class {name!r} in the data{nearest(name, names)}")
    return set(keep)


def assemble(
    store: Store, found: dict[str, Found], keep: tuple[str, ...], complain: Complain
) -> Listing:
    """The listing of all splits; the classes are those of the training images, by name, in code
    point order.

    keep: class names, empty for all. Complains of classes that differ between the splits.
    """
    trained = sorted(set(found["train"].classes))
    if not trained:
        raise DataError(f"{found['train'].place}: no images")
    wanted = known(keep, trained) if keep else set(trained)
    for split in found.values():
        here = set(split.classes)
        for name in sorted(wanted - here):
            complain(f"{split.place}: no images of class {name!r}, which the others have")
        for name in sorted(here - set(trained)) if not keep else ():
            complain(f"{split.place}: class {name!r} has no training images")
    return listed(store, found, tuple(name for name in trained if name in wanted))


def listed(store: Store, found: dict[str, Found], class_names: tuple[str, ...]) -> Listing:
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
    return Listing(class_names, store, labels, identities, splits)


def _check_names(found: dict[str, Found], class_names: tuple[str, ...]) -> None:
    """Refuse names of classes that a configuration or a table could not hold, and of images that a
    list with one name a line could not; bytes of these that are no UTF-8 are kept."""
    for name in class_names:
        if trouble := name_trouble(name):
            place = found["train"].place
            raise DataError(f"{place}: the class '{in_line(name)}': its name {trouble}; rename it")
    for split in found.values():
        for name in split.names:
            if breaks_line(name):
                raise DataError(
                    f"{split.place}: the image '{in_line(name)}': its name holds a line break or "
                    "another control character; rename it"
                )
