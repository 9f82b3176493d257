"""The image sources: each finds labelled images and the splits they come with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, VisionDataset

from deit.config.data_section import DataConfig
from deit.core.errors import DataError, SystemFault, first_line, raise_transient
from deit.core.file_reading import read_lines
from deit.datasets.folders import list_folder
from deit.datasets.images import EncodedImages, ImageStore, InMemoryImages
from deit.datasets.listing import Listing, resolve_classes
from deit.datasets.shards import list_shards
from deit.datasets.timm_readers import list_reader


class Loaded(NamedTuple):
    """What a source holds: None where it has no such split.

    identities: int64 [number of training images] in [0, 2**32), a number for each training image
    that does not depend on which others are there: what is set aside is chosen by it.
    left_out: bool [positions of the store], the excluded images; None without a list.
    passed: what is beside the images and is not read, in words.
    """

    class_names: tuple[str, ...]
    identities: Tensor
    train: InMemoryImages | EncodedImages
    validation: InMemoryImages | EncodedImages | None
    test: InMemoryImages | EncodedImages | None
    left_out: Tensor | None = None
    passed: tuple[str, ...] = ()


def load_digits(config: DataConfig, keep: tuple[str, ...]) -> Loaded:
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels of 17 grey levels, without splits.

    Source: the test half of UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak,
    1998). Raises SystemFault without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits as read
    except ImportError as error:
        raise SystemFault(
            f"data.source digits: scikit-learn is missing or does not load ({first_line(error)}); "
            "pip install 'deit[digits]'"
        ) from None
    digits = read()
    grey = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))
    pixels = grey.unsqueeze(1).repeat(1, 3, 1, 1)
    names = tuple(str(name) for name in digits.target_names)
    everything = InMemoryImages(pixels, torch.from_numpy(digits.target).long())
    return _keep_classes(Loaded(names, torch.arange(len(pixels)), everything, None, None), keep)


def load_mnist(config: DataConfig, keep: tuple[str, ...]) -> Loaded:
    """MNIST in torchvision's layout: 60,000 training and 10,000 test digits of 28x28, grey."""
    raw = Path(config.root) / "MNIST" / "raw"
    train, test = _both_splits(
        MNIST,
        config,
        expected=f"{raw} (train-images-idx3-ubyte and three more)",
        else_="the digits recipes need no data",
    )

    def images(split: MNIST) -> InMemoryImages:
        return InMemoryImages(split.data.unsqueeze(1).repeat(1, 3, 1, 1), split.targets.long())

    names = tuple(str(digit) for digit in range(10))
    identities = torch.arange(len(train.targets))
    return _keep_classes(Loaded(names, identities, images(train), None, images(test)), keep)


def _both_splits(
    dataset: type[VisionDataset], config: DataConfig, *, expected: str, else_: str
) -> tuple[VisionDataset, VisionDataset]:
    """Training and test split of one of torchvision's sets. expected, else_: where it should lie,
    and what could be had instead, for the message. Raises DataError."""
    root = Path(config.root)
    try:
        train, test = (
            dataset(root, train=part, download=config.download) for part in (True, False)
        )
    except Exception as error:  # torchvision raises RuntimeError, urllib, tarfile, struct their own
        raise_transient(error, f"data.root {root}")
        raise DataError(
            f"data.root {root}: no {dataset.__name__} here ({first_line(error)}); expected "
            f"{expected}. Fetch it with --data.download, or point --data.root at it; {else_}"
        ) from None
    return train, test


def load_cifar10(config: DataConfig, keep: tuple[str, ...]) -> Loaded:
    """CIFAR-10 in torchvision's layout: 50,000 training and 10,000 test images of 32x32."""
    return _load_cifar(CIFAR10, config, keep)


def load_cifar100(config: DataConfig, keep: tuple[str, ...]) -> Loaded:
    """CIFAR-100 in torchvision's layout, fine labels."""
    return _load_cifar(CIFAR100, config, keep)


