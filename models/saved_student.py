"""Save and load a student: a folder with its weights and a ModelInfo that rebuilds it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from deit.config.arguments import checks_types
from deit.config.command_choices import check_at_least, check_channels, check_fraction, check_path
from deit.config.cross_field_checks.student import check_student
from deit.config.schema import Config
from deit.config.sections.student import StudentConfig
from deit.config.validation import section_from_dict
from deit.core import manifest
from deit.core.errors import ConfigError, SystemFault, config_error
from deit.core.filesystem import atomic_write_dir
from deit.core.json_io import load_json_as
from deit.core.rng import unchanged_generators
from deit.core.tensors import as_device
from deit.models.load_weights import saved_weights
from deit.models.metadata import MODEL_INFO, WEIGHTS, ModelInfo, find_saved_model
from deit.models.registry import create_network
from deit.models.student import Student
from deit.models.weight_files import load_weights


def student_from_info(model_info: ModelInfo) -> Student:
    """Return a new student with random weights from torch's generator.

    Raises ConfigError as `create_network`.

    >>> from deit.config.sections.student import StudentConfig
    >>> config = StudentConfig("deit_micro", image_size=8, depth=1)
    >>> model_info = ModelInfo(config, ("cat", "dog"), (0.5,) * 3, (0.25,) * 3, 1.0)
    >>> student_from_info(model_info).network.head.weight.shape
    torch.Size([2, 96])
    """
    network = create_network(model_info.student, len(model_info.class_names))
    return Student(network, mean=model_info.mean, std=model_info.std, config=model_info.student)


@checks_types
def build_student(
    student: StudentConfig | Config | str,
    num_classes: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    **options: Any,
) -> Student:
    """Return a new student with random weights from torch's generator, for a loop of your own.

    It takes images in [0, 1] and returns the logits of all its heads. student: its section of a
    configuration, a whole configuration, or a name that student.name accepts. options: fields of
    the section, such as image_size or depth. mean, std: the normalization of its input, three
    numbers each, for images in [0, 1]. device: cpu, cuda, cuda:INDEX, or auto for a GPU if there is
    one.
    Raises ConfigError with all problems.

    >>> student = build_student("deit_micro", 10, mean=[0.5] * 3, std=[0.25] * 3, image_size=8)
    >>> import torch
    >>> output = student(torch.rand(4, 3, 8, 8))
    >>> output.class_logits.shape, output.distillation_logits.shape
    (torch.Size([4, 10]), torch.Size([4, 1, 10]))
    """
    mean, std, device = check_channels("mean", mean), check_channels("std", std), as_device(device)
    check_at_least("num_classes", num_classes, 1)
    if isinstance(student, Config):
        student = student.student
    if not isinstance(student, str | StudentConfig):
        raise ConfigError(
            f"student: should be a name or a configuration; got {type(student).__name__}"
        )
    fields = {"name": student} if isinstance(student, str) else asdict(student)
    config = section_from_dict(StudentConfig, "student", {**fields, **options})
    if problems := check_student(Config(student=config)):
        raise config_error(problems)
    network = create_network(config, int(num_classes))
    return Student(network, mean=mean, std=std, config=config).to(device)


@checks_types
def save_student(
    student: nn.Module,
    folder: str | PathLike,
    class_names: Sequence[str],
    *,
    evaluation_crop: float = 1.0,
    force: bool = False,
) -> Path:
    """Write a student of `build_student` into a folder, which becomes a teacher (`load_teacher`),
    initial weights (init.weights) or a student again (`load_student`). Return the folder.

    student: it may be in a wrapper of DistributedDataParallel, Lightning Fabric or torch.compile.
    class_names: in the order of the labels it was trained on. evaluation_crop: see ModelInfo.
    force: replace a student that is there; any other folder is never replaced.
    Raises ConfigError for another model or number of classes, and SystemFault if the folder exists.

    >>> student = build_student("deit_micro", 2, mean=[0.5] * 3, std=[0.25] * 3, image_size=8)
    >>> folder = save_student(student, "saved", ("cat", "dog"))
    >>> load_student(folder)[1].class_names
    ('cat', 'dog')
    """
    folder = Path(check_path("folder", folder))
    student = _unwrapped(student)
    if student.config is None:
        raise ConfigError("student: should be of build_student or load_student")
    check_fraction("evaluation_crop", evaluation_crop)
    names = tuple(map(str, class_names))
    num_classes = getattr(student.network, "num_classes", len(names))
    if len(names) != num_classes:
        raise ConfigError(
            f"class_names: {len(names)} names, but the student has {num_classes} classes"
        )
    if folder.exists() and not force:
        raise SystemFault(f"folder = {folder}: exists already; use force=True to replace it")
    if folder.exists() and find_saved_model(folder) != folder:
        raise SystemFault(f"folder = {folder}: is no saved student, so it is not replaced")
    mean, std = (tuple(buffer.flatten().tolist()) for buffer in (student.mean, student.std))
    model_info = ModelInfo(student.config, names, mean, std, evaluation_crop)
    weights = student.network.state_dict()
    folder.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_dir(folder, lambda new: write_student(new, weights, model_info), replace=force)
    return folder


def _unwrapped(model: nn.Module) -> Student:
    """Return the student in wrappers of other libraries. Raises ConfigError for other models."""
    inner: nn.Module | None = model
    while inner is not None and not isinstance(inner, Student):
        inner = getattr(inner, "_orig_mod", getattr(inner, "module", None))
    if inner is None:
        raise ConfigError(
            "student: should be of build_student or load_student, alone or in a wrapper of "
            f"DistributedDataParallel, Fabric or torch.compile; got {type(model).__name__}"
        )
    return inner


def write_student(folder: str | Path, weights: dict[str, Tensor], model_info: ModelInfo) -> None:
    """Write model.safetensors and model.json into an existing folder.

    weights: by their names in `student.network`.
    """
    folder = Path(folder)
    save_weights(folder / WEIGHTS, weights)
    (folder / MODEL_INFO).write_text(
        json.dumps(asdict(model_info), indent=1) + "\n", encoding="utf-8"
    )


def save_weights(path: str | Path, weights: dict[str, Tensor]) -> None:
    """Write named tensors as a safetensors file with the metadata that transformers expects."""
    # Not safetensors' save_file, which ignores the umask: only the owner could read its files.
    Path(path).write_bytes(to_safetensors_bytes(weights))


def to_safetensors_bytes(weights: dict[str, Tensor]) -> bytes:
    """Return named tensors as the content of a safetensors file."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    return save(tensors, metadata={"format": "pt"})


