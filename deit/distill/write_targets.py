"""Asks the teachers for their answers to every training view, and writes them into a store."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from deit.config.schema import Config, to_dict
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
from deit.datasets.loader import TeacherInput, TrainLoader
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
from deit.distill.target_checks import check_records, teacher_query
from deit.distill.target_fingerprint import fingerprint_of
from deit.distill.target_shards import ShardedTargetWriter, TargetShard
from deit.distill.target_store import (
    FORMAT,
    SHARDS,
    RecordFormat,
    canary,
    encode,
)
from deit.distill.teacher_check import check_teachers
from deit.distill.teacher_ensemble import TeacherEnsemble
from deit.models.teacher_sources import resolve_source
from deit.models.teachers import Teacher

_ALMOST_ONE = 0.9  # a mixed view counts as one image from this weight on
_MOST_CLASSES = 2**16


def write_targets(
    config: Config,
    out: Path,
    *,
    epochs: int | None = None,
    content: str | None = None,
    part: tuple[int, int] = (0, 1),
    teacher_index: int | None = None,
) -> bool:
    """Write the teachers' outputs for all training views of a configuration into a store.

    Shards that exist are kept. epochs: how many to write; None: all of the run. content: hard, full
    or top-K; None: what the loss needs. part: (number from 0, of how many) of the shards to write
    here. teacher_index: write the outputs of this teacher alone (from 1), for the views that all
    teachers see; None: of all teachers.
    Returns whether the store is complete, as the first process knows it. Raises the errors of
    deit.core.errors.
    """
    config = _for_writing(config, teacher_index)
    config = with_init_normalization(config, load_init_weights(config))
    out = out.resolve()
    _check_places(config, out)
    accelerator = build_accelerator(config.run)
    splits = load_splits(config.data)
    teachers = build_teachers(config, splits, accelerator)
    size = teacher_input_size([teacher.image_size for teacher in teachers])
    loader = build_train_loader(config, splits, accelerator, teacher_size=size, all_ranks=True)
    if teacher_index is not None:
        teachers = teachers[teacher_index - 1 : teacher_index]
        config = _with_one_teacher(config, teacher_index)
    layout = _layout(config, loader, len(splits.class_names), epochs, content)
    block = max(config.run.eval_batch_size // 2 * 2, 2)
    manifest = _manifest(config, splits, loader, teachers, layout, accelerator, block)
    units = ShardedTargetWriter(out, manifest)
    if _is_complete(units, accelerator):
        info(f"{out}: complete already")
        return True
    size = loader.sizes.teacher
    for teacher in teachers:
        with accelerator.autocast():
            check_inference_memory(teacher, teacher.forward, size, accelerator, block)
    _check_room(out, layout)
    weights = tuple(member.weight for member in teacher_specs(config.teacher))
    check_teachers(config, splits, accelerator, teachers, weights=weights, size=size)
    units.create_or_match()  # not before: teachers that will not do leave no folder behind
    ensemble = build_online_ensemble(config, splits, teachers, accelerator)
    shards = _shards_of(part, layout.num_shards, accelerator)
    writer = TargetWriter(units, shards, loader, ensemble, config, splits.train.labels, block)
    _write_all(writer, accelerator)
    return accelerator.is_main_process and units.merge_if_complete()


def _is_complete(units: ShardedTargetWriter, accelerator: Accelerator) -> bool:
    """Whether any process finds the store complete: what follows needs all processes together."""
    if not any_process(accelerator, units.is_complete()):
        return False
    if accelerator.is_main_process:
        units.clean_up()
    return True


def _check_places(config: Config, out: Path) -> None:
    """Check teachers and folder before the images are read."""
    for member in teacher_specs(config.teacher):
        resolve_source(member.source)
    if out.exists() and not out.is_dir():
        raise SystemFault(f"--out {out}: is a file, not a folder")
    check_writable(out, option="--out")


def _check_room(out: Path, layout: RecordFormat) -> None:
    """Check that the disk has room for the shards and for the file that they are merged into."""
    written = sum(file.stat().st_size for file in (out / SHARDS).glob("*.bin"))
    check_space(out, 2 * layout.rows * layout.dtype.itemsize - written, option="--out")


def _manifest(
    config: Config,
    splits: Splits,
    loader: TrainLoader,
    teachers: list[Teacher],
    layout: RecordFormat,
    accelerator: Accelerator,
    block: int,
) -> dict[str, Any]:
    """Return the manifest of a store that is not complete yet."""
    environment = environment_info(accelerator)
    return {
        "format": FORMAT,
        "complete": False,
        # The last bits of an output depend on these, so all writers of a store share them.
        "asked": {"precision": environment["precision"], "block": block},
        "fingerprint": fingerprint_of(config, splits, loader, teachers),
        "layout": layout._asdict(),
        "teacher_top1": None,
        "about": _about(config, teachers, environment),
    }


def _shards_of(part: tuple[int, int], num_shards: int, accelerator: Accelerator) -> list[int]:
    """The shards that this process writes of a part (number from 0, of how many)."""
    processes = accelerator.num_processes
    number, parts = part[0] * processes + accelerator.process_index, part[1] * processes
    shards = [shard for shard in range(num_shards) if shard % parts == number]
    if not shards:
        info(f"this part is empty: there are {num_shards} shards for {parts} parts")
    return shards


def _write_all(writer: "TargetWriter", accelerator: Accelerator) -> None:
    """Write a process's shards; a signal stops all processes together."""
    blocks = torch.tensor([writer.blocks], device=accelerator.device)
    longest = int(accelerator.gather(blocks).max())
    with GracefulStop(accelerator) as interruption:
        writer.write(interruption)
        # The others may have more to write: what stops them stops this process as well.
        for _ in range(longest - writer.blocks):
            interruption.raise_if_stopped()
        interruption.raise_if_stopped(now=True)


