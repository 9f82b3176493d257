"""A saved network: a folder with its weights and the facts that rebuild and feed it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ConfigDict
from safetensors.torch import save
from torch import Tensor

from deit import manifest
from deit.config import StudentConfig
from deit.models.networks import create_network
from deit.models.student import Student
from deit.models.weights import load_weights, read_weights
from deit.typed_json import read_typed

WEIGHTS = "model.safetensors"
FACTS = "model.json"


@dataclass(frozen=True)
class Facts:
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


def build_student(facts: Facts) -> Student:
    """The student of these facts, with random weights from torch's generator."""
    network = create_network(facts.student, len(facts.class_names))
    return Student(network, mean=facts.mean, std=facts.std)


def save_student(folder: Path, weights: dict[str, Tensor], facts: Facts) -> None:
    """Write the weights (named as in `student.network`) and facts into an existing folder."""
    save_weights(folder / WEIGHTS, weights)
    (folder / FACTS).write_text(json.dumps(asdict(facts), indent=1) + "\n")


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write tensors by name as safetensors that other libraries read."""
    # Not save_file: its files are nobody else's to read, whatever the umask says.
    path.write_bytes(serialised(weights))


def serialised(weights: dict[str, Tensor]) -> bytes:
    """Tensors by name as the content of a safetensors file."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    return save(tensors, metadata={"format": "pt"})


def load_student(folder: Path) -> tuple[Student, Facts]:
    """Rebuild a saved student. Raises CheckpointError, also where the folder has a manifest and is
    not as it was written."""
    if (folder / manifest.MANIFEST).is_file():
        manifest.check(folder)
    facts = read_typed(folder / FACTS, Facts)
    student = build_student(facts)
    load_weights(student.network, read_weights(folder / WEIGHTS), origin=str(folder / WEIGHTS))
    return student, facts


def find_saved(folder: Path) -> Path | None:
    """The saved student in a run folder (its best), or the folder itself; None if neither."""
    for candidate in (folder / "best", folder):
        if (candidate / FACTS).is_file() and (candidate / WEIGHTS).is_file():
            return candidate
    return None
