"""Select the attention heads and hidden units of a run to keep, by importance."""

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
from deit.models.saved_student import ModelInfo, load_student
from deit.models.student import Student
from deit.models.surgery.structured_pruning import (
    KeptUnits,
    Scores,
    TaylorScorer,
    macs_of,
    magnitudes,
    select_top,
    units_for_macs,
)
from deit.training.build import build_run
from deit.training.state import TrainingRun


def select_units(
    config: Config, saved: Path, options: PruneOptions, num_units: tuple[int, int]
) -> tuple[ModelInfo, KeptUnits, dict[str, Tensor]]:
    """Return the saved student's model info, the units to keep, and its weights.

    config: as `scoring_config` returns it. num_units: numbers of heads and hidden units to keep.
    Raises the errors of deit.core.errors.
    """
    student, model_info = load_student(saved)
    if options.criterion == "taylor":
        scores = _taylor_scores(config, options.images)
    else:
        scores = magnitudes(student.network)
    units = KeptUnits(
        select_top(scores.heads, num_units[0], scope=options.scope),
        select_top(scores.hidden, num_units[1], scope=options.scope),
    )
    return model_info, units, student.network.state_dict()


def units_to_keep(config: Config, options: PruneOptions) -> tuple[int, int]:
    """Return the numbers of heads and hidden units to keep.

    Raises ConfigError if that is less than one of each per block.
    """
    student = config.student
    if options.macs is not None:
        try:
            return units_for_macs(student, options.macs)
        except ValueError:
            raise ConfigError(
                f"macs = {options.macs:g}: is below the MACs of one head and one hidden unit per "
                "block; give a larger share"
            ) from None
    return (
        _num_remaining("heads", student.block_heads, options.removed_heads),
        _num_remaining("hidden", student.block_hidden, options.removed_hidden),
    )


def _num_remaining(name: str, per_block: tuple[int, ...], share: float) -> int:
    """Return the number of units left without a share of them. Raises ConfigError."""
    num_units = round(sum(per_block) * (1 - share))
    if num_units < len(per_block):
        raise ConfigError(
            f"{name} = {share:g}: keeps {num_units} of {sum(per_block)}, and each of the "
            f"{len(per_block)} blocks needs one"
        )
    return num_units


def scoring_config(config: Config, recovery: Config, saved: Path) -> Config:
    """Return the run's configuration for computing importance scores.

    It starts from the run's weights. Images, teachers and device are those of the recovery, as they
    may have been moved.
    """
    data = {field: getattr(recovery.data, field) for field in ("root", "num_workers", "storage")}
    device = {field: getattr(recovery.run, field) for field in ("device", "precision")}
    plain = {"compile": "none", "linear_backend": "torch", "sharding": "none", "trackers": ()}
    config = dataclasses.replace(config, teacher=recovery.teacher)
    return config.replace(
        data=data,
        init={"weights": str(saved), "head": "keep", "pruning_masks": "keep", "start_step": 0},
        optim={"trainable": "all"},
        run={**plain, **device, "keep_steps": ()},
    )


def _taylor_scores(config: Config, num_images: int) -> Scores:
    """Return importance scores for the run's own loss, on training views and with its teacher."""
    run = build_run(config)
    student: Student = run.accelerator.unwrap_model(run.student).eval()
    scorer = TaylorScorer(student.network)
    with scorer.on(student.network):
        for loss in _losses(run, student, num_images):
            scorer.add(loss)
    return scorer.scores()


def _losses(run: TrainingRun, student: Student, num_images: int) -> Iterator[Tensor]:
    """Yield the loss of each micro-batch of training views, summed over its images."""
    num_epochs, micro_batch = run.config.optim.epochs, run.loader.micro_batch_size
    per_epoch = run.loader.steps_per_epoch * run.config.optim.grad_accum_steps
    total = min(-(-num_images // micro_batch), per_epoch)
    batches = itertools.islice(run.loader.epoch(0), total)
    for batch in progress(batches, total=total, title="importance scores"):
        teacher_output = None if run.ensemble is None else run.ensemble(batch)
        # As at the end of training, when the distillation term has its full weight.
        losses = distillation_loss(
            student(batch.images), batch.targets, teacher_output, run.config.loss, epoch=num_epochs
        )
        yield losses["loss"] * len(batch.targets)


def print_selection(model_info: ModelInfo, units: KeptUnits) -> None:
    """Print how many heads and hidden units each block keeps."""
    student = model_info.student
    blocks = zip(units.heads, student.block_heads, units.hidden, student.block_hidden)
    rows = [
        (str(block), f"{len(heads)} of {num_heads}", f"{len(hidden)} of {num_hidden}")
        for block, (heads, num_heads, hidden, num_hidden) in enumerate(blocks)
    ]
    table("units kept", ("block", "heads", "hidden units"), rows)
    after = [sum(map(len, per_block)) for per_block in (units.heads, units.hidden)]
    before = [sum(student.block_heads), sum(student.block_hidden)]
    share = macs_of(student, *after) / macs_of(student, *before)
    info(
        f"{after[0]} of {before[0]} heads and {after[1]} of {before[1]} hidden units: "
        f"{format_percent(share)} % of the blocks' MACs"
    )
