"""Asks the teachers for their answers to every training view, and writes them into a store."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from deit.config import Config, fixed, mixes, to_dict
from deit.console import clock, progress, say
from deit.datasets.loader import Shown, TrainLoader
from deit.datasets.splits import load_splits
from deit.disk import check_space, check_writable
from deit.environment import create_accelerator, describe
from deit.errors import ConfigError, EnvironmentFault
from deit.faults import reach
from deit.fingerprint import fingerprint_of
from deit.interruption import Interruption
from deit.losses import needs_logits
from deit.memory import check_answers
from deit.models.teachers import Teacher, locate
from deit.panel import Panel
from deit.preflight import measure
from deit.preparation import (
    chorus,
    found_start,
    lay_out,
    loader_of,
    settled,
    teacher_input,
    teachers_of,
)
from deit.records import Answers
from deit.seats import alone, members
from deit.stored import answer_to, check_records
from deit.target_units import Unit, Units
from deit.targets import (
    FORMAT,
    UNITS,
    Layout,
    canary,
    encode,
    layouts_asked,
    read_manifest,
)
from deit.validation import validate

_ALMOST_ONE = 0.9  # a mixed view counts as one image from this weight on
_MOST_CLASSES = 2**16


def write_targets(
    config: Config,
    out: Path,
    *,
    epochs: int | None = None,
    records: str | None = None,
    shard: tuple[int, int] = (0, 1),
    only: int | None = None,
) -> bool:
    """Write the answers of a configuration's teachers to its training views, and finish the store
    when no unit of it is missing any more; whether it is complete, as the first process knows.
    What is there already is not written again.

    epochs: to write; None: all that are trained. records: hard, full or top-K; None: what the
    objective needs. shard: (number from 0, of how many): which part of the units is written here.
    only: number, from 1, of the one of several teachers whose answers are written, to the views
    that all of them see together; None: what all say.
    Raises the errors of deit.errors.
    """
    config = _for_writing(config, only)
    config = settled(config, found_start(config))
    for member in members(config.teacher):
        locate(member.source)  # before the images are read
    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise EnvironmentFault(f"--out {out}: is a file, not a folder")
    check_writable(out, option="--out")
    accelerator = create_accelerator(config.run)
    splits = load_splits(config.data)
    teachers = teachers_of(config, splits, accelerator)
    size = teacher_input([teacher.image_size for teacher in teachers])
    loader = loader_of(config, splits, accelerator, teacher_size=size, alone=True)
    if only is not None:
        teachers = teachers[only - 1 : only]
        config = _of_one(config, only)
    layout = _layout(config, loader, len(splits.class_names), epochs, records)
    block = max(config.run.evaluation_batch // 2 * 2, 2)
    environment = describe(accelerator, [])
    manifest = {
        "format": FORMAT,
        "complete": False,
        # The last bits of an answer depend on these, so all writers of a store share them.
        "asked": {"precision": environment["precision"], "block": block},
        "fingerprint": fingerprint_of(config, splits, loader, teachers),
        "layout": layout._asdict(),
        "teacher_top1": None,
        "about": _about(config, teachers, environment),
    }
    wanted = tuple(member.layout for member in members(config.teacher))
    layouts = _layouts(out, wanted, wanted)
    layouts = lay_out(teachers, layouts, accelerator, images=block)
    units = _units(out, manifest, layouts)
    complete = torch.tensor(float(units.found()), device=accelerator.device)
    # Together: what follows measures the teachers with all processes.
    if accelerator.reduce(complete, reduction="sum").item() > 0:
        if accelerator.is_main_process:
            units.tidy()
        say(f"{out}: complete already")
        return True
    for teacher in teachers:
        with accelerator.autocast():
            side = loader.sizes.teacher
            check_answers(teacher, teacher.forward, side, accelerator, block)
    # The units, and beside them the file that they are put together in.
    written = sum(file.stat().st_size for file in (out / UNITS).glob("*.bin"))
    check_space(out, 2 * layout.rows * layout.dtype.itemsize - written, option="--out")
    weights = tuple(member.weight for member in members(config.teacher))
    size = loader.sizes.teacher
    measure(config, splits, accelerator, teachers, weights=weights, size=size)
    # Who writes another part of this store may have settled it meanwhile.
    layouts = lay_out(teachers, _layouts(out, wanted, layouts), accelerator, images=block)
    units = _units(out, manifest, layouts)
    units.claim()  # not before: teachers that will not do leave no folder behind
    panel = chorus(config, splits, teachers, accelerator)
    part, parts = shard
    processes = accelerator.num_processes
    part, parts = part * processes + accelerator.process_index, parts * processes
    mine = [unit for unit in range(layout.units) if unit % parts == part]
    if not mine:
        say(f"this part is empty: there are {layout.units} units for {parts} parts")
    writer = Writer(units, mine, loader, panel, config, splits.train.labels, block)
    blocks = torch.tensor([writer.blocks], device=accelerator.device)
    longest = int(accelerator.gather(blocks).max())
    with Interruption(accelerator) as interruption:
        writer.write(interruption)
        # The others may have more to ask for: what stops them stops this process as well.
        for _ in range(longest - writer.blocks):
            interruption.check()
        interruption.check(now=True)
    return accelerator.is_main_process and units.finish()


def _layouts(out: Path, wanted: tuple[str, ...], otherwise: tuple[str, ...]) -> tuple[str, ...]:
    """The wanted layouts, those left open as in what is written of this store; where nothing is, as
    in `otherwise`. The same in all processes."""
    try:
        written = read_manifest(out)["asked"]
    except FileNotFoundError:
        written = None
    known = otherwise if written is None else layouts_asked(written, len(wanted))
    layouts = tuple(known if want == "auto" else want for want, known in zip(wanted, known))
    return broadcast_object_list([layouts])[0]


def _units(out: Path, manifest: dict[str, Any], layouts: tuple[str, ...]) -> Units:
    """The store that is to be written. Stores of contiguous teachers do not say so."""
    asked = manifest["asked"]
    if set(layouts) != {"contiguous"}:
        asked = {**asked, "layouts": list(layouts)}
    return Units(out, {**manifest, "asked": asked})


def _of_one(config: Config, only: int) -> Config:
    """The configuration with one of its teachers, counted from 1."""
    config = replace(config, teacher=alone(config.teacher, only - 1))
    return config.replace(student={"distillation_tokens": 1})


def _for_writing(config: Config, only: int | None) -> Config:
    """The configuration, if there is something to write of it. Raises ConfigError."""
    config = validate(config.replace(teacher={"targets": ()}), online=False)
    if only is not None:
        number = len(config.teacher.source)
        if not 1 <= only <= number:
            raise ConfigError(f"--only {only}: should be in 1 ... {number}, the number of teachers")
        _for_writing(_of_one(config, only), None)
        return config
    if config.loss.kind == "none":
        raise ConfigError("loss.kind = 'none': there is no teacher to ask")
    if not config.teacher.source:
        raise ConfigError("teacher.source = None: there is no teacher to ask; give one")
    if len(config.teacher.source) > 1 and config.teacher.combine == "tokens":
        raise ConfigError(
            "teacher.combine = 'tokens': nothing is combined; write a store for each teacher "
            "(--only 1, --only 2), then train with --teacher.targets A,B"
        )
    mean = len(config.teacher.source) > 1 and config.teacher.combine == "probabilities"
    if mean and needs_logits(config.loss) and config.loss.temperature != 1:
        raise ConfigError(
            f"loss.temperature = {config.loss.temperature:g}: a mean of probabilities is another "
            "at each temperature; write a store for each teacher (--only 1, --only 2), then "
            "train with --teacher.targets A,B; or use --teacher.combine logits"
        )
    return config


def _layout(
    config: Config,
    loader: TrainLoader,
    num_classes: int,
    epochs: int | None,
    records: str | None,
) -> Layout:
    """What will be written. Raises ConfigError."""
    if records is None:
        # Of many classes the largest, where the objective can be had from them exactly enough.
        loss = config.loss
        exact = loss.temperature == 1 and not loss.standardise and loss.kind != "dkd"
        exact &= len(config.teacher.source) < 2 or config.teacher.combine != "logits"
        full = "top-10" if num_classes > 100 and exact else "full"
        records = full if needs_logits(loss) else "hard"
    if num_classes > _MOST_CLASSES:
        raise ConfigError(f"{num_classes} classes: a store can tell {_MOST_CLASSES} apart")
    if fixed(config.views):
        if epochs not in (None, 1):
            raise ConfigError(
                f"--epochs {epochs}: views.teacher_view {config.views.teacher_view} is the same in "
                "every epoch; 1 is all there is"
            )
        epochs = 1
    layout = Layout(
        records=records,
        num_classes=num_classes,
        epochs=epochs or config.optim.epochs,
        places=loader.places,
        paired=mixes(config.views),
    )
    if layout.kept is not None and layout.kept >= num_classes:
        raise ConfigError(f"--records {records}: there are {num_classes} classes; use full")
    combine = config.teacher.combine if len(config.teacher.source) > 1 else None
    single = config if combine is None else replace(config, teacher=alone(config.teacher, 0))
    check_records(layout.records, single, combine, where=f"--records {records}")
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


class Writer:
    """Asks for the answers of those units that are not there yet, and commits them.

    mine: the units to care for. blocks: how many blocks of `block` views that takes.
    """

    def __init__(
        self,
        units: Units,
        mine: list[int],
        loader: TrainLoader,
        panel: Panel,
        config: Config,
        labels: Tensor,
        block: int,
    ) -> None:
        self.units = units
        self.layout = units.layout
        self.loader = loader
        self.panel = panel
        self.answer = answer_to(config, loader, panel)
        self.labels = labels
        self.block = block
        self.missing = [unit for unit in mine if not units.path(unit).is_file()]
        if len(self.missing) < len(mine):
            say(f"{len(mine) - len(self.missing)} of {len(mine)} units are there already")
        stretches = [piece for unit in self.missing for piece in self.layout.stretches(unit)]
        self.rows = sum(last - first for _, first, last in stretches)
        self.blocks = sum(-(-(last - first) // block) for _, first, last in stretches)

    def write(self, interruption: Interruption) -> None:
        """Write the units. interruption: asked before each block. Raises Stopped."""

        def watched() -> Iterator[None]:
            for _ in progress(range(self.blocks), total=self.blocks, title="asking the teacher"):
                reach("answers")
                interruption.check()
                yield

        ticks = watched()
        started = time.monotonic()
        for unit in self.missing:
            with interruption.at_once():
                made = self._ask(unit, ticks, interruption)
            self.units.commit(unit, made)
        next(ticks, None)  # lets the bar go
        took = time.monotonic() - started
        if self.rows:
            say(f"asked for {self.rows} answers in {clock(took)}: {self.rows / took:.0f} images/s")

    def _ask(self, unit: int, ticks: Iterator[None], interruption: Interruption) -> Unit:
        """The answers of a unit. Raises NumericsError naming the images where one is not finite."""
        records, canaries, right, counted = [], [], 0, 0
        for epoch, first, last in self.layout.stretches(unit):
            blocks = self.loader.shown(epoch, torch.arange(first, last), block=self.block)
            for shown in interruption.over(blocks):
                next(ticks, None)
                answers = self.answer(shown)
                encoded, marks = recorded(self.layout, shown, answers)
                records.append(encoded)
                canaries += marks
                clear = _clear(shown)
                same = answers.labels[:, 0].cpu() == self.labels[shown.samples.cpu()]
                right, counted = right + int((same & clear).sum()), counted + int(clear.sum())
        self.panel.check()
        return Unit(np.concatenate(records), np.array(canaries, "<u4"), right, counted)


def recorded(layout: Layout, shown: Shown, answers: Answers) -> tuple[np.ndarray, list[int]]:
    """The records of a block, and the canaries that fall into it."""
    marked = (shown.places % layout.canary_step == 0).nonzero().flatten().tolist()
    canaries = [
        canary(shown, row) for row in marked if int(shown.places[row]) in layout.canary_places
    ]
    return encode(layout, answers.logits[:, 0]), canaries


def _clear(shown: Shown) -> Tensor:
    """Which views are (almost) one image alone, bool [rows], on the CPU."""
    if shown.mix is None:
        return torch.ones(len(shown.places), dtype=torch.bool)
    return (shown.mix.own_weight > _ALMOST_ONE).repeat_interleave(2).cpu()
