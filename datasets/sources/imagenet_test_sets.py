"""Load ImageNet's other test sets (ReaL, V2, A, R, Sketch) from folders of synsets."""

import os
import pkgutil
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch import Tensor

from deit.config.sections.data import DataConfig
from deit.core.errors import DataError
from deit.datasets.images import EncodedImages
from deit.datasets.sources.folders import list_folder

_NUM_IMAGES = 50_000  # of the validation set, which ReaL relabels
SYNSET_FILES = {
    "imagenet-real": "imagenet_synsets.txt",
    "imagenet-v2": "imagenet_synsets.txt",
    "imagenet-a": "imagenet_a_synsets.txt",
    "imagenet-r": "imagenet_r_synsets.txt",
    "imagenet-sketch": "imagenet_synsets.txt",
}
"""timm's file with the classes of each test set: ReaL (Beyer et al. 2020, new labels of the
validation images), V2 (Recht et al. 2019), A (Hendrycks et al. 2021b), R (Hendrycks et al. 2021a),
Sketch (Wang et al. 2019)."""


class TestSet(NamedTuple):
    """A test set, restricted to the classes of a network.

    class_indices: the network's classes that the test set has; its prediction is the most likely
    of these.
    accepted: bool [images, classes], the correct classes of each image: one, or several in ReaL.
    note: which part of the test set is used, as text.
    """

    images: EncodedImages
    class_indices: tuple[int, ...]
    accepted: Tensor
    note: str


def check_has_classes(name: str, class_names: tuple[str, ...]) -> None:
    """Raise DataError if the network has none of the test set's classes."""
    if set(class_names).isdisjoint(_synsets(SYNSET_FILES[name])):
        raise DataError(
            f"the network has none of the classes of test set {name}; its classes are named "
            f"{', '.join(map(repr, class_names[:3]))}, not by synset"
        )


def load_test_set(name: str, root: str | Path, class_names: tuple[str, ...]) -> TestSet:
    """Load a test set from ROOT/CLASS/*, with classes named by synset (V2: or by index).

    name: one of SYNSET_FILES. class_names: synsets of the network. Raises DataError if the folder
    is not that test set, or the network has none of its classes.
    """
    listing = list_folder(DataConfig(source="folder", root=str(root)), ())
    check_has_classes(name, class_names)
    rows = torch.cat(list(listing.splits.values()))
    images = EncodedImages(listing.labels[rows], listing.store, rows)
    expected, imagenet = _synsets(SYNSET_FILES[name]), ImageNetInfo().label_names()
    synsets = listing.class_names
    if name == "imagenet-v2" and all(synset.isdecimal() for synset in synsets):
        if max(map(int, synsets)) >= len(imagenet):
            raise DataError(
                f"data.root {root}: class {max(synsets, key=int)} is not one of the 1000 classes"
            )
        synsets = tuple(imagenet[int(index)] for index in synsets)
    unknown = sorted(set(synsets) - set(expected))
    if unknown or len(synsets) != len(expected):
        example = f", including the unknown {unknown[0]!r}" if unknown else ""
        raise DataError(
            f"data.root {root}: test set {name} has {len(expected)} classes in "
            f"folders named by synset, but the folder has {len(synsets)}{example}"
        )
    present = set(synsets)
    class_indices = tuple(i for i, synset in enumerate(class_names) if synset in present)
    if not class_indices:
        raise DataError(f"data.root {root}: contains none of the network's classes")
    columns = {class_names[index]: column for column, index in enumerate(class_indices)}
    if name == "imagenet-real":
        column_of = [columns.get(synset, -1) for synset in imagenet]
        accepted = _real_labels(images, column_of, len(columns))
    else:
        labels = torch.tensor([columns.get(synset, -1) for synset in synsets])[images.labels]
        accepted = labels[:, None] == torch.arange(len(columns))
    used = accepted.any(dim=1)
    note = f"{int(used.sum())} of {len(used)} images, {len(columns)} of {len(synsets)} classes"
    return TestSet(images.select(used), class_indices, accepted[used], note)


@cache
def _synsets(file: str) -> tuple[str, ...]:
    return tuple(pkgutil.get_data("timm.data", f"_info/{file}").decode().split())


def _real_labels(images: EncodedImages, column_of: list[int], num_columns: int) -> Tensor:
    """Return ReaL's labels of the validation images, bool [images, columns], by file name.

    column_of: the column of each of the 1000 classes, -1 for none. Raises DataError for a file
    name that is not ImageNet's.
    """
    names = [f"ILSVRC2012_val_{index + 1:08d}.JPEG" for index in range(_NUM_IMAGES)]
    labels = RealLabelsImagenet(names).real_labels
    accepted = torch.zeros(len(images.labels), num_columns, dtype=torch.bool)
    for row in range(len(images.labels)):
        file = os.path.basename(images.name(row))
        if not re.fullmatch(r"ILSVRC2012_val_\d{8}\.JPEG", file):
            raise DataError(
                f"{images.name(row)}: ReaL's labels need file names such as "
                "ILSVRC2012_val_00000001.JPEG"
            )
        for label in labels[file]:
            if column_of[label] >= 0:
                accepted[row, column_of[label]] = True
    return accepted
