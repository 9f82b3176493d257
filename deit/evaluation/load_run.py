"""Finished runs on disk: their checkpoints, configurations, students and images."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from deit.config.finetune_schedules import at_resolution
from deit.config.schema import Config
from deit.config.student_section import InitConfig
from deit.config.validation import load_config
from deit.core import run_folder, run_log
from deit.core.console import warn
from deit.core.errors import CheckpointError, DataError
from deit.datasets.imagenet_variants import load_variant
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.splits import load_split
from deit.models.adapt_weights import LoadedWeights, adapt_weights
from deit.models.metadata import ModelInfo, find_saved_model
from deit.models.saved import build_student, load_student
from deit.models.student import Student
from deit.models.weight_files import load_weights


class EvaluationSet(NamedTuple):
    """What is evaluated: images, which classes may be answered, and what is right: int64 [images]
    of these, or bool [images, classes]; what it is called, and what was left out."""

    images: InMemoryImages | EncodedImages
    columns: list[int]
    labels: Tensor
    name: str
    note: str = ""


def evaluation_images(
    config: Config, facts: ModelInfo, run: Path, split: str, test_set: str | None, root: str | None
) -> EvaluationSet:
    """The images of a split, or of one of ImageNet's variants. Raises DataError."""
    if test_set is not None:
        loaded = load_variant(test_set, root or config.data.root, facts.class_names)
        single = bool((loaded.accepted.sum(dim=1) == 1).all()) and test_set != "real"
        labels = loaded.accepted.long().argmax(dim=1) if single else loaded.accepted
        name = f"ImageNet {test_set}"
        return EvaluationSet(loaded.images, list(loaded.columns), labels, name, loaded.note)
    class_names, images = load_split(config.data, split)
    if class_names != facts.class_names:
        raise DataError(
            f"{run}: was trained on other classes than the data has: "
            f"{_first_difference(facts.class_names, class_names)}"
        )
    return EvaluationSet(images, list(range(len(facts.class_names))), images.labels, split)


def warn_unfinished(run: Path) -> None:
    """Say of a run folder that its training has not ended, where it has not."""
    if (run / run_log.METRICS).is_file() and run_folder.read_result(run) is None:
        warn(f"{run}: is not finished; these are the weights that it has so far")


def evaluation_config(
    config: Config,
    *,
    root: str | None = None,
    device: str | None = None,
    resolution: int | None = None,
    crop: float | None = None,
) -> Config:
    """A run's configuration for evaluating it, with what was asked to be otherwise."""
    teacher = config.teacher
    if resolution is not None:
        config = replace(at_resolution(config, resolution), teacher=teacher)
    if crop is not None:
        config = config.replace(views={"eval_crop_pct": crop})
    # The size from which the view is cut: resized once, as `deit predict` and an export do it.
    side = round(config.student.image_size / config.views.eval_crop_pct)
    config = config.replace(data={"image_size": side})
    if root is not None:
        config = config.replace(data={"root": root})
    if device is not None:
        config = config.replace(run={"device": device})
    return config


def student_at_resolution(saved: Path, side: int | None) -> tuple[Student, ModelInfo]:
    """A saved student, for images of another side [px] with its position embedding resized; None:
    of its own. Raises CheckpointError where its patches do not divide the side."""
    student, facts = load_student(saved)
    own = facts.student
    if side is None or side == own.image_size:
        return student, facts
    _check_side(student, facts, side)
    facts = replace(facts, student=replace(own, image_size=side))
    larger, names = build_student(facts), facts.class_names
    weights = LoadedWeights(
        student.network.state_dict(), own.name, own, names, facts.mean, facts.std
    )
    fitted = adapt_weights(weights, larger.network, names, InitConfig(weights=str(saved)))
    load_weights(larger.network, fitted.weights, origin=str(saved))
    return larger, facts


def _check_side(student: Student, facts: ModelInfo, side: int) -> None:
    """Refuse a side [px] that a network's patches do not divide. Raises CheckpointError."""
    embedding = getattr(student.network, "patch_embed", None)
    patch = getattr(embedding, "patch_size", (1,))[0]
    if side % patch:
        name = facts.student.name
        raise CheckpointError(
            f"--resolution {side}: the patches of {name} ({patch} px) do not divide it"
        )


def resolve_run(run: Path, name: str) -> tuple[Config, Path]:
    """The configuration and the checkpoint folder of a run; also where `run` is that folder.

    name: best or last. Teachers that lay beside the run, as in a comparison or a sweep, are found
    there, wherever both are now. Raises CheckpointError and ConfigError.
    """
    saved = None
    if not (run / run_folder.CONFIG).is_file() and run_folder.is_checkpoint_dir(run):
        run, saved = run.parent, run
    run_folder.require_run(run)
    saved = saved or run_folder.find_checkpoint(run, name)
    if saved is None or find_saved_model(saved) != saved:
        raise CheckpointError(f"{run}: has no finished checkpoint {name!r} yet")
    return load_run_config(run), saved


def load_run_config(run: Path) -> Config:
    """The configuration of a run; teachers that are not where it found them are taken from the
    folders around it, if a run of that name is there. Raises CheckpointError and ConfigError."""
    config = load_config(run / run_folder.CONFIG)
    around = (run.resolve().parent, run.resolve().parent.parent)

    def lies(source: str) -> str:
        path = Path(source).expanduser()
        if path.exists() or ".py:" in source or "/" not in source:
            return source
        there = (folder / path.name for folder in around)
        return next((str(one) for one in there if find_saved_model(one)), source)

    return config.replace(teacher={"source": tuple(map(lies, config.teacher.source))})


def _first_difference(trained: tuple[str, ...], found: tuple[str, ...]) -> str:
    if len(trained) != len(found):
        return f"{len(trained)} against {len(found)}"
    return next(f"{a!r} against {b!r}" for a, b in zip(trained, found) if a != b)
