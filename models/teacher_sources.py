"""Load a teacher (a run, timm, a checkpoint file or Python code) and match its classes."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from deit.config.input_paths import missing_source
from deit.config.sections.student import STUDENTS, StudentConfig
from deit.config.sections.teacher import CLASS_ORDERS
from deit.config.teachers import TeacherSpec
from deit.core.errors import (
    ConfigError,
    DataError,
    NotFoundError,
    did_you_mean,
    first_line,
    raise_if_transient,
)
from deit.core.file_reading import missing_file_reason
from deit.core.rng import unchanged_generators
from deit.core.types import logits_by_head
from deit.core.user_code import HUB_PREFIXES, address_hint, import_file, read_names
from deit.models.metadata import find_saved_model
from deit.models.parameters import classifier_names
from deit.models.registry import create_network, is_published_name
from deit.models.saved_student import load_student
from deit.models.student import Student
from deit.models.teachers import ASSUMED, BY_NAME, LoadedNetwork, Teacher
from deit.models.weight_files import load_weights, read_weights, strip_common_prefix


@unchanged_generators()
def teacher_from_spec(
    spec: TeacherSpec, class_names: tuple[str, ...], *, image_size: int
) -> Teacher:
    """Load a teacher and match its logits to the classes of the data.

    image_size: side [px] of its input, if neither `spec` nor the source states one.

    Raises NotFoundError if the source is missing, DataError if it has no trained weights, its code
    fails or its classes differ, ConfigError if its architecture is missing or unknown, and
    CheckpointError if its file is unreadable or made for another network.

    >>> from tempfile import TemporaryDirectory
    >>> code = "import torch\\nnet = lambda: torch.nn.Sequential(" + (
    ...     "torch.nn.Flatten(), torch.nn.Linear(192, 2))")
    >>> with TemporaryDirectory() as folder:
    ...     _ = (Path(folder) / "net.py").write_text(code)
    ...     spec = TeacherSpec(f"{folder}/net.py:net", None, None, None, None, 1.0, "auto")
    ...     teacher = teacher_from_spec(spec, ("cat", "dog"), image_size=8)
    >>> tuple(teacher(torch.rand(4, 3, 8, 8)).shape), teacher.training
    ((4, 2), False)
    """
    loaded = _load_network(spec, class_names)
    return match_teacher(loaded, spec, class_names, image_size=image_size)


def match_teacher(
    loaded: LoadedNetwork, spec: TeacherSpec, class_names: tuple[str, ...], *, image_size: int
) -> Teacher:
    """Return a loaded network as a teacher of these classes, with the options of its `spec`.

    image_size: as for `teacher_from_spec`. Raises DataError and ConfigError as it does.
    """
    trained_size = loaded.image_size
    if spec.image_size is not None:
        loaded = loaded._replace(image_size=spec.image_size)
    if spec.mean is not None and spec.std is not None:
        loaded = loaded._replace(mean=spec.mean, std=spec.std)
    count = _count_outputs(loaded, image_size)
    class_order = BY_NAME
    if spec.classes is not None:
        loaded = loaded._replace(class_names=_given_names(spec.classes, class_names))
        more = ",..." if len(spec.classes) > 4 else ""
        class_order = f"teacher.classes {','.join(spec.classes[:4])}{more}"
    elif loaded.class_names is None:
        loaded = loaded._replace(class_names=_known_names(count, class_names))
        class_order = ASSUMED if loaded.class_names is None else f"{count} synsets of ImageNet"
    teacher = Teacher(loaded, _match_classes(loaded, class_names, count), trained_size, class_order)
    if spec.memory_format == "channels_last":
        teacher.set_memory_format("channels_last")
    return teacher


def resolve_source(source: str) -> str:
    """Return the kind of a teacher.source: callable, run, timm or file.

    Reads no file. Raises NotFoundError if the source does not exist.

    >>> resolve_source("checkpoints/digits-teacher"), resolve_source("resnet18")
    ('run', 'timm')
    """
    path = Path(source).expanduser()
    if ".py:" in source:
        file = Path(source.rsplit(":", 1)[0]).expanduser()
        if not file.is_file():
            raise NotFoundError(f"teacher.source {source}: {missing_file_reason(file)}")
        return "callable"
    if path.is_dir():
        if find_saved_model(path):
            return "run"
        if (path / "config.json").is_file() and not (path / "metrics.jsonl").exists():
            return "timm"
        raise NotFoundError(
            f"teacher.source {source}: holds no trained network (no best/model.safetensors of a "
            "run, no config.json of timm); let the run finish, or train it with train_deit.py"
        )
    if path.is_file():
        return "file"
    if is_published_name(source):
        return "timm"
    if path.exists():
        raise NotFoundError(f"teacher.source {source}: {missing_file_reason(path)}")
    if (advice := address_hint(source)) is not None:
        raise NotFoundError(f"teacher.source {source}: {advice}")
    if "/" in source or path.suffix:
        raise NotFoundError(missing_source(source))
    raise NotFoundError(
        f"teacher.source {source}: no such file, folder or timm model"
        + did_you_mean(source, timm.list_models())
    )


def _load_network(spec: TeacherSpec, class_names: tuple[str, ...]) -> LoadedNetwork:
    source = spec.source or ""
    path = Path(source).expanduser()
    kind = resolve_source(source)
    if kind == "callable":
        return _from_callable(source)
    if kind == "run":
        return _from_run(find_saved_model(path), source)
    if kind == "file":
        return _from_file(path, spec, class_names)
    return _from_timm(f"local-dir:{path}" if path.is_dir() else source, source)


class FusedLogits(nn.Module):
    """A student as a network with a single output: the fused logits of its heads, if it has two."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        heads = logits_by_head(self.student(images))
        return heads.get("fused", heads["class"])


