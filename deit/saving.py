"""A run written down at any update: checkpoints, the best weights, the end."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from deit import checkpoint, journal
from deit.console import clock, warn
from deit.disk import write_json
from deit.engine import Tally
from deit.faults import reach
from deit.manifest import Content, digests
from deit.metrics import agreement
from deit.models.base import save_base
from deit.models.layers import trained_in
from deit.models.masks import MASKS, holds
from deit.models.saved import save_student, save_weights
from deit.optimizer_state import optimizer_tensors, save_optimizer
from deit.parts import Parts
from deit.sharding import whole

AVERAGE = "average.safetensors"
_SLOW_S = 10.0


def selected_top1(validation: dict[str, float]) -> float:
    """The number that selects `best`: of the average if there is one, fused if there are two."""
    for name in ("average_fused_top1", "average_class_top1", "fused_top1"):
        if name in validation:
            return validation[name]
    return validation["class_top1"]


def save(parts: Parts, tally: Tally, *, regular: bool) -> None:
    """Write the checkpoint of this update.

    regular: whether every run of this configuration saves here; the hashes of its state then go
    into the chain, by which two runs can be held beside each other. Raises EnvironmentFault.
    """
    state, accelerator = parts.state, parts.accelerator
    state.tally = tally.dump()  # of all processes
    student = accelerator.unwrap_model(parts.student)
    main = accelerator.is_main_process
    weights = whole(student.network.state_dict(), wanted=main)
    moments = whole(optimizer_tensors(parts.optimizer, student.network), wanted=main)
    averaged = {}
    if parts.average is not None:
        averaged = whole(parts.average.model.network.state_dict(), wanted=main)
    if not main:
        return
    weights, averaged = _kept(parts, weights), _kept(parts, averaged)
    _guard(parts)
    if parts.average is not None:
        state.average_updates = int(parts.average.updates)
    state.scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()

    def fill(folder: Path) -> dict[str, Content]:
        save_student(folder, weights, parts.facts)
        reach("model")
        save_optimizer(folder / checkpoint.OPTIMIZER, moments)
        reach("optimizer")
        if averaged:
            save_weights(folder / AVERAGE, averaged)
            reach("average")
        _save_beside(parts, folder, weights, averaged)
        hashed = digests(folder, (path.name for path in folder.glob("*.safetensors")))
        if regular:
            _link(parts, hashed)
        write_json(folder / checkpoint.STATE, asdict(state))
        reach("state")
        return hashed

    started = time.monotonic()
    run = parts.config.run
    keep, stay, needs = run.keep_checkpoints, run.keep_updates, checkpoint_bytes(parts)
    checkpoint.write(parts.out, state.step, fill, keep=keep, stay=stay, needs=needs)
    if (took := time.monotonic() - started) > _SLOW_S:
        warn(
            f"{checkpoint.folder_of(parts.out, state.step)}: took {clock(took)} to write; "
            "launchers often kill 30 s after a signal, and then the checkpoint before it is what "
            "is left"
        )


def _kept(parts: Parts, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is saved of a network's weights: all, or adapters and heads where they alone move."""
    if parts.config.optim.trained != "adapters":
        return weights
    names = trained_in(parts.accelerator.unwrap_model(parts.student).network, "adapters")
    return {name: value for name, value in weights.items() if name in names}


def _save_beside(parts: Parts, folder: Path, *saved: dict[str, Tensor]) -> None:
    """Write what weights are not to be read without: the base of adapters; the masks of a pruned
    student, which must hold in them."""
    if parts.base is not None:
        save_base(folder, parts.base)
    if parts.held is None:
        return
    assert all(holds(parts.held.masks, weights) for weights in saved if weights)
    save_weights(folder / MASKS, parts.held.masks)


