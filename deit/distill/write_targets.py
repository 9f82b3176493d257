"""Write the teachers' outputs for every training view into a target store."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from deit.config.command_choices import check_amount
from deit.config.schema import Config, to_dict
from deit.config.sections.teacher import TeacherConfig
from deit.config.teachers import single_teacher, teacher_specs
from deit.config.validation import validate
from deit.core.accelerator import any_process, environment_info
from deit.core.console import format_duration, info, progress
from deit.core.errors import ConfigError, SystemFault
from deit.core.fault_injection import fault_point
from deit.core.filesystem import check_space, check_writable
from deit.core.host_memory import check_inference_memory
from deit.core.signals import GracefulStop
from deit.core.types import TeacherOutput
from deit.datasets.loader import TeacherInput, TrainLoader, UnmixedViews
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
from deit.distill.target_format import FORMAT_VERSION, RecordFormat, encode, view_checksum
from deit.distill.target_shards import ShardedTargetWriter, TargetShard
from deit.distill.target_store import SHARDS, TargetStore, open_store
from deit.distill.teacher_check import check_teachers
from deit.distill.teacher_ensemble import TeacherEnsemble, teacher_query
from deit.models.teacher_sources import resolve_source
from deit.models.teachers import Teacher

_UNMIXED_WEIGHT = 0.9  # a mixed view counts as one image above this weight
_MAX_CLASSES = 2**16


def write_targets(
    config: Config,
    out: str | Path,
    *,
    epochs: int | None = None,
    content: str | None = None,
    part: tuple[int, int] = (0, 1),
    teacher_index: int | None = None,
) -> TargetStore | None:
    """Write the teachers' outputs for all training views of a configuration into a store.

    Shards that exist are kept.
    epochs: how many to write; default: all of the run. content: hard, full or top-K; default: what
    the loss needs. part: (index, number of parts) of the shards to write here, the index from 0.
    teacher_index: write the outputs of this teacher only (from 1), for the views that all teachers
    see; default: the outputs of all teachers.
    Returns the complete store, in the main process; None in other processes, and while shards of
    other parts are missing. Raises the errors of deit.core.errors.

    Example:
        >>> from deit.config.recipes import find_recipe
        >>> from deit.core.console import quiet
        >>> config = find_recipe("digits").replace(data={"train_fraction": 0.1})
        >>> with quiet():
        ...     store = write_targets(config, "targets", epochs=2)
        >>> store.record_format.epochs
        2
    """
    check_amount(epochs, part)
    config = validate(config.replace(teacher={"target_stores": ()}), live_teacher=False)
    _check_combinable(config if teacher_index is None else _with_one_teacher(config, teacher_index))
    config = with_init_normalization(config, load_init_weights(config.init))
    out = Path(out).resolve()
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
    record_format = _record_format(config, loader, len(splits.class_names), epochs, content)
    batch_size = max(config.run.eval_batch_size // 2 * 2, 2)
    manifest = _manifest(config, splits, loader, teachers, record_format, accelerator, batch_size)
    store = ShardedTargetWriter(out, manifest)
    if _is_complete(store, accelerator):
        info(f"{out}: already complete")
        return open_store(out) if accelerator.is_main_process else None
    _check_memory(teachers, loader.sizes.teacher, accelerator, batch_size)
    _check_disk(out, record_format)
    _measure_teachers(teachers, config, splits, accelerator, loader.sizes.teacher)
    store.create_or_match()  # only now: teachers that fail the checks leave no folder behind
    ensemble = build_online_ensemble(teachers, config.teacher, splits, accelerator)
    shards = _shards_of(part, record_format.num_shards, accelerator)
    writer = TargetWriter(store, shards, loader, ensemble, splits.train.labels, batch_size)
    _write_all(writer, accelerator)
    return open_store(out) if accelerator.is_main_process and store.merge_if_complete() else None


def _is_complete(store: ShardedTargetWriter, accelerator: Accelerator) -> bool:
    """Return whether any process finds the store complete: all must take the same path."""
    if not any_process(accelerator, store.is_complete()):
        return False
    if accelerator.is_main_process:
        store.clean_up()
    return True


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


def _measure_teachers(
    teachers: list[Teacher], config: Config, splits: Splits, accelerator: Accelerator, size: int
) -> None:
    """Measure the teachers on the validation images, as a run does."""
    weights = tuple(spec.weight for spec in teacher_specs(config.teacher))
    check_teachers(
        teachers, config.teacher, splits, accelerator, config.evaluation, weights=weights, size=size
    )


def _manifest(
    config: Config,
    splits: Splits,
    loader: TrainLoader,
    teachers: list[Teacher],
    record_format: RecordFormat,
    accelerator: Accelerator,
    batch_size: int,
) -> dict[str, Any]:
    """Return the manifest of a store that is not yet complete."""
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
        "provenance": _provenance(config, teachers, environment),
    }


def _shards_of(part: tuple[int, int], num_shards: int, accelerator: Accelerator) -> list[int]:
    """Return the shards that this process writes of a part (index from 0, number of parts)."""
    processes = accelerator.num_processes
    index, num_parts = part[0] * processes + accelerator.process_index, part[1] * processes
    shards = [shard for shard in range(num_shards) if shard % num_parts == index]
    if not shards:
        info(f"this part is empty: there are {num_shards} shards for {num_parts} parts")
    return shards


def _write_all(writer: "TargetWriter", accelerator: Accelerator) -> None:
    """Write a process's shards; a signal stops all processes together."""
    num_batches = torch.tensor([writer.num_batches], device=accelerator.device)
    most = int(accelerator.gather(num_batches).max())
    with GracefulStop(accelerator) as interruption:
        writer.write(interruption)
        # Each of these calls is collective, so all processes make the same number of them: a signal
        # to a process with more batches stops this one as well.
        for _ in range(most - writer.num_batches):
            interruption.raise_if_stopped()
        interruption.raise_if_stopped(now=True)


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
    config: Config, teachers: list[Teacher], environment: dict[str, Any]
) -> dict[str, Any]:
    """Return how a store was written, for people and for verifying it."""
    return {
        "teachers": [teacher.description for teacher in teachers],
        "class_orders": [teacher.class_order for teacher in teachers],
        "device": environment["device"],
        "packages": environment["packages"],
        "config": to_dict(config),
    }