def _from_run(folder: Path, source: str) -> LoadedNetwork:
    student, model_info = load_student(folder)
    mean, std = model_info.mean, model_info.std
    # The Teacher normalizes; the student within it must not do so again.
    student.mean.zero_()
    student.std.fill_(1)
    return LoadedNetwork(
        FusedLogits(student),
        f"{model_info.student.name} from {source}",
        model_info.student.image_size,
        mean,
        std,
        model_info.class_names,
    )


def _from_timm(name: str, source: str) -> LoadedNetwork:
    try:
        network = timm.create_model(name, pretrained=True)
    except Exception as error:  # hub, network, parsing and shape errors of many types
        raise_if_transient(error, f"teacher.source {source}")
        reason = str(error).strip().split("\n")[0]
        # An existing folder is damaged; a name belongs to the hub, which could not be reached.
        kind = DataError if name.startswith("local-dir:") else NotFoundError
        raise kind(
            f"teacher.source {source}: its weights could not be loaded ({reason}); "
            f"{_advice(source)}"
        ) from None
    pretrained_cfg = network.pretrained_cfg
    if not any(pretrained_cfg.get(key) for key in ("file", "url", "hf_hub_id", "state_dict")):
        raise DataError(f"teacher.source {source}: timm has no trained weights for this model")
    names = pretrained_cfg.get("label_names")
    subset = infer_imagenet_subset(network)
    if names is None and subset is not None and not name.startswith("local-dir:"):
        names = ImageNetInfo(subset).label_names()  # timm's published weights are for ImageNet
    return LoadedNetwork(
        network,
        f"timm {name}",
        pretrained_cfg["input_size"][-1],
        tuple(pretrained_cfg["mean"]),
        tuple(pretrained_cfg["std"]),
        None if names is None else tuple(names),
    )


def _advice(source: str) -> str:
    """Return the remedy for a source that could not be downloaded."""
    if source.startswith(HUB_PREFIXES):
        return f"it {address_hint(source)}"
    return "give a local folder or checkpoint file instead"


def _from_file(path: Path, spec: TeacherSpec, class_names: tuple[str, ...]) -> LoadedNetwork:
    name = spec.architecture
    if name is None:
        raise ConfigError(
            f"teacher.architecture = None: set the architecture of the checkpoint file {path}: "
            f"timm:NAME or one of {', '.join(STUDENTS)}"
        )
    if name not in STUDENTS and not name.startswith("timm:"):
        raise ConfigError(
            f"teacher.architecture = {name!r}: should be timm:NAME or one of "
            f"{', '.join(STUDENTS)}{did_you_mean(name, STUDENTS)}"
        )
    weights = read_weights(path)
    pretrained_cfg: dict = {}
    if name.startswith("timm:") and timm.is_model(name.removeprefix("timm:")):
        pretrained_cfg = timm.get_pretrained_cfg(name.removeprefix("timm:")).to_dict()
    size = spec.image_size or pretrained_cfg.get("input_size", (3, None, None))[-1]
    mean, std = spec.mean or pretrained_cfg.get("mean"), spec.std or pretrained_cfg.get("std")
    if size is None or mean is None:
        raise ConfigError(
            f"teacher.image_size, teacher.mean and teacher.std: the checkpoint file {path} does "
            "not state the values it was trained with; set all three"
        )
    student = StudentConfig(name=name, image_size=size)
    network = create_network(student, _num_classes_of(weights, student, len(class_names)))
    load_weights(network, weights, origin=f"teacher.source {path}")
    return LoadedNetwork(network, f"{name} from {path}", size, tuple(mean), tuple(std), None)


