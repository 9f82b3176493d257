"""Find a teacher (a run, timm, a checkpoint file or Python code) and match its classes."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from deit.config.schema import CLASS_ORDERS
from deit.config.student_section import STUDENTS, StudentConfig
from deit.config.teachers import TeacherSpec
from deit.core.errors import (
    ConfigError,
    DataError,
    NotFoundError,
    did_you_mean,
    first_line,
    raise_transient,
)
from deit.core.file_reading import missing_file_reason
from deit.core.types import logits_by_head
from deit.core.user_code import HUB_PREFIXES, address_hint, import_file, read_names
from deit.models.metadata import find_saved_model
from deit.models.networks import create_network
from deit.models.parameters import classifier_names
from deit.models.saved import load_student
from deit.models.student import Student
from deit.models.teachers import ASSUMED, BY_NAME, LoadedNetwork, Teacher
from deit.models.weight_files import as_named, load_weights, read_weights


def load_teacher(config: TeacherSpec, class_names: tuple[str, ...], *, image_size: int) -> Teacher:
    """A teacher of a configuration, checked against the classes of the data.

    image_size: side [px] of the images it will be given if it does not say its own.

    Raises DataError where it is missing, has no real weights, or its classes differ;
    CheckpointError where its file is unreadable or made for another network.
    """
    origin = _find(config, class_names)
    trained = origin.image_size
    if config.image_size is not None:
        origin = origin._replace(image_size=config.image_size)
    if config.mean is not None and config.std is not None:
        origin = origin._replace(mean=config.mean, std=config.std)
    count = _count_outputs(origin, image_size)
    order = BY_NAME
    if config.classes is not None:
        origin = origin._replace(class_names=_given_names(config.classes, class_names))
        more = ",..." if len(config.classes) > 4 else ""
        order = f"teacher.classes {','.join(config.classes[:4])}{more}"
    elif origin.class_names is None:
        origin = origin._replace(class_names=_known_names(count, class_names))
        order = ASSUMED if origin.class_names is None else f"{count} synsets of ImageNet"
    teacher = Teacher(origin, _match_classes(origin, class_names, count), trained, order)
    if config.memory_format == "channels_last":
        teacher.set_memory_format("channels_last")
    return teacher


def resolve_source(source: str) -> str:
    """What a teacher.source is: callable, run, timm or file; cheap, before any data is read.

    Raises NotFoundError where there is nothing.
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
            f"teacher.source {source}: holds no trained network (no best/model.safetensors of "
            "ours, no config.json of timm); let the run finish, or train it with train_deit.py"
        )
    if path.is_file():
        return "file"
    if timm.is_model(source) or source.startswith(HUB_PREFIXES):
        return "timm"
    if path.exists():
        raise NotFoundError(f"teacher.source {source}: {missing_file_reason(path)}")
    if (advice := address_hint(source)) is not None:
        raise NotFoundError(f"teacher.source {source}: {advice}")
    if "/" in source or path.suffix:
        recipe = path.name if path.name.endswith("-teacher") else "RECIPE"
        place = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise NotFoundError(
            f"teacher.source {source}: no such file or folder{place}; train a teacher first "
            f"(python train_deit.py {recipe} --out {source}, with the same --data options), or say "
            "where it is now (--teacher.source DIR)"
        )
    raise NotFoundError(
        f"teacher.source {source}: no such file, folder or timm model"
        + did_you_mean(source, timm.list_models())
    )


def _find(config: TeacherSpec, class_names: tuple[str, ...]) -> LoadedNetwork:
    source = config.source or ""
    path = Path(source).expanduser()
    kind = resolve_source(source)
    if kind == "callable":
        return _from_callable(source)
    if kind == "run":
        return _from_run(find_saved_model(path), source)
    if kind == "file":
        return _from_file(path, config, class_names)
    return _from_timm(f"local-dir:{path}" if path.is_dir() else source, source)


