"""Scan every image of a dataset in one pass: contents, unreadable files and duplicates."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from deit.config.recipes import RECIPES
from deit.config.sections.data import DataConfig
from deit.core.console import count_noun, info, table, warn
from deit.core.errors import DataError, NotAllowedError, SystemFault
from deit.datasets.decoding import decode_image, map_threads
from deit.datasets.images import ImageStore
from deit.datasets.sources.listing import SkippedFiles
from deit.datasets.sources.registry import LISTINGS, exclude_list_line, is_excluded

_EXAMPLES = 3
MIN_SIDE = RECIPES["folder"]().student.image_size // 8
"""Images with a shorter side [px] are reported: enlarged eight times, few show anything."""

MODES = {
    "1": "black and white",
    "L": "gray",
    "LA": "gray with transparency",
    "P": "palette",
    "PA": "palette with transparency",
    "RGBA": "RGB with transparency",
    "I;16": "16-bit gray",
}
"""Descriptions of Pillow's modes; other modes (RGB, CMYK, YCbCr) are reported by their names."""


class _ImageInfo(NamedTuple):
    """The result of decoding one image.

    reason: why it cannot be used, or "". no_permission: whether the reason is a permission only.
    """

    reason: str = ""
    no_permission: bool = False
    size: tuple[int, int] = (0, 0)
    format: str = ""
    mode: str = ""
    digest: bytes = b""


class _Location(NamedTuple):
    """Where an image is: its split, label and row of the store."""

    split: str
    label: int
    row: int


@dataclass
class SplitStats:
    """The contents of a split. smallest, median, largest: width and height [px], by area."""

    images: int
    classes: int
    smallest: tuple[int, int]
    median: tuple[int, int]
    largest: tuple[int, int]
    formats: dict[str, int]
    modes: dict[str, int]


@dataclass
class Duplicates:
    """Repeated images. count: of the repetitions; examples: keys of the first groups."""

    count: int = 0
    examples: list[list[str]] = field(default_factory=list)

    def add(self, keys: list[str], count: int) -> None:
        """Add `count` repetitions of the image that has these keys."""
        self.count += count
        if count and len(self.examples) < _EXAMPLES:
            self.examples.append(keys)


@dataclass
class ScanReport:
    """The results of a scan, as plain values.

    problems: errors in the layout, and files without read permission. unreadable: key -> reason.
    within_split, across_splits, across_classes: repetitions of an image in its own split, in
    another split (so that training images are evaluated), and under another class (so that one
    label is wrong). small: key -> width and height [px] of images with a side below
    MIN_SIDE. excluded: number of images on the exclude list. passed_over: number of files
    that are no images, by extension. not_read: folders and other entries that are not read, each
    with a reason.
    """

    root: str
    class_names: tuple[str, ...]
    splits: dict[str, SplitStats]
    problems: list[str]
    unreadable: dict[str, str]
    within_split: Duplicates
    across_splits: Duplicates
    across_classes: Duplicates
    small: dict[str, tuple[int, int]] = field(default_factory=dict)
    excluded: int = 0
    passed_over: dict[str, int] = field(default_factory=dict)
    not_read: list[str] = field(default_factory=list)


def scan(data: DataConfig | str | Path) -> ScanReport:
    """Decode every image of every split of a folder, shards or reader source.

    data: its configuration, or the path of a folder source. Unreadable images are recorded and the
    scan continues. Raises DataError if there are no images at all, and SystemFault if an image
    cannot be read for a reason of the machine: it may be valid, and every image on an exclude list
    is left out of all later runs.

    >>> report = scan("pets")
    >>> report.class_names, report.splits["train"].images, report.unreadable
    (('cat', 'dog'), 20, {})
    """
    config = data if isinstance(data, DataConfig) else DataConfig(source="folder", root=str(data))
    problems: list[str] = []
    listing = LISTINGS[config.source](config, (), problems.append)
    store = listing.store
    excluded = _excluded(config.exclude_list, store, problems)

    def decode(row: int) -> _ImageInfo:
        try:
            stored = decode_image(store.read(row), store.name(row))
        except DataError as error:
            reason = str(error).removeprefix(f"{store.name(row)}: ")
            return _ImageInfo(reason, isinstance(error, NotAllowedError))
        image = stored.image
        content = hashlib.blake2b(str(image.size).encode(), digest_size=16)
        content.update(image.tobytes())
        return _ImageInfo("", False, image.size, stored.format, stored.mode, content.digest())

    splits, unreadable, small = {}, {}, {}
    copies = defaultdict(list)  # digest -> locations
    for split, rows in listing.splits.items():
        rows = rows[~excluded[rows]].tolist()
        decoded = list(map_threads(decode, rows, f"scanning {split}"))
        labels = listing.labels[rows].tolist()
        splits[split] = _split_stats(decoded, len(set(labels)))
        for row, label, image in zip(rows, labels, decoded):
            if image.no_permission:
                problems.append(f"{store.name(row)}: {image.reason}")
            elif image.reason:
                unreadable[store.key(row)] = image.reason
            else:
                copies[image.digest].append(_Location(split, label, row))
                if min(image.size) < MIN_SIDE:
                    small[store.key(row)] = image.size
    within, across, mislabeled = _duplicates(copies.values(), store)
    return ScanReport(
        root=config.root,
        class_names=listing.class_names,
        splits=splits,
        problems=problems,
        unreadable=unreadable,
        within_split=within,
        across_splits=across,
        across_classes=mislabeled,
        small=small,
        excluded=int(excluded.sum()),
        passed_over=dict(listing.skipped.files),
        not_read=listing.skipped.paths,
    )


