"""A run written down at any update: checkpoints, the best weights, the end."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from deit.core import run_folder, run_log
from deit.core.console import format_duration, warn
from deit.core.fault_injection import fault_point
from deit.core.filesystem import write_json
from deit.core.manifest import FileDigest, digests
from deit.core.metrics import agreement
from deit.core.sharding import full_tensors
from deit.models.metadata import save_base
from deit.models.parameters import trainable_parameters
from deit.models.saved import save_student, save_weights
from deit.models.surgery.pruning_masks import MASKS, is_masked
from deit.training.loop import MetricAccumulator
from deit.training.optimizer import optimizer_tensors, save_optimizer
from deit.training.state import TrainingRun

AVERAGE = "average.safetensors"
_SLOW_S = 10.0


def selection_metric(validation: dict[str, float]) -> float:
    """The number that selects `best`: of the average if there is one, fused if there are two."""
    for name in ("average_fused_top1", "average_class_top1", "fused_top1"):
        if name in validation:
            return validation[name]
    return validation["class_top1"]


def save_checkpoint(parts: TrainingRun, tally: MetricAccumulator, *, in_hash_chain: bool) -> None:
    """Write the checkpoint of this update.

    regular: whether every run of this configuration saves here; the hashes of its state then go
    into the chain, by which two runs can be held beside each other. Raises SystemFault.
    """
    state, accelerator = parts.state, parts.accelerator
    state.metric_sums = tally.state()  # of all processes
    student = accelerator.unwrap_model(parts.student)
    main = accelerator.is_main_process
    weights = full_tensors(student.network.state_dict(), keep=main)
    moments = full_tensors(optimizer_tensors(parts.optimizer, student.network), keep=main)
    averaged = {}
    if parts.average is not None:
        averaged = full_tensors(parts.average.model.network.state_dict(), keep=main)
    if not main:
        return
    weights, averaged = _saved_subset(parts, weights), _saved_subset(parts, averaged)
    _guard(parts)
    if parts.average is not None:
        state.average_updates = int(parts.average.updates)
    state.scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()

    def fill(folder: Path) -> dict[str, FileDigest]:
        save_student(folder, weights, parts.model_info)
        fault_point("model")
        save_optimizer(folder / run_folder.OPTIMIZER, moments)
        fault_point("optimizer")
        if averaged:
            save_weights(folder / AVERAGE, averaged)
            fault_point("average")
        _save_extras(parts, folder, weights, averaged)
        hashed = digests(folder, (path.name for path in folder.glob("*.safetensors")))
        if in_hash_chain:
            _append_hash(parts, hashed)
        write_json(folder / run_folder.STATE, asdict(state))
        fault_point("state")
        return hashed

    started = time.monotonic()
    run = parts.config.run
    keep, stay, needs = run.num_checkpoints, run.keep_steps, checkpoint_bytes(parts)
    run_folder.save_checkpoint(
        parts.out, state.step, fill, keep=keep, keep_steps=stay, bytes_needed=needs
    )
    if (took := time.monotonic() - started) > _SLOW_S:
        warn(
            f"{run_folder.checkpoint_path(parts.out, state.step)}: took {format_duration(took)} to "
            "write; "
            "launchers often kill 30 s after a signal, and then the checkpoint before it is what "
            "is left"
        )


def _saved_subset(run: TrainingRun, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is saved of a network's weights: all, or adapters and heads where they alone move."""
    if run.config.optim.trainable != "adapters":
        return weights
    names = trainable_parameters(run.accelerator.unwrap_model(run.student).network, "adapters")
    return {name: value for name, value in weights.items() if name in names}


def _save_extras(run: TrainingRun, folder: Path, *saved: dict[str, Tensor]) -> None:
    """Write what weights are not to be read without: the base of adapters; the masks of a pruned
    student, which must hold in them."""
    if run.adapter_base is not None:
        save_base(folder, run.adapter_base)
    if run.masks is None:
        return
    assert all(is_masked(run.masks.masks, weights) for weights in saved if weights)
    save_weights(folder / MASKS, run.masks.masks)


