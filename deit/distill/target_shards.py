"""A target store that is being written: shards are committed one by one and merged at the end."""

import hashlib
import json
import shutil
import struct
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deit.core.console import count_noun, format_percent, info, progress, warn
from deit.core.errors import CheckpointError, ConfigError, SystemFault
from deit.core.fault_injection import fault_point
from deit.core.file_reading import read_bytes
from deit.core.filesystem import atomic_write, describe_os_error, is_temporary, sync, write_once
from deit.distill.target_fingerprint import differences
from deit.distill.target_format import FORMAT_VERSION, RecordFormat, StoreChecks
from deit.distill.target_store import (
    CHECKS,
    MANIFEST,
    SHARDS,
    TARGETS,
    TargetStore,
    manifest_bytes,
    read_manifest,
)

_MAGIC = b"deit-shrd"
# Magic, format version, digest, shard, number of rows and of view checksums, CRC-32.
_HEADER = struct.Struct("<9sB16sIIII")
_COUNTS = struct.Struct("<II")
_OUTLIER = 6.0  # standard deviations


class TargetShard(NamedTuple):
    """Consecutive records of a store, with their checks.

    view_checksums: of the checked rows in the shard, uint32. num_unmixed: number of views of
    (almost) one image; num_correct: for how many of them the teacher predicts the label.
    """

    records: np.ndarray
    view_checksums: np.ndarray
    num_correct: int
    num_unmixed: int


