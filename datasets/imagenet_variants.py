"""ImageNet's other test sets (ReaL, V2, A, R, Sketch) from folders, by timm's lists of classes."""

import os
import pkgutil
import re
from functools import cache
from typing import NamedTuple

import torch
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch import Tensor

from deit.config.data_section import DataConfig
from deit.core.errors import DataError
from deit.datasets.folders import list_folder
from deit.datasets.images import EncodedImages

_IMAGES = 50_000  # of the validation set, which ReaL labels anew
VARIANTS = {
    "real": "imagenet_synsets.txt",
    "v2": "imagenet_synsets.txt",
    "a": "imagenet_a_synsets.txt",
    "r": "imagenet_r_synsets.txt",
    "sketch": "imagenet_synsets.txt",
}
"""The list of timm's that holds the classes of each: ReaL (Beyer et al. 2020, new labels of the
validation images), V2 (Recht et al. 2019), A (Hendrycks et al. 2021b), R (Hendrycks et al. 2021a),
Sketch (Wang et al. 2019)."""


class Variant(NamedTuple):
    """A test set, cut to the classes that a network knows.

    columns: which of the network's classes take part; its answer is the likeliest of these.
    accepted: bool [images, columns], the right answers of each image; one of them, but in ReaL.
    note: what was left out, in words.
    """

    images: EncodedImages
    columns: tuple[int, ...]
    accepted: Tensor
    note: str


def check_known(name: str, class_names: tuple[str, ...]) -> None:
    """Refuse a network that knows none of a variant's classes. Raises DataError."""
    if set(class_names).isdisjoint(_synsets(VARIANTS[name])):
        raise DataError(
            f"the network knows none of the classes of variant {name}; its own are named "
            f"{', '.join(map(repr, class_names[:3]))}, not by synset"
        )


def load_variant(name: str, root: str, class_names: tuple[str, ...]) -> Variant:
    """A variant from ROOT/CLASS/*, its classes named by synset (V2: or by their number).

    class_names: of the network, synsets. Raises DataError where the folder is not that variant, or
    the network knows none of its classes.
    """
    listing = list_folder(DataConfig(source="folder", root=root), ())
    check_known(name, class_names)
    rows = torch.cat(list(listing.splits.values()))
    images = EncodedImages(listing.labels[rows], listing.store, rows)
    expected, everyone = _synsets(VARIANTS[name]), ImageNetInfo().label_names()
    found = listing.class_names
    if name == "v2" and all(one.isdecimal() for one in found):
        if max(map(int, found)) >= len(everyone):
            raise DataError(f"--data.root {root}: a class {max(found, key=int)} is none of 1000")
        found = tuple(everyone[int(one)] for one in found)
    strange = sorted(set(found) - set(expected))
    if strange or len(found) != len(expected):
        told = f", among them {strange[0]!r}, which is none of them" if strange else ""
        raise DataError(
            f"--data.root {root}: ImageNet's variant {name} has {len(expected)} classes in folders "
            f"named by synset, here are {len(found)}{told}"
        )
    there = set(found)
    columns = tuple(column for column, one in enumerate(class_names) if one in there)
    if not columns:
        raise DataError(f"--data.root {root}: holds none of the classes that the network knows")
    place = {class_names[column]: index for index, column in enumerate(columns)}
    if name == "real":
        accepted = _anew(images, [place.get(one, -1) for one in everyone], len(columns))
    else:
        ours = torch.tensor([place.get(one, -1) for one in found])[images.labels]
        accepted = ours[:, None] == torch.arange(len(columns))
    known = accepted.any(dim=1)
    note = f"{int(known.sum())} of {len(known)} images, of {len(columns)} of {len(found)} classes"
    return Variant(images.select(known), columns, accepted[known], note)


@cache
def _synsets(file: str) -> tuple[str, ...]:
    return tuple(pkgutil.get_data("timm.data", f"_info/{file}").decode().split())


def _anew(images: EncodedImages, place: list[int], columns: int) -> Tensor:
    """ReaL's labels of the validation images, by their file names, bool [images, columns].

    place: the column of each of the 1000 classes, -1 for none. Raises DataError at another name.
    """
    names = [f"ILSVRC2012_val_{number + 1:08d}.JPEG" for number in range(_IMAGES)]
    labels = RealLabelsImagenet(names).real_labels
    accepted = torch.zeros(len(images.labels), columns, dtype=torch.bool)
    for row in range(len(images.labels)):
        file = os.path.basename(images.name(row))
        if not re.fullmatch(r"ILSVRC2012_val_\d{8}\.JPEG", file):
            raise DataError(
                f"{images.name(row)}: ReaL knows images as ILSVRC2012_val_00000001.JPEG"
            )
        for label in labels[file]:
            if place[label] >= 0:
                accepted[row, place[label]] = True
    return accepted
