"""The format of stored teacher outputs: the records, and the checks stored with them."""

import math
import struct
import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deit.datasets.view_batches import UnmixedViews

FORMAT_VERSION = 3
_MAX_SHARDS = 2048
_MIN_ROWS_PER_SHARD = 4096
_CHECK_INTERVAL = 1024
_MIN_CHECKED_ROWS = 8
_FP16_MIN = -65504.0


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
        minimum = max(self.rows / _MAX_SHARDS, _MIN_ROWS_PER_SHARD)
        return 2 ** math.ceil(math.log2(minimum))

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.rows_per_shard)

    @property
    def check_interval(self) -> int:
        """Rows from one with a view checksum to the next, even; an epoch has at least eight."""
        return max(2, min(_CHECK_INTERVAL, self.rows_per_epoch // _MIN_CHECKED_ROWS // 2 * 2))

    @property
    def checked_rows(self) -> range:
        """The rows of an epoch that have a view checksum; a mixed view needs the next row too."""
        last = self.rows_per_epoch - (1 if self.mixed_pairs else 0)
        return range(0, last, self.check_interval)

    def checked_indices(self, target_rows: Tensor) -> list[int]:
        """Return which of the rows, int64 [batch], have a view checksum, as indices."""
        candidates = (target_rows % self.check_interval == 0).nonzero().flatten().tolist()
        return [index for index in candidates if int(target_rows[index]) in self.checked_rows]

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
    scores = logits.double().log_softmax(dim=1).clamp_min(_FP16_MIN)
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
    other_prob = (1 - scores.exp().sum(dim=1, keepdim=True)).clamp_min(1e-8) / num_others
    log_probs = other_prob.log().expand(-1, record_format.num_classes)
    return labels[:, 0], log_probs.scatter(1, labels, scores)


class StoreChecks(NamedTuple):
    """The checks of a store: the content of its checks.bin, in this order.

    shards: CRC-32 of each shard's records, uint32 [shards].
    views: `view_checksum` of the checked rows, uint32 [epochs, checked rows].
    labels: uint32 [shards, 2]: of the views of (almost) one image in a shard, for how many the
    teacher predicts the label, and their number.
    """

    shards: np.ndarray
    views: np.ndarray
    labels: np.ndarray

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        return np.concatenate([values.astype("<u4").ravel() for values in self]).tobytes()

    @staticmethod
    def num_bytes(record_format: RecordFormat) -> int:
        """Return the size of the file [bytes]."""
        num_views = record_format.epochs * len(record_format.checked_rows)
        return 4 * (3 * record_format.num_shards + num_views)

    @classmethod
    def from_bytes(cls, content: bytes, record_format: RecordFormat) -> "StoreChecks":
        """Return the checks in the content of a file of `num_bytes`."""
        values, num_shards = np.frombuffer(content, "<u4"), record_format.num_shards
        return cls(
            shards=values[:num_shards],
            views=values[num_shards : -2 * num_shards].reshape(record_format.epochs, -1),
            labels=values[-2 * num_shards :].reshape(num_shards, 2),
        )


def view_checksum(views: UnmixedViews, index: int) -> int:
    """Return the CRC-32 of one of the teacher's views in a batch.

    It covers the pixels; with mixing (`index` is even) those of both images, the weight and the
    box.
    """
    num_images = 1 if views.mix is None else 2
    value = zlib.crc32(
        views.pixels[index : index + num_images].contiguous().cpu().numpy().tobytes()
    )
    if views.mix is None:
        return value
    pair = index // 2
    # Rounded: the weight is computed by log and cos, whose last bits differ between devices.
    weight = round(float(views.mix.lam[pair]) * 2**20)
    numbers = [weight, int(views.mix.is_cutmix[pair]), *views.mix.boxes[pair].tolist()]
    return zlib.crc32(struct.pack("<6q", *numbers), value)