class ShardedTargetWriter:
    """The folder of a store that is being written, by any number of processes."""

    def __init__(self, store: Path, manifest: dict[str, Any]) -> None:
        self.store = store
        self.manifest = manifest
        self.record_format = RecordFormat(**manifest["record_format"])
        common = {
            key: manifest[key] for key in ("format", "fingerprint", "inference", "record_format")
        }
        # Written into every shard, so that those of another store are detected.
        self.digest = hashlib.sha256(json.dumps(common, sort_keys=True).encode()).digest()[:16]

    def is_complete(self) -> bool:
        """Return whether the folder is a complete store of this manifest; nothing is written.

        Raises ConfigError if it is a store of other targets.
        """
        try:
            return self._match()
        except FileNotFoundError:
            return False

    def create_or_match(self) -> bool:
        """Create the store, or check that it is of this manifest; return whether it is complete.

        Raises ConfigError if it is a store of something else or the folder has other content.
        """
        try:
            return self._match()
        except FileNotFoundError:
            return self._create()

    def _match(self) -> bool:
        """Return whether the existing store is complete. Raises FileNotFoundError, ConfigError."""
        existing = read_manifest(self.store)
        keys = ("fingerprint", "inference", "record_format")
        differing = differences(
            *({k: manifest[k] for k in keys} for manifest in (existing, self.manifest))
        )
        if differing:
            written = any((self.store / SHARDS).glob("[0-9]*.bin")) or existing["complete"]
            advice = "give another folder" if written else "it has no targets yet, delete it"
            raise ConfigError(
                f"out = {self.store}: is a store of other targets; {advice}:"
                + "".join(f"\n  {line}" for line in differing)
            )
        return existing["complete"]

    def _create(self) -> bool:
        out = self.store
        names = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
        if MANIFEST in names:
            return self.create_or_match()  # another process was faster
        # A killed process can leave the folder of shards or a temporary file.
        others = [name for name in names if name != SHARDS and not is_temporary(name)]
        if others:
            raise ConfigError(
                f"out = {out}: not empty (it holds {min(others)!r}); give another folder"
            )
        try:
            (out / SHARDS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemFault(f"out = {out}: cannot be created ({error.strerror})") from None
        if not write_once(out / MANIFEST, manifest_bytes(self.manifest)):
            return self.create_or_match()
        return False

    def path(self, shard: int) -> Path:
        """Return the path of a shard, which exists once it is written."""
        return self.store / SHARDS / f"{shard:06d}.bin"

    def commit(self, index: int, shard: TargetShard) -> None:
        """Write a shard atomically."""
        checksums = shard.view_checksums.astype("<u4").tobytes()
        counts = _COUNTS.pack(shard.num_correct, shard.num_unmixed)
        payload = shard.records.tobytes() + checksums + counts
        sizes = (index, len(shard.records), len(shard.view_checksums), zlib.crc32(payload))
        header = _HEADER.pack(_MAGIC, FORMAT_VERSION, self.digest, *sizes)
        try:
            fault_point("targets")
            atomic_write(self.path(index), header + payload)
        except FileNotFoundError:
            if not self._complete():  # another process wrote it and completed the store
                raise
        except OSError as error:
            reason = describe_os_error(error, self.store)
            raise SystemFault(f"{self.path(index)}: could not be written ({reason})") from None

    def read(self, index: int) -> TargetShard:
        """Return a written shard. Raises CheckpointError if it is damaged or of another store."""
        content = read_bytes(self.path(index))
        payload = content[_HEADER.size :]
        header, num_rows, num_checksums, crc = (), 0, 0, -1
        if len(content) > _HEADER.size:
            *header, num_rows, num_checksums, crc = _HEADER.unpack(content[: _HEADER.size])
        if len(header) == 4 and header[:2] == [_MAGIC, FORMAT_VERSION] and header[2] != self.digest:
            raise CheckpointError(
                f"{self.path(index)}: was written for another store ({header[2].hex()[:12]}, not "
                f"{self.digest.hex()[:12]}); delete it and run the same command again"
            )
        if header != [_MAGIC, FORMAT_VERSION, self.digest, index] or zlib.crc32(payload) != crc:
            raise CheckpointError(
                f"{self.path(index)}: damaged; delete it and run the same command again"
            )
        end = num_rows * self.record_format.dtype.itemsize
        return TargetShard(
            np.frombuffer(payload[:end], self.record_format.dtype),
            np.frombuffer(payload[end : end + 4 * num_checksums], "<u4"),
            *_COUNTS.unpack(payload[end + 4 * num_checksums :]),
        )

    def _complete(self) -> bool:
        return read_manifest(self.store)["complete"]

    def merge_if_complete(self, check: Callable[[TargetStore], None] | None = None) -> bool:
        """Merge the shards if all are written; return whether the store is complete.

        Several processes can do so at once: they write the same. check: a function of the merged
        store; if it raises, the store stays incomplete. Raises CheckpointError if a shard is
        damaged.
        """
        num_shards = self.record_format.num_shards
        num_written = sum(self.path(index).is_file() for index in range(num_shards))
        try:
            if num_written == num_shards:
                self._merge(check)
            elif not self._complete():
                info(
                    f"{self.store}: {num_written} of {num_shards} shards are written, "
                    f"{num_shards - num_written} missing"
                )
        except FileNotFoundError:
            if not self._complete():
                raise
        return self._complete()

    def _merge(self, check: Callable[[TargetStore], None] | None) -> None:
        """Write all records into one file, then their checks, then the complete manifest."""
        checksums, views, counts = [], [], []
        temporary = self.store / f".{TARGETS}.{uuid.uuid4().hex}"
        shards = range(self.record_format.num_shards)
        try:
            with temporary.open("wb") as file:
                for index in progress(shards, total=len(shards), title="finishing"):
                    shard = self.read(index)
                    file.write(shard.records.tobytes())
                    checksums.append(zlib.crc32(shard.records.tobytes()))
                    views.append(shard.view_checksums)
                    counts.append((shard.num_correct, shard.num_unmixed))
                sync(file)
            labels = np.array(counts, "<u4")
            checks = StoreChecks(np.array(checksums, "<u4"), np.concatenate(views), labels)
            atomic_write(self.store / CHECKS, checks.to_bytes())
            temporary.replace(self.store / TARGETS)
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = f"could not be written ({describe_os_error(error, self.store)})"
            raise SystemFault(f"{self.store}: {reason}") from None
        finally:
            temporary.unlink(missing_ok=True)
        num_correct, num_unmixed = (int(total) for total in labels.sum(axis=0, dtype=np.int64))
        top1 = num_correct / num_unmixed if num_unmixed else None
        finished = {**self.manifest, "complete": True, "teacher_top1": top1}
        if check is not None:
            check(TargetStore(self.store, finished))
        atomic_write(self.store / MANIFEST, manifest_bytes(finished))
        self.clean_up()
        self._warn_of_outliers(labels)
        self._log_complete(top1)

    def _log_complete(self, top1: float | None) -> None:
        record_format = self.record_format
        size = sum((self.store / name).stat().st_size for name in (TARGETS, CHECKS, MANIFEST))
        epochs = count_noun(record_format.epochs, "epoch")
        info(
            f"{self.store}: complete, {record_format.rows} {record_format.content} targets "
            f"({epochs} of {record_format.rows_per_epoch}) in {size / 1e6:.2f} MB; teacher top-1 "
            f"{format_percent(top1)} %"
        )

    def clean_up(self) -> None:
        """Remove shards and temporary files of a complete store, also those of killed processes."""
        shutil.rmtree(self.store / SHARDS, ignore_errors=True)
        for name in (TARGETS, CHECKS, MANIFEST):
            for leftover in self.store.glob(f".{name}.*"):
                leftover.unlink(missing_ok=True)

    def _warn_of_outliers(self, labels: np.ndarray) -> None:
        """Warn about shards whose teacher accuracy is far from the mean: rows may be misaligned.

        labels: as in StoreChecks.
        """
        num_correct, num_unmixed = labels.astype(np.float64).T
        mean = num_correct.sum() / max(num_unmixed.sum(), 1)
        deviation = np.sqrt(np.maximum(num_unmixed * mean * (1 - mean), 1e-12))
        is_outlier = np.abs(num_correct - num_unmixed * mean) > _OUTLIER * deviation
        for index in np.flatnonzero(is_outlier):
            warn(
                f"{self.store}: in shard {index} the teacher predicts {num_correct[index]:.0f} of "
                f"{num_unmixed[index]:.0f} labels, on average {format_percent(mean)} %; check it "
                "with `deit targets verify`"
            )