def _link(parts: Parts, files: dict[str, Content]) -> None:
    """Add the hashes of a state's tensors to the chain."""
    state = parts.state
    hashes = {name.removesuffix(".safetensors"): one.sha256 for name, one in files.items()}
    state.chain = journal.link(state.chain, state.step, hashes)
    row = {"step": state.step, **hashes, "chain": state.chain}
    state.chain_bytes = journal.append(parts.out / journal.CHAIN, row)


def close_epoch(parts: Parts, row: dict[str, Any]) -> None:
    """Note a finished epoch: `best`, unless the selected accuracy fell, then the row of metrics."""
    state = parts.state
    top1 = selected_top1(row["validation"]) if "validation" in row else float("-inf")
    # A tie goes to the later epoch: on a small validation split it comes early by luck, and the
    # weights still move a lot then.
    improved = top1 >= state.best["top1"]
    chosen = {}
    if improved:
        state.best = {"epoch": state.epoch, "top1": top1, **row["validation"]}
        student = parts.accelerator.unwrap_model(parts.student)
        model = student if parts.average is None else parts.average.model
        chosen = whole(model.network.state_dict(), wanted=parts.accelerator.is_main_process)
        chosen = _kept(parts, chosen)
    if not parts.accelerator.is_main_process:
        return
    _guard(parts)

    def fill(folder: Path) -> None:
        save_student(folder, chosen, parts.facts)
        _save_beside(parts, folder, chosen)
        write_json(folder / checkpoint.STATE, asdict(state))

    if improved:
        checkpoint.seal_folder(parts.out / checkpoint.BEST, fill, step=state.step)
    state.metrics_bytes = journal.append(parts.out / journal.METRICS, row)


def _guard(parts: Parts) -> None:
    if parts.guard is not None:
        parts.guard()


def finish(parts: Parts) -> dict[str, Any]:
    """Mark the run as finished; what came of it, as plain values."""
    state = parts.state
    result = asdict(
        checkpoint.Result(
            epochs=state.epoch,
            step=state.step,
            samples_seen=state.samples_seen,
            seconds=state.seconds,
            skipped=state.skipped,
            teacher_top1=_teacher_top1(parts),
            best=state.best,
            chain=state.chain,
            fingerprint=state.fingerprint,
            targets=state.targets,
            teachers=state.teachers,
        )
    )
    if parts.accelerator.is_main_process:
        _guard(parts)
        reach("finish")
        write_json(parts.out / checkpoint.RESULT, result)
    return result


def _teacher_top1(parts: Parts) -> float | None:
    """The teacher's own accuracy on the validation split, where it was asked."""
    if parts.teacher_answers is None:
        return None
    return agreement(parts.teacher_answers.cpu(), parts.splits.validation.labels.cpu())


def checkpoint_bytes(parts: Parts) -> int:
    """About what a checkpoint takes [bytes]."""
    network = parts.accelerator.unwrap_model(parts.student).network
    moments = 2 * sum(one.nbytes for one in network.parameters() if one.requires_grad)
    masks = {} if parts.held is None else parts.held.masks
    masked = sum(mask.nbytes for mask in masks.values())
    return _weights_bytes(parts) * (2 if parts.average is not None else 1) + moments + masked


def _weights_bytes(parts: Parts) -> int:
    network = parts.accelerator.unwrap_model(parts.student).network
    return sum(value.nbytes for value in _kept(parts, network.state_dict()).values())


def space_of(parts: Parts) -> int:
    """What a run still adds to its folder at most [bytes]: checkpoints until all that stay are
    there, one more while that is written, and the best likewise."""
    run, there = parts.config.run, [step for step, _ in checkpoint.found(parts.out)]
    passing = [step for step in there if step not in run.keep_updates]
    number = max(run.keep_checkpoints - len(passing), 0) + 1
    number += len(set(run.keep_updates) - set(there))
    best = 1 if (parts.out / checkpoint.BEST).is_dir() else 2
    return number * checkpoint_bytes(parts) + best * _weights_bytes(parts)