def _num_classes_of(weights: dict[str, Tensor], student: StudentConfig, default: int) -> int:
    """Return the number of rows of the head among the weights, or `default` if it is missing.

    A missing head is reported when the weights are loaded.
    """
    with torch.device("meta"):
        network = create_network(student, default)
    stripped = strip_common_prefix(weights, network.state_dict())
    for head in classifier_names(network):
        if (weight := stripped.get(f"{head}.weight")) is not None and weight.ndim:
            return len(weight)
    return default


def _known_names(count: int, class_names: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the synsets of the ImageNet subset with `count` classes; None if the data's differ."""
    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return None
    synsets = tuple(ImageNetInfo(subset).label_names())
    return synsets if set(class_names) <= set(synsets) else None


def ordered_classes(order: str, class_names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the data's class names in one of `deit.config.sections.teacher.CLASS_ORDERS`.

    >>> ordered_classes("natural", ("room1", "room10", "room2"))
    ('room1', 'room2', 'room10')
    """

    def natural(name: str) -> list[int | str]:
        # Text and numbers alternate, so that elements at the same index have the same type.
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]

    if order == "data":
        return class_names
    keys: dict[str, Callable[[str], Any]] = {
        "natural": lambda name: natural(name.lower()),
        "natural_cased": natural,
        "caseless": str.lower,
    }
    return tuple(sorted(class_names, key=keys.get(order), reverse=order == "reversed"))


def _given_names(classes: tuple[str, ...], class_names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the class names of teacher.classes: an order of the data's, names, or a file of them.

    Raises DataError if the file is unreadable or a name occurs twice.
    """
    if len(classes) == 1 and classes[0] in CLASS_ORDERS:
        return ordered_classes(classes[0], class_names)
    names = read_names("teacher.classes", classes)
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates:
        raise DataError(f"teacher.classes: contains {duplicates[0]!r} twice")
    return names


def _from_callable(source: str) -> LoadedNetwork:
    file, function = source.rsplit(":", 1)
    path = Path(file).expanduser()
    try:
        network = getattr(import_file(path), function)()
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise_if_transient(error, f"teacher.source {source}")
        raise DataError(f"teacher.source {source}: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise DataError(
            f"teacher.source {source}: should return a torch.nn.Module, "
            f"returned {type(network).__name__}"
        )
    names = getattr(network, "class_names", None)
    return LoadedNetwork(
        network,
        f"{function} from {path}",
        None,
        (0.0, 0.0, 0.0),
        (1.0, 1.0, 1.0),
        None if names is None else tuple(names),
    )


def _match_classes(
    loaded: LoadedNetwork, class_names: tuple[str, ...], count: int
) -> tuple[int, ...] | None:
    """Return the indices of the data's classes among the teacher's; None if they are equal.

    count: the number of the teacher's logits.
    """
    if loaded.class_names is not None and count != len(loaded.class_names):
        raise DataError(
            f"teacher {loaded.description}: has {count} outputs, but {len(loaded.class_names)} "
            "class names; name each output with teacher.classes, @FILE or a list"
        )
    if loaded.class_names is None:
        if count != len(class_names):
            raise DataError(
                f"teacher {loaded.description}: has {count} outputs, the data {len(class_names)} "
                "classes, and no class names to match them by; give them with teacher.classes: "
                "@FILE, one per line in the order of its outputs, or a list"
            )
        return None
    if loaded.class_names == class_names:
        return None
    indices = {name: index for index, name in enumerate(loaded.class_names)}
    missing = [name for name in class_names if name not in indices]
    if missing:
        examples = ", ".join(repr(name) for name in missing[:5])
        raise DataError(
            f"teacher {loaded.description}: has {len(indices)} classes, but lacks {len(missing)} "
            f"of the data's {len(class_names)}: {examples}{did_you_mean(missing[0], indices)}"
        )
    counts = Counter(loaded.class_names)
    if ambiguous := [name for name in class_names if counts[name] > 1]:
        raise DataError(
            f"teacher {loaded.description}: {counts[ambiguous[0]]} of its classes are named "
            f"{ambiguous[0]!r}; name each output with teacher.classes, @FILE or a list"
        )
    return tuple(indices[name] for name in class_names)


def _count_outputs(loaded: LoadedNetwork, image_size: int) -> int:
    side = loaded.image_size or image_size
    loaded.network.eval()
    try:
        with torch.no_grad():
            logits = loaded.network(torch.zeros(2, 3, side, side))
    except (Exception, SystemExit) as error:  # a network of any origin may raise anything
        raise_if_transient(error, f"teacher {loaded.description}")
        raise DataError(
            f"teacher {loaded.description}: fails on images of {side} px "
            f"({type(error).__name__}: {first_line(error)}); set its input size with "
            "teacher.image_size"
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 2:
        raise DataError(
            f"teacher {loaded.description}: should return logits [batch, classes], returned "
            f"{tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__}"
        )
    return logits.shape[1]
