"""Write the teachers' outputs for every training view into a target store."""

from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from deit.config.arguments import checks_types
from deit.config.command_choices import check_amount, check_content_name, check_path
from deit.config.recipes import recipe
from deit.config.schema import Config, to_dict
from deit.config.sections.loss import LossConfig
from deit.config.sections.run import RunConfig
from deit.config.sections.teacher import TeacherConfig
from deit.config.teachers import single_teacher, teacher_specs
from deit.config.validation import validate
from deit.core.accelerator import any_process, environment_info, own_accelerate_state
from deit.core.console import format_percent, info, obeys_verbose, warn
from deit.core.errors import ConfigError, SystemFault
from deit.core.filesystem import check_space, check_writable
from deit.core.host_memory import check_inference_memory
from deit.core.metrics import is_near_chance, majority_accuracy
from deit.datasets.loader import TrainLoader
from deit.datasets.splits import Splits, load_splits
from deit.distill.build import (
    build_accelerator,
    build_online_ensemble,
    build_teachers,
    build_train_loader,
    teacher_input_size,
)
from deit.distill.losses import needs_logits
from deit.distill.student_init import load_init_weights, with_init_normalization
from deit.distill.target_content import check_content
from deit.distill.target_fingerprint import fingerprint_of, teachers_fingerprint
from deit.distill.target_format import FORMAT_VERSION, RecordFormat
from deit.distill.target_shards import ShardedTargetWriter
from deit.distill.target_store import SHARDS, TargetStore, open_store
from deit.distill.target_writer import TargetWriter, shards_of, write_all
from deit.distill.teacher_check import check_teachers
from deit.distill.teacher_ensemble import teacher_query
from deit.distill.verify_targets import verify_store
from deit.models.teacher_sources import resolve_source
from deit.models.teachers import Teacher

_MAX_CLASSES = 2**16
_QUERIES_PER_SHARD = 64  # two views with their neighbors: evenly spaced, they miss no shard


class _Inputs(NamedTuple):
    """What a store is written from. saved_config: for the manifest; None if a loader was given."""

    config: Config
    splits: Splits
    loader: TrainLoader
    teachers: list[Teacher]
    accelerator: Accelerator
    saved_config: Config | None


