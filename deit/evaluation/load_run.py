"""Load a finished run from disk: its checkpoint, configuration, student and images."""

from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from deit.config.command_choices import check_at_least, check_choice, check_fraction
from deit.config.finetune_schedules import at_resolution
from deit.config.schema import Config
from deit.config.sections.init import InitConfig
from deit.config.validation import load_config
from deit.core import run_folder, run_log
from deit.core.console import warn
from deit.core.errors import CheckpointError, DataError
from deit.core.rng import unchanged_generators
from deit.datasets.images import EncodedImages, InMemoryImages
from deit.datasets.sources.imagenet_test_sets import load_test_set
from deit.datasets.splits import load_split
from deit.models.adapt_weights import LoadedWeights, adapt_weights
from deit.models.metadata import ModelInfo, find_saved_model
from deit.models.saved_student import load_student, student_from_info
from deit.models.student import Student
from deit.models.weight_files import load_weights


class EvaluationSet(NamedTuple):
    """The images to evaluate on.

    columns: the classes of the network that count, by index. labels: int64 [images], positions in
    `columns`; or bool [images, columns] where an image has several correct classes. name: of the
    split or test set. note: images and classes that were skipped.
    """

    images: InMemoryImages | EncodedImages
    columns: list[int]
    labels: Tensor
    name: str
    note: str = ""


def evaluation_images(
    config: Config,
    model_info: ModelInfo,
    run: str | Path,
    split: str,
    test_set: str | None,
    root: str | None,
) -> EvaluationSet:
    """Return the images of a split, or of another test set of ImageNet. Raises DataError."""
    if test_set is not None:
        loaded = load_test_set(test_set, root or config.data.root, model_info.class_names)
        single = bool((loaded.accepted.sum(dim=1) == 1).all()) and test_set != "imagenet-real"
        labels = loaded.accepted.long().argmax(dim=1) if single else loaded.accepted
        name = test_set
        return EvaluationSet(loaded.images, list(loaded.class_indices), labels, name, loaded.note)
    class_names, images = load_split(config.data, split)
    if class_names != model_info.class_names:
        raise DataError(
            f"{run}: was trained on other classes than the data has: "
            f"{_first_difference(model_info.class_names, class_names)}"
        )
    return EvaluationSet(images, list(range(len(class_names))), images.labels, split)


def warn_unfinished(run: str | Path) -> None:
    """Warn if the run in this folder is not finished."""
    run = Path(run)
    if (run / run_log.METRICS).is_file() and run_folder.read_result(run) is None:
        warn(f"{run}: is not finished; using its weights so far")


def evaluation_config(
    config: Config,
    *,
    root: str | PathLike | None = None,
    device: str | None = None,
    resolution: int | None = None,
    crop: float | None = None,
    batch_size: int | None = None,
) -> Config:
    """Return the configuration of a run for evaluating it.

    Each option overrides a setting of the run: data.root, run.device, student.image_size [px],
    views.eval_crop_pct and run.eval_batch_size.
    """
    teacher = config.teacher
    if resolution is not None:
        check_at_least("resolution", resolution, 1)
        config = replace(at_resolution(config, resolution), teacher=teacher)
    if crop is not None:
        check_fraction("crop", crop)
        config = config.replace(views={"eval_crop_pct": crop})
    # Images are resized once, to the size that is cropped, as `deit predict` and exports do.
    side = round(config.student.image_size / config.views.eval_crop_pct)
    config = config.replace(data={"image_size": side})
    if root is not None:
        config = config.replace(data={"root": fspath(root)})
    if device is not None:
        check_choice("device", device, ("auto", "cpu", "cuda"))
        config = config.replace(run={"device": device})
    if batch_size is not None:
        check_at_least("batch_size", batch_size, 1)
        config = config.replace(run={"eval_batch_size": batch_size})
    return config


