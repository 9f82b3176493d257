"""One pass over every image of a data set: what there is, what is bad, what lies there twice."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from deit.config.data_section import DataConfig
from deit.core.console import info, table, warn
from deit.core.errors import DataError, NotAllowedError, SystemFault
from deit.datasets.decoding import in_threads, read_picture
from deit.datasets.images import ImageStore
from deit.datasets.listing import PassedOver
from deit.datasets.sources import LISTINGS, exclude_list_line, is_excluded

_EXAMPLES = 3

MODES = {
    "1": "black and white",
    "L": "grey",
    "LA": "grey with transparency",
    "P": "palette",
    "PA": "palette with transparency",
    "RGBA": "RGB with transparency",
    "I;16": "16-bit grey",
}
"""Words for Pillow's modes; the others (RGB, CMYK, YCbCr) speak for themselves."""


class _Seen(NamedTuple):
    """What decoding one image showed; reason: why it cannot be used, or nothing. closed: whether
    that is a permission alone."""

    reason: str = ""
    closed: bool = False
    size: tuple[int, int] = (0, 0)
    format: str = ""
    mode: str = ""
    digest: bytes = b""


class _Place(NamedTuple):
    """Where a picture lies."""

    split: str
    label: int
    row: int


@dataclass
class SplitStats:
    """What a split holds. smallest, median, largest: width and height [px], ordered by area."""

    images: int
    classes: int
    smallest: tuple[int, int]
    median: tuple[int, int]
    largest: tuple[int, int]
    formats: dict[str, int]
    modes: dict[str, int]


@dataclass
class Duplicates:
    """Pictures that are there more than once: how many more, and the keys of the first groups."""

    number: int = 0
    examples: list[list[str]] = field(default_factory=list)

    def add(self, keys: list[str], number: int) -> None:
        """Count so many more of the pictures with these keys."""
        self.number += number
        if number and len(self.examples) < _EXAMPLES:
            self.examples.append(keys)


@dataclass
class ScanReport:
    """The findings, as plain values.

    problems: what is wrong with the layout, and files that may not be read. unreadable: key ->
    reason.
    within_split, across_splits, across_classes: the same picture again in its own split, in
    another split (what is measured there was trained on), under another class (one is wrong).
    passed_over: files that are not read, by the ending of their names. not_read: folders and the
    like that are not, each with a reason.
    """

    root: str
    class_names: tuple[str, ...]
    splits: dict[str, SplitStats]
    problems: list[str]
    unreadable: dict[str, str]
    within_split: Duplicates
    across_splits: Duplicates
    across_classes: Duplicates
    excluded: int = 0
    passed_over: dict[str, int] = field(default_factory=dict)
    not_read: list[str] = field(default_factory=list)


def scan(config: DataConfig) -> ScanReport:
    """Decode every image of every split of a folder, shards or reader source.

    Goes on after what is bad; raises DataError only where there is nothing to look at, and
    SystemFault where an image cannot be read now and may be sound: what is listed as bad is
    left out of every later run.
    """
    problems: list[str] = []
    listing = LISTINGS[config.source](config, (), problems.append)
    store = listing.store
    wanted = torch.ones(len(store), dtype=torch.bool)
    if config.exclude_list is not None:
        wanted = ~is_excluded(Path(config.exclude_list), store)

    def look(row: int) -> _Seen:
        try:
            picture = read_picture(store.read(row), store.name(row))
        except DataError as error:
            reason = str(error).removeprefix(f"{store.name(row)}: ")
            return _Seen(reason, isinstance(error, NotAllowedError))
        image = picture.image
        content = hashlib.blake2b(str(image.size).encode(), digest_size=16)
        content.update(image.tobytes())
        return _Seen("", False, image.size, picture.format, picture.mode, content.digest())

    splits: dict[str, SplitStats] = {}
    unreadable: dict[str, str] = {}
    copies = defaultdict(list)  # digest -> where the picture lies
    for split, rows in listing.splits.items():
        rows = rows[wanted[rows]].tolist()
        seen = list(in_threads(look, rows, f"scanning {split}"))
        labels = listing.labels[rows].tolist()
        splits[split] = _facts([one for one in seen if not one.reason], len(set(labels)))
        for row, label, one in zip(rows, labels, seen):
            if one.closed:
                problems.append(f"{store.name(row)}: {one.reason}")
            elif one.reason:
                unreadable[store.key(row)] = one.reason
            else:
                copies[one.digest].append(_Place(split, label, row))
    within, across, mislabelled = _duplicates(copies.values(), store)
    return ScanReport(
        root=config.root,
        class_names=listing.class_names,
        splits=splits,
        problems=problems,
        unreadable=unreadable,
        within_split=within,
        across_splits=across,
        across_classes=mislabelled,
        excluded=int((~wanted).sum()),
        passed_over=dict(listing.passed.files),
        not_read=listing.passed.places,
    )


