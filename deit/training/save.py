"""Write a run: checkpoints, the best weights, and the result."""

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
from deit.models.saved_student import save_weights, write_student
from deit.models.surgery.pruning_masks import MASKS, is_masked
from deit.training.loop import MetricAccumulator
from deit.training.optimizer import optimizer_tensors, save_optimizer
from deit.training.state import TrainingRun

AVERAGE = "average.safetensors"
_SLOW_S = 10.0


def selection_metric(validation: dict[str, float]) -> float:
    """Return the accuracy that selects `best`: of the EMA if there is one, of the fused heads if
    there are two.

    validation: the metrics of a row of metrics.jsonl, in [0, 1].

    Example:
        >>> selection_metric({"class_top1": 0.8, "distillation_top1": 0.82, "fused_top1": 0.83})
        0.83
    """
    return validation[selection_name(validation)]


def selection_name(validation: dict[str, float]) -> str:
    """Return the name of the accuracy that selects the best checkpoint."""
    for name in ("average_fused_top1", "average_class_top1", "fused_top1"):
        if name in validation:
            return name
    return "class_top1"


def save_checkpoint(run: TrainingRun, metrics: MetricAccumulator, *, in_hash_chain: bool) -> None:
    """Write a checkpoint of the current step.

    in_hash_chain: whether every run of this configuration saves at this step. The hashes of its
    state then extend state_hashes.jsonl, by which two runs can be compared. Raises SystemFault.
    """
    state, accelerator = run.state, run.accelerator
    state.metric_sums = metrics.state()  # a collective call
    student = accelerator.unwrap_model(run.student)
    main = accelerator.is_main_process
    weights = full_tensors(student.network.state_dict(), keep=main)
    moments = full_tensors(optimizer_tensors(run.optimizer, student.network), keep=main)
    averaged = {}
    if run.average is not None:
        averaged = full_tensors(run.average.model.network.state_dict(), keep=main)
    if not main:
        return
    weights, averaged = _saved_subset(run, weights), _saved_subset(run, averaged)
    _check_lock(run)
    if run.average is not None:
        state.average_updates = int(run.average.updates)
    state.scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()

    def fill(folder: Path) -> dict[str, FileDigest]:
        write_student(folder, weights, run.model_info)
        fault_point("model")
        save_optimizer(folder / run_folder.OPTIMIZER, moments)
        fault_point("optimizer")
        if averaged:
            save_weights(folder / AVERAGE, averaged)
            fault_point("average")
        _save_extras(run, folder, weights, averaged)
        hashed = digests(folder, (path.name for path in folder.glob("*.safetensors")))
        if in_hash_chain:
            _append_hash(run, hashed)
        write_json(folder / run_folder.STATE, asdict(state))
        fault_point("state")
        return hashed

    started = time.monotonic()
    settings = run.config.run
    run_folder.save_checkpoint(
        run.out,
        state.step,
        fill,
        keep=settings.num_checkpoints,
        keep_steps=settings.keep_steps,
        bytes_needed=checkpoint_bytes(run),
    )
    if (took := time.monotonic() - started) > _SLOW_S:
        warn(
            f"{run_folder.checkpoint_path(run.out, state.step)}: took {format_duration(took)} to "
            "write; launchers often kill a process 30 s after a signal, which would lose it"
        )


def _saved_subset(run: TrainingRun, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights to save: all, or adapters and heads if only these are trained."""
    if run.config.optim.trainable != "adapters":
        return weights
    names = trainable_parameters(run.accelerator.unwrap_model(run.student).network, "adapters")
    return {name: value for name, value in weights.items() if name in names}


def _save_extras(run: TrainingRun, folder: Path, *saved: dict[str, Tensor]) -> None:
    """Write what belongs to the weights: the base of adapters, the masks of a pruned student."""
    if run.adapter_base is not None:
        save_base(folder, run.adapter_base)
    if run.masks is None:
        return
    assert all(is_masked(run.masks.masks, weights) for weights in saved if weights)
    save_weights(folder / MASKS, run.masks.masks)


def _append_hash(run: TrainingRun, files: dict[str, FileDigest]) -> None:
    """Append the hashes of a checkpoint's tensors to the hash chain."""
    state = run.state
    hashes = {name.removesuffix(".safetensors"): file.sha256 for name, file in files.items()}
    state.chain = run_log.next_chain_hash(state.chain, state.step, hashes)
    row = {"step": state.step, **hashes, "chain": state.chain}
    state.chain_bytes = run_log.append(run.out / run_log.HASH_CHAIN, row)


def finish_epoch(run: TrainingRun, row: dict[str, Any]) -> None:
    """Record a finished epoch: write `best` unless accuracy dropped, then append the metrics."""
    state = run.state
    top1 = selection_metric(row["validation"]) if "validation" in row else float("-inf")
    # A tie goes to the later epoch: on a small validation split, an early epoch reaches the same
    # accuracy by chance.
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
    _check_lock(run)

    def fill(folder: Path) -> None:
        write_student(folder, chosen, run.model_info)
        _save_extras(run, folder, chosen)
        write_json(folder / run_folder.STATE, asdict(state))

    if improved:
        run_folder.write_with_manifest(run.out / run_folder.BEST, fill, step=state.step)
    state.metrics_bytes = run_log.append(run.out / run_log.METRICS, row)


def _check_lock(run: TrainingRun) -> None:
    if run.check_lock is not None:
        run.check_lock()


def write_result(run: TrainingRun) -> dict[str, Any]:
    """Write result.json, which marks the run as finished; return its content."""
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
            validation_images=len(run.splits.validation.labels),
        )
    )
    if run.accelerator.is_main_process:
        _check_lock(run)
        fault_point("finish")
        write_json(run.out / run_folder.RESULT, result)
    return result


def _teacher_top1(run: TrainingRun) -> float | None:
    """Return the teacher's accuracy on the validation split, None if it was not measured."""
    if run.teacher_predictions is None:
        return None
    return agreement(run.teacher_predictions.cpu(), run.splits.validation.labels.cpu())


def checkpoint_bytes(run: TrainingRun) -> int:
    """Return the approximate size of a checkpoint [bytes]."""
    network = run.accelerator.unwrap_model(run.student).network
    moments = 2 * sum(p.nbytes for p in network.parameters() if p.requires_grad)
    masks = {} if run.masks is None else run.masks.masks
    mask_bytes = sum(mask.nbytes for mask in masks.values())
    return _weights_bytes(run) * (2 if run.average is not None else 1) + moments + mask_bytes


def _weights_bytes(run: TrainingRun) -> int:
    network = run.accelerator.unwrap_model(run.student).network
    return sum(value.nbytes for value in _saved_subset(run, network.state_dict()).values())


def required_bytes(run: TrainingRun) -> int:
    """Return what a run adds to its folder at most [bytes]: the checkpoints that are kept, one more
    while it is written, and the best weights twice."""
    settings = run.config.run
    existing = [step for step, _ in run_folder.list_checkpoints(run.out)]
    rotating = [step for step in existing if step not in settings.keep_steps]
    num_checkpoints = max(settings.num_checkpoints - len(rotating), 0) + 1
    num_checkpoints += len(set(settings.keep_steps) - set(existing))
    num_best = 1 if (run.out / run_folder.BEST).is_dir() else 2
    return num_checkpoints * checkpoint_bytes(run) + num_best * _weights_bytes(run)
