"""A saved network: a folder with its weights and the facts that rebuild and feed it."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from deit.core import manifest
from deit.core.json_io import load_json_as
from deit.models.load_weights import saved_weights
from deit.models.metadata import FACTS, WEIGHTS, ModelInfo
from deit.models.networks import create_network
from deit.models.student import Student
from deit.models.weight_files import load_weights


def build_student(facts: ModelInfo) -> Student:
    """The student of these facts, with random weights from torch's generator."""
    network = create_network(facts.student, len(facts.class_names))
    return Student(network, mean=facts.mean, std=facts.std)


def save_student(folder: Path, weights: dict[str, Tensor], facts: ModelInfo) -> None:
    """Write the weights (named as in `student.network`) and facts into an existing folder."""
    save_weights(folder / WEIGHTS, weights)
    (folder / FACTS).write_text(json.dumps(asdict(facts), indent=1) + "\n", encoding="utf-8")


def save_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write tensors by name as safetensors that other libraries read."""
    # Not save_file: its files are nobody else's to read, whatever the umask says.
    path.write_bytes(to_safetensors_bytes(weights))


def to_safetensors_bytes(weights: dict[str, Tensor]) -> bytes:
    """Tensors by name as the content of a safetensors file."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    return save(tensors, metadata={"format": "pt"})


def load_student(folder: Path) -> tuple[Student, ModelInfo]:
    """Rebuild a saved student; where adapters and heads alone were saved, on the weights they
    belong to. Raises CheckpointError, also where the folder has a manifest and is not as it was
    written."""
    if (folder / manifest.MANIFEST).is_file():
        manifest.verify_dir(folder)
    facts = load_json_as(folder / FACTS, ModelInfo)
    student = build_student(facts)
    load_weights(student.network, saved_weights(folder, facts), origin=str(folder / WEIGHTS))
    return student, facts
