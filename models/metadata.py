"""The metadata files of a saved network: model.json, base.json; and where such a folder is."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import ConfigDict
from torch import Tensor

from deit.config.field_types import PosEmbedKernel
from deit.config.sections.student import StudentConfig
from deit.core.errors import CheckpointError
from deit.core.json_io import load_json_as
from deit.core.run_folder import MODEL_INFO as MODEL_INFO
from deit.models.weight_files import digest_of

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class ModelInfo:
    """What rebuilds a network and feeds it images, without its weights (model.json).

    student: its network and input size.
    class_names: in the order of its logits.
    mean, std: normalization per channel, for images in [0, 1].
    evaluation_crop: in (0, 1]: evaluation resizes the shorter side to image_size / evaluation_crop
    and crops the center (timm's crop_pct).
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    student: StudentConfig
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    evaluation_crop: float


def find_saved_model(folder: str | Path) -> Path | None:
    """Return `folder` if it holds a saved student, or `folder/best` if that does, or None.

    >>> find_saved_model("checkpoints/digits").as_posix()
    'checkpoints/digits/best'
    """
    folder = Path(folder)
    for candidate in (folder, folder / "best"):
        if (candidate / MODEL_INFO).is_file() and (candidate / WEIGHTS).is_file():
            return candidate
    return None


BASE = "base.json"


class _HasWeights(Protocol):
    weights: dict[str, Tensor]


T = TypeVar("T", bound=_HasWeights)


@dataclass(frozen=True)
class AdapterBase:
    """The initial weights of a student whose checkpoints store adapters and heads only (base.json).

    source: init.weights; a path is absolute.
    relative_path: the same path, relative to the run folder; None for a timm name.
    weights: SHA-256 of the tensors (deit.models.weight_files.digest_of).
    kernel: resizes their position embedding.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    source: str
    relative_path: str | None
    weights: str
    kernel: PosEmbedKernel


def base_of(source: str, weights: str, kernel: PosEmbedKernel, *, out: Path) -> AdapterBase:
    """Return the record of initial weights for a run in the folder `out`.

    source: a path or a timm name. weights: their SHA-256.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return AdapterBase(source, None, weights, kernel)
    relative_path = os.path.relpath(path.resolve(), out.resolve())
    return AdapterBase(str(path.absolute()), relative_path, weights, kernel)


def save_base(folder: Path, base: AdapterBase) -> None:
    """Write base.json into a folder with saved adapters."""
    (folder / BASE).write_text(json.dumps(asdict(base), indent=1) + "\n", encoding="utf-8")


def read_base(folder: Path) -> AdapterBase | None:
    """Return the base of the adapters saved in `folder`; None if all weights are stored there.

    Raises CheckpointError if base.json cannot be read.
    """
    return load_json_as(folder / BASE, AdapterBase) if (folder / BASE).is_file() else None


def find_base(folder: Path, base: AdapterBase, read: Callable[[str], T]) -> T:
    """Return the weights of a base: at its path relative to the run, or at its original path.

    folder: of a checkpoint. read: reads a source. Raises CheckpointError if neither path exists or
    the weights have changed since the training.
    """
    problem = f"{base.source} was not found, neither at its original path nor next to the run"
    for source in _candidate_sources(folder, base):
        if Path(source).resolve() in (folder.resolve(), folder.resolve().parent):
            continue  # reading it would not end
        try:
            loaded = read(source)
        except CheckpointError as error:
            problem = str(error)
            continue
        digest = digest_of(loaded.weights)
        if digest == base.weights:
            return loaded
        problem = f"{source} has changed: it now holds other weights (SHA-256 {digest[:12]})"
    raise CheckpointError(
        f"{folder}: stores adapters and heads only, and the weights they were trained on (SHA-256 "
        f"{base.weights[:12]}) are missing: {problem}"
    )


def _candidate_sources(folder: Path, base: AdapterBase) -> list[str]:
    if base.relative_path is None:
        return [base.source]
    run = folder.resolve().parent
    paths = (Path(os.path.normpath(run / base.relative_path)), Path(base.source))
    return [str(path) for path in dict.fromkeys(paths) if path.exists()]
