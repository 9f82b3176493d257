"""A run put back to where it was; what differs from the run that began is refused or told."""

import dataclasses
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from deit.config.schema import RESUMABLE_FIELDS, Config, to_dict
from deit.config.validation import load_config
from deit.core import run_folder, run_log
from deit.core.accelerator import in_main_process
from deit.core.console import info, warn
from deit.core.errors import CheckpointError, ConfigError, DataError, SystemFault
from deit.core.json_io import load_json_as
from deit.core.manifest import FORMAT_VERSION
from deit.core.manifest import verify_dir as check_manifest
from deit.models.load_weights import reader_of
from deit.models.metadata import WEIGHTS, read_base
from deit.models.surgery.pruning_masks import MASKS, PruningMasks, read_masks
from deit.models.weight_files import load_weights
from deit.training.optimizer import load_optimizer
from deit.training.save import AVERAGE
from deit.training.state import TrainingRun, TrainState


def read_state(folder: Path) -> TrainState:
    """The state.json of a checkpoint. Raises CheckpointError."""
    path = folder / run_folder.STATE
    state = load_json_as(path, TrainState)
    there = load_json_as(path, dict[str, Any])  # the dataclass would fill in what is missing
    for one in dataclasses.fields(TrainState):
        if one.name not in there:
            raise CheckpointError(f"{path}: {one.name}: is missing")
    if state.format_version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {state.format_version}, this release reads {FORMAT_VERSION}"
        )
    return state


def resume_run(run: TrainingRun) -> bool:
    """Put a run back to its newest sound checkpoint; the configuration and data must be the same.
    Whether there was one.

    Raises CheckpointError where there were checkpoints and none is sound: a run never starts over
    unasked.
    """
    _check_config(run)
    folder = _select_checkpoint(run.out, run.accelerator)
    if folder is None:
        _check_fresh(run.out)
        info(f"{run.out}: no checkpoint yet, starting from the beginning")
        _cut(run, TrainState())
        return False
    state = read_state(folder)
    _check_data(run, state.fingerprint, state.targets)
    _check_teachers(run, state.teachers)
    steps = run.loader.steps_per_epoch
    if not state.epoch * steps < state.step <= (state.epoch + 1) * steps:
        raise CheckpointError(
            f"{folder}: update {state.step} is not in epoch {state.epoch + 1} of {steps} updates; "
            "give another --out to start from the beginning"
        )
    if (state.scaler is None) != (run.accelerator.scaler is None):
        raise CheckpointError(
            f"{folder}: the scale of fp16 gradients is in only one of checkpoint and run; resume "
            "in the same precision"
        )
    student = run.accelerator.unwrap_model(run.student)
    run.adapter_base = read_base(folder)
    read = reader_of(folder, run.model_info)
    weights = _finite(read(WEIGHTS), origin=folder / WEIGHTS)
    load_weights(student.network, weights, origin=str(folder / WEIGHTS))
    load_optimizer(folder / run_folder.OPTIMIZER, run.optimizer, student.network)
    if (folder / MASKS).is_file():
        run.masks = PruningMasks(read_masks(folder / MASKS), student.network)
    if run.average is not None:
        weights = _finite(read(AVERAGE), origin=folder / AVERAGE)
        load_weights(run.average.model.network, weights, origin=str(folder / AVERAGE))
        run.average.updates.fill_(state.average_updates)
    if state.scaler is not None:
        run.accelerator.scaler.load_state_dict(state.scaler)
    run.state = state
    check_best(run)
    _cut(run, state)
    epochs = run.config.optim.epochs
    info(
        f"{run.out}: resuming after update {state.step} of {epochs * steps} "
        f"(epoch {state.epoch + 1} of {epochs})"
    )
    return True


def check_best(run: TrainingRun) -> None:
    """Where the best weights so far are gone, damaged or of another evaluation than the state
    knows, the next evaluation takes their place; in a finished run they are only told."""
    best = run.out / run_folder.BEST
    if in_main_process(run.accelerator, lambda: int(_best_is_invalid(run)), best):
        run.state.best = TrainState().best  # in all processes: they decide alike what is better


def _best_is_invalid(run: TrainingRun) -> bool:
    """Tell what is wrong with the best weights so far; whether they are to be forgotten."""
    best, known = run.out / run_folder.BEST, run.state.best
    finished = run_folder.read_result(run.out) is not None
    if known["epoch"] == 0 and not finished:
        return False
    advice = "the next evaluation takes its place"
    if finished:
        advice = "the newest checkpoint is there still (--checkpoint last)"
    try:
        check_manifest(best)
        there = read_state(best)
    except (CheckpointError, SystemFault) as error:
        if error.exit_code == SystemFault.exit_code and not finished:
            raise  # it may well be sound
        warn(f"{error}; {advice}")
    else:
        if finished or there.best == known:
            return False
        # That of this very moment: the run ended between it and the next checkpoint.
        if there.step != run.state.step:
            warn(
                f"{best}: holds the weights of epoch {there.epoch}, where the run goes on from the "
                f"best was of epoch {known['epoch']}; {advice}"
            )
    return True


