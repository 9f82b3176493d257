"""The logs of a run in JSON lines: appended, read, and truncated when a run is resumed."""

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
    """Append a row and sync it; numbers that are not finite become null.

    Return the length of the file [bytes]. Raises SystemFault.
    """
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


def read(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows, oldest first; an empty list if there is no file.

    Stops at the first line that is not a row, for example one cut off by a kill.
    """
    path = Path(path)
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
    """A row of metrics.jsonl. Numbers that are not finite are None.

    train: losses by name, `<head>_top1` and `lr`.
    validation: top-1 by head and other metrics; only after epochs with an evaluation.
    seconds: training time so far.
    loader, images_per_s, memory_mb: only of epochs without an interruption.
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
        fields = self.model_fields_set
        for name, is_present in (
            ("train.lr", self.train.get("lr") is not None),
            (
                "validation.class_top1",
                "validation" not in fields or "class_top1" in self.validation,
            ),
            ("images_per_s", "loader" not in fields or "images_per_s" in fields),
        ):
            if not is_present:
                raise ValueError(f"no {name}")
        return self


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics, oldest first. A last line cut off by a kill is ignored.

    Raises CheckpointError if another line is not a valid row.

    >>> rows = read_metrics("checkpoints/digits")
    >>> [row["epoch"] for row in rows], 0 <= rows[-1]["validation"]["fused_top1"] <= 1
    ([1, 2], True)
    """
    path = Path(run) / METRICS
    rows = read(path)
    if path.is_file() and len(rows) < read_bytes(path).count(b"\n"):
        raise CheckpointError(f"{path}: line {len(rows) + 1} is not a JSON object")
    rows = as_typed(path, rows, list[_Epoch])
    return [row.model_dump(exclude_unset=True) for row in rows]


def truncate(path: Path, length: int) -> None:
    """Remove the rows after `length` [bytes], which a resumed run writes again.

    Also removes lines before it that are not rows, because `read` stops at them.
    """
    content = read_bytes(path) if path.is_file() else b""
    rows = [line for line in content[:length].splitlines(keepends=True) if _is_row(line)]
    remaining = b"".join(rows)
    if len(remaining) < length:
        warn(f"{path}: was changed or damaged, so rows are lost; the run itself is not affected")
    if content.startswith(remaining):
        if remaining != content:
            os.truncate(path, len(remaining))
    else:
        atomic_write(path, remaining)


def _is_row(line: bytes) -> bool:
    """Return whether a line is a complete row, with its line end."""
    try:
        return line.endswith(b"\n") and isinstance(parse_strict_json(line), dict)
    except ValueError:
        return False


def truncate_after_step(path: Path, step: int) -> None:
    """Remove the rows of later steps than `step`."""
    num_lines = len(read_bytes(path).splitlines()) if path.is_file() else 0
    rows = [row for row in read(path) if isinstance(row.get("step"), int)]
    if len(rows) < num_lines:
        warn(f"{path}: removed rows that cannot be read; the run itself is not affected")
    remaining = [row for row in rows if row["step"] <= step]
    if len(remaining) < num_lines:
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in remaining).encode())


def next_chain_hash(before: str, step: int, digests: dict[str, str]) -> str:
    """Return the next hash of a hash chain: SHA-256 of the last hash, the step and the state.

    before: the last hash, "" for the first.
    digests: digests of the parts of the state, by name.
    """
    parts = " ".join(f"{name}={digest}" for name, digest in sorted(digests.items()))
    return hashlib.sha256(f"{before} {step} {parts}".encode()).hexdigest()
