"""Which heads and hidden units of a run stay, by what they are worth."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from deit.config.schema import Config
from deit.core.console import format_percent, info, progress, table
from deit.core.errors import ConfigError
from deit.deploy.prune_options import PruneOptions
from deit.distill.losses import distillation_loss
from deit.models.saved import ModelInfo, load_student
from deit.models.student import Student
from deit.models.surgery.structured_pruning import (
    KeptUnits,
    Scores,
    TaylorScorer,
    macs_of,
    magnitudes,
    numbers_for_macs,
    select_top,
)
from deit.training.build import build_run
from deit.training.state import TrainingRun


def select_units(
    config: Config, saved: Path, asked: PruneOptions, numbers: tuple[int, int]
) -> tuple[ModelInfo, KeptUnits, dict[str, Tensor]]:
    """What the student is, which parts of it stay, and its weights. numbers: of heads and hidden
    units that stay. Raises the errors of deit.core.errors."""
    student, facts = load_student(saved)
    if asked.criterion == "taylor":
        scores = _by_images(config, asked.images)
    else:
        scores = magnitudes(student.network)
    kept = KeptUnits(
        select_top(scores.heads, numbers[0], scope=asked.scope),
        select_top(scores.hidden, numbers[1], scope=asked.scope),
    )
    return facts, kept, student.network.state_dict()


def units_to_keep(config: Config, asked: PruneOptions) -> tuple[int, int]:
    """How many heads and hidden units stay, at least one of each in every block. Raises
    ConfigError where that is none of what was asked."""
    student = config.student
    if asked.macs is not None:
        try:
            return numbers_for_macs(student, asked.macs)
        except ValueError:
            raise ConfigError(
                f"--macs {asked.macs:g}: one head and one hidden unit in every block are more"
            ) from None
    totals = student.block_heads, student.block_hidden
    found = []
    for option, parts, share in zip(("heads", "hidden"), totals, (asked.heads, asked.hidden)):
        number = round(sum(parts) * (1 - share))
        if number < len(parts):
            raise ConfigError(
                f"--{option} {share:g}: leaves {number} of {sum(parts)}, and each of {len(parts)} "
                "blocks needs one"
            )
        found.append(number)
    return found[0], found[1]


def scoring_config(config: Config, recovery: Config, saved: Path) -> Config:
    """The run's own configuration, begun with its weights, with the data, the teachers and the
    device where the command line says that they are now."""
    where = {leaf: getattr(recovery.data, leaf) for leaf in ("root", "num_workers", "storage")}
    device = {leaf: getattr(recovery.run, leaf) for leaf in ("device", "precision")}
    plain = {"compile": "none", "linear_backend": "torch", "sharding": "none", "trackers": ()}
    config = dataclasses.replace(config, teacher=recovery.teacher)
    return config.replace(
        data=where,
        init={"weights": str(saved), "head": "keep", "pruning_masks": "keep", "start_step": 0},
        optim={"trainable": "all"},
        run={**plain, **device, "keep_steps": ()},
    )


def _by_images(config: Config, number: int) -> Scores:
    """What parts are worth to the run's own objective, on training views and with its teacher."""
    run = build_run(config)
    student: Student = run.accelerator.unwrap_model(run.student).eval()
    watch = TaylorScorer(student.network)
    with watch.on(student.network):
        for loss in _losses(run, student, number):
            watch.add(loss)
    return watch.scores()


def _losses(run: TrainingRun, student: Student, number: int) -> Iterator[Tensor]:
    """The objective of batches of about so many training views, each the sum over its images."""
    epochs, block = run.config.optim.epochs, run.loader.block
    all_of_them = run.loader.steps_per_epoch * run.config.optim.grad_accum_steps
    total = min(-(-number // block), all_of_them)
    batches = itertools.islice(run.loader.epoch(0), total)
    for batch in progress(batches, total=total, title="what parts are worth"):
        answers = None if run.ensemble is None else run.ensemble(batch)
        # As at the end of the training, where a teacher's term has its whole weight.
        losses = distillation_loss(
            student(batch.images), batch.targets, answers, run.config.loss, epoch=epochs
        )
        yield losses["total"] * len(batch.targets)


def print_selection(facts: ModelInfo, kept: KeptUnits) -> None:
    """Which parts stay, block by block."""
    rows = [
        (str(place), f"{len(heads)} of {of_heads}", f"{len(hidden)} of {of_hidden}")
        for place, (heads, of_heads, hidden, of_hidden) in enumerate(
            zip(
                kept.heads,
                facts.student.block_heads,
                kept.hidden,
                facts.student.block_hidden,
            )
        )
    ]
    table("what stays", ("block", "heads", "hidden units"), rows)
    numbers = [sum(map(len, one)) for one in (kept.heads, kept.hidden)]
    whole = [sum(facts.student.block_heads), sum(facts.student.block_hidden)]
    share = macs_of(facts.student, *numbers) / macs_of(facts.student, *whole)
    info(
        f"{numbers[0]} of {whole[0]} heads and {numbers[1]} of {whole[1]} hidden units: "
        f"{format_percent(share)} % of the blocks' arithmetic"
    )
