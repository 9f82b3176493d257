"""The image sources: each loads or lists labeled images and the splits they come with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, VisionDataset

from deit.config.sections.data import DataConfig
from deit.core.errors import DataError, SystemFault, first_line, raise_if_transient
from deit.core.file_reading import read_lines
from deit.datasets.images import EncodedImages, ImageStore, InMemoryImages
from deit.datasets.sources.folders import list_folder
from deit.datasets.sources.listing import Listing, check_classes
from deit.datasets.sources.shards import list_shards
from deit.datasets.sources.timm_readers import list_reader


class Loaded(NamedTuple):
    """The images of a source; a split that it does not have is None.

    identities: int64 [training images] in [0, 2**32), a number for each training image that does
    not depend on the other images; validation and test images are selected by it.
    excluded: bool [positions of the store], the excluded images; None without a list.
    skipped: what is not read, as lines of text.
    """

    class_names: tuple[str, ...]
    identities: Tensor
    train: InMemoryImages | EncodedImages
    validation: InMemoryImages | EncodedImages | None
    test: InMemoryImages | EncodedImages | None
    excluded: Tensor | None = None
    skipped: tuple[str, ...] = ()


def load_digits(config: DataConfig, classes: tuple[str, ...]) -> Loaded:
    """Load scikit-learn's 1,797 handwritten digits, 8x8 pixels of 17 gray levels, without splits.

    Source: the test half of UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak,
    1998). Raises SystemFault if scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits as read
    except ImportError as error:
        raise SystemFault(
            f"data.source digits: scikit-learn is missing or does not load ({first_line(error)}); "
            "pip install 'deit[digits]'"
        ) from None
    digits = read()
    gray = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))
    pixels = gray.unsqueeze(1).repeat(1, 3, 1, 1)
    names = tuple(str(name) for name in digits.target_names)
    images = InMemoryImages(pixels, torch.from_numpy(digits.target).long())
    return _keep_classes(Loaded(names, torch.arange(len(pixels)), images, None, None), classes)


def load_mnist(config: DataConfig, classes: tuple[str, ...]) -> Loaded:
    """Load MNIST in torchvision's layout: 60,000 training and 10,000 test digits of 28x28, gray.

    Raises DataError if it is missing.
    """
    raw = Path(config.root) / "MNIST" / "raw"
    train, test = _both_splits(
        MNIST,
        config,
        expected=f"{raw} (train-images-idx3-ubyte and three more)",
        alternative="recipes named digits need no data",
    )

    def images(split: MNIST) -> InMemoryImages:
        return InMemoryImages(split.data.unsqueeze(1).repeat(1, 3, 1, 1), split.targets.long())

    names = tuple(str(digit) for digit in range(10))
    identities = torch.arange(len(train.targets))
    return _keep_classes(Loaded(names, identities, images(train), None, images(test)), classes)


def _both_splits(
    dataset: type[VisionDataset], config: DataConfig, *, expected: str, alternative: str
) -> tuple[VisionDataset, VisionDataset]:
    """Load training and test split of a torchvision dataset. Raises DataError if it is missing.

    expected, alternative: its location, and what to use instead, for the message.
    """
    root = Path(config.root)
    try:
        train, test = (
            dataset(root, train=part, download=config.download) for part in (True, False)
        )
    except Exception as error:  # torchvision raises RuntimeError, urllib, tarfile, struct their own
        raise_if_transient(error, f"data.root {root}")
        raise DataError(
            f"data.root {root}: contains no {dataset.__name__} ({first_line(error)}); expected "
            f"{expected}. Download it with --data.download, or set --data.root to its location; "
            f"{alternative}"
        ) from None
    return train, test


def load_cifar10(config: DataConfig, classes: tuple[str, ...]) -> Loaded:
    """Load CIFAR-10 in torchvision's layout: 50,000 training and 10,000 test images of 32x32.

    Raises DataError if it is missing.
    """
    return _load_cifar(CIFAR10, config, classes)


def load_cifar100(config: DataConfig, classes: tuple[str, ...]) -> Loaded:
    """Load CIFAR-100 in torchvision's layout, with fine labels. Raises DataError if missing."""
    return _load_cifar(CIFAR100, config, classes)