@unchanged_generators()
def student_at_resolution(saved: str | Path, side: int | None) -> tuple[Student, ModelInfo]:
    """Load a saved student for images of side `side` [px], with its position embedding resized.

    saved: the folder of a checkpoint. side: default: the student's own. Raises CheckpointError if
    the patch size does not divide the side.

    >>> student, _ = student_at_resolution("checkpoints/digits/best", 16)
    >>> student.network.pos_embed.shape  # 2 tokens, and 8 x 8 patches of 2 px
    torch.Size([1, 66, 16])
    """
    student, model_info = load_student(Path(saved))
    config = model_info.student
    if side is None or side == config.image_size:
        return student, model_info
    _check_side(student, model_info, side)
    model_info = replace(model_info, student=replace(config, image_size=side))
    resized, names = student_from_info(model_info), model_info.class_names
    weights = LoadedWeights(
        student.network.state_dict(), config.name, config, names, model_info.mean, model_info.std
    )
    adapted = adapt_weights(weights, resized.network, names, InitConfig(weights=str(saved)))
    load_weights(resized.network, adapted.weights, origin=str(saved))
    return resized, model_info


def _check_side(student: Student, model_info: ModelInfo, side: int) -> None:
    """Raise CheckpointError if the network's patch size does not divide a side [px]."""
    embedding = getattr(student.network, "patch_embed", None)
    patch = getattr(embedding, "patch_size", (1,))[0]
    if side % patch:
        raise CheckpointError(
            f"resolution = {side}: is not a multiple of the patch size of "
            f"{model_info.student.name} ({patch} px)"
        )


def resolve_run(run: str | Path, name: str) -> tuple[Config, Path]:
    """Return the configuration and the checkpoint folder of a run.

    run: a run folder, or a checkpoint folder in it. name: best or last. Teachers that were moved
    together with the run are looked up next to it (see `load_run_config`). Raises CheckpointError
    and ConfigError.

    >>> config, saved = resolve_run("checkpoints/digits", "best")
    >>> config.student.name, saved.as_posix()
    ('deit_micro', 'checkpoints/digits/best')
    """
    folder = run = Path(run)
    if not (run / run_folder.CONFIG).is_file() and run_folder.is_checkpoint_dir(run):
        run = run.parent
    run_folder.require_run(run)
    return load_run_config(run), find_student(folder, name)


def find_student(run: str | Path, name: str) -> Path:
    """Return the folder of a saved student: a checkpoint of a run, or the given folder itself.

    name: of the checkpoint, best or last. Raises CheckpointError.
    """
    run = Path(run)
    run_folder.require_folder(run)
    saved = run_folder.find_checkpoint(run, name) or run
    if find_saved_model(saved) != saved:
        raise CheckpointError(f"{run}: has no finished checkpoint {name!r} yet")
    return saved


def load_run_config(run: str | Path) -> Config:
    """Return the configuration of a run, with the teachers' sources where they are now.

    A teacher that is missing at its source is replaced by a saved model of the same folder name
    next to the run or one folder above, as in a comparison or a sweep that was moved. Raises
    CheckpointError and ConfigError.

    >>> load_run_config("checkpoints/digits").optim.epochs
    2
    """
    run = Path(run)
    config = load_config(run / run_folder.CONFIG)
    nearby = (run.resolve().parent, run.resolve().parent.parent)

    def locate(source: str) -> str:
        path = Path(source).expanduser()
        if path.exists() or ".py:" in source or "/" not in source:
            return source
        candidates = (folder / path.name for folder in nearby)
        return next((str(folder) for folder in candidates if find_saved_model(folder)), source)

    return config.replace(teacher={"source": tuple(map(locate, config.teacher.source))})


def _first_difference(trained: tuple[str, ...], current: tuple[str, ...]) -> str:
    if len(trained) != len(current):
        return f"{len(trained)} classes, now {len(current)}"
    return next(f"{a!r}, now {b!r}" for a, b in zip(trained, current) if a != b)
