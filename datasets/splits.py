"""The three splits of a run: training, validation for selection, test for the final number."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from deit.config import DataConfig
from deit.datasets.sources import SOURCES, Images, Loaded, check_memory
from deit.errors import DataError
from deit.keys import Keys, words


class Splits(NamedTuple):
    """The images of a run.

    class_names: one name for each label.
    mean, std: per channel over the training images, in [0, 1].
    notes: what was set aside from what, in words.
    fingerprint: SHA-256 over class names, pixels and labels of all three splits.
    """

    class_names: tuple[str, ...]
    train: Images
    validation: Images
    test: Images
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    notes: tuple[str, ...]
    fingerprint: str


def load_splits(config: DataConfig) -> Splits:
    """Load the source and set aside what it does not bring. Raises DataError."""
    loaded = SOURCES[config.source](config, _class_list(config.classes))
    train, validation, test = loaded.train, loaded.validation, loaded.test
    _check_counts(loaded, config)
    if train.pixels.shape[-1] != config.image_size:  # folders are checked before they are decoded
        check_memory(sum(len(split.labels) for split in loaded[2:] if split is not None), config)
    notes = []
    free = torch.ones(len(train.labels), dtype=torch.bool)  # not yet in any split

    def take(fraction: float, stream: str) -> Images:
        mine = free.clone()
        mine[free] = choose(
            train.labels[free], loaded.identities[free], fraction, config.split_seed, stream
        )
        free[mine] = False
        return Images(train.pixels[mine], train.labels[mine])

    if test is None:
        test = take(config.test_fraction, "test")
        notes.append(f"test: {config.test_fraction:.0%} of each class, set aside")
    if validation is None:
        validation = take(config.validation_fraction, "validation")
        notes.append(f"validation: {config.validation_fraction:.0%} of each class, set aside")
    if config.train_fraction < 1:
        train = take(config.train_fraction, "scarce")
        notes.append(f"train: {config.train_fraction:.2%} of what remained")
    else:
        train = Images(train.pixels[free], train.labels[free])
    train, validation, test = (
        Images(_resized(split.pixels, config.image_size), split.labels)
        for split in (train, validation, test)
    )
    mean, std = channel_statistics(train.pixels)
    fingerprint = _fingerprint(loaded.class_names, (train, validation, test))
    return Splits(loaded.class_names, train, validation, test, mean, std, tuple(notes), fingerprint)


def choose(labels: Tensor, identities: Tensor, fraction: float, seed: int, stream: str) -> Tensor:
    """Which images are set aside: a share of every class, bool [number].

    labels, identities: int64 [number]. Ranked within the class by a word of the identity, so that
    the choice depends neither on the other classes nor on the order. At least one image of each
    class goes to either side, so a class needs two of them.
    """
    rank = words(Keys(seed, 0, identities), f"split/{stream}", 1).squeeze(1)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        number = min(max(round(len(members) * fraction), 1), len(members) - 1)
        chosen[members[rank[members].argsort(stable=True)[:number]]] = True
    return chosen


def _check_counts(loaded: Loaded, config: DataConfig) -> None:
    """At least two classes, each with enough images to set a part aside."""
    if len(loaded.class_names) < 2:
        raise DataError(f"only one class ({loaded.class_names[0]!r}): nothing to tell apart")
    parts = (loaded.validation is None, loaded.test is None, config.train_fraction < 1)
    needed = 1 + sum(parts)
    counts = torch.bincount(loaded.train.labels, minlength=len(loaded.class_names))
    for name, number in zip(loaded.class_names, counts.tolist()):
        if number < needed:
            raise DataError(
                f"class {name!r} has {number} image(s), {needed} are needed to split it; add "
                "images, or leave the class out with data.classes"
            )


def channel_statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 [number, 3, height, width], in [0, 1].

    Exact: from a histogram of the 256 grey levels. A constant channel gets the deviation 1.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(3):
        counts = torch.bincount(pixels[:, channel].flatten(), minlength=256).double()
        share = counts / counts.sum()
        centre = (share * levels).sum()
        mean.append(centre.item())
        std.append(((share * (levels - centre) ** 2).sum().sqrt()).item() or 1.0)
    return tuple(mean), tuple(std)


def _class_list(classes: tuple[str, ...]) -> tuple[str, ...]:
    """The class names, with `@FILE` replaced by the lines of that file."""
    names: list[str] = []
    for name in classes:
        if not name.startswith("@"):
            names.append(name)
            continue
        try:
            lines = Path(name[1:]).read_text().splitlines()
        except OSError as error:
            raise DataError(f"data.classes {name}: not readable ({error.strerror})") from None
        # The first word of a line, so that `wnid<TAB>words` lists work as they are.
        names += [line.split("\t")[0].strip() for line in lines if line.strip()]
    return tuple(names)


def _resized(pixels: Tensor, size: int) -> Tensor:
    if pixels.shape[-1] == size:
        return pixels
    resized = [
        interpolate(part, (size, size), mode="bicubic", antialias=True)
        for part in pixels.split(512)
    ]
    return torch.cat(resized)


def _fingerprint(class_names: tuple[str, ...], splits: tuple[Images, ...]) -> str:
    digest = hashlib.sha256("\n".join(class_names).encode())
    for split in splits:
        digest.update(split.pixels.contiguous().numpy())
        digest.update(split.labels.numpy())
    return digest.hexdigest()