def _finite(weights: dict[str, torch.Tensor], *, origin: Path) -> dict[str, torch.Tensor]:
    """Weights without a NaN or an infinity. Raises CheckpointError."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise CheckpointError(
                f"{origin}: {name} is not finite, so training cannot go on from it"
            )
    return weights


def _cut(run: TrainingRun, state: TrainState) -> None:
    """Drop the rows of the logs that the checkpoint does not know."""
    if run.accelerator.is_main_process:
        run_log.truncate(run.out / run_log.METRICS, state.metrics_bytes)
        run_log.truncate(run.out / run_log.HASH_CHAIN, state.chain_bytes)
        run_log.truncate_after_step(run.out / run_log.NONFINITE_LOG, state.step)


def _select_checkpoint(out: Path, accelerator: Accelerator) -> Path | None:
    """The checkpoint to go on from, the same in all processes; damaged later ones are set aside.

    Raises CheckpointError where none is sound, SystemFault where one cannot be read now.
    """

    def find() -> int:
        folder = run_folder.latest_checkpoint(out)
        if folder is None:
            return 0
        step = run_folder.checkpoint_step(folder)
        run_folder.rename_damaged(out, after=step)
        return 1 + step

    step = in_main_process(accelerator, find, f"the checkpoints in {out}") - 1
    return None if step < 0 else run_folder.checkpoint_path(out, step)


def _check_fresh(out: Path) -> None:
    """Refuse a run that had checkpoints, and has none. Raises CheckpointError."""
    # One link of the chain may be of a first checkpoint that a kill kept from being there.
    several = len(run_log.read(out / run_log.HASH_CHAIN)) > 1 or bool(
        run_folder.damaged_checkpoints(out)
    )
    if several or (out / run_folder.BEST).is_dir() or run_log.read(out / run_log.METRICS):
        raise CheckpointError(
            f"{out}: its checkpoints are gone, so the run cannot go on; give another --out to "
            "start anew"
        )


def check_same_run(run: TrainingRun, finished: dict[str, Any]) -> None:
    """Hold the configuration and the data against those of a finished run. Raises ConfigError and
    DataError."""
    _check_config(run)
    _check_data(run, finished["fingerprint"], finished["targets"])
    _check_teachers(run, finished.get("teachers", run.state.teachers))


def _check_data(run: TrainingRun, fingerprint: str, targets: list[str]) -> None:
    if fingerprint != run.splits.fingerprint:
        raise DataError(
            f"{run.out}: the images differ from those the run started with (class names, pixels "
            "or labels; another version of Pillow may decode other pixels); resume with the same "
            "data (data.source, data.root), or start again in another --out"
        )
    if targets != run.state.targets:
        raise DataError(
            f"{run.out}: the stored targets differ from those the run started with; resume with "
            "the same teacher.target_stores, or start again in another --out"
        )


def _check_teachers(run: TrainingRun, before: list[str]) -> None:
    """Of a teacher that only its stored answers speak for, nothing is known here: "" then."""
    now = run.state.teachers
    if len(before) != len(now) or any(a and b and a != b for a, b in zip(before, now)):
        raise DataError(
            f"{run.out}: a teacher's weights differ from those the run started with; resume "
            "with the same teacher.source, or start again in another --out"
        )


def _check_config(run: TrainingRun) -> None:
    differences = []
    for section, values in to_dict(load_config(run.out / run_folder.CONFIG)).items():
        for leaf, value in values.items():
            current = getattr(getattr(run.config, section), leaf)
            if current != value and f"{section}.{leaf}" not in RESUMABLE_FIELDS:
                differences.append(f"\n  {section}.{leaf}: {value!r} before, {current!r} now")
    if differences:
        ways = ["give the same one", "another --out"]
        if (run.out / run_folder.BEST).is_dir():
            ways.append(f"deit finetune --from {shlex.quote(str(run.out))} to train its weights on")
        raise ConfigError(
            f"--resume: the configuration differs from the run's; {', or '.join(ways)}:"
            + "".join(differences)
        )


_COMPUTING = ("torch", "torchvision", "timm", "accelerate", "numpy", "pillow")
"""Packages whose versions may change what is computed, pictures that are decoded among it."""


@dataclass(frozen=True)
class MachineInfo:
    """What deit.core.accelerator.describe says that a result depends on to the bit."""

    device_name: str | None = None
    processes: int | None = None
    threads: int | None = None
    precision: str | None = None
    packages: dict[str, str] = field(default_factory=dict)


def warn_if_not_reproducible(out: Path, now: dict[str, Any], config: Config) -> None:
    """Say where a run began on other ground: it goes on, but no longer to the bit.

    now: what deit.core.accelerator.describe returns.
    """
    path = out / run_folder.ENVIRONMENT
    if not path.is_file():
        return
    try:
        before = load_json_as(path, MachineInfo)
    except CheckpointError as error:
        warn(f"{error}; so whether it goes on to the bit is not known")
        return
    begun = load_config(out / run_folder.CONFIG)
    settings = {
        "optim.grad_accum_steps": (begun.optim.grad_accum_steps, config.optim.grad_accum_steps),
        "run.linear_backend": (begun.run.linear_backend, config.run.linear_backend),
        "run.compile": (begun.run.compile, config.run.compile),
    }
    if max(before.processes or 1, now["processes"]) > 1:
        settings["run.sharding"] = begun.run.sharding, config.run.sharding
    if config.loss.kind != "none":
        settings["teacher.memory_format"] = tuple(
            ",".join(one.teacher.memory_format) for one in (begun, config)
        )
    told = [
        f"{name} {was} before, {is_} now" for name, (was, is_) in settings.items() if was != is_
    ]
    told += [
        f"{name} {getattr(before, name)} before, {now[name]} now"
        for name in ("device_name", "processes", "threads", "precision")
        if getattr(before, name) != now[name]
    ]
    versions = [(name, before.packages.get(name), now["packages"][name]) for name in _COMPUTING]
    told += [f"{name} {was} before, {is_} now" for name, was, is_ in versions if was != is_]
    if told:
        warn(f"{out}: goes on from where it was, but not to the bit: {'; '.join(told)}")