def _load_cifar(dataset: type[VisionDataset], config: DataConfig, keep: tuple[str, ...]) -> Loaded:
    folder = Path(config.root) / dataset.base_folder
    train, test = _both_splits(
        dataset,
        config,
        expected=f"{folder} (archive {dataset.filename}, md5 {dataset.tgz_md5})",
        else_="images in class folders are read by --data.source folder",
    )

    def images(split: VisionDataset) -> InMemoryImages:
        pixels = torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()
        return InMemoryImages(pixels, torch.tensor(split.targets))

    identities = torch.arange(len(train.targets))
    found = Loaded(tuple(train.classes), identities, images(train), None, images(test))
    return _keep_classes(found, keep)


def load_listed(config: DataConfig, keep: tuple[str, ...]) -> Loaded:
    """Images that stay encoded, as the listing of their source finds them."""
    listing = LISTINGS[config.source](config, keep)
    encoded = {
        split: EncodedImages(listing.labels[rows], listing.store, rows)
        for split, rows in listing.splits.items()
    }
    left_out = None
    if config.exclude_list is not None:
        left_out = is_excluded(Path(config.exclude_list), listing.store)
    return Loaded(
        listing.class_names,
        listing.identities[listing.splits["train"]],
        encoded["train"],
        encoded.get("validation"),
        encoded.get("test"),
        left_out,
        listing.passed.notes(),
    )


def is_excluded(path: Path, store: ImageStore) -> Tensor:
    """Which positions of a store an exclude list names, bool [positions].

    The list: one name below data.root a line, as it is or, by `exclude_list_line`, as a text of
    JSON; `#` begins a comment line. Raises DataError for a name that is not in the data, so that a
    list for other data cannot pass unnoticed."""
    try:
        lines = read_lines(path, errors="surrogateescape")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"data.exclude_list {path}: not readable ({reason})") from None
    names = {_name_in(line) for line in lines if line and not line.startswith("#")}
    listed = torch.zeros(len(store), dtype=torch.bool)
    for position in range(len(store)) if names else ():
        if (name := store.key(position)) in names:
            listed[position] = True
            names.discard(name)
    if names:
        raise DataError(
            f"data.exclude_list {path}: {min(names)!r} is not in the data; names are relative to "
            "data.root, as `deit check-data --write-exclude-list` writes them"
        )
    return listed


def exclude_list_line(name: str) -> str:
    """A line of an exclude list for any file name: one that a line cannot hold as it is, or that
    looks like something else, as a text of JSON."""
    plain = name.splitlines() == [name.strip()] and not name.startswith(("#", '"'))
    return name if plain else json.dumps(name)


def _name_in(line: str) -> str:
    if not line.startswith('"'):
        return line
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def _keep_classes(loaded: Loaded, keep: tuple[str, ...]) -> Loaded:
    """Only the wanted classes, in the order of the source; all of them if none are named."""
    if not keep:
        return loaded
    wanted = resolve_classes(keep, loaded.class_names)
    old = [index for index, name in enumerate(loaded.class_names) if name in wanted]
    new_label = torch.full((len(loaded.class_names),), -1)
    new_label[old] = torch.arange(len(old))

    def filtered(images: InMemoryImages | None) -> InMemoryImages | None:
        if images is None:
            return None
        labels = new_label[images.labels]
        return InMemoryImages(images.pixels, labels).select(labels >= 0)

    names = tuple(loaded.class_names[index] for index in old)
    identities = loaded.identities[new_label[loaded.train.labels] >= 0]
    train, validation, test = map(filtered, (loaded.train, loaded.validation, loaded.test))
    return Loaded(names, identities, train, validation, test)


LISTINGS: dict[str, Callable[..., Listing]] = {
    "folder": list_folder,
    "shards": list_shards,
    "reader": list_reader,
}
"""The sources of encoded images: (config, class names to keep or none, complain) -> Listing."""

SOURCES: dict[str, Callable[[DataConfig, tuple[str, ...]], Loaded]] = {
    "digits": load_digits,
    "mnist": load_mnist,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    **dict.fromkeys(LISTINGS, load_listed),
}
"""Every source by its name in data.source: (config, class names to keep or none) -> Loaded."""