def _excluded(path: str | None, store: ImageStore, problems: list[str]) -> torch.Tensor:
    """Return `is_excluded`, nothing without a list.

    If it fails, the message has the problems of the layout, a likely cause, first.
    """
    if path is None:
        return torch.zeros(len(store), dtype=torch.bool)
    try:
        return is_excluded(path, store)
    except DataError as error:
        raise DataError("; ".join([*problems, str(error)])) from None


def _split_stats(images: list[_ImageInfo], num_classes: int) -> SplitStats:
    images = [image for image in images if not image.reason]
    sizes = sorted((image.size for image in images), key=lambda size: size[0] * size[1])
    sizes = sizes or [(0, 0)]
    return SplitStats(
        images=len(images),
        classes=num_classes,
        smallest=sizes[0],
        median=sizes[len(sizes) // 2],
        largest=sizes[-1],
        formats=dict(Counter(image.format for image in images).most_common()),
        modes=dict(Counter(MODES.get(image.mode, image.mode) for image in images).most_common()),
    )


def _duplicates(copies: Iterable[list[_Location]], store: ImageStore) -> tuple[Duplicates, ...]:
    """Return the repetitions within a split, in a later split, and under another class."""
    within, across, mislabeled = Duplicates(), Duplicates(), Duplicates()
    for locations in copies:
        if len(locations) == 1:
            continue
        keys = [store.key(location.row) for location in locations]
        num_splits = len({location.split for location in locations})
        first = locations[0]
        within.add(keys, len(locations) - num_splits)
        across.add(keys, sum(location.split != first.split for location in locations))
        mislabeled.add(keys, sum(location.label != first.label for location in locations))
    return within, across, mislabeled


def print_scan(report: ScanReport) -> None:
    """Print a table of the splits, every unreadable image with its reason, and duplicates."""
    rows = [
        (
            name,
            str(split.classes),
            str(split.images),
            *(f"{width} x {height}" for width, height in (split.smallest, split.median)),
            f"{split.largest[0]} x {split.largest[1]}",
            _format_counts(split.formats),
            _format_counts(split.modes),
        )
        for name, split in report.splits.items()
    ]
    columns = (
        "split",
        "classes",
        "images",
        "smallest",
        "median",
        "largest",
        "formats",
        "color modes",
    )
    table(report.root, columns, rows, text=True)
    for problem in report.problems:
        info(f"bad: {problem}")
    for key, reason in report.unreadable.items():
        info(f"bad: {key}: {reason}")
    if report.small:
        listed = [f"{key} {w} x {h}" for key, (w, h) in report.small.items()]
        examples = ", ".join(listed[:_EXAMPLES]) + ", ..." * (len(listed) > _EXAMPLES)
        warn(
            f"small images: {len(listed)} with a side below {MIN_SIDE} px, an eighth of the "
            f"{8 * MIN_SIDE} px at which the recipe `folder` trains ({examples}); remove them if "
            "they show nothing"
        )
    for duplicates, where in (
        (report.within_split, "in the same split"),
        (report.across_splits, "in another split, so training images are also evaluated"),
        (report.across_classes, "in another class, so one of the labels is wrong"),
    ):
        if duplicates.count:
            examples = "; ".join(" = ".join(keys[:_EXAMPLES]) for keys in duplicates.examples)
            warn(f"duplicate images: {duplicates.count} {where} ({examples})")
    for note in SkippedFiles(Counter(report.passed_over), report.not_read).notes(max_paths=None):
        info(note)
    if report.excluded:
        info(f"skipped {count_noun(report.excluded, 'image')} of the exclude list")


def _format_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def write_exclude_list(report: ScanReport, path: str | Path) -> None:
    """Write the unreadable images as a list for data.exclude_list, each below its reason.

    Raises SystemFault if the file cannot be written.
    """
    path = Path(path)
    lines = [f"# unreadable images of {report.root}, a list for data.exclude_list"]
    for key, reason in report.unreadable.items():
        lines += [f"# {reason}", exclude_list_line(key)]
    text = "\n".join(lines) + "\n"
    try:
        path.write_bytes(text.encode(errors="surrogateescape"))
    except OSError as error:
        raise SystemFault(f"{path}: {error.strerror}") from None
    info(f"wrote {path}: {count_noun(len(report.unreadable), 'image')}")


def raise_if_unreadable(report: ScanReport, exclude_list: str | Path | None = None) -> None:
    """Raise DataError, with the remedy, if the scan had problems or unreadable images.

    exclude_list: the list that the unreadable images were written to.
    """
    errors = []
    if report.problems:
        count = count_noun(len(report.problems), "problem")
        errors.append(
            f"{count} of folders or permissions, which no exclude list solves: {report.problems[0]}"
        )
    if report.unreadable:
        advice = (
            "write a list of them (--write-exclude-list FILE) and exclude them with "
            "data.exclude_list"
            if exclude_list is None
            else f"exclude them with data.exclude_list {exclude_list}"
        )
        count = count_noun(len(report.unreadable), "unreadable image")
        errors.append(f"{count}; replace them, or {advice}")
    if errors:
        raise DataError(f"{report.root}: {'; '.join(errors)}")