def _facts(seen: list[_Seen], classes: int) -> SplitStats:
    sizes = sorted((one.size for one in seen), key=lambda size: size[0] * size[1]) or [(0, 0)]
    return SplitStats(
        images=len(seen),
        classes=classes,
        smallest=sizes[0],
        median=sizes[len(sizes) // 2],
        largest=sizes[-1],
        formats=dict(Counter(one.format for one in seen).most_common()),
        modes=dict(Counter(MODES.get(one.mode, one.mode) for one in seen).most_common()),
    )


def _duplicates(copies: Iterable[list[_Place]], store: ImageStore) -> tuple[Duplicates, ...]:
    """Copies within their split, in a later split, and under another class than the first."""
    within, across, mislabelled = Duplicates(), Duplicates(), Duplicates()
    for places in copies:
        if len(places) == 1:
            continue
        keys = [store.key(place.row) for place in places]
        splits = Counter(place.split for place in places)
        first = places[0]
        within.add(keys, len(places) - len(splits))
        across.add(keys, sum(place.split != first.split for place in places))
        mislabelled.add(keys, sum(place.label != first.label for place in places))
    return within, across, mislabelled


def print_scan(found: ScanReport) -> None:
    """A table of what is there, every bad image with its reason, warnings of duplicates."""
    rows = [
        (
            name,
            str(split.classes),
            str(split.images),
            *(f"{width} x {height}" for width, height in (split.smallest, split.median)),
            f"{split.largest[0]} x {split.largest[1]}",
            _counts(split.formats),
            _counts(split.modes),
        )
        for name, split in found.splits.items()
    ]
    columns = (
        "split",
        "classes",
        "images",
        "smallest",
        "median",
        "largest",
        "formats",
        "stored as",
    )
    table(found.root, columns, rows, text=True)
    for problem in found.problems:
        info(f"bad: {problem}")
    for key, reason in found.unreadable.items():
        info(f"bad: {key}: {reason}")
    for duplicates, where in (
        (found.within_split, "in the same split"),
        (found.across_splits, "in another split, so that it measures what was trained on"),
        (found.across_classes, "under another class, so that one of the labels is wrong"),
    ):
        if duplicates.number:
            examples = "; ".join(" = ".join(keys[:_EXAMPLES]) for keys in duplicates.examples)
            warn(f"copies of pictures: {duplicates.number} {where} ({examples})")
    for note in PassedOver(Counter(found.passed_over), found.not_read).notes(most=None):
        info(note)
    if found.excluded:
        info(f"{found.excluded} excluded images were skipped (exclude list)")


def _counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


def write_exclude_list(path: Path, found: ScanReport) -> None:
    """The unreadable images as a list for data.exclude_list, each under its reason. Raises
    SystemFault where the disk refuses."""
    lines = [f"# images of {found.root} to leave out: --data.exclude_list takes this list"]
    for key, reason in found.unreadable.items():
        lines += [f"# {reason}", exclude_list_line(key)]
    text = "\n".join(lines) + "\n"
    try:
        path.write_bytes(text.encode(errors="surrogateescape"))
    except OSError as error:
        raise SystemFault(f"--write-exclude-list {path}: {error.strerror}") from None
    info(f"wrote {path}: {len(found.unreadable)} images")


def raise_if_unreadable(found: ScanReport, listed: Path | None = None) -> None:
    """Raises DataError if anything was unreadable, with what to do about it.

    listed: where the unreadable images were listed.
    """
    bad = [f"{len(found.unreadable)} unreadable images"] if found.unreadable else []
    bad += [f"{len(found.problems)} problems of the layout"] if found.problems else []
    if not bad:
        return
    advice = ""
    if found.unreadable and listed is None:
        advice = (
            "; replace them, or list them with --write-exclude-list FILE for "
            "--data.exclude_list FILE"
        )
    elif found.unreadable:
        advice = f"; replace them, or leave them out with --data.exclude_list {listed}"
    raise DataError(f"{found.root}: {' and '.join(bad)}{advice}")