class _FusedLogits(nn.Module):
    """A student of ours as a plain network: images normalised by it, one answer, fused."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> Tensor:
        heads = logits_by_head(self.student(images))
        return heads.get("fused", heads["class"])


def _from_run(folder: Path, source: str) -> LoadedNetwork:
    student, facts = load_student(folder)
    mean, std = facts.mean, facts.std
    # The Teacher normalises; the student inside must not do it again.
    student.mean.zero_()
    student.std.fill_(1)
    return LoadedNetwork(
        _FusedLogits(student),
        f"{facts.student.name} from {source}",
        facts.student.image_size,
        mean,
        std,
        facts.class_names,
    )


def _from_timm(name: str, source: str) -> LoadedNetwork:
    try:
        network = timm.create_model(name, pretrained=True)
    except Exception as error:  # hub, network, parsing and shape errors of many types
        raise_transient(error, f"teacher.source {source}")
        reason = str(error).strip().split("\n")[0]
        # A folder that is there is broken; a name is one of the hub's, which is not reached.
        kind = DataError if name.startswith("local-dir:") else NotFoundError
        raise kind(
            f"teacher.source {source}: its weights could not be loaded ({reason}); "
            + _instead(source)
        ) from None
    known = network.pretrained_cfg
    if not any(known.get(place) for place in ("file", "url", "hf_hub_id", "state_dict")):
        raise DataError(f"teacher.source {source}: timm has no trained weights for this model")
    names = known.get("label_names")
    subset = infer_imagenet_subset(network)
    if names is None and subset is not None and not name.startswith("local-dir:"):
        names = ImageNetInfo(subset).label_names()  # what timm publishes is of ImageNet
    return LoadedNetwork(
        network,
        f"timm {name}",
        known["input_size"][-1],
        tuple(known["mean"]),
        tuple(known["std"]),
        None if names is None else tuple(names),
    )


def _instead(source: str) -> str:
    """What to do where the hub is not reached."""
    if source.startswith(HUB_PREFIXES):
        return f"it {address_hint(source)}"
    return "give a local folder or checkpoint file instead"


def _from_file(path: Path, config: TeacherSpec, class_names: tuple[str, ...]) -> LoadedNetwork:
    name = config.architecture
    if name is None:
        raise ConfigError(
            f"teacher.architecture = None: the checkpoint file {path} needs its architecture, "
            f"timm:NAME or one of {', '.join(STUDENTS)}"
        )
    if name not in STUDENTS and not name.startswith("timm:"):
        raise ConfigError(
            f"teacher.architecture = {name!r}: should be timm:NAME or one of "
            f"{', '.join(STUDENTS)}{did_you_mean(name, STUDENTS)}"
        )
    weights = read_weights(path)
    known: dict = {}
    if name.startswith("timm:") and timm.is_model(name.removeprefix("timm:")):
        known = timm.get_pretrained_cfg(name.removeprefix("timm:")).to_dict()
    size = config.image_size or known.get("input_size", (3, None, None))[-1]
    mean, std = config.mean or known.get("mean"), config.std or known.get("std")
    if size is None or mean is None:
        raise ConfigError(
            f"teacher.image_size, teacher.mean and teacher.std: the checkpoint file {path} does "
            "not say what it was trained with; give all three"
        )
    student = StudentConfig(name=name, image_size=size)
    network = create_network(student, _classes_in(weights, student, len(class_names)))
    load_weights(network, weights, origin=f"teacher.source {path}")
    return LoadedNetwork(network, f"{name} from {path}", size, tuple(mean), tuple(std), None)


def _classes_in(weights: dict[str, Tensor], student: StudentConfig, otherwise: int) -> int:
    """The classes of a network, by the rows of its head among the weights; `otherwise` where that
    is not in them under its name, which loading then reports."""
    with torch.device("meta"):
        network = create_network(student, otherwise)
    named = as_named(weights, network.state_dict())
    for head in classifier_names(network):
        if (found := named.get(f"{head}.weight")) is not None and found.ndim:
            return len(found)
    return otherwise


def _known_names(count: int, class_names: tuple[str, ...]) -> tuple[str, ...] | None:
    """The names of so many outputs: the synsets of the part of ImageNet that has as many classes,
    where those of the data are among them; else None."""
    subset = infer_imagenet_subset({"num_classes": count})
    if subset is None:
        return None
    synsets = tuple(ImageNetInfo(subset).label_names())
    return synsets if set(class_names) <= set(synsets) else None


def arranged(order: str, class_names: tuple[str, ...]) -> tuple[str, ...]:
    """The data's class names in one of `config.CLASS_ORDERS`."""

    def natural(name: str) -> list[int | str]:
        # Text and numbers take turns, so equal places always compare.
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]

    if order == "data":
        return class_names
    keys: dict[str, Callable[[str], Any]] = {
        "natural": lambda name: natural(name.lower()),
        "natural_cased": natural,
        "caseless": str.lower,
    }
    return tuple(sorted(class_names, key=keys.get(order), reverse=order == "reversed"))


