"""A target store: the files and records of stored teacher outputs, and their checks.

No image and no identifier is stored. A view is a function of (seed, epoch, row), so its target is
found by its row. Fingerprints show that a row is the same view for writer and reader, and so do
canaries: checksums of the pixels of every Nth view.
"""

import hashlib
import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deit.core.console import progress
from deit.core.errors import CheckpointError, DataError
from deit.core.file_reading import read_bytes
from deit.core.json_io import digest_of_value, parse_strict_json
from deit.core.types import Batch
from deit.datasets.loader import TeacherInput

FORMAT = 3
MANIFEST = "store.json"
TARGETS = "targets.bin"
CHECKS = "checks.bin"
SHARDS = "shards"
_MAX_SHARDS = 2048
_MIN_ROWS = 4096
_CANARY_STEP = 1024
_MIN_CANARIES = 8


def top_k_of(content: str) -> int | None:
    """Return K of top-K; None for hard and full."""
    return int(content.removeprefix("top-")) if content.startswith("top-") else None


class RecordFormat(NamedTuple):
    """The format of a store: one record for each row of each epoch, in that order.

    content: hard (the label); full (label and all log-probabilities in fp16); or top-K (labels and
    log-probabilities of the K largest). epochs: 1 if the teacher's view of an image is fixed.
    mixed_pairs: whether neighboring rows are mixed, so that a view consists of two images.
    """

    content: str
    num_classes: int
    epochs: int
    rows_per_epoch: int
    mixed_pairs: bool

    @property
    def top_k(self) -> int | None:
        """K of top-K; None for the others."""
        return top_k_of(self.content)

    @property
    def dtype(self) -> np.dtype:
        """The type of a record, little-endian."""
        label = "u1" if self.num_classes <= 256 else "<u2"
        if self.top_k is not None:
            return np.dtype([("labels", label, self.top_k), ("scores", "<f2", self.top_k)])
        if self.content == "full":
            return np.dtype([("label", label), ("scores", "<f2", self.num_classes)])
        return np.dtype([("label", label)])

    @property
    def rows(self) -> int:
        """Number of records of all epochs."""
        return self.epochs * self.rows_per_epoch

    @property
    def rows_per_shard(self) -> int:
        """Number of records of a shard, which is written atomically."""
        minimum = max(self.rows / _MAX_SHARDS, _MIN_ROWS)
        return 2 ** math.ceil(math.log2(minimum))

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.rows_per_shard)

    @property
    def canary_step(self) -> int:
        """Rows from one canary to the next, even; an epoch has at least eight canaries."""
        return max(2, min(_CANARY_STEP, self.rows_per_epoch // _MIN_CANARIES // 2 * 2))

    @property
    def canary_rows(self) -> range:
        """The rows of an epoch that have a canary."""
        return range(0, self.rows_per_epoch - self.mixed_pairs, self.canary_step)

    def epoch_ranges(self, shard: int) -> list[tuple[int, int, int]]:
        """Return the rows of a shard as (epoch, first row, last row + 1)."""
        first, last = shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.rows)
        ranges = []
        while first < last:
            epoch, row = divmod(first, self.rows_per_epoch)
            stop = min(self.rows_per_epoch, row + last - first)
            ranges.append((epoch, row, stop))
            first += stop - row
        return ranges


def encode(record_format: RecordFormat, logits: Tensor) -> np.ndarray:
    """Return the records [rows] of a teacher's logits, float32 [rows, C].

    The label is the argmax before rounding. Log-probabilities are stored instead of logits:
    softmax(logp / T) equals softmax(logits / T) for every T, and fp16 is most precise near 0, where
    the probability is large.

    Example:
        >>> record_format = RecordFormat("hard", 3, epochs=1, rows_per_epoch=2, mixed_pairs=False)
        >>> records = encode(record_format, torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]]))
        >>> records.nbytes, decode(record_format, records)[0].tolist()
        (2, [1, 0])
    """
    records = np.zeros(len(logits), dtype=record_format.dtype)
    scores = logits.double().log_softmax(dim=1).clamp_min(-65504.0)
    if (k := record_format.top_k) is not None:
        # Sorted before rounding, which can make different values equal.
        order = logits.double().argsort(dim=1, descending=True, stable=True)[:, :k]
        records["labels"] = order.cpu().numpy()
        records["scores"] = scores.gather(1, order).cpu().numpy()
        return records
    records["label"] = logits.argmax(dim=1).cpu().numpy()
    if record_format.content == "full":
        records["scores"] = scores.cpu().numpy()
    return records


def decode(record_format: RecordFormat, records: np.ndarray) -> tuple[Tensor, Tensor | None]:
    """Return labels, int64 [rows], and log-probabilities, float32 [rows, C], if they are stored.

    With top-K, the other classes share the remaining probability equally.
    """
    if record_format.content == "hard":
        return torch.from_numpy(records["label"].astype(np.int64)), None
    scores = torch.from_numpy(records["scores"].astype(np.float32))
    if record_format.top_k is None:
        return torch.from_numpy(records["label"].astype(np.int64)), scores
    labels = torch.from_numpy(records["labels"].astype(np.int64))
    num_others = max(record_format.num_classes - record_format.top_k, 1)
    rest = (1 - scores.exp().sum(dim=1, keepdim=True)).clamp_min(1e-8) / num_others
    remaining = rest.log().expand(-1, record_format.num_classes)
    return labels[:, 0], remaining.scatter(1, labels, scores)


def canary(block: TeacherInput, row: int) -> int:
    """Return the CRC-32 of the teacher's view in a row of a block.

    It covers the pixels; with mixing (`row` is even) those of both images, the weight and the box.
    """
    num_images = 1 if block.mix is None else 2
    value = zlib.crc32(block.views[row : row + num_images].contiguous().cpu().numpy().tobytes())
    if block.mix is None:
        return value
    pair = row // 2
    # Rounded: the weight is computed by log and cos, whose last bits differ between devices.
    weight = round(float(block.mix.lam[pair]) * 2**20)
    numbers = [weight, int(block.mix.is_cutmix[pair]), *block.mix.boxes[pair].tolist()]
    return zlib.crc32(struct.pack("<6q", *numbers), value)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested dictionary as a flat one, with keys such as `views.crop`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return `key: X in the store, Y in this run` for each value that differs."""
    before, now = flatten(stored), flatten(current)
    return [
        f"{key}: {_short(before.get(key))} in the store, {_short(now.get(key))} in this run"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    ]


def _short(value: Any) -> str:
    digest = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}..." if digest else repr(value)


class TargetStore:
    """A complete store. Its records are opened on first use, so it can be sent to other processes.

    Called with a batch, it returns the targets of the batch's rows, like a live teacher.

    Example:
        >>> store = open_store("checkpoints/digits-targets")
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
        self._epoch, self._records = -1, np.empty(0, self.record_format.dtype)
        self._checked_epoch = -1
        self._checks = np.fromfile(path / CHECKS, "<u4")

    @property
    def input_sizes(self) -> list[int | None]:
        """The input side [px] of each of its teachers; None for any."""
        return [teacher["image_size"] for teacher in self.fingerprint["teacher"].values()]

    @property
    def digest(self) -> str:
        """SHA-256 of fingerprint, format and checksums, and so of every target. A store that was
        moved, or written again with the same content, has the same digest."""
        header = {"fingerprint": self.fingerprint, "record_format": self.record_format._asdict()}
        content = json.dumps(header, sort_keys=True).encode() + self._checks.tobytes()
        return hashlib.sha256(content).hexdigest()

    @property
    def canaries(self) -> np.ndarray:
        """The canaries, uint32 [epochs, canary rows]."""
        num_shards = self.record_format.num_shards
        canaries = self._checks[num_shards : -2 * num_shards]
        return canaries.reshape(-1, len(self.record_format.canary_rows))

    @property
    def checksums(self) -> np.ndarray:
        """CRC-32 of each shard's records, uint32 [shards]."""
        return self._checks[: self.record_format.num_shards]

    def records(self, epoch: int) -> np.ndarray:
        """Return the memory-mapped records of an epoch, [rows_per_epoch], one epoch at a time.
        Raises ValueError beyond the stored epochs."""
        if epoch != self._epoch:
            dtype, num_rows = self.record_format.dtype, self.record_format.rows_per_epoch
            offset = epoch * num_rows * dtype.itemsize
            self._records = np.memmap(self.path / TARGETS, dtype, "r", offset, (num_rows,))
            self._epoch = epoch
        return self._records

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the targets of a batch: labels, int64 [B]; log-probabilities, float32 [B, C], or
        None. After the stored epochs they start again with the first."""
        epoch = batch.epoch % self.record_format.epochs
        labels, scores = decode(self.record_format, self.records(epoch)[batch.target_rows.numpy()])
        device = batch.images.device
        scores = None if scores is None else scores.to(device, non_blocking=True)
        return labels.to(device, non_blocking=True), scores

    def check_batch(self, block: TeacherInput) -> None:
        """Compare the first canary row of each epoch with the store. Raises DataError.

        Only the first, because each comparison synchronizes a GPU.
        """
        if block.epoch == self._checked_epoch:
            return
        is_candidate = block.target_rows % self.record_format.canary_step == 0
        for row in is_candidate.nonzero().flatten().tolist():
            if int(block.target_rows[row]) in self.record_format.canary_rows:
                self._checked_epoch = block.epoch
                self.check_canary(block, row)
                return

    def check_canary(self, block: TeacherInput, row: int) -> None:
        """Compare the view in a canary row with the store. Raises DataError."""
        target_row = int(block.target_rows[row])
        epoch = block.epoch % self.record_format.epochs
        stored = self.canaries[epoch][target_row // self.record_format.canary_step]
        if canary(block, row) != int(stored):
            packages = self.provenance["packages"]
            raise DataError(
                f"teacher.target_stores {self.path}: row {target_row} of epoch {epoch} (training "
                f"image {int(block.sample_ids[row])}) is not the view that the teacher saw: its "
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
                if zlib.crc32(file.read(size)) != int(self.checksums[shard]):
                    epoch, row, _ = self.record_format.epoch_ranges(shard)[0]
                    raise CheckpointError(
                        f"{self.path / TARGETS}: shard {shard} (from epoch {epoch}, row {row}) is "
                        "damaged: its checksum differs; write the store again"
                    )


_DIGEST = "sha256"


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
    if version != FORMAT:
        raise CheckpointError(f"{file}: format {version}, this release reads {FORMAT}")
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


def open_store(path: str | Path) -> TargetStore:
    """Return a complete store. path: its folder, as written by `write_targets`.

    Raises DataError if there is none or it is incomplete, and CheckpointError if its files are
    truncated or of another format.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        raise DataError(
            f"teacher.target_stores {path}: is not a target store (no {MANIFEST}); write one with "
            "`deit targets write RECIPE --out STORE`"
        ) from None
    record_format = RecordFormat(**manifest["record_format"])
    if not manifest["complete"]:
        num_written = len(list((path / SHARDS).glob("[0-9]*.bin")))
        raise DataError(
            f"teacher.target_stores {path}: incomplete, {num_written} of "
            f"{record_format.num_shards} shards are written; run the same `deit targets write` "
            "command again to finish it"
        )
    canaries = record_format.epochs * len(record_format.canary_rows)
    sizes = {
        TARGETS: record_format.rows * record_format.dtype.itemsize,
        CHECKS: 4 * (3 * record_format.num_shards + canaries),
    }
    for name, size in sizes.items():
        file = path / name
        state = f"has {file.stat().st_size} bytes" if file.is_file() else "is missing"
        if state != f"has {size} bytes":
            raise CheckpointError(
                f"{file}: {state}, should have {size} bytes; write the store again"
            )
    return TargetStore(path, manifest)
