"""The logs of a run, a line of JSON a row: written, read, and cut where a resumed run goes on."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, model_validator

from deit.core.console import warn
from deit.core.errors import CheckpointError, SystemFault
from deit.core.fault_injection import fault_point
from deit.core.file_reading import read_bytes
from deit.core.filesystem import atomic_write, describe_os_error, open_to_append, sync
from deit.core.json_io import as_typed, parse_strict_json

METRICS = "metrics.jsonl"
HASH_CHAIN = "state_hashes.jsonl"
NONFINITE_LOG = "nonfinite_steps.jsonl"


def append(path: Path, row: dict[str, Any]) -> int:
    """Add a row and bring it to the disk; what is not finite becomes null. The length of the file
    then [bytes]. Raises SystemFault."""
    try:
        with open_to_append(path, "ab") as file:
            file.write(json.dumps(_finite(row), allow_nan=False).encode() + b"\n")
            sync(file)
            fault_point(path.stem)
            return file.tell()
    except OSError as error:
        raise SystemFault(
            f"{path}: could not be written ({describe_os_error(error, path)})"
        ) from None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read(path: Path) -> list[dict[str, Any]]:
    """The rows, oldest first; an empty list without the file. What follows a line that is no row,
    because a kill cut it off for instance, is left out."""
    rows = []
    for line in read_bytes(path).splitlines() if path.is_file() else ():
        try:
            row = parse_strict_json(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


class _Loader(BaseModel):
    share: float
    images_per_s: dict[str, float]


class _Epoch(BaseModel, extra="allow"):
    """A row of metrics.jsonl. What is not finite is None.

    train: losses by name, `<head>_top1` and `lr`. validation: top-1 by head and others; of epochs
    with an evaluation. seconds: of training so far. loader, images_per_s, memory_mb: of epochs that
    one command trained whole.
    """

    epoch: int = Field(ge=1)
    step: int = Field(ge=1)
    train: dict[str, float | None]
    seconds: float
    validation: dict[str, float] = {}
    loader: _Loader = _Loader(share=0, images_per_s={})
    images_per_s: float = 0
    memory_mb: float | None = None

    @model_validator(mode="after")
    def _complete(self) -> "_Epoch":
        given = self.model_fields_set
        for name, there in (
            ("train.lr", self.train.get("lr") is not None),
            ("validation.class_top1", "validation" not in given or "class_top1" in self.validation),
            ("images_per_s", "loader" not in given or "images_per_s" in given),
        ):
            if not there:
                raise ValueError(f"no {name}")
        return self


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics, oldest first. Raises CheckpointError where one is not as a run
    writes it; a last line that a kill cut off is left out."""
    path = run / METRICS
    rows = read(path)
    if path.is_file() and len(rows) < read_bytes(path).count(b"\n"):
        raise CheckpointError(f"{path}: line {len(rows) + 1} is no row of JSON")
    rows = as_typed(path, rows, list[_Epoch])
    return [row.model_dump(exclude_unset=True) for row in rows]


def truncate(path: Path, length: int) -> None:
    """Drop the rows behind `length` [bytes], which a resumed run writes again, and lines before
    it that are no rows: they would hide what follows them."""
    content = read_bytes(path) if path.is_file() else b""
    rows = [line for line in content[:length].splitlines(keepends=True) if _is_row(line)]
    kept = b"".join(rows)
    if len(kept) < length:
        warn(f"{path}: not as it was written, so rows are lost; the run itself is not affected")
    if content.startswith(kept):
        if kept != content:
            os.truncate(path, len(kept))
    else:
        atomic_write(path, kept)


def _is_row(line: bytes) -> bool:
    """Whether a line is a whole row: half a one would spoil the next."""
    try:
        return line.endswith(b"\n") and isinstance(parse_strict_json(line), dict)
    except ValueError:
        return False


def truncate_after_step(path: Path, step: int) -> None:
    """Drop the rows of later updates than `step`."""
    lines = len(read_bytes(path).splitlines()) if path.is_file() else 0
    rows = [row for row in read(path) if isinstance(row.get("step"), int)]
    if len(rows) < lines:
        warn(f"{path}: some rows cannot be read and are left out; the run itself is not affected")
    kept = [row for row in rows if row["step"] <= step]
    if len(kept) < lines:
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in kept).encode())


def next_chain_hash(before: str, step: int, digests: dict[str, str]) -> str:
    """The next link of a chain of hashes: SHA-256 of the one before, the step and what is now.

    before: "" for the first. digests: of the parts of a state by name.
    """
    parts = " ".join(f"{name}={digest}" for name, digest in sorted(digests.items()))
    return hashlib.sha256(f"{before} {step} {parts}".encode()).hexdigest()