@checks_types
@obeys_verbose
@own_accelerate_state()
def write_targets(
    source: Config | TrainLoader | str | PathLike,
    out: str | PathLike,
    teacher: Teacher | None = None,
    *,
    epochs: int | None = None,
    content: str | None = None,
    part: tuple[int, int] = (0, 1),
    teacher_index: int | None = None,
    verbose: bool = True,
) -> TargetStore | None:
    """Write the teachers' outputs for all training views into a store.

    Shards that exist are kept: after an interruption, the same call continues, and compares some
    outputs of each shard with the teacher's. More epochs cannot be added to a store later.
    source: a configuration with its teachers, or the name of a recipe; or a loader of
    `TrainLoader.from_config`, `from_folder` or `from_arrays`. teacher: of a loader, from
    `load_teacher`. epochs: how many to write; default: all of the configuration. content: hard,
    full or top-K, which serves soft losses at temperature 1 only; default: what the loss of the
    configuration needs; full for a loader. part: (index, number of parts) of the shards to write
    here, the index from 0. teacher_index: write the outputs of this teacher only (from 1), for the
    views that all teachers see; default: of all teachers. verbose: show messages and progress;
    warnings are always shown.
    Returns the complete store; None while shards are missing, and in other processes than the main
    one. Raises the errors of deit.core.errors.

    Example:
        >>> from deit.config.recipes import find_recipe
        >>> config = find_recipe("digits").replace(data={"train_fraction": 0.1})
        >>> store = write_targets(config, "targets", epochs=2, verbose=False)
        >>> store.record_format.epochs
        2
    """
    check_amount(epochs, part)
    check_content_name(content)
    out = Path(check_path("out", out)).resolve()
    if isinstance(source, TrainLoader):
        content = content or "full"
        inputs = _from_loader(source, teacher, out, epochs, content, teacher_index)
    else:
        inputs = _from_config(source, teacher, out, teacher_index)
    config, splits, loader, teachers, accelerator, _ = inputs
    record_format = _record_format(config, loader, len(splits.class_names), epochs, content)
    batch_size = max(config.run.eval_batch_size // 2 * 2, 2)
    store = ShardedTargetWriter(out, _manifest(inputs, record_format, batch_size))
    if _is_complete(store, accelerator):
        info(f"{out}: complete already; some outputs are computed again and compared")
        return _verified(inputs, out)
    _check_memory(teachers, loader.sizes.teacher, accelerator, batch_size)
    _check_disk(out, record_format)
    _measure_teachers(inputs)
    ensemble = build_online_ensemble(teachers, config.teacher, splits, accelerator)
    shards = shards_of(part, record_format.num_shards, accelerator)
    writer = TargetWriter(store, shards, loader, ensemble, splits.train.labels, batch_size)
    writer.check_teacher()
    store.create_or_match()  # only now: teachers that fail the checks leave no folder behind
    write_all(writer, accelerator)
    return _finished(inputs, store, is_new=len(writer.missing) == record_format.num_shards)


def _from_config(
    source: Config | str | PathLike,
    teacher: Teacher | None,
    out: Path,
    teacher_index: int | None,
) -> _Inputs:
    """Load the images and teachers of a configuration. Raises ConfigError and DataError."""
    if teacher is not None:
        raise ConfigError("teacher: goes with a loader; a configuration names its teachers itself")
    config = source if isinstance(source, Config) else recipe(source)
    config = validate(config.replace(teacher={"target_stores": ()}), live_teacher=False)
    _check_combinable(config if teacher_index is None else _with_one_teacher(config, teacher_index))
    config = with_init_normalization(config, load_init_weights(config.init))
    _check_paths(config.teacher, out)
    accelerator = build_accelerator(config.run)
    splits = load_splits(config.data)
    teachers = build_teachers(
        config.teacher, splits.class_names, config.student.image_size, accelerator
    )
    size = teacher_input_size([teacher.image_size for teacher in teachers])
    loader = build_train_loader(config, splits, accelerator, teacher_size=size, all_processes=True)
    if teacher_index is not None:
        teachers = teachers[teacher_index - 1 : teacher_index]
        config = _with_one_teacher(config, teacher_index)
    return _Inputs(config, splits, loader, teachers, accelerator, config)


def _from_loader(
    loader: TrainLoader,
    teacher: Teacher | None,
    out: Path,
    epochs: int | None,
    content: str | None,
    teacher_index: int | None,
) -> _Inputs:
    """Return the inputs of a loader and its teacher. Raises ConfigError if one is missing."""
    if loader.splits is None:
        raise ConfigError("loader: has no splits; make it with TrainLoader.from_config")
    if not isinstance(teacher, Teacher):
        given = "none was given" if teacher is None else f"got {type(teacher).__name__}"
        raise ConfigError(f"teacher: should be a Teacher, as load_teacher returns; {given}")
    if teacher_index is not None:
        raise ConfigError(f"teacher_index = {teacher_index}: goes with a configuration only")
    if epochs is None and not loader.views.has_fixed_teacher_view:
        raise ConfigError("epochs: give the number of epochs to write")
    _check_paths(TeacherConfig(), out)
    config = Config(
        views=loader.views,
        optim=loader.optim,
        loss=LossConfig("hard" if content == "hard" else "soft"),
        teacher=TeacherConfig(source=(teacher.description,)),
        run=RunConfig(seed=loader.seed),
    )
    config = config.replace(student={"image_size": loader.sizes.student})
    accelerator = build_accelerator(RunConfig(device=loader.device.type))
    teachers = [teacher.to(loader.device)]
    return _Inputs(config, loader.splits, loader, teachers, accelerator, saved_config=None)


def _is_complete(store: ShardedTargetWriter, accelerator: Accelerator) -> bool:
    """Return whether any process finds the store complete: all must take the same path."""
    if not any_process(accelerator, store.is_complete()):
        return False
    if accelerator.is_main_process:
        store.clean_up()
    return True


def _verified(inputs: _Inputs, out: Path) -> TargetStore | None:
    """Return a complete store after `_check_outputs`; None unless in the main process."""
    if not inputs.accelerator.is_main_process:
        return None
    store = open_store(out)
    _check_outputs(inputs, store)
    return store


def _check_outputs(inputs: _Inputs, store: TargetStore) -> None:
    """Compare a store that others have written, at least in part, with the teachers.

    Raises DataError if its outputs are not theirs: a network's code is in no fingerprint.
    """
    config, splits, loader, teachers, accelerator, _ = inputs
    ensemble = build_online_ensemble(teachers, config.teacher, splits, accelerator)
    verify_store(
        store,
        splits,
        loader,
        config.teacher,
        teachers=teachers,
        query=teacher_query(loader, ensemble),
        num_queries=_QUERIES_PER_SHARD * max(store.record_format.num_shards, 8),
    )


def _finished(inputs: _Inputs, store: ShardedTargetWriter, *, is_new: bool) -> TargetStore | None:
    """Return the store if all of it is written, in the main process. is_new: whether this call has
    written all of it; what others have written is compared with the teachers first."""
    check = None if is_new else partial(_check_outputs, inputs)
    if not inputs.accelerator.is_main_process or not store.merge_if_complete(check):
        return None
    return _measured(inputs, store.store) if is_new else open_store(store.store)


def _measured(inputs: _Inputs, out: Path) -> TargetStore:
    """Warn if the teachers, which were not measured before, are near chance on the views."""
    config, splits, *_ = inputs
    store = open_store(out)
    chance = majority_accuracy(splits.train.labels, len(splits.class_names))
    if (
        not len(splits.validation.labels)
        and store.teacher_top1 is not None
        and is_near_chance(store.teacher_top1, chance)
    ):
        warn(
            f"teacher {', '.join(config.teacher.source)}: {format_percent(store.teacher_top1)} % "
            f"top-1 on the stored views is near chance ({format_percent(chance)} %, the share of "
            "the largest class): wrong weights, normalization or class order?"
        )
    return store


def _check_paths(teacher: TeacherConfig, out: Path) -> None:
    """Check teachers and output folder before images are read."""
    for spec in teacher_specs(teacher):
        resolve_source(spec.source)
    if out.exists() and not out.is_dir():
        raise SystemFault(f"out = {out}: is a file, not a folder")
    check_writable(out, name="out")


def _check_disk(out: Path, record_format: RecordFormat) -> None:
    """Check that the disk has space for the shards and for the file that they are merged into."""
    written = sum(file.stat().st_size for file in (out / SHARDS).glob("*.bin"))
    check_space(out, 2 * record_format.rows * record_format.dtype.itemsize - written, name="out")


def _check_memory(
    teachers: list[Teacher], size: int, accelerator: Accelerator, batch_size: int
) -> None:
    """Check that a batch of images fits the memory, for each teacher."""
    for teacher in teachers:
        with accelerator.autocast():
            check_inference_memory(teacher, teacher.forward, size, accelerator, batch_size)


def _measure_teachers(inputs: _Inputs) -> None:
    """Measure the teachers on the validation images, as a run does; not without such images."""
    config, splits, loader, teachers, accelerator, _ = inputs
    if not len(splits.validation.labels):
        info("teacher   not measured: there are no validation images")
        return
    weights = tuple(spec.weight for spec in teacher_specs(config.teacher))
    check_teachers(
        teachers,
        config.teacher,
        splits,
        accelerator,
        config.evaluation,
        weights=weights,
        size=loader.sizes.teacher,
    )


def _manifest(inputs: _Inputs, record_format: RecordFormat, batch_size: int) -> dict[str, Any]:
    """Return the manifest of a store that is not yet complete."""
    config, splits, loader, teachers, accelerator, saved_config = inputs
    environment = environment_info(accelerator)
    return {
        "format": FORMAT_VERSION,
        "complete": False,
        # The last bits of an output depend on these, so all writers of a store share them.
        "inference": {"precision": environment["precision"], "batch_size": batch_size},
        "fingerprint": {
            **fingerprint_of(splits, loader),
            **teachers_fingerprint(config.teacher, teachers),
        },
        "record_format": record_format._asdict(),
        "teacher_top1": None,
        "provenance": _provenance(saved_config, teachers, environment),
    }


def _with_one_teacher(config: Config, teacher_index: int) -> Config:
    """Return the configuration with one of its teachers, counted from 1. Raises ConfigError."""
    num_teachers = len(config.teacher.source)
    if not 1 <= teacher_index <= num_teachers:
        raise ConfigError(
            f"teacher_index = {teacher_index}: should be in 1 ... {num_teachers}, the number of "
            "teachers"
        )
    config = replace(config, teacher=single_teacher(config.teacher, teacher_index - 1))
    config = config.replace(student={"num_distillation_tokens": 1})
    return validate(config, live_teacher=False)


def _check_combinable(config: Config) -> None:
    """Raise ConfigError unless the outputs of all teachers of a configuration make one target."""
    teacher, loss = config.teacher, config.loss
    if loss.kind == "none":
        raise ConfigError("loss.kind = 'none': has no teacher; choose another loss.kind")
    if not teacher.source:
        raise ConfigError("teacher.source = None: there is no teacher; give one")
    if len(teacher.source) > 1 and teacher.combine == "tokens":
        raise ConfigError(
            "teacher.combine = 'tokens': the teachers are not combined; write a store for each "
            "(teacher_index 1, teacher_index 2), then train with teacher.target_stores A,B"
        )
    averages_probabilities = len(teacher.source) > 1 and teacher.combine == "probabilities"
    if averages_probabilities and needs_logits(loss) and loss.temperature != 1:
        raise ConfigError(
            f"loss.temperature = {loss.temperature:g}: a mean of probabilities differs at each "
            "temperature; write a store for each teacher (teacher_index 1, teacher_index 2), "
            "then train with teacher.target_stores A,B; or use teacher.combine logits"
        )


def _record_format(
    config: Config,
    loader: TrainLoader,
    num_classes: int,
    epochs: int | None,
    content: str | None,
) -> RecordFormat:
    """Return the format of the records to write. Raises ConfigError."""
    views, teacher, loss = config.views, config.teacher, config.loss
    is_ensemble = len(teacher.source) > 1
    if content is None:
        # With many classes, only the largest probabilities, unless the loss needs all of them.
        exact = loss.temperature == 1 and not loss.standardize_logits and loss.kind != "dkd"
        exact &= not is_ensemble or teacher.combine != "logits"
        soft = "top-10" if num_classes > 100 and exact else "full"
        content = soft if needs_logits(loss) else "hard"
    if num_classes > _MAX_CLASSES:
        raise ConfigError(f"{num_classes} classes: a target store holds at most {_MAX_CLASSES}")
    if views.has_fixed_teacher_view:
        if epochs not in (None, 1):
            raise ConfigError(
                f"epochs = {epochs}: views.teacher_view {views.teacher_view} is the same in every "
                "epoch; give epochs 1"
            )
        epochs = 1
    record_format = RecordFormat(
        content=content,
        num_classes=num_classes,
        epochs=epochs or config.optim.epochs,
        rows_per_epoch=loader.rows_per_epoch,
        mixed_pairs=views.uses_mixing,
    )
    if record_format.top_k is not None and record_format.top_k >= num_classes:
        raise ConfigError(f"content = {content}: there are {num_classes} classes; use full")
    single = single_teacher(teacher, 0) if is_ensemble else teacher
    combine = teacher.combine if is_ensemble else None
    check_content(
        record_format.content, single, loss, combine=combine, where=f"content = {content}"
    )
    return record_format


def _provenance(
    config: Config | None, teachers: list[Teacher], environment: dict[str, Any]
) -> dict[str, Any]:
    """Return how a store was written, for people and for verifying it."""
    return {
        "teachers": [teacher.description for teacher in teachers],
        "class_orders": [teacher.class_order for teacher in teachers],
        "device": environment["device"],
        "packages": environment["packages"],
        "config": None if config is None else to_dict(config),
    }
