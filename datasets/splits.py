"""Load and split the images of a run: training, validation for model selection, and test."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from deit.config.arguments import checks_types
from deit.config.sections.data import DataConfig
from deit.core.errors import DataError, SystemFault
from deit.core.host_memory import free_memory
from deit.core.rng import Keys, random_words
from deit.core.user_code import read_names
from deit.datasets.decoding import decode_all, map_threads
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.sources.listing import check_classes
from deit.datasets.sources.registry import SOURCES, Loaded


class Splits(NamedTuple):
    """The images of a run. All three splits are in memory, or all three stay encoded.

    class_names: of the labels, in order.
    mean, std: per channel over the training images, for values in [0, 1].
    notes: how the splits were made, as lines of text.
    fingerprint: SHA-256 of class names, labels and pixels of all splits; for encoded images of
    names and sizes [bytes] instead of pixels.
    skipped: what is not read, as lines of text.
    """

    class_names: tuple[str, ...]
    train: InMemoryImages | EncodedImages
    validation: InMemoryImages | EncodedImages
    test: InMemoryImages | EncodedImages
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    notes: tuple[str, ...]
    fingerprint: str
    skipped: tuple[str, ...] = ()


class _SplitImages(NamedTuple):
    """The splits before decoding, and the identity of each training image."""

    class_names: tuple[str, ...]
    train: InMemoryImages | EncodedImages
    validation: InMemoryImages | EncodedImages
    test: InMemoryImages | EncodedImages
    identities: Tensor
    notes: tuple[str, ...]
    skipped: tuple[str, ...]


def _load_and_split(config: DataConfig) -> _SplitImages:
    """Load the source and split off the parts that it does not provide. Raises DataError."""
    loaded = SOURCES[config.source](config, read_names("data.classes", config.classes))
    train, validation, test = loaded.train, loaded.validation, loaded.test
    identities, notes = loaded.identities, []
    _check_counts(loaded, config)
    free = torch.ones(len(train.labels), dtype=torch.bool)  # not yet in any split

    def take(fraction: float, stream: str) -> Tensor:
        taken = free.clone()
        taken[free] = select_fraction(
            train.labels[free], identities[free], fraction, config.split_seed, stream
        )
        free[taken] = False
        return taken

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
    if loaded.excluded is not None:
        # After splitting, so that excluding images does not move others to another split.
        before = len(train.labels) + len(validation.labels) + len(test.labels)
        remaining = ~loaded.excluded[train.positions]
        train, identities = train.select(remaining), identities[remaining]
        validation, test = (
            split.select(~loaded.excluded[split.positions]) for split in (validation, test)
        )
        _check_remaining(loaded.class_names, train)
        count = before - len(train.labels) - len(validation.labels) - len(test.labels)
        notes.append(f"exclude list: {count} images excluded, listed in {config.exclude_list}")
    unseen = unseen_labels(config, loaded.class_names)
    if unseen:
        # Last, so that all other images stay in their splits.
        seen = ~torch.isin(train.labels, torch.tensor(unseen))
        train, identities = train.select(seen), identities[seen]
        validation = validation.select(~torch.isin(validation.labels, torch.tensor(unseen)))
        named = ", ".join(loaded.class_names[label] for label in unseen)
        notes.append(f"unseen classes: no training or validation images of {named}")
    parts = (train, validation, test)
    return _SplitImages(loaded.class_names, *parts, identities, tuple(notes), loaded.skipped)


@checks_types
def load_splits(config: DataConfig) -> Splits:
    """Load the images of a run and split them.

    Parts that the source does not provide are split off the training images by
    data.validation_fraction and data.test_fraction. Raises DataError if images are missing,
    unreadable or too few, SystemFault if they do not fit into memory.

    >>> splits = load_splits(DataConfig(source="folder", root="pets", image_size=8))
    >>> splits.class_names, splits.train.pixels.shape  # 14 of the 20 images in pets/cat, pets/dog
    (('cat', 'dog'), torch.Size([14, 3, 8, 8]))
    """
    class_names, train, validation, test, identities, split_notes, skipped = _load_and_split(config)
    splits, notes = (train, validation, test), list(split_notes)
    if isinstance(train, InMemoryImages):
        splits = _to_squares(splits, config)
    elif _use_memory(splits, config):
        splits = tuple(
            decode_all(split, config.image_size, f"reading {name} images")
            for name, split in zip(("training", "validation", "test"), splits)
        )
    else:
        notes.append("images stay encoded (data.storage files)")
    if isinstance(splits[0], InMemoryImages):
        mean, std = channel_statistics(splits[0].pixels)
    else:
        sample = _statistics_sample(identities, config.split_seed)
        measured = decode_all(train.select(sample), config.image_size, "measuring mean and std")
        mean, std = channel_statistics(measured.pixels)
        if len(sample) < len(train.labels):
            notes.append(f"mean and std: of a sample of {len(sample)} training images")
    fingerprint = digest_of_images(class_names, splits)
    return Splits(class_names, *splits, mean, std, tuple(notes), fingerprint, skipped)


def load_split(
    config: DataConfig, name: str
) -> tuple[tuple[str, ...], InMemoryImages | EncodedImages]:
    """Return the class names and the images of one split: train, validation or test.

    Only the images of this split are decoded. Raises DataError and SystemFault as `load_splits`.

    >>> class_names, images = load_split(DataConfig(source="digits", image_size=8), "test")
    >>> len(class_names), images.pixels.dtype, images.pixels[0].shape
    (10, torch.uint8, torch.Size([3, 8, 8]))
    """
    splits = _load_and_split(config)
    images: InMemoryImages | EncodedImages = getattr(splits, name)
    if isinstance(images, InMemoryImages):
        (images,) = _to_squares((images,), config)
    elif _use_memory((splits.train, splits.validation, splits.test), config):
        images = decode_all(images, config.image_size, f"reading {name} images")
    return splits.class_names, images


def unseen_labels(config: DataConfig, class_names: tuple[str, ...]) -> list[int]:
    """Return the labels of data.unseen_classes, of which training sees no images.

    Raises DataError for an unknown class, or if fewer than two classes would remain.
    """
    names = read_names("data.unseen_classes", config.unseen_classes)
    check_classes(names, class_names, field="data.unseen_classes")
    unseen = set(names)
    if names and len(class_names) - len(unseen) < 2:
        raise DataError(
            f"data.unseen_classes: leaves {len(class_names) - len(unseen)} of {len(class_names)} "
            "classes for training; at least two are needed"
        )
    return [label for label, name in enumerate(class_names) if name in unseen]


AUTO_BYTES = 2 * 2**30
"""With data.storage auto, larger datasets stay encoded. Only the size of the decoded images counts,
not the free memory, so that all processes and all resumptions of a run decide alike."""


def _use_memory(splits: tuple[EncodedImages, ...], config: DataConfig) -> bool:
    """Return whether to decode images into memory. Raises SystemFault if they do not fit."""
    count = sum(len(split.labels) for split in splits)
    fits = count * 3 * config.image_size**2 <= AUTO_BYTES
    if config.storage == "files" or (config.storage == "auto" and not fits):
        return False
    check_images_fit(count, config)
    return True


def check_images_fit(count: int, config: DataConfig) -> None:
    """Raise SystemFault if `count` images of data.image_size do not fit into memory."""
    needed = count * 3 * config.image_size**2
    allowed = free_memory(torch.device("cpu")) * config.memory_fraction
    if needed > allowed:
        advice = "" if config.source in ("digits", "mnist", "cifar10", "cifar100") else _STAY_FILES
        raise SystemFault(
            f"{count} images need {needed / 2**30:.1f} GiB at data.image_size "
            f"{config.image_size}, but {allowed / 2**30:.1f} GiB are allowed; {advice}lower "
            "data.image_size, use fewer data.classes, or raise data.memory_fraction"
        )


_STAY_FILES = "use data.storage files, "


def _to_squares(
    splits: tuple[InMemoryImages, ...], config: DataConfig
) -> tuple[InMemoryImages, ...]:
    """Resize images in memory to data.image_size."""
    if splits[0].pixels.shape[-1] != config.image_size:
        check_images_fit(sum(len(split.labels) for split in splits), config)
    return tuple(
        InMemoryImages(_resize(pixels, config.image_size), labels) for pixels, labels in splits
    )


_MEASURED = 2048


def _statistics_sample(identities: Tensor, seed: int) -> Tensor:
    """Return the indices of the images for mean and std, int64, independent of their order."""
    rank = random_words(Keys(seed, 0, identities), "statistics", 1).squeeze(1)
    return rank.argsort(stable=True)[:_MEASURED]


def _check_remaining(class_names: tuple[str, ...], train: EncodedImages) -> None:
    counts = torch.bincount(train.labels, minlength=len(class_names))
    for name, count in zip(class_names, counts.tolist()):
        if count == 0:
            raise DataError(
                f"class {name!r}: data.exclude_list leaves no training images; remove the class "
                "with data.classes"
            )


def select_fraction(
    labels: Tensor, identities: Tensor, fraction: float, seed: int, stream: str
) -> Tensor:
    """Select a fraction of each class, bool [images].

    labels, identities: int64 [images]. fraction: in (0, 1). Images are ranked within a class by a
    random word of (seed, stream, identity), so the selection does not depend on their order or on
    other classes. At least one image of each class is selected and one is not.
    """
    rank = random_words(Keys(seed, 0, identities), f"split/{stream}", 1).squeeze(1)
    is_selected = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        is_selected[members[rank[members].argsort(stable=True)[:count]]] = True
    return is_selected


def _check_counts(loaded: Loaded, config: DataConfig) -> None:
    """Raise DataError unless there are two classes, each with enough images to split."""
    if len(loaded.class_names) < 2:
        raise DataError(
            f"only one class ({loaded.class_names[0]!r}): a classifier needs at least two"
        )
    parts = (loaded.validation is None, loaded.test is None, config.train_fraction < 1)
    needed = 1 + sum(parts)
    counts = torch.bincount(loaded.train.labels, minlength=len(loaded.class_names))
    for name, count in zip(loaded.class_names, counts.tolist()):
        if count < needed:
            raise DataError(
                f"class {name!r} has {count} image(s), but {needed} are needed to split it; add "
                "images, or remove the class with data.classes"
            )


def channel_statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of uint8 [images, 3, height, width].

    Both are for values in [0, 1], computed exactly from a histogram. The standard deviation of a
    constant channel is 1.

    >>> pixels = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    >>> channel_statistics(pixels)
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(3):
        counts = torch.bincount(pixels[:, channel].flatten(), minlength=256).double()
        share = counts / counts.sum()
        center = (share * levels).sum()
        mean.append(center.item())
        std.append(((share * (levels - center) ** 2).sum().sqrt()).item() or 1.0)
    return tuple(mean), tuple(std)


def _resize(pixels: Tensor, size: int) -> Tensor:
    if pixels.shape[-1] == size:
        return pixels
    resized = torch.empty((len(pixels), 3, size, size), dtype=torch.uint8)
    for part, target in zip(pixels.split(512), resized.split(512)):
        target[:] = interpolate(part, (size, size), mode="bicubic", antialias=True)
    return resized


def digest_of_images(
    class_names: tuple[str, ...], splits: tuple[InMemoryImages | EncodedImages, ...]
) -> str:
    """Return the SHA-256 of class names, labels and pixels of splits.

    For encoded images, names and sizes [bytes] are used instead of pixels.
    """
    digest = hashlib.sha256("\n".join(class_names).encode(errors="surrogateescape"))
    for split in splits:
        if isinstance(split, InMemoryImages):
            digest.update(split.pixels.contiguous().numpy())
        else:
            _digest_names(digest, split)
        digest.update(split.labels.numpy())
    return digest.hexdigest()


def _digest_names(digest: "hashlib._Hash", split: EncodedImages) -> None:
    """Add name and size of each file to the digest."""

    def name_and_size(position: int) -> str:
        return f"{split.store.key(position)}\n{split.store.size(position)}\n"

    for lines in map_threads(name_and_size, split.positions.tolist(), "checking file sizes"):
        digest.update(lines.encode(errors="surrogateescape"))


def stratified_indices(labels: Tensor, count: int, *, seed: int, stream: str) -> Tensor:
    """Select `count` images at random with class counts as equal as possible.

    labels: int64 [images]. Return sorted indices, int64 [min(count, images)], a function of
    `labels`, `seed` and `stream` only. Class counts differ by at most one, unless a class has too
    few images.

    >>> labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    >>> indices = stratified_indices(labels, 5, seed=0, stream="example")
    >>> torch.bincount(labels[indices]).tolist()
    [2, 2, 1]
    """
    rank = random_words(Keys(seed, 0, torch.arange(len(labels))), stream, 1).squeeze(1)
    order = rank.argsort(stable=True)
    rank_in_class = torch.empty_like(labels)
    for label in labels.unique():
        members = order[labels[order] == label]
        rank_in_class[members] = torch.arange(len(members))
    return order[rank_in_class[order].argsort(stable=True)][:count].sort().values
