"""A store of teachers' answers: its files, its records, and the checks that refuse a wrong one.

Nothing of a view is stored: it is a function of (seed, epoch, place), so an answer is found by its
place alone. That the place means the same view to writer and reader is proven by fingerprints, and
by canaries: checksums of the grey levels of every so many-th view.
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

FORMAT = 2
MANIFEST = "store.json"
TARGETS = "targets.bin"
CHECKS = "checks.bin"
SHARDS = "units"
_MOST_UNITS = 2048
_LEAST_ROWS = 4096
_CANARY_EVERY = 1024
_LEAST_CANARIES = 8


def top_k_of(records: str) -> int | None:
    """K of top-K; None of hard and full."""
    return int(records.removeprefix("top-")) if records.startswith("top-") else None


class RecordFormat(NamedTuple):
    """How the answers lie: one record for each place of each epoch, in that order.

    content: hard; full (hard and all log-probabilities, fp16); or top-K (the K largest).
    epochs: 1 where the teacher's view of an image is always the same. places: in an epoch.
    paired: whether neighbours are mixed, so that a view is made of two images.
    """

    content: str
    num_classes: int
    epochs: int
    rows_per_epoch: int
    mixed_pairs: bool

    @property
    def top_k(self) -> int | None:
        """K of top-K; None of the others."""
        return top_k_of(self.content)

    @property
    def dtype(self) -> np.dtype:
        """Of one record, little-endian."""
        label = "u1" if self.num_classes <= 256 else "<u2"
        if self.top_k is not None:
            return np.dtype([("labels", label, self.top_k), ("scores", "<f2", self.top_k)])
        if self.content == "full":
            return np.dtype([("label", label), ("scores", "<f2", self.num_classes)])
        return np.dtype([("label", label)])

    @property
    def rows(self) -> int:
        """Records of all epochs."""
        return self.epochs * self.rows_per_epoch

    @property
    def rows_per_shard(self) -> int:
        """Records of a unit, the piece that is written whole or not at all."""
        wanted = max(self.rows / _MOST_UNITS, _LEAST_ROWS)
        return 2 ** math.ceil(math.log2(wanted))

    @property
    def num_shards(self) -> int:
        """How many units there are."""
        return -(-self.rows // self.rows_per_shard)

    @property
    def canary_step(self) -> int:
        """Places from one canary to the next, even; small epochs get at least eight."""
        return max(2, min(_CANARY_EVERY, self.rows_per_epoch // _LEAST_CANARIES // 2 * 2))

    @property
    def canary_rows(self) -> range:
        """The places of an epoch that have a canary."""
        return range(0, self.rows_per_epoch - self.mixed_pairs, self.canary_step)

    def epoch_ranges(self, unit: int) -> list[tuple[int, int, int]]:
        """The unit's records as (epoch, first place, last place + 1)."""
        first, last = unit * self.rows_per_shard, min((unit + 1) * self.rows_per_shard, self.rows)
        found = []
        while first < last:
            epoch, place = divmod(first, self.rows_per_epoch)
            stop = min(self.rows_per_epoch, place + last - first)
            found.append((epoch, place, stop))
            first += stop - place
        return found


def encode(layout: RecordFormat, logits: Tensor) -> np.ndarray:
    """Records [rows] of a teacher's answers, float32 [rows, classes].

    The label is the argmax before rounding. Log-probabilities and not logits: softmax(logp / T) is
    softmax(logits / T) for every T, and fp16 is most exact where the probability is large.
    """
    records = np.zeros(len(logits), dtype=layout.dtype)
    scores = logits.double().log_softmax(dim=1).clamp_min(-65504.0)
    if layout.top_k is not None:
        # Sorted by the answer itself: rounding may make equals of what differs.
        order = logits.double().argsort(dim=1, descending=True, stable=True)[:, : layout.top_k]
        records["labels"] = order.cpu().numpy()
        records["scores"] = scores.gather(1, order).cpu().numpy()
        return records
    records["label"] = logits.argmax(dim=1).cpu().numpy()
    if layout.content == "full":
        records["scores"] = scores.cpu().numpy()
    return records