@checks_types
@unchanged_generators()
def load_student(
    folder: str | PathLike, *, device: torch.device | str = "cpu"
) -> tuple[Student, ModelInfo]:
    """Load a saved student and its ModelInfo, in training mode.

    device: as for `build_student`. If the folder stores adapters and heads only, the other weights
    are read from the base they were trained on. Raises CheckpointError if a file is missing,
    damaged or made for another network, or differs from the folder's manifest if it has one.

    >>> from tempfile import TemporaryDirectory
    >>> from deit.config.sections.student import StudentConfig
    >>> config = StudentConfig("deit_micro", image_size=8, depth=1)
    >>> model_info = ModelInfo(config, ("cat", "dog"), (0.5,) * 3, (0.25,) * 3, 1.0)
    >>> with TemporaryDirectory() as folder:
    ...     write_student(folder, student_from_info(model_info).network.state_dict(), model_info)
    ...     student, loaded = load_student(folder)
    >>> loaded == model_info, student.network.num_classes
    (True, 2)
    """
    folder, device = Path(check_path("folder", folder)), as_device(device)
    if (folder / manifest.MANIFEST).is_file():
        manifest.verify_dir(folder)
    model_info = load_json_as(folder / MODEL_INFO, ModelInfo)
    student = student_from_info(model_info)
    load_weights(student.network, saved_weights(folder, model_info), origin=str(folder / WEIGHTS))
    return student.to(device), model_info