def _load_cifar(
    dataset: type[VisionDataset], config: DataConfig, classes: tuple[str, ...]
) -> Loaded:
    folder = Path(config.root) / dataset.base_folder
    train, test = _both_splits(
        dataset,
        config,
        expected=f"{folder} (archive {dataset.filename}, md5 {dataset.tgz_md5})",
        alternative="for images in class folders use --data.source folder",
    )

    def images(split: VisionDataset) -> InMemoryImages:
        pixels = torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()
        return InMemoryImages(pixels, torch.tensor(split.targets))

    identities = torch.arange(len(train.targets))
    loaded = Loaded(tuple(train.classes), identities, images(train), None, images(test))
    return _keep_classes(loaded, classes)


def load_listed(config: DataConfig, classes: tuple[str, ...]) -> Loaded:
    """List images that stay encoded (folder, shards, reader), without those of the exclude list.

    Raises DataError if the images or the list cannot be read.
    """
    listing = LISTINGS[config.source](config, classes)
    encoded = {
        split: EncodedImages(listing.labels[rows], listing.store, rows)
        for split, rows in listing.splits.items()
    }
    excluded = None
    if config.exclude_list is not None:
        excluded = is_excluded(config.exclude_list, listing.store)
    return Loaded(
        listing.class_names,
        listing.name_hashes[listing.splits["train"]],
        encoded["train"],
        encoded.get("validation"),
        encoded.get("test"),
        excluded,
        listing.skipped.notes(),
    )


def is_excluded(path: str | Path, store: ImageStore) -> Tensor:
    """Return which positions of a store an exclude list contains, bool [positions].

    The list has one name relative to data.root per line, plain or as a JSON string (see
    `exclude_list_line`); `#` starts a comment line. Raises DataError if the list cannot be read or
    contains a name that is not in the data, as a list for other data would.
    """
    path = Path(path)
    try:
        lines = read_lines(path, errors="surrogateescape")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"data.exclude_list {path}: not readable ({reason})") from None
    names = {_parse_line(line) for line in lines if line and not line.startswith("#")}
    excluded = torch.zeros(len(store), dtype=torch.bool)
    for position in range(len(store)) if names else ():
        if (name := store.key(position)) in names:
            excluded[position] = True
            names.discard(name)
    if names:
        missing = min(names)
        note = _moved_note(missing, store)
        raise DataError(
            f"data.exclude_list {path}: {missing!r} is not in the data{note}; names are relative "
            "to data.root, as `deit check-data --write-exclude-list` writes them"
        )
    return excluded


def _moved_note(name: str, store: ImageStore) -> str:
    """Return where the image is now, if the list is of another data.root or layout of folders."""
    for position in range(len(store)):
        key = store.key(position)
        if key.endswith(f"/{name}") or name.endswith(f"/{key}"):
            return f", which has {key!r}: the list was written for another data.root or layout"
    return ""


def exclude_list_line(name: str) -> str:
    """Return a line of an exclude list: the name, or a JSON string for a name that needs one.

    Such as names with line breaks, or that start like a comment.

    >>> exclude_list_line("cat/1.jpg"), exclude_list_line("#1.jpg")
    ('cat/1.jpg', '"#1.jpg"')
    """
    plain = name.splitlines() == [name.strip()] and not name.startswith(("#", '"'))
    return name if plain else json.dumps(name)


def _parse_line(line: str) -> str:
    if not line.startswith('"'):
        return line
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def _keep_classes(loaded: Loaded, classes: tuple[str, ...]) -> Loaded:
    """Keep only some classes, in the order of the source; empty for all."""
    if not classes:
        return loaded
    check_classes(classes, loaded.class_names)
    old_labels = [index for index, name in enumerate(loaded.class_names) if name in classes]
    new_label = torch.full((len(loaded.class_names),), -1)
    new_label[old_labels] = torch.arange(len(old_labels))

    def filtered(images: InMemoryImages | None) -> InMemoryImages | None:
        if images is None:
            return None
        labels = new_label[images.labels]
        return InMemoryImages(images.pixels, labels).select(labels >= 0)

    names = tuple(loaded.class_names[index] for index in old_labels)
    identities = loaded.identities[new_label[loaded.train.labels] >= 0]
    train, validation, test = map(filtered, (loaded.train, loaded.validation, loaded.test))
    return Loaded(names, identities, train, validation, test)


LISTINGS: dict[str, Callable[..., Listing]] = {
    "folder": list_folder,
    "shards": list_shards,
    "reader": list_reader,
}
"""The sources of encoded images: (config, class names or none for all, on_problem) -> Listing."""

SOURCES: dict[str, Callable[[DataConfig, tuple[str, ...]], Loaded]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    **dict.fromkeys(LISTINGS, load_listed),
}
"""All sources by their names in data.source: (config, class names or none for all) -> Loaded."""
