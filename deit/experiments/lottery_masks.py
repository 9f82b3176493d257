"""Compute, write and verify the pruning masks of a lottery experiment."""

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
from deit.models.saved_student import WEIGHTS, load_student, to_safetensors_bytes
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


def write_masks(run: LotteryRun, plan: LotteryPlan) -> None:
    """Compute the masks of a run from the runs that it depends on, and write them.

    The masks are deterministic, so those of a run that was started before must be the same. Raises
    CheckpointError if they are not.
    """
    if run.masks is None:
        return
    masks = MASK_BUILDERS[run.kind](run, plan)
    folder = run.spec.out
    if run_folder.list_checkpoints(folder) and not _same(_masks_of(folder), masks):
        raise CheckpointError(
            f"{folder}: its {MASKS} differs from the masks that follow from the runs before it; "
            "remove this folder to train the run again"
        )
    if not run.masks.is_file() or not _same(read_masks(run.masks), masks):
        run.masks.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(run.masks, to_safetensors_bytes(masks))


def _same(a: Masks, b: Masks) -> bool:
    return a.keys() == b.keys() and all(torch.equal(mask, b[name]) for name, mask in a.items())


def _masks_of(run: Path) -> Masks:
    """Return the masks in the latest checkpoint of a run. Raises CheckpointError."""
    return read_masks(_latest_checkpoint(run) / MASKS)


def _latest_checkpoint(run: Path) -> Path:
    folder = run_folder.latest_checkpoint(run)
    if folder is None:
        raise CheckpointError(f"{run}: has no checkpoint to compute pruning masks from")
    return folder


def final_weights(run: str | Path) -> Weights:
    """Return the prunable weights at the end of a finished run, in the order of the network.

    They are the trained weights, not their moving average. Raises CheckpointError if the last
    checkpoint of the run is missing or damaged.
    """
    run = Path(run)
    folder, result = _latest_checkpoint(run), run_folder.read_result(run)
    if result is None or run_folder.checkpoint_step(folder) != result["step"]:
        raise CheckpointError(
            f"{run}: its last checkpoint is missing or damaged; remove this folder to train the "
            "run again"
        )
    student, _ = load_student(folder)
    return prunable(student.network)


def _iterative_masks(run: LotteryRun, plan: LotteryPlan) -> Masks:
    """Keep the largest of the weights that the level before kept, at its end."""
    previous = run.spec.out.with_name(f"level-{run.level - 1}")
    weights = final_weights(previous)
    masks = all_ones(weights)
    if run.level > 1:
        masks = _masks_of(previous)
    return _keep_largest(weights, masks, plan, run.level)


def _one_shot_masks(run: LotteryRun, plan: LotteryPlan) -> Masks:
    """Keep the largest weights at the end of the dense run."""
    weights = final_weights(run.spec.out.with_name("level-0"))
    return _keep_largest(weights, all_ones(weights), plan, run.level)


def _keep_largest(weights: Weights, masks: Masks, plan: LotteryPlan, level: int) -> Masks:
    scores = {name: weight.abs() for name, weight in weights.items()}
    masks = {name: masks[name] for name in scores}  # the order of the network breaks ties
    return prune_in(plan.scope)(scores, masks, plan.densities[level - 1])


def _random_masks(run: LotteryRun, plan: LotteryPlan) -> Masks:
    """Keep random weights, as many in each layer as the ticket of the level."""
    masks = read_masks(run.masks.with_name(f"level-{run.level}.safetensors"))
    return random_like(masks, plan.scope, seed=1000 * run.seed + run.level)


MASK_BUILDERS: dict[str, Callable[[LotteryRun, LotteryPlan], Masks]] = {
    TICKET: _iterative_masks,
    REINITIALIZED: _iterative_masks,
    RANDOM: _random_masks,
    ONE_SHOT: _one_shot_masks,
}


def mask_report(run: LotteryRun) -> dict[str, Any]:
    """Return the summary of a finished run's masks and the size of its weights.

    The summary is that of deit.models.surgery.pruning_masks.mask_summary. `parameters` is the
    number of all parameters. `bytes` has the size of the weights: of the `file`, with its zeros; of
    the file `packed` by zlib; and `sparse`, without zeros but with one bit per prunable weight.
    """
    folder = run.spec.out
    file = run_folder.latest_checkpoint(folder) / WEIGHTS
    weights = read_weights(file)
    masks = all_ones(final_weights(folder)) if run.masks is None else read_masks(run.masks)
    summary = mask_summary(masks)
    dense_bytes, total = sum(weight.nbytes for weight in weights.values()), summary["total"]
    sparse_bytes = dense_bytes - 4 * (total - summary["kept"]) + total // 8
    sizes = {
        "file": file.stat().st_size,
        "packed": len(zlib.compress(file.read_bytes(), 1)),
        "sparse": min(sparse_bytes, dense_bytes),
    }
    parameters = sum(weight.numel() for weight in weights.values())
    return {**summary, "parameters": parameters, "bytes": sizes}
