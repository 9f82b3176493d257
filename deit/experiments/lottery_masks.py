"""The masks of a search for tickets: derived from how runs ended, written, held against others."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deit.core import run_folder
from deit.core.errors import CheckpointError
from deit.core.filesystem import atomic_write
from deit.experiments.lottery_options import ONE_SHOT, RANDOM, REINITIALIZED, TICKET
from deit.experiments.lottery_plan import LotteryPlan, LotteryRun
from deit.models.saved import WEIGHTS, load_student, to_safetensors_bytes
from deit.models.surgery.pruning_masks import (
    MASKS,
    Masks,
    Weights,
    all_ones,
    mask_summary,
    prunable,
    prune_in,
    random_like,
    read_masks,
)
from deit.models.weight_files import read_weights


def write_masks(ticket: LotteryRun, plan: LotteryPlan) -> None:
    """Write the masks of a run, which follow from what the runs before it ended with.

    The same runs give the same masks, so a run that has begun is held against those it was begun
    with. Raises CheckpointError where they are others.
    """
    if ticket.masks is None:
        return
    masks = MASK_BUILDERS[ticket.kind](ticket, plan)
    if run_folder.list_checkpoints(ticket.run.out) and not _same(
        _trained_under(ticket.run.out), masks
    ):
        raise CheckpointError(
            f"{ticket.run.out}: its {MASKS} holds other masks than follow now from the runs before "
            "it; remove this folder to train it anew"
        )
    if not ticket.masks.is_file() or not _same(read_masks(ticket.masks), masks):
        ticket.masks.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(ticket.masks, to_safetensors_bytes(masks))


def _same(one: Masks, other: Masks) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(mask, other[name]) for name, mask in one.items()
    )


def _trained_under(run: Path) -> Masks:
    """The masks in the newest checkpoint of a run. Raises CheckpointError."""
    return read_masks(_newest(run) / MASKS)


def _newest(run: Path) -> Path:
    folder = run_folder.latest_checkpoint(run)
    if folder is None:
        raise CheckpointError(f"{run}: has no checkpoint, so nothing says what to prune")
    return folder


def final_weights(run: Path) -> Weights:
    """The prunable weights a finished run ended with (not their average), in the order of the
    network. Raises CheckpointError where its last checkpoint is not sound."""
    folder, result = _newest(run), run_folder.read_result(run)
    if result is None or run_folder.checkpoint_step(folder) != result["step"]:
        raise CheckpointError(
            f"{run}: the checkpoint of its end is not there or not sound; remove this folder to "
            "train it anew"
        )
    student, _ = load_student(folder)
    return prunable(student.network)


def _of_level(ticket: LotteryRun, plan: LotteryPlan) -> Masks:
    """The largest at the end of the level before, of those that it kept."""
    before = f"level-{ticket.level - 1}"
    weights = final_weights(ticket.run.out.with_name(before))
    masks = all_ones(weights)
    if ticket.level > 1:
        masks = _trained_under(ticket.run.out.with_name(before))
    return _largest(weights, masks, plan, ticket.level)


def _in_one_shot(ticket: LotteryRun, plan: LotteryPlan) -> Masks:
    """The largest at the end of the dense run."""
    weights = final_weights(ticket.run.out.with_name("level-0"))
    return _largest(weights, all_ones(weights), plan, ticket.level)


def _largest(weights: Weights, masks: Masks, plan: LotteryPlan, level: int) -> Masks:
    scores = {name: one.abs() for name, one in weights.items()}
    masks = {name: masks[name] for name in scores}  # ties go by the order of the network
    return prune_in(plan.scope)(scores, masks, plan.densities[level - 1])


def _at_random(ticket: LotteryRun, plan: LotteryPlan) -> Masks:
    """Random ones, as many in each layer as the ticket of the level has."""
    masks = read_masks(ticket.masks.with_name(f"level-{ticket.level}.safetensors"))
    return random_like(masks, plan.scope, seed=1000 * ticket.seed + ticket.level)


MASK_BUILDERS: dict[str, Callable[[LotteryRun, LotteryPlan], Masks]] = {
    TICKET: _of_level,
    REINITIALIZED: _of_level,
    RANDOM: _at_random,
    ONE_SHOT: _in_one_shot,
}


def mask_report(ticket: LotteryRun) -> dict[str, Any]:
    """What there is to know of a finished run's masks: as
    deit.models.surgery.pruning_masks.mask_summary says it, the number of all `parameters`, and the
    `bytes` of its weights: as the `file` holds them, zeros and all; `packed` by zlib; `sparse`,
    with a bit that says of each prunable one whether it is there."""
    file = run_folder.latest_checkpoint(ticket.run.out) / WEIGHTS
    weights = read_weights(file)
    masks = (
        all_ones(final_weights(ticket.run.out))
        if ticket.masks is None
        else read_masks(ticket.masks)
    )
    told = mask_summary(masks)
    held, total = sum(one.nbytes for one in weights.values()), told["total"]
    sparse = held - 4 * (total - told["kept"]) + total // 8
    sizes = {
        "file": file.stat().st_size,
        "packed": len(zlib.compress(file.read_bytes(), 1)),
        "sparse": min(sparse, held),
    }
    parameters = sum(one.numel() for one in weights.values())
    return {**told, "parameters": parameters, "bytes": sizes}