def decode(layout: RecordFormat, records: np.ndarray) -> tuple[Tensor, Tensor | None]:
    """Labels int64 [rows], and log-probabilities float32 [rows, classes] where they are stored.

    What top-K leaves out shares the rest of the probability equally.
    """
    if layout.content == "hard":
        return torch.from_numpy(records["label"].astype(np.int64)), None
    scores = torch.from_numpy(records["scores"].astype(np.float32))
    if layout.top_k is None:
        return torch.from_numpy(records["label"].astype(np.int64)), scores
    labels = torch.from_numpy(records["labels"].astype(np.int64))
    others = max(layout.num_classes - layout.top_k, 1)
    rest = (1 - scores.exp().sum(dim=1, keepdim=True)).clamp_min(1e-8) / others
    spread = rest.log().expand(-1, layout.num_classes)
    return labels[:, 0], spread.scatter(1, labels, scores)


def canary(shown: TeacherInput, place: int) -> int:
    """CRC-32 of what the teacher was shown at the place-th row of a block: its grey levels; with
    mixing (place is even) those of its partner too, the weight and the box."""
    partners = 1 if shown.mix is None else 2
    value = zlib.crc32(shown.views[place : place + partners].contiguous().cpu().numpy().tobytes())
    if shown.mix is None:
        return value
    pair = place // 2
    # The weight comes from logarithms and cosines, whose last bits differ between devices.
    weight = round(float(shown.mix.own_weight[pair]) * 2**20)
    facts = [weight, int(shown.mix.cut[pair]), *shown.mix.boxes[pair].tolist()]
    return zlib.crc32(struct.pack("<6q", *facts), value)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one: `views.crop`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differences(stored: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """`key: X in the store, Y here` for each value of two fingerprints that differs."""
    one, two = flatten(stored), flatten(here)
    return [
        f"{key}: {_short(one.get(key))} in the store, {_short(two.get(key))} here"
        for key in dict.fromkeys([*one, *two])
        if one.get(key) != two.get(key)
    ]


def _short(value: Any) -> str:
    digest = isinstance(value, str) and len(value) == 64
    return f"{value[:12]}..." if digest else repr(value)


class TargetStore:
    """A finished store. Opens its files when it is read, so that it may be sent to others."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.fingerprint: dict[str, Any] = manifest["fingerprint"]
        self.provenance: dict[str, Any] = manifest["about"]
        self.query: dict[str, Any] = manifest["asked"]
        self.layout = RecordFormat(**manifest["layout"])
        self.teacher_top1: float | None = manifest["teacher_top1"]
        self._epoch, self._records = -1, np.empty(0, self.layout.dtype)
        self._watched = -1  # the epoch of views that was held against a canary last
        self._checks = np.fromfile(path / CHECKS, "<u4")

    @property
    def input_sizes(self) -> list[int | None]:
        """The side [px] at which each of its teachers wants images; None where any will do."""
        return [one["image_size"] for one in self.fingerprint["teacher"].values()]

    @property
    def digest(self) -> str:
        """SHA-256 of what it answers and of its checksums: of every answer, by way of them. The
        same for a store that was moved, or written again to the same bytes."""
        about = {"fingerprint": self.fingerprint, "layout": self.layout._asdict()}
        content = json.dumps(about, sort_keys=True).encode() + self._checks.tobytes()
        return hashlib.sha256(content).hexdigest()

    @property
    def canaries(self) -> np.ndarray:
        """uint32 [epochs, canary places]."""
        number = len(self.layout.canary_rows)
        return self._checks[self.layout.num_shards : -2 * self.layout.num_shards].reshape(
            -1, number
        )

    @property
    def checksums(self) -> np.ndarray:
        """CRC-32 of each unit's records, uint32 [units]."""
        return self._checks[: self.layout.num_shards]

    def records(self, epoch: int) -> np.ndarray:
        """The records of an epoch; mapped, and only those of one epoch at a time."""
        if epoch != self._epoch:
            offset = epoch * self.layout.rows_per_epoch * self.layout.dtype.itemsize
            self._records = np.memmap(
                self.path / TARGETS, self.layout.dtype, "r", offset, (self.layout.rows_per_epoch,)
            )
            self._epoch = epoch
        return self._records

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What the teacher said of a batch: (labels [batch], log-probabilities or None)."""
        epoch = batch.epoch % self.layout.epochs
        labels, scores = decode(self.layout, self.records(epoch)[batch.target_rows.numpy()])
        device = batch.images.device
        scores = None if scores is None else scores.to(device, non_blocking=True)
        return labels.to(device, non_blocking=True), scores

    def check_batch(self, shown: TeacherInput) -> None:
        """Hold the first canary of each epoch that is shown against the store's. Raises DataError.

        Not all of them: each makes a GPU wait.
        """
        if shown.epoch == self._watched:
            return
        for row in (shown.target_rows % self.layout.canary_step == 0).nonzero().flatten().tolist():
            if int(shown.target_rows[row]) in self.layout.canary_rows:
                self._watched = shown.epoch
                self.check_canary(shown, row)
                return

    def check_canary(self, shown: TeacherInput, row: int) -> None:
        """Hold the view of a canary place against the store. Raises DataError."""
        place = int(shown.target_rows[row])
        epoch = shown.epoch % self.layout.epochs
        if canary(shown, row) != int(self.canaries[epoch][place // self.layout.canary_step]):
            written = self.provenance["packages"]
            raise DataError(
                f"teacher.target_stores {self.path}: the view at place {place} of epoch {epoch}, "
                "of "
                f"training image {int(shown.sample_ids[row])}, is not what the teacher saw: grey "
                "levels or mixing differ; has the image changed, or how it is decoded (then: "
                f"pillow {written['pillow']}, torchvision {written['torchvision']})?"
            )

    def verify_checksums(self) -> None:
        """Read every record and compare its unit's checksum. Raises CheckpointError naming the
        first unit that differs."""
        size = self.layout.rows_per_shard * self.layout.dtype.itemsize
        units = range(self.layout.num_shards)
        with (self.path / TARGETS).open("rb") as file:
            for unit in progress(units, total=len(units), title="reading the store"):
                if zlib.crc32(file.read(size)) != int(self.checksums[unit]):
                    epoch, place, _ = self.layout.epoch_ranges(unit)[0]
                    raise CheckpointError(
                        f"{self.path / TARGETS}: unit {unit} (from epoch {epoch}, place {place}) "
                        "is damaged: its checksum differs; write the store anew"
                    )


_DIGEST = "sha256"


def manifest_bytes(manifest: dict[str, Any]) -> bytes:
    """What is written as a store's manifest: with a digest, so that nothing else is read."""
    value = {**manifest, _DIGEST: digest_of_value(manifest)}
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a store, complete or not. Raises FileNotFoundError and CheckpointError."""
    file = path / MANIFEST
    try:
        manifest = parse_strict_json(read_bytes(file))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable ({error})") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{file}: format {found}, this release reads {FORMAT}")
    if manifest.pop(_DIGEST, None) != digest_of_value(manifest):
        raise CheckpointError(
            f"{file}: was edited or damaged (its digest differs); write the store again"
        )
    try:
        _check_manifest(manifest)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: not a store's ({type(error).__name__}: {error}); write it anew"
        ) from None
    return manifest


_PARTS = {"fingerprint": dict, "about": dict, "asked": dict, "layout": dict, "complete": bool}


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raises KeyError, TypeError, ValueError or AttributeError where something is missing or is
    not what it should be."""
    for name, kind in _PARTS.items():
        if not isinstance(manifest[name], kind):
            raise TypeError(f"{name} is {manifest[name]!r}")
    manifest["teacher_top1"]
    for teacher in manifest["fingerprint"]["teacher"].values():
        teacher["image_size"]
    layout = RecordFormat(**manifest["layout"])
    counts = (layout.num_classes, layout.epochs, layout.rows_per_epoch)
    if not all(isinstance(count, int) and count > 0 for count in counts):
        raise ValueError(f"layout {tuple(layout)}")
    if layout.content not in ("hard", "full") and layout.top_k is None:
        raise ValueError(f"records {layout.content!r}")


def open_store(path: Path) -> TargetStore:
    """A finished store. Raises DataError where there is none or it is not complete, and
    CheckpointError where its files are cut off or of another format."""
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        raise DataError(
            f"teacher.target_stores {path}: holds no store of targets (no {MANIFEST}); write one "
            "with "
            "`deit targets write RECIPE --out STORE`"
        ) from None
    layout = RecordFormat(**manifest["layout"])
    if not manifest["complete"]:
        done = len(list((path / SHARDS).glob("[0-9]*.bin")))
        raise DataError(
            f"teacher.target_stores {path}: not complete, {done} of {layout.num_shards} units are "
            "written; "
            "run the `deit targets write` command again, it goes on"
        )
    canaries = layout.epochs * len(layout.canary_rows)
    sizes = {
        TARGETS: layout.rows * layout.dtype.itemsize,
        CHECKS: 4 * (3 * layout.num_shards + canaries),
    }
    for name, size in sizes.items():
        file = path / name
        found = f"has {file.stat().st_size} bytes" if file.is_file() else "is not there"
        if found != f"has {size} bytes":
            raise CheckpointError(f"{file}: {found}, should have {size} bytes; write it anew")
    return TargetStore(path, manifest)