def _with_one_teacher(config: Config, teacher_index: int) -> Config:
    """The configuration with one of its teachers, counted from 1."""
    config = replace(config, teacher=single_teacher(config.teacher, teacher_index - 1))
    return config.replace(student={"num_distillation_tokens": 1})


def _for_writing(config: Config, teacher_index: int | None) -> Config:
    """The configuration, if there is something to write of it. Raises ConfigError."""
    config = validate(config.replace(teacher={"target_stores": ()}), live_teacher=False)
    if teacher_index is not None:
        number = len(config.teacher.source)
        if not 1 <= teacher_index <= number:
            raise ConfigError(
                f"--teacher-index {teacher_index}: should be in 1 ... {number}, the number of "
                "teachers"
            )
        _for_writing(_with_one_teacher(config, teacher_index), None)
        return config
    if config.loss.kind == "none":
        raise ConfigError("loss.kind = 'none': there is no teacher to ask")
    if not config.teacher.source:
        raise ConfigError("teacher.source = None: there is no teacher to ask; give one")
    if len(config.teacher.source) > 1 and config.teacher.combine == "tokens":
        raise ConfigError(
            "teacher.combine = 'tokens': nothing is combined; write a store for each teacher "
            "(--teacher-index 1, --teacher-index 2), then train with --teacher.target_stores A,B"
        )
    mean = len(config.teacher.source) > 1 and config.teacher.combine == "probabilities"
    if mean and needs_logits(config.loss) and config.loss.temperature != 1:
        raise ConfigError(
            f"loss.temperature = {config.loss.temperature:g}: a mean of probabilities is another "
            "at each temperature; write a store for each teacher (--teacher-index 1, "
            "--teacher-index 2), then "
            "train with --teacher.target_stores A,B; or use --teacher.combine logits"
        )
    return config


def _layout(
    config: Config,
    loader: TrainLoader,
    num_classes: int,
    epochs: int | None,
    content: str | None,
) -> RecordFormat:
    """What will be written. Raises ConfigError."""
    if content is None:
        # Of many classes the largest, where the objective can be had from them exactly enough.
        loss = config.loss
        exact = loss.temperature == 1 and not loss.standardize_logits and loss.kind != "dkd"
        exact &= len(config.teacher.source) < 2 or config.teacher.combine != "logits"
        full = "top-10" if num_classes > 100 and exact else "full"
        content = full if needs_logits(loss) else "hard"
    if num_classes > _MOST_CLASSES:
        raise ConfigError(f"{num_classes} classes: a store can tell {_MOST_CLASSES} apart")
    if config.views.has_fixed_teacher_view:
        if epochs not in (None, 1):
            raise ConfigError(
                f"--epochs {epochs}: views.teacher_view {config.views.teacher_view} is the same in "
                "every epoch; 1 is all there is"
            )
        epochs = 1
    layout = RecordFormat(
        content=content,
        num_classes=num_classes,
        epochs=epochs or config.optim.epochs,
        rows_per_epoch=loader.rows_per_epoch,
        mixed_pairs=config.views.uses_mixing,
    )
    if layout.top_k is not None and layout.top_k >= num_classes:
        raise ConfigError(f"--content {content}: there are {num_classes} classes; use full")
    combine = config.teacher.combine if len(config.teacher.source) > 1 else None
    single = (
        config if combine is None else replace(config, teacher=single_teacher(config.teacher, 0))
    )
    check_records(layout.content, single, combine, where=f"--content {content}")
    return layout


