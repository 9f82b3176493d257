"""What a saved network's folder says beside its weights, and where such a folder is."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from deit.config import StudentConfig

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
