"""The three splits of a run: training, validation for selection, test for the final number."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from deit.config.data_section import DataConfig
from deit.core.errors import DataError, SystemFault
from deit.core.host_memory import free_memory
from deit.core.rng import Keys, random_words
from deit.core.user_code import read_names
from deit.datasets.decoding import decode_all, in_threads
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.listing import resolve_classes
from deit.datasets.sources import SOURCES, Loaded


class Splits(NamedTuple):
    """The images of a run; all three splits are in memory, or all three stay encoded.

    class_names: one name for each label.
    mean, std: per channel over the training images, in [0, 1].
    notes: what was set aside from what, in words.
    fingerprint: SHA-256 over class names, labels and pixels of all three splits; of encoded images
    over names and sizes [bytes] in place of pixels.
    passed: what is beside the images and is not read, in words.
    """

    class_names: tuple[str, ...]
    train: InMemoryImages | EncodedImages
    validation: InMemoryImages | EncodedImages
    test: InMemoryImages | EncodedImages
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    notes: tuple[str, ...]
    fingerprint: str
    passed: tuple[str, ...] = ()


class _Divided(NamedTuple):
    """The splits as the source holds their images, and a number for each training image."""

    class_names: tuple[str, ...]
    train: InMemoryImages | EncodedImages
    validation: InMemoryImages | EncodedImages
    test: InMemoryImages | EncodedImages
    identities: Tensor
    notes: tuple[str, ...]
    passed: tuple[str, ...]


def _split(config: DataConfig) -> _Divided:
    """Find the images and set aside what the source does not bring. Raises DataError."""
    loaded = SOURCES[config.source](config, read_names("data.classes", config.classes))
    train, validation, test = loaded.train, loaded.validation, loaded.test
    identities, notes = loaded.identities, []
    _check_counts(loaded, config)
    free = torch.ones(len(train.labels), dtype=torch.bool)  # not yet in any split

    def take(fraction: float, stream: str) -> Tensor:
        mine = free.clone()
        mine[free] = select_fraction(
            train.labels[free], identities[free], fraction, config.split_seed, stream
        )
        free[mine] = False
        return mine

    if test is None:
        test = train.select(take(config.test_fraction, "test"))
        notes.append(f"test: {config.test_fraction:.0%} of each class, set aside")
    if validation is None:
        validation = train.select(take(config.validation_fraction, "validation"))
        notes.append(f"validation: {config.validation_fraction:.0%} of each class, set aside")
    if config.train_fraction < 1:
        free = take(config.train_fraction, "scarce")
        notes.append(f"train: {config.train_fraction:.2%} of what remained")
    train, identities = train.select(free), identities[free]
    if loaded.left_out is not None:
        # Only now: without the excluded images, all others stay in the split they were in.
        before = len(train.labels) + len(validation.labels) + len(test.labels)
        kept = ~loaded.left_out[train.positions]
        train, identities = train.select(kept), identities[kept]
        validation, test = (
            split.select(~loaded.left_out[split.positions]) for split in (validation, test)
        )
        _check_remaining(loaded.class_names, train)
        number = before - len(train.labels) - len(validation.labels) - len(test.labels)
        notes.append(f"exclude list: {number} images excluded, listed in {config.exclude_list}")
    unseen = held_out(config, loaded.class_names)
    if unseen:
        # Last, so that every other image is in the split it would be in without.
        seen = ~torch.isin(train.labels, torch.tensor(unseen))
        train, identities = train.select(seen), identities[seen]
        validation = validation.select(~torch.isin(validation.labels, torch.tensor(unseen)))
        named = ", ".join(loaded.class_names[label] for label in unseen)
        notes.append(f"held out: no training or validation image of {named}")
    parts = (train, validation, test)
    return _Divided(loaded.class_names, *parts, identities, tuple(notes), loaded.passed)


def load_splits(config: DataConfig) -> Splits:
    """Load the source and set aside what it does not bring. Raises DataError."""
    class_names, train, validation, test, identities, made, passed = _split(config)
    splits, notes = (train, validation, test), list(made)
    if isinstance(train, InMemoryImages):
        splits = _squares(splits, config)
    elif _in_memory(splits, config):
        splits = tuple(
            decode_all(split, config.image_size, f"reading {name} images")
            for name, split in zip(("training", "validation", "test"), splits)
        )
    else:
        notes.append("images stay encoded (data.storage files)")
    if isinstance(splits[0], InMemoryImages):
        mean, std = channel_statistics(splits[0].pixels)
    else:
        sample = _sample(identities, config.split_seed)
        measured = decode_all(train.select(sample), config.image_size, "measuring mean and std")
        mean, std = channel_statistics(measured.pixels)
        if len(sample) < len(train.labels):
            notes.append(f"mean and std: measured on {len(sample)} training images")
    fingerprint = digest_of_images(class_names, splits)
    return Splits(class_names, *splits, mean, std, tuple(notes), fingerprint, passed)


def load_split(
    config: DataConfig, name: str
) -> tuple[tuple[str, ...], InMemoryImages | EncodedImages]:
    """The class names and one split by its name; of encoded images only those of this split are
    decoded where all would be held in memory. Raises DataError."""
    found = _split(config)
    images: InMemoryImages | EncodedImages = getattr(found, name)
    if isinstance(images, InMemoryImages):
        (images,) = _squares((images,), config)
    elif _in_memory((found.train, found.validation, found.test), config):
        images = decode_all(images, config.image_size, f"reading {name} images")
    return found.class_names, images


def held_out(config: DataConfig, class_names: tuple[str, ...]) -> list[int]:
    """The labels of the classes that training does not see. Raises DataError for a class that the
    data does not have, and where fewer than two are left to be seen."""
    names = read_names("data.unseen_classes", config.unseen_classes)
    wanted = resolve_classes(names, class_names, field="data.unseen_classes")
    if names and len(class_names) - len(wanted) < 2:
        raise DataError(
            f"data.unseen_classes: leaves {len(class_names) - len(wanted)} of {len(class_names)} "
            "classes "
            "to be seen; at least two are needed"
        )
    return [label for label, name in enumerate(class_names) if name in wanted]


AUTO_BYTES = 2 * 2**30
"""With data.storage auto, larger sets of squares stay files. The size alone decides, not the free
memory of the moment: every process and every resumption of a run must come to the same."""


def _in_memory(splits: tuple[EncodedImages, ...], config: DataConfig) -> bool:
    """Whether the squares of encoded images are to be held in memory. Raises SystemFault where
    they should and do not fit."""
    number = sum(len(split.labels) for split in splits)
    fits = number * 3 * config.image_size**2 <= AUTO_BYTES
    if config.storage == "files" or (config.storage == "auto" and not fits):
        return False
    check_images_fit(number, config)
    return True


def check_images_fit(number: int, config: DataConfig) -> None:
    """Refuse images that do not fit into memory before they are decoded or enlarged. Raises
    SystemFault.

    number: of images.
    """
    needed = number * 3 * config.image_size**2
    allowed = free_memory(torch.device("cpu")) * config.memory_fraction
    if needed > allowed:
        advice = "" if config.source in ("digits", "mnist", "cifar10", "cifar100") else _STAY_FILES
        raise SystemFault(
            f"{number} images need {needed / 2**30:.1f} GiB at data.image_size "
            f"{config.image_size}, allowed are {allowed / 2**30:.1f} GiB; {advice}lower "
            "data.image_size, keep fewer data.classes, or raise data.memory_fraction"
        )


_STAY_FILES = "use data.storage files, "


def _squares(splits: tuple[InMemoryImages, ...], config: DataConfig) -> tuple[InMemoryImages, ...]:
    """Images that came in memory, at the size asked for."""
    if splits[0].pixels.shape[-1] != config.image_size:
        check_images_fit(sum(len(split.labels) for split in splits), config)
    return tuple(
        InMemoryImages(_resized(pixels, config.image_size), labels) for pixels, labels in splits
    )


_MEASURED = 2048


def _sample(identities: Tensor, seed: int) -> Tensor:
    """Which images are measured for mean and deviation: int64, the same whatever their order."""
    rank = random_words(Keys(seed, 0, identities), "statistics", 1).squeeze(1)
    return rank.argsort(stable=True)[:_MEASURED]


def _check_remaining(class_names: tuple[str, ...], train: EncodedImages) -> None:
    counts = torch.bincount(train.labels, minlength=len(class_names))
    for name, number in zip(class_names, counts.tolist()):
        if number == 0:
            raise DataError(
                f"class {name!r}: data.exclude_list leaves no training image; leave the class out "
                "with data.classes"
            )


def select_fraction(
    labels: Tensor, identities: Tensor, fraction: float, seed: int, stream: str
) -> Tensor:
    """Which images are set aside: a share of every class, bool [number].

    labels, identities: int64 [number]. Ranked within the class by a word of the identity, so that
    the choice depends neither on the other classes nor on the order. At least one image of each
    class goes to either side, so a class needs two of them.
    """
    rank = random_words(Keys(seed, 0, identities), f"split/{stream}", 1).squeeze(1)
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


def _resized(pixels: Tensor, size: int) -> Tensor:
    if pixels.shape[-1] == size:
        return pixels
    resized = torch.empty((len(pixels), 3, size, size), dtype=torch.uint8)
    for part, target in zip(pixels.split(512), resized.split(512)):
        target[:] = interpolate(part, (size, size), mode="bicubic", antialias=True)
    return resized


def digest_of_images(
    class_names: tuple[str, ...], splits: tuple[InMemoryImages | EncodedImages, ...]
) -> str:
    """SHA-256 over class names, labels and pixels of splits; of encoded images over names and sizes
    [bytes] in place of pixels."""
    digest = hashlib.sha256("\n".join(class_names).encode(errors="surrogateescape"))
    for split in splits:
        if isinstance(split, InMemoryImages):
            digest.update(split.pixels.contiguous().numpy())
        else:
            _digest_names(digest, split)
        digest.update(split.labels.numpy())
    return digest.hexdigest()


def _digest_names(digest: "hashlib._Hash", split: EncodedImages) -> None:
    """Name and size of every file, in place of the pixels."""

    def fact(position: int) -> str:
        return f"{split.store.key(position)}\n{split.store.size(position)}\n"

    for line in in_threads(fact, split.positions.tolist(), "looking at the files"):
        digest.update(line.encode(errors="surrogateescape"))


def stratified_indices(labels: Tensor, number: int, *, seed: int, stream: str) -> Tensor:
    """The rows of so many images, or of all where there are fewer: int64, rising, the same for a
    seed and stream.

    labels: int64 [images]. Of each class as many as of every other, or one more, as far as it has
    them; which ones is drawn.
    """
    drawn = random_words(Keys(seed, 0, torch.arange(len(labels))), stream, 1).squeeze(1)
    order = drawn.argsort(stable=True)
    turn = torch.empty_like(labels)
    for label in labels.unique():
        members = order[labels[order] == label]
        turn[members] = torch.arange(len(members))
    return order[turn[order].argsort(stable=True)][:number].sort().values
