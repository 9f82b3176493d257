"""A store while it is written: units committed one by one, and put together when all are there."""

import hashlib
import json
import shutil
import struct
import uuid
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deit.core.console import count_noun, format_percent, info, progress, warn
from deit.core.errors import CheckpointError, ConfigError, SystemFault
from deit.core.fault_injection import fault_point
from deit.core.file_reading import read_bytes
from deit.core.filesystem import atomic_write, describe_os_error, is_temporary, sync, write_once
from deit.distill.target_store import (
    CHECKS,
    FORMAT,
    MANIFEST,
    SHARDS,
    TARGETS,
    RecordFormat,
    differences,
    manifest_bytes,
    read_manifest,
)

_MAGIC = b"deit-unit"
_HEADER = struct.Struct("<9sB16sIIII")  # magic, format, digest, unit, rows, canaries, CRC-32
_TRACE = struct.Struct("<II")
_OUTLIER = 6.0  # standard deviations


class TargetShard(NamedTuple):
    """A piece of the answers, with what proves it.

    canaries: uint32, of the canary places it covers. right, counted: how often the teacher named
    the true label, over views that are (almost) one image.
    """

    records: np.ndarray
    canaries: np.ndarray
    right: int
    counted: int


class ShardedTargetWriter:
    """The folder of a store that is being written, by any number of processes."""

    def __init__(self, store: Path, manifest: dict[str, Any]) -> None:
        self.store = store
        self.manifest = manifest
        self.layout = RecordFormat(**manifest["layout"])
        common = {key: manifest[key] for key in ("format", "fingerprint", "asked", "layout")}
        # Every unit carries it: none of another store can slip in.
        self.digest = hashlib.sha256(json.dumps(common, sort_keys=True).encode()).digest()[:16]

    def is_complete(self) -> bool:
        """Whether the folder is a store of this manifest, and complete; looks only.

        Raises ConfigError where it is a store of something else.
        """
        try:
            return self._compared()
        except FileNotFoundError:
            return False

    def create_or_match(self) -> bool:
        """Make the folder a store of this manifest, or find that it is one; whether it is complete.

        Raises ConfigError where it is one of something else or holds other things.
        """
        try:
            return self._compared()
        except FileNotFoundError:
            return self._make()

    def _compared(self) -> bool:
        """Whether the store that is there is complete. Raises FileNotFoundError and ConfigError."""
        found = read_manifest(self.store)
        keys = ("fingerprint", "asked", "layout")
        differing = differences(*({k: one[k] for k in keys} for one in (found, self.manifest)))
        if differing:
            written = any((self.store / SHARDS).glob("[0-9]*.bin")) or found["complete"]
            advice = "give another --out" if written else "it holds no answers yet, delete it"
            raise ConfigError(
                f"--out {self.store}: is a store of something else; {advice}:"
                + "".join(f"\n  {line}" for line in differing)
            )
        return found["complete"]

    def _make(self) -> bool:
        out = self.store
        there = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
        if MANIFEST in there:
            return self.create_or_match()  # another process was faster
        # A process that was killed may have left the folder of units, or a passing file.
        others = [name for name in there if name != SHARDS and not is_temporary(name)]
        if others:
            raise ConfigError(
                f"--out {out}: not empty (it holds {min(others)!r}); give another --out"
            )
        try:
            (out / SHARDS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemFault(f"--out {out}: cannot be made ({error.strerror})") from None
        if not write_once(out / MANIFEST, manifest_bytes(self.manifest)):
            return self.create_or_match()
        return False

    def path(self, unit: int) -> Path:
        """Where a unit lies; it is written if that is there."""
        return self.store / SHARDS / f"{unit:06d}.bin"

    def commit(self, unit: int, made: TargetShard) -> None:
        """Write a unit: whole, or not at all."""
        trace = _TRACE.pack(made.right, made.counted)
        payload = made.records.tobytes() + made.canaries.astype("<u4").tobytes() + trace
        sizes = (unit, len(made.records), len(made.canaries), zlib.crc32(payload))
        header = _HEADER.pack(_MAGIC, FORMAT, self.digest, *sizes)
        try:
            fault_point("targets")
            atomic_write(self.path(unit), header + payload)
        except FileNotFoundError:
            if not self._complete():  # another process wrote the same and finished the store
                raise
        except OSError as error:
            reason = describe_os_error(error, self.store)
            raise SystemFault(f"{self.path(unit)}: could not be written ({reason})") from None

    def read(self, unit: int) -> TargetShard:
        """A unit that was committed. Raises CheckpointError if it is damaged or another store's."""
        content = read_bytes(self.path(unit))
        payload = content[_HEADER.size :]
        known, rows, canaries, crc = (), 0, 0, -1
        if len(content) > _HEADER.size:
            *known, rows, canaries, crc = _HEADER.unpack(content[: _HEADER.size])
        if len(known) == 4 and known[:2] == [_MAGIC, FORMAT] and known[2] != self.digest:
            raise CheckpointError(
                f"{self.path(unit)}: was written for another store ({known[2].hex()[:12]}, not "
                f"{self.digest.hex()[:12]}); delete it and run the same command again"
            )
        if known != [_MAGIC, FORMAT, self.digest, unit] or zlib.crc32(payload) != crc:
            raise CheckpointError(
                f"{self.path(unit)}: damaged; delete it and run the same command again"
            )
        at = rows * self.layout.dtype.itemsize
        return TargetShard(
            np.frombuffer(payload[:at], self.layout.dtype),
            np.frombuffer(payload[at : at + 4 * canaries], "<u4"),
            *_TRACE.unpack(payload[at + 4 * canaries :]),
        )

    def _complete(self) -> bool:
        return read_manifest(self.store)["complete"]

    def merge_if_complete(self) -> bool:
        """Put the units together if all are there; whether the store is complete. Any number of
        processes may at once: they write the same. Raises CheckpointError at a damaged unit."""
        number = self.layout.num_shards
        there = sum(self.path(unit).is_file() for unit in range(number))
        try:
            if there == number:
                self._merge()
            elif not self._complete():
                info(
                    f"{self.store}: {there} of {number} units are written, {number - there} missing"
                )
        except FileNotFoundError:
            if not self._complete():
                raise
        return self._complete()

    def _merge(self) -> None:
        sums, canaries, traces = [], [], []
        temporary = self.store / f".{TARGETS}.{uuid.uuid4().hex}"
        units = range(self.layout.num_shards)
        try:
            with temporary.open("wb") as file:
                for number in progress(units, total=len(units), title="finishing"):
                    unit = self.read(number)
                    file.write(unit.records.tobytes())
                    sums.append(zlib.crc32(unit.records.tobytes()))
                    canaries.append(unit.canaries)
                    traces.append((unit.right, unit.counted))
                sync(file)
            trace = np.array(traces, "<u4")
            checks = np.concatenate([np.array(sums, "<u4"), *canaries, trace.ravel()])
            atomic_write(self.store / CHECKS, checks.tobytes())
            temporary.replace(self.store / TARGETS)
        except FileNotFoundError:
            raise
        except OSError as error:
            reason = f"could not be written ({describe_os_error(error, self.store)})"
            raise SystemFault(f"{self.store}: {reason}") from None
        finally:
            temporary.unlink(missing_ok=True)
        right, counted = (int(part) for part in trace.sum(axis=0, dtype=np.int64))
        top1 = right / counted if counted else None
        finished = {**self.manifest, "complete": True, "teacher_top1": top1}
        atomic_write(self.store / MANIFEST, manifest_bytes(finished))
        self.clean_up()
        self._warn_of_outliers(trace)
        size = sum((self.store / name).stat().st_size for name in (TARGETS, CHECKS, MANIFEST))
        layout = self.layout
        epochs = count_noun(layout.epochs, "epoch")
        info(
            f"{self.store}: complete, {layout.rows} answers ({layout.content}, {epochs} of "
            f"{layout.rows_per_epoch}) in {size / 1e6:.2f} MB; the teacher names "
            f"{format_percent(top1)} % of the "
            "labels"
        )

    def clean_up(self) -> None:
        """Remove what a finished store needs no more, also of processes that were killed."""
        shutil.rmtree(self.store / SHARDS, ignore_errors=True)
        for name in (TARGETS, CHECKS, MANIFEST):
            for left in self.store.glob(f".{name}.*"):
                left.unlink(missing_ok=True)

    def _warn_of_outliers(self, accuracy_trace: np.ndarray) -> None:
        """Where the teacher is far better or worse than elsewhere, the pairing is in doubt."""
        right, counted = accuracy_trace.astype(np.float64).T
        mean = right.sum() / max(counted.sum(), 1)
        spread = np.sqrt(np.maximum(counted * mean * (1 - mean), 1e-12))
        for unit in np.flatnonzero(np.abs(right - counted * mean) > _OUTLIER * spread):
            warn(
                f"{self.store}: in unit {unit} the teacher names {right[unit]:.0f} of "
                f"{counted[unit]:.0f} labels, elsewhere {format_percent(mean)} %; look at it with "
                "`deit targets verify`"
            )
