"""The masks of a search for tickets: derived from how runs ended, written, held against others."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deit import checkpoint
from deit.disk import put_file
from deit.errors import CheckpointError
from deit.models.masks import (
    MASKS,
    Masks,
    Weights,
    dense,
    prunable,
    prune_in,
    random_like,
    read_masks,
    told_of,
)
from deit.models.saved import WEIGHTS, load_student, serialised
from deit.models.weights import read_weights
from deit.ticket_options import ANEW, ONE_SHOT, RANDOM, TICKET
from deit.ticket_plan import Plan, Ticket


def write_masks(ticket: Ticket, plan: Plan) -> None:
    """Write the masks of a run, which follow from what the runs before it ended with.

    The same runs give the same masks, so a run that has begun is held against those it was begun
    with. Raises CheckpointError where they are others.
    """
    if ticket.masks is None:
        return
    masks = _MAKERS[ticket.kind](ticket, plan)
    if checkpoint.found(ticket.run.out) and not _same(_trained_under(ticket.run.out), masks):
        raise CheckpointError(
            f"{ticket.run.out}: its {MASKS} holds other masks than follow now from the runs before "
            "it; remove this folder to train it anew"
        )
    if not ticket.masks.is_file() or not _same(read_masks(ticket.masks), masks):
        ticket.masks.parent.mkdir(parents=True, exist_ok=True)
        put_file(ticket.masks, serialised(masks))


def _same(one: Masks, other: Masks) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(mask, other[name]) for name, mask in one.items()
    )


def _trained_under(run: Path) -> Masks:
    """The masks in the newest checkpoint of a run. Raises CheckpointError."""
    return read_masks(_newest(run) / MASKS)


def _newest(run: Path) -> Path:
    folder = checkpoint.newest(run)
    if folder is None:
        raise CheckpointError(f"{run}: has no checkpoint, so nothing says what to prune")
    return folder


def ends_of(run: Path) -> Weights:
    """The prunable weights a finished run ended with (not their average), in the order of the
    network. Raises CheckpointError where its last checkpoint is not sound."""
    folder, result = _newest(run), checkpoint.result_of(run)
    if result is None or checkpoint.step_of(folder) != result["step"]:
        raise CheckpointError(
            f"{run}: the checkpoint of its end is not there or not sound; remove this folder to "
            "train it anew"
        )
    student, _ = load_student(folder)
    return prunable(student.network)


def _of_level(ticket: Ticket, plan: Plan) -> Masks:
    """The largest at the end of the level before, of those that it kept."""
    before = f"level-{ticket.level - 1}"
    weights = ends_of(ticket.run.out.with_name(before))
    masks = dense(weights)
    if ticket.level > 1:
        masks = _trained_under(ticket.run.out.with_name(before))
    return _largest(weights, masks, plan, ticket.level)


def _in_one_shot(ticket: Ticket, plan: Plan) -> Masks:
    """The largest at the end of the dense run."""
    weights = ends_of(ticket.run.out.with_name("level-0"))
    return _largest(weights, dense(weights), plan, ticket.level)


def _largest(weights: Weights, masks: Masks, plan: Plan, level: int) -> Masks:
    scores = {name: one.abs() for name, one in weights.items()}
    masks = {name: masks[name] for name in scores}  # ties go by the order of the network
    return prune_in(plan.scope)(scores, masks, plan.densities[level - 1])


def _at_random(ticket: Ticket, plan: Plan) -> Masks:
    """Random ones, as many in each layer as the ticket of the level has."""
    masks = read_masks(ticket.masks.with_name(f"level-{ticket.level}.safetensors"))
    return random_like(masks, plan.scope, seed=1000 * ticket.seed + ticket.level)


_MAKERS: dict[str, Callable[[Ticket, Plan], Masks]] = {
    TICKET: _of_level,
    ANEW: _of_level,
    RANDOM: _at_random,
    ONE_SHOT: _in_one_shot,
}


def facts_of_masks(ticket: Ticket) -> dict[str, Any]:
    """What there is to know of a finished run's masks: as deit.models.masks.told_of says it, the
    number of all `parameters`, and the `bytes` of its weights: as the `file` holds them, zeros and
    all; `packed` by zlib; `sparse`, with a bit that says of each prunable one whether it is there.
    """
    file = checkpoint.newest(ticket.run.out) / WEIGHTS
    weights = read_weights(file)
    masks = dense(ends_of(ticket.run.out)) if ticket.masks is None else read_masks(ticket.masks)
    told = told_of(masks)
    held, total = sum(one.nbytes for one in weights.values()), told["total"]
    sparse = held - 4 * (total - told["kept"]) + total // 8
    sizes = {
        "file": file.stat().st_size,
        "packed": len(zlib.compress(file.read_bytes(), 1)),
        "sparse": min(sparse, held),
    }
    parameters = sum(one.numel() for one in weights.values())
    return {**told, "parameters": parameters, "bytes": sizes}