def _given_names(words: tuple[str, ...], class_names: tuple[str, ...]) -> tuple[str, ...]:
    """The names that teacher.classes says. Raises DataError where a file of them is unreadable, or
    one is there twice."""
    if len(words) == 1 and words[0] in CLASS_ORDERS:
        return arranged(words[0], class_names)
    names = read_names("teacher.classes", words)
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise DataError(f"teacher.classes: names {twice[0]!r} twice")
    return names


def _from_callable(source: str) -> LoadedNetwork:
    file, function = source.rsplit(":", 1)
    path = Path(file).expanduser()
    try:
        network = getattr(import_file(path), function)()
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise_transient(error, f"teacher.source {source}")
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
    origin: LoadedNetwork, class_names: tuple[str, ...], count: int
) -> tuple[int, ...] | None:
    """Columns of the teacher's logits for the data's classes; None if they agree as they are.

    count: of its outputs.
    """
    if origin.class_names is not None and count != len(origin.class_names):
        raise DataError(
            f"teacher {origin.description}: answers with {count} classes and names "
            f"{len(origin.class_names)}; --teacher.classes @FILE gives a name to each"
        )
    if origin.class_names is None:
        if count != len(class_names):
            raise DataError(
                f"teacher {origin.description}: answers with {count} classes, the data has "
                f"{len(class_names)}, and it carries no class names to match them by; "
                "--teacher.classes @FILE gives them, one a line in the order of its answers"
            )
        return None
    if origin.class_names == class_names:
        return None
    column = {name: index for index, name in enumerate(origin.class_names)}
    missing = [name for name in class_names if name not in column]
    if missing:
        shown = ", ".join(repr(name) for name in missing[:5])
        raise DataError(
            f"teacher {origin.description}: knows {len(column)} classes, but of the data's "
            f"{len(class_names)} it lacks {len(missing)}: {shown}"
            f"{did_you_mean(missing[0], column)}"
        )
    return tuple(column[name] for name in class_names)


def _count_outputs(origin: LoadedNetwork, image_size: int) -> int:
    side = origin.image_size or image_size
    origin.network.eval()
    try:
        with torch.no_grad():
            answer = origin.network(torch.zeros(2, 3, side, side))
    except (Exception, SystemExit) as error:  # a network of any origin may raise anything
        raise_transient(error, f"teacher {origin.description}")
        raise DataError(
            f"teacher {origin.description}: cannot answer images of {side} px "
            f"({type(error).__name__}: {first_line(error)}); teacher.image_size sets it"
        ) from error
    if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != 2:
        raise DataError(
            f"teacher {origin.description}: should answer with logits [batch, classes], answered "
            f"with {tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__}"
        )
    return answer.shape[1]