def _append_hash(run: TrainingRun, files: dict[str, FileDigest]) -> None:
    """Add the hashes of a state's tensors to the chain."""
    state = run.state
    hashes = {name.removesuffix(".safetensors"): one.sha256 for name, one in files.items()}
    state.chain = run_log.next_chain_hash(state.chain, state.step, hashes)
    row = {"step": state.step, **hashes, "chain": state.chain}
    state.chain_bytes = run_log.append(run.out / run_log.HASH_CHAIN, row)


def finish_epoch(run: TrainingRun, row: dict[str, Any]) -> None:
    """Note a finished epoch: `best`, unless the selected accuracy fell, then the row of metrics."""
    state = run.state
    top1 = selection_metric(row["validation"]) if "validation" in row else float("-inf")
    # A tie goes to the later epoch: on a small validation split it comes early by luck, and the
    # weights still move a lot then.
    improved = top1 >= state.best["top1"]
    chosen = {}
    if improved:
        state.best = {"epoch": state.epoch, "top1": top1, **row["validation"]}
        student = run.accelerator.unwrap_model(run.student)
        model = student if run.average is None else run.average.model
        chosen = full_tensors(model.network.state_dict(), keep=run.accelerator.is_main_process)
        chosen = _saved_subset(run, chosen)
    if not run.accelerator.is_main_process:
        return
    _guard(run)

    def fill(folder: Path) -> None:
        save_student(folder, chosen, run.model_info)
        _save_extras(run, folder, chosen)
        write_json(folder / run_folder.STATE, asdict(state))

    if improved:
        run_folder.write_with_manifest(run.out / run_folder.BEST, fill, step=state.step)
    state.metrics_bytes = run_log.append(run.out / run_log.METRICS, row)


def _guard(run: TrainingRun) -> None:
    if run.check_lock is not None:
        run.check_lock()


def write_result(run: TrainingRun) -> dict[str, Any]:
    """Mark the run as finished; what came of it, as plain values."""
    state = run.state
    result = asdict(
        run_folder.Result(
            epochs=state.epoch,
            step=state.step,
            samples_seen=state.samples_seen,
            seconds=state.seconds,
            skipped=state.skipped,
            teacher_top1=_teacher_top1(run),
            best=state.best,
            chain=state.chain,
            fingerprint=state.fingerprint,
            targets=state.targets,
            teachers=state.teachers,
        )
    )
    if run.accelerator.is_main_process:
        _guard(run)
        fault_point("finish")
        write_json(run.out / run_folder.RESULT, result)
    return result


def _teacher_top1(run: TrainingRun) -> float | None:
    """The teacher's own accuracy on the validation split, where it was asked."""
    if run.teacher_predictions is None:
        return None
    return agreement(run.teacher_predictions.cpu(), run.splits.validation.labels.cpu())


def checkpoint_bytes(run: TrainingRun) -> int:
    """About what a checkpoint takes [bytes]."""
    network = run.accelerator.unwrap_model(run.student).network
    moments = 2 * sum(one.nbytes for one in network.parameters() if one.requires_grad)
    masks = {} if run.masks is None else run.masks.masks
    masked = sum(mask.nbytes for mask in masks.values())
    return _weights_bytes(run) * (2 if run.average is not None else 1) + moments + masked


def _weights_bytes(run: TrainingRun) -> int:
    network = run.accelerator.unwrap_model(run.student).network
    return sum(value.nbytes for value in _saved_subset(run, network.state_dict()).values())


def required_bytes(parts: TrainingRun) -> int:
    """What a run still adds to its folder at most [bytes]: checkpoints until all that stay are
    there, one more while that is written, and the best likewise."""
    run, there = parts.config.run, [step for step, _ in run_folder.list_checkpoints(parts.out)]
    passing = [step for step in there if step not in run.keep_steps]
    number = max(run.num_checkpoints - len(passing), 0) + 1
    number += len(set(run.keep_steps) - set(there))
    best = 1 if (parts.out / run_folder.BEST).is_dir() else 2
    return number * checkpoint_bytes(parts) + best * _weights_bytes(parts)
