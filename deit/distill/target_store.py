"""A target store: a folder with stored teacher outputs, found by epoch and row.

No image and no identifier is stored. A view is a function of (seed, epoch, row), so its target is
found by its row. Two checks show that a row is the same view for the writer and the reader: the
fingerprint of data, views and teachers, and checksums of the pixels of every Nth view.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from deit.config.arguments import checks_types
from deit.config.command_choices import check_path
from deit.config.input_paths import missing_store
from deit.config.sections.views import ViewsConfig
from deit.core.console import progress
from deit.core.errors import CheckpointError, ConfigError, DataError
from deit.core.file_reading import read_bytes
from deit.core.json_io import digest_of_value, parse_strict_json
from deit.core.types import Batch
from deit.datasets.loader import TrainLoader
from deit.datasets.view_batches import UnmixedViews
from deit.distill.target_fingerprint import OF_TEACHERS, differences, fingerprint_of
from deit.distill.target_format import (
    FORMAT_VERSION,
    RecordFormat,
    StoreChecks,
    decode,
    view_checksum,
)

MANIFEST = "store.json"
TARGETS = "targets.bin"
CHECKS = "checks.bin"
SHARDS = "shards"


class TargetStore:
    """A complete store. Its records are opened on first use, so it can be sent to other processes.

    Called with a batch, it returns the targets of the batch's rows, like a live teacher.

    Example:
        >>> import torch
        >>> store = TargetStore.open("checkpoints/digits-targets")
        >>> store.record_format.content, store.record_format.epochs, store.records(0).dtype.itemsize
        ('full', 1, 21)
        >>> images, rows = torch.zeros(2, 3, 8, 8), torch.tensor([5, 3])
        >>> labels, log_probs = store(Batch(images, None, torch.zeros(2, 10), rows, 0, rows))
        >>> torch.equal(labels, log_probs.argmax(dim=1)), log_probs.shape
        (True, torch.Size([2, 10]))
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.fingerprint: dict[str, Any] = manifest["fingerprint"]
        self.provenance: dict[str, Any] = manifest["provenance"]
        self.inference: dict[str, Any] = manifest["inference"]
        self.record_format = RecordFormat(**manifest["record_format"])
        self.teacher_top1: float | None = manifest["teacher_top1"]
        self.checks = StoreChecks.from_bytes((path / CHECKS).read_bytes(), self.record_format)
        self._records: tuple[int, np.ndarray] | None = None  # one value: threads share a store
        self._checked_epoch: int | None = None

    @classmethod
    @checks_types
    def open(cls, path: str | PathLike, loader: TrainLoader | None = None) -> "TargetStore":
        """Return a complete store. loader: of the views that it is for, see `attach`; without it,
        nothing shows that the batches are those that the store was written for.

        Raises the errors of `open_store` and `attach`.
        """
        store = open_store(path)
        if loader is not None:
            store.attach(loader)
        return store

    @checks_types
    def attach(self, loader: TrainLoader) -> None:
        """Compare the store with a loader's images, classes and views, and from now on a view of
        each epoch with its checksum: one that the loader makes, or if the teacher has views of its
        own, the first of them.

        loader: from one of TrainLoader's constructors. Raises DataError with all differences, and
        while training if a view is not the one that the teacher saw; ConfigError for a loader
        without splits.
        """
        if not isinstance(loader, TrainLoader) or loader.splits is None:
            raise ConfigError("loader: has no splits; make it with TrainLoader.from_config")
        stored = {
            name: value for name, value in self.fingerprint.items() if name not in OF_TEACHERS
        }
        if lines := differences(stored, fingerprint_of(loader.splits, loader)):
            raise mismatch_error(self.path, lines)
        # The loader may have other stores, for other teachers, and this one already.
        before = loader.on_views
        checks = before.checks if isinstance(before, _Checks) else {None: before} if before else {}
        loader.on_views = _Checks({**checks, self.path.resolve(): self.check_once_per_epoch})

    def __repr__(self) -> str:
        content, _, epochs, rows, _ = self.record_format
        return f"TargetStore({str(self.path)!r}, {content}, {epochs} epochs of {rows} views)"

    @property
    def input_sizes(self) -> list[int | None]:
        """The input side [px] of each of its teachers; None for any."""
        return [teacher["image_size"] for teacher in self.fingerprint["teacher"].values()]

    @property
    def digest(self) -> str:
        """SHA-256 of fingerprint, format and checks, and so of every target. A store that was
        moved, or written again with the same content, has the same digest."""
        header = {"fingerprint": self.fingerprint, "record_format": self.record_format._asdict()}
        content = json.dumps(header, sort_keys=True).encode() + self.checks.to_bytes()
        return hashlib.sha256(content).hexdigest()

    def records(self, epoch: int) -> np.ndarray:
        """Return the memory-mapped records of an epoch, [rows_per_epoch], one epoch at a time.
        Raises ValueError beyond the stored epochs."""
        opened = self._records
        if opened is None or opened[0] != epoch:
            dtype, num_rows = self.record_format.dtype, self.record_format.rows_per_epoch
            offset = epoch * num_rows * dtype.itemsize
            opened = epoch, np.memmap(self.path / TARGETS, dtype, "r", offset, (num_rows,))
            self._records = opened
        return opened[1]

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the targets of a batch: labels, int64 [B]; log-probabilities, float32 [B, C], or
        None if only labels are stored.

        Raises DataError for views of an epoch that is not stored: they are other views.
        """
        if not isinstance(batch, Batch):
            raise ConfigError(f"batch: should be of a TrainLoader; got {type(batch).__name__}")
        if not self._holds(batch.epoch):
            epochs = self.record_format.epochs
            raise DataError(
                f"teacher.target_stores {self.path}: holds the views of epochs 0 to {epochs - 1}, "
                f"but the batch is of epoch {batch.epoch}; repeat the stored views with "
                f"loader.epoch(epoch % {epochs}), or write a store of more epochs"
            )
        rows = batch.target_rows.cpu().numpy()
        epoch = batch.epoch % self.record_format.epochs
        labels, scores = decode(self.record_format, self.records(epoch)[rows])
        device = batch.images.device
        scores = None if scores is None else scores.to(device, non_blocking=True)
        return labels.to(device, non_blocking=True), scores

    def _holds(self, epoch: int) -> bool:
        """Return whether the views of an epoch are stored; fixed views are those of every epoch."""
        views = ViewsConfig(teacher_view=self.fingerprint["views"]["teacher_view"])
        end = math.inf if views.has_fixed_teacher_view else self.record_format.epochs
        return 0 <= epoch < end

    def check_once_per_epoch(self, views: UnmixedViews) -> None:
        """Compare the first view of each epoch that has a checksum. Raises DataError.

        Only the first, because each comparison synchronizes a GPU.
        """
        if views.epoch == self._checked_epoch or not self._holds(views.epoch):
            return
        for index in self.record_format.checked_indices(views.target_rows)[:1]:
            self.check_view(views, index)
            self._checked_epoch = views.epoch

    def check_view(self, views: UnmixedViews, index: int) -> None:
        """Compare a view of a batch with its checksum in the store. Raises DataError.

        index: of the view in the batch; its row has a checksum.
        """
        target_row = int(views.target_rows[index])
        epoch = views.epoch % self.record_format.epochs
        stored = self.checks.views[epoch][target_row // self.record_format.check_interval]
        if view_checksum(views, index) != int(stored):
            packages = self.provenance["packages"]
            raise DataError(
                f"teacher.target_stores {self.path}: row {target_row} of epoch {epoch} (training "
                f"image {int(views.sample_ids[index])}) is not the view that the teacher saw: its "
                "pixels or mixing differ; did the image or its decoder change (written with "
                f"pillow {packages['pillow']}, torchvision {packages['torchvision']})?"
            )

    def verify_checksums(self) -> None:
        """Read all records and compare the checksums of shards. Raises CheckpointError naming the
        first shard that differs."""
        size = self.record_format.rows_per_shard * self.record_format.dtype.itemsize
        shards = range(self.record_format.num_shards)
        with (self.path / TARGETS).open("rb") as file:
            for shard in progress(shards, total=len(shards), title="reading the store"):
                if zlib.crc32(file.read(size)) != int(self.checks.shards[shard]):
                    epoch, row, _ = self.record_format.epoch_ranges(shard)[0]
                    raise CheckpointError(
                        f"{self.path / TARGETS}: shard {shard} (from epoch {epoch}, row {row}) is "
                        "damaged: its checksum differs; write the store again"
                    )


class _Checks(NamedTuple):
    """Functions that a loader calls with its views, by the folder of their store."""

    checks: dict[Path | None, Callable[[UnmixedViews], None]]

    def __call__(self, views: UnmixedViews) -> None:
        for check in self.checks.values():
            check(views)


_DIGEST = "sha256"


def mismatch_error(path: Path, lines: list[str]) -> DataError:
    """Return the error that a store was written for other data. lines: the differences."""
    hint = ""
    if any(line.startswith("seed:") for line in lines):
        hint = "\n  (views.seed sets the seed of the views independently of run.seed)"
    return DataError(
        f"teacher.target_stores {path}: was written for other data, views or teachers; write a "
        "store for this configuration, or train the one it was written for:"
        + "".join(f"\n  {line}" for line in lines)
        + hint
    )


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """Return the content of a store's manifest file, with a digest against edits."""
    value = {**manifest, _DIGEST: digest_of_value(manifest)}
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a store, complete or not.

    Raises FileNotFoundError and CheckpointError.
    """
    file = path / MANIFEST
    try:
        manifest = parse_strict_json(read_bytes(file))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable ({error})") from None
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{file}: format {version}, this release reads {FORMAT_VERSION}")
    if manifest.pop(_DIGEST, None) != digest_of_value(manifest):
        raise CheckpointError(
            f"{file}: was edited or is damaged (its digest differs); write the store again"
        )
    try:
        _check_manifest(manifest)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: not a store's manifest ({type(error).__name__}: {error}); write the store "
            "again"
        ) from None
    return manifest


_SECTIONS = ("fingerprint", "provenance", "inference", "record_format")


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise KeyError, TypeError, ValueError or AttributeError if a value is missing or invalid."""
    for name, kind in (dict.fromkeys(_SECTIONS, dict) | {"complete": bool}).items():
        if not isinstance(manifest[name], kind):
            raise TypeError(f"{name} is {manifest[name]!r}")
    manifest["teacher_top1"]
    for teacher in manifest["fingerprint"]["teacher"].values():
        teacher["image_size"]
    record_format = RecordFormat(**manifest["record_format"])
    counts = (record_format.num_classes, record_format.epochs, record_format.rows_per_epoch)
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise ValueError(f"record_format {tuple(record_format)}")
    if record_format.content not in ("hard", "full") and record_format.top_k is None:
        raise ValueError(f"records {record_format.content!r}")


def open_store(path: str | PathLike) -> TargetStore:
    """Return a complete store. path: its folder, as written by `write_targets`.

    Raises DataError if there is none or it is incomplete, and CheckpointError if its files are
    truncated or of another format.
    """
    path = Path(check_path("path", path))
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        raise DataError(missing_store(path)) from None
    record_format = RecordFormat(**manifest["record_format"])
    if not manifest["complete"]:
        num_written = len(list((path / SHARDS).glob("[0-9]*.bin")))
        raise DataError(
            f"teacher.target_stores {path}: incomplete, {num_written} of "
            f"{record_format.num_shards} shards are written; run the same `deit targets write` "
            "command again to finish it"
        )
    sizes = {
        TARGETS: record_format.rows * record_format.dtype.itemsize,
        CHECKS: StoreChecks.num_bytes(record_format),
    }
    for name, size in sizes.items():
        file = path / name
        state = f"has {file.stat().st_size} bytes" if file.is_file() else "is missing"
        if state != f"has {size} bytes":
            raise CheckpointError(
                f"{file}: {state}, should have {size} bytes; write the store again"
            )
    return TargetStore(path, manifest)
