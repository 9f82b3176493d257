"""What a saved network's folder says beside its weights, and where such a folder is."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import ConfigDict
from torch import Tensor

from deit.config.fields import PosEmbedKernel
from deit.config.student_section import StudentConfig
from deit.core.errors import CheckpointError
from deit.core.json_io import load_json_as
from deit.models.weight_files import digest_of

WEIGHTS = "model.safetensors"
FACTS = "model.json"


@dataclass(frozen=True)
class ModelInfo:
    """What a network needs beside its weights.

    mean, std: its normalisation, per channel in [0, 1].
    evaluation_crop: evaluation resizes to image_size / this and cuts the centre.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    student: StudentConfig
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    evaluation_crop: float


def find_saved_model(folder: Path) -> Path | None:
    """The folder itself where it holds a saved student, or the best of a run; None if neither."""
    for candidate in (folder, folder / "best"):
        if (candidate / FACTS).is_file() and (candidate / WEIGHTS).is_file():
            return candidate
    return None


BASE = "base.json"


class _Weights(Protocol):
    weights: dict[str, Tensor]


Found = TypeVar("Found", bound=_Weights)


@dataclass(frozen=True)
class AdapterBase:
    """What a student with adapters started from.

    source: as init.weights, a path in full. beside: the same path from the run's folder; None for a
    name of timm's. weights: SHA-256 of the tensors (deit.models.weight_files.digest_of). kernel:
    how their position embedding is resized."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    source: str
    relative_path: str | None
    weights: str
    kernel: PosEmbedKernel


def base_of(source: str, weights: str, kernel: PosEmbedKernel, *, out: Path) -> AdapterBase:
    """The base of a run in the folder `out`."""
    path = Path(source).expanduser()
    if not path.exists():
        return AdapterBase(source, None, weights, kernel)
    beside = os.path.relpath(path.resolve(), out.resolve())
    return AdapterBase(str(path.absolute()), beside, weights, kernel)


def save_base(folder: Path, base: AdapterBase) -> None:
    """Write what saved adapters belong to, into the folder of their weights."""
    (folder / BASE).write_text(json.dumps(asdict(base), indent=1) + "\n", encoding="utf-8")


def read_base(folder: Path) -> AdapterBase | None:
    """What the saved adapters in a folder belong to; None where the weights are whole.

    Raises CheckpointError.
    """
    return load_json_as(folder / BASE, AdapterBase) if (folder / BASE).is_file() else None


def find_base(folder: Path, base: AdapterBase, find: Callable[[str], Found]) -> Found:
    """The weights of a base: beside the run as when it was trained, else where they were.

    folder: of a checkpoint. find: reads a source. Raises CheckpointError where they are gone,
    or others lie there now.
    """
    trouble = f"{base.source} is not there any more, nor beside the run"
    for place in _places(folder, base):
        try:
            found = find(place)
        except CheckpointError as error:
            trouble = str(error)
            continue
        digest = digest_of(found.weights)
        if digest == base.weights:
            return found
        trouble = f"{place} holds other weights now (SHA-256 {digest[:12]})"
    raise CheckpointError(
        f"{folder}: holds adapters and heads alone, and what they belong to (SHA-256 "
        f"{base.weights[:12]}) is missing: {trouble}"
    )


def _places(folder: Path, base: AdapterBase) -> list[str]:
    """Where a base may lie."""
    if base.relative_path is None:
        return [base.source]
    run = folder.resolve().parent
    paths = (Path(os.path.normpath(run / base.relative_path)), Path(base.source))
    return [str(path) for path in dict.fromkeys(paths) if path.exists()]