def _about(config: Config, teachers: list[Teacher], environment: dict[str, Any]) -> dict[str, Any]:
    """What a person wants to know of a store, and what verifying it needs."""
    return {
        "teachers": [teacher.description for teacher in teachers],
        "class_orders": [teacher.class_order for teacher in teachers],
        "device": environment["device"],
        "packages": environment["packages"],
        "config": to_dict(config),
    }


class TargetWriter:
    """Asks for the answers of those units that are not there yet, and commits them.

    mine: the units to care for. blocks: how many blocks of `block` views that takes.
    """

    def __init__(
        self,
        units: ShardedTargetWriter,
        own_shards: list[int],
        loader: TrainLoader,
        panel: TeacherEnsemble,
        config: Config,
        labels: Tensor,
        block: int,
    ) -> None:
        self.units = units
        self.layout = units.layout
        self.loader = loader
        self.panel = panel
        self.answer = teacher_query(config, loader, panel)
        self.labels = labels
        self.block = block
        self.missing = [unit for unit in own_shards if not units.path(unit).is_file()]
        if len(self.missing) < len(own_shards):
            info(
                f"{len(own_shards) - len(self.missing)} of {len(own_shards)} units are there "
                "already"
            )
        stretches = [piece for unit in self.missing for piece in self.layout.epoch_ranges(unit)]
        self.rows = sum(last - first for _, first, last in stretches)
        self.blocks = sum(-(-(last - first) // block) for _, first, last in stretches)

    def write(self, interruption: GracefulStop) -> None:
        """Write the units. interruption: asked before each block. Raises Stopped."""

        def watched() -> Iterator[None]:
            for _ in progress(range(self.blocks), total=self.blocks, title="asking the teacher"):
                fault_point("answers")
                interruption.raise_if_stopped()
                yield

        ticks = watched()
        started = time.monotonic()
        for unit in self.missing:
            with interruption.interruptible():
                made = self._ask(unit, ticks, interruption)
            self.units.commit(unit, made)
        next(ticks, None)  # lets the bar go
        took = time.monotonic() - started
        if self.rows:
            info(
                f"asked for {self.rows} answers in {format_duration(took)}: {self.rows / took:.0f} "
                "images/s"
            )

    def _ask(self, unit: int, ticks: Iterator[None], interruption: GracefulStop) -> TargetShard:
        """The answers of a unit. Raises NumericsError naming the images where one is not finite."""
        records, canaries, right, counted = [], [], 0, 0
        for epoch, first, last in self.layout.epoch_ranges(unit):
            blocks = self.loader.teacher_inputs(epoch, torch.arange(first, last), block=self.block)
            for shown in interruption.iterate(blocks):
                next(ticks, None)
                answers = self.answer(shown)
                encoded, marks = encode_block(self.layout, shown, answers)
                records.append(encoded)
                canaries += marks
                clear = _is_unmixed(shown)
                same = answers.labels[:, 0].cpu() == self.labels[shown.sample_ids.cpu()]
                right, counted = right + int((same & clear).sum()), counted + int(clear.sum())
        self.panel.check()
        return TargetShard(np.concatenate(records), np.array(canaries, "<u4"), right, counted)


def encode_block(
    layout: RecordFormat, shown: TeacherInput, answers: TeacherOutput
) -> tuple[np.ndarray, list[int]]:
    """The records of a block, and the canaries that fall into it."""
    marked = (shown.target_rows % layout.canary_step == 0).nonzero().flatten().tolist()
    canaries = [
        canary(shown, row) for row in marked if int(shown.target_rows[row]) in layout.canary_rows
    ]
    return encode(layout, answers.logits[:, 0]), canaries


def _is_unmixed(shown: TeacherInput) -> Tensor:
    """Which views are (almost) one image alone, bool [rows], on the CPU."""
    if shown.mix is None:
        return torch.ones(len(shown.target_rows), dtype=torch.bool)
    return (shown.mix.own_weight > _ALMOST_ONE).repeat_interleave(2).cpu()