class TargetWriter:
    """Computes the teachers' outputs for missing shards and writes them.

    missing: the shards to write. num_batches: how many batches of at most `batch_size` views they
    take.
    """

    def __init__(
        self,
        store: ShardedTargetWriter,
        shards: list[int],
        loader: TrainLoader,
        ensemble: TeacherEnsemble,
        labels: Tensor,
        batch_size: int,
    ) -> None:
        """shards: of this process. labels: of the training images, int64 [N]."""
        self.store = store
        self.record_format = store.record_format
        self.loader = loader
        self.ensemble = ensemble
        self.query = teacher_query(loader, ensemble)
        self.labels = labels
        self.batch_size = batch_size
        self.missing = [shard for shard in shards if not store.path(shard).is_file()]
        if len(self.missing) < len(shards):
            num_written = len(shards) - len(self.missing)
            info(f"{num_written} of {len(shards)} shards are already written")
        ranges = [rows for shard in self.missing for rows in self.record_format.epoch_ranges(shard)]
        self.num_rows = sum(last - first for _, first, last in ranges)
        self.num_batches = sum(-(-(last - first) // batch_size) for _, first, last in ranges)

    def write(self, interruption: GracefulStop) -> None:
        """Write the missing shards. Raises StoppedBySignal between two batches."""
        steps = progress(range(self.num_batches), total=self.num_batches, title="writing targets")

        def before_batch() -> None:
            next(steps, None)
            fault_point("teacher")
            interruption.raise_if_stopped()

        started = time.monotonic()
        for shard in self.missing:
            with interruption.interruptible():
                targets = self._compute(shard, interruption, before_batch)
            self.store.commit(shard, targets)
        next(steps, None)  # ends the progress bar
        seconds = time.monotonic() - started
        if self.num_rows:
            info(
                f"computed {self.num_rows} teacher outputs in {format_duration(seconds)}: "
                f"{self.num_rows / seconds:.0f} images/s"
            )

    def _compute(
        self, shard: int, interruption: GracefulStop, before_batch: Callable[[], None]
    ) -> TargetShard:
        """Return a shard. Raises NumericsError naming the images if an output is not finite."""
        records, checksums, num_correct, num_unmixed = [], [], 0, 0
        for epoch, first, last in self.record_format.epoch_ranges(shard):
            rows = torch.arange(first, last)
            batches = self.loader.teacher_inputs(epoch, rows, batch_size=self.batch_size)
            for inputs in interruption.iterate(batches):
                before_batch()
                outputs = self.query(inputs)
                batch_records, batch_checksums = encode_batch(self.record_format, inputs, outputs)
                records.append(batch_records)
                checksums += batch_checksums
                unmixed = _is_unmixed(inputs.views)
                correct = outputs.labels[:, 0].cpu() == self.labels[inputs.views.sample_ids.cpu()]
                num_correct += int((correct & unmixed).sum())
                num_unmixed += int(unmixed.sum())
        self.ensemble.check()
        view_checksums = np.array(checksums, "<u4")
        return TargetShard(np.concatenate(records), view_checksums, num_correct, num_unmixed)


def encode_batch(
    record_format: RecordFormat, inputs: TeacherInput, outputs: TeacherOutput
) -> tuple[np.ndarray, list[int]]:
    """Return the records of a batch, and the checksums of the checked views in it."""
    indices = record_format.checked_indices(inputs.views.target_rows)
    checksums = [view_checksum(inputs.views, index) for index in indices]
    return encode(record_format, outputs.logits[:, 0]), checksums


def _is_unmixed(views: UnmixedViews) -> Tensor:
    """Return which views are (almost) one image, bool [rows], on the CPU."""
    if views.mix is None:
        return torch.ones(len(views.target_rows), dtype=torch.bool)
    return (views.mix.lam > _UNMIXED_WEIGHT).repeat_interleave(2).cpu()
