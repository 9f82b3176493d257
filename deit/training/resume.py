"""Resume a run from its latest valid checkpoint; check that it is still the same run."""

import dataclasses
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from deit.config.presets import follow_from_epochs
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
    """Return the state of a checkpoint. Raises CheckpointError.

    Example:
        >>> read_state(Path("checkpoints/digits/best")).skipped
        0
    """
    path = folder / run_folder.STATE
    state = load_json_as(path, TrainState)
    values = load_json_as(path, dict[str, Any])  # the dataclass would use defaults
    for field_ in dataclasses.fields(TrainState):
        if field_.name not in values:
            raise CheckpointError(f"{path}: {field_.name}: is missing")
    if state.format_version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {state.format_version}, this release reads {FORMAT_VERSION}"
        )
    return state


def resume_run(run: TrainingRun) -> bool:
    """Restore the latest valid checkpoint; return whether there was one.

    Raises ConfigError and DataError if configuration, data or teachers changed, and CheckpointError
    if all checkpoints are damaged: a run never starts over silently.
    """
    _check_config(run)
    folder = _select_checkpoint(run.out, run.accelerator)
    if folder is None:
        _check_fresh(run.out)
        info(f"{run.out}: no checkpoint yet, starting from the first step")
        _truncate_logs(run, TrainState())
        return False
    state = read_state(folder)
    _check_state(run, folder, state)
    _restore(run, folder, state)
    check_best(run)
    _truncate_logs(run, state)
    epochs = run.config.optim.epochs
    info(
        f"{run.out}: resuming after step {state.step} of {epochs * run.loader.steps_per_epoch} "
        f"(epoch {state.epoch + 1} of {epochs})"
    )
    return True


def _check_state(run: TrainingRun, folder: Path, state: TrainState) -> None:
    """Raise DataError or CheckpointError if the state of a checkpoint does not fit the run."""
    _check_data(run, state.fingerprint, state.targets)
    _check_teachers(run, state.teachers)
    steps = run.loader.steps_per_epoch
    if not state.epoch * steps < state.step <= (state.epoch + 1) * steps:
        raise CheckpointError(
            f"{folder}: step {state.step} is not in epoch {state.epoch + 1} of {steps} steps; give "
            "another folder to start a new run"
        )
    if (state.scaler is None) != (run.accelerator.scaler is None):
        raise CheckpointError(
            f"{folder}: was trained with another run.precision; resume with the same one"
        )


def _restore(run: TrainingRun, folder: Path, state: TrainState) -> None:
    """Restore all that `save_checkpoint` writes: student, optimizer, masks, EMA and state."""
    network = run.accelerator.unwrap_model(run.student).network
    run.adapter_base = read_base(folder)
    read = reader_of(folder, run.model_info)

    def restore_weights(network: nn.Module, file: str) -> None:
        weights = _finite(read(file), origin=folder / file)
        load_weights(network, weights, origin=str(folder / file))

    restore_weights(network, WEIGHTS)
    load_optimizer(folder / run_folder.OPTIMIZER, run.optimizer, network)
    if (folder / MASKS).is_file():
        run.masks = PruningMasks(read_masks(folder / MASKS), network)
    if run.average is not None:
        restore_weights(run.average.model.network, AVERAGE)
        run.average.updates.fill_(state.average_updates)
    if state.scaler is not None:
        run.accelerator.scaler.load_state_dict(state.scaler)
    run.state = state


def check_best(run: TrainingRun) -> None:
    """Warn if the best weights are missing, damaged or from another evaluation.

    In an unfinished run, the next evaluation then replaces them.
    """
    best = run.out / run_folder.BEST
    if in_main_process(run.accelerator, lambda: int(_best_is_invalid(run)), best):
        run.state.best = TrainState().best  # in all processes, which compare with it


def _best_is_invalid(run: TrainingRun) -> bool:
    """Warn about the best weights; return whether the next evaluation replaces them."""
    best, expected = run.out / run_folder.BEST, run.state.best
    finished = run_folder.read_result(run.out) is not None
    if expected["epoch"] == 0 and not finished:
        return False
    advice = "the next evaluation replaces it"
    if finished:
        advice = "the latest checkpoint is available (--checkpoint last)"
    try:
        check_manifest(best)
        saved = read_state(best)
    except (CheckpointError, SystemFault) as error:
        if error.exit_code == SystemFault.exit_code and not finished:
            raise  # it can be valid
        warn(f"{error}; {advice}")
    else:
        if finished or saved.best == expected:
            return False
        # The run can have stopped between `best` of this step and the next checkpoint.
        if saved.step != run.state.step:
            warn(
                f"{best}: has the weights of epoch {saved.epoch}, but in the checkpoint the best "
                f"epoch is {expected['epoch']}; {advice}"
            )
    return True


def _finite(weights: dict[str, torch.Tensor], *, origin: Path) -> dict[str, torch.Tensor]:
    """Return the weights. Raises CheckpointError if one is NaN or infinite."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise CheckpointError(
                f"{origin}: {name} is not finite, so training cannot resume from it"
            )
    return weights


def _truncate_logs(run: TrainingRun, state: TrainState) -> None:
    """Drop the rows of the logs that were written after the checkpoint."""
    if run.accelerator.is_main_process:
        run_log.truncate(run.out / run_log.METRICS, state.metrics_bytes)
        run_log.truncate(run.out / run_log.HASH_CHAIN, state.chain_bytes)
        run_log.truncate_after_step(run.out / run_log.NONFINITE_LOG, state.step)


def _select_checkpoint(out: Path, accelerator: Accelerator) -> Path | None:
    """Return the latest valid checkpoint, the same in all processes; rename damaged later ones.

    Raises CheckpointError if all are damaged, SystemFault if one cannot be read at the moment.
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
    """Raise CheckpointError if the run had checkpoints and has none now."""
    # One row of the hash chain can belong to a first checkpoint whose writing was interrupted.
    had_checkpoints = len(run_log.read(out / run_log.HASH_CHAIN)) > 1 or bool(
        run_folder.damaged_checkpoints(out)
    )
    if had_checkpoints or (out / run_folder.BEST).is_dir() or run_log.read(out / run_log.METRICS):
        raise CheckpointError(
            f"{out}: its checkpoints are missing, so the run cannot resume; give another folder to "
            "start a new run"
        )


def check_same_run(run: TrainingRun, finished: dict[str, Any]) -> None:
    """Compare configuration, data and teachers with those of a finished run.

    Raises ConfigError and DataError if they differ.
    """
    _check_config(run)
    _check_data(run, finished["fingerprint"], finished["targets"])
    _check_teachers(run, finished.get("teachers", run.state.teachers))


def check_resumable(run: TrainingRun, finished: dict[str, Any] | None) -> None:
    """Make the checks of resuming a run, finished or not, and change nothing.

    Raises as `resume_run` and `check_same_run`.
    """
    if finished is not None:
        check_same_run(run, finished)
    elif (run.out / run_folder.CONFIG).is_file():
        _check_config(run)
        folder = run_folder.latest_checkpoint(run.out)
        if folder is None:
            _check_fresh(run.out)
        else:
            _check_state(run, folder, read_state(folder))


def _check_data(run: TrainingRun, fingerprint: str, targets: list[str]) -> None:
    if fingerprint != run.splits.fingerprint:
        raise DataError(
            f"{run.out}: the images differ from those the run started with (class names, pixels "
            "or labels; another version of Pillow can decode other pixels); resume with the same "
            "data (data.source, data.root, data.exclude_list), or start a new run in another folder"
        )
    if targets != run.state.targets:
        raise DataError(
            f"{run.out}: the stored targets differ from those the run started with; resume with "
            "the same teacher.target_stores, or start a new run in another folder"
        )


def _check_teachers(run: TrainingRun, before: list[str]) -> None:
    """Compare digests of the teachers' weights; "" stands for unavailable ones."""
    now = run.state.teachers
    if len(before) != len(now) or any(a and b and a != b for a, b in zip(before, now)):
        raise DataError(
            f"{run.out}: a teacher's weights differ from those the run started with; resume "
            "with the same teacher.source, or start a new run in another folder"
        )


def _check_config(run: TrainingRun) -> None:
    """Raise ConfigError if a field differs that decides the result."""
    differences = []
    before, now = to_dict(load_config(run.out / run_folder.CONFIG)), to_dict(run.config)
    ignored = {*RESUMABLE_FIELDS, *follow_from_epochs(before, now)}
    for section, values in before.items():
        for leaf, value in values.items():
            current = now[section][leaf]
            if current != value and f"{section}.{leaf}" not in ignored:
                differences.append(f"\n  {section}.{leaf}: {value!r} before, {current!r} now")
    if differences:
        advice = ["give the same one", "another folder"]
        if (run.out / run_folder.BEST).is_dir():
            advice.append(
                f"continue with its weights by `deit finetune --from {shlex.quote(str(run.out))}`"
            )
        raise ConfigError(
            f"resume = True: the configuration differs from the run's; {', or '.join(advice)}:"
            + "".join(differences)
        )


_COMPUTING = ("torch", "torchvision", "timm", "accelerate", "numpy", "pillow")
"""Packages whose versions can change what is computed or how images are decoded."""


@dataclass(frozen=True)
class MachineInfo:
    """The part of environment.json that bit-exact results depend on."""

    device_name: str | None = None
    processes: int | None = None
    threads: int | None = None
    precision: str | None = None
    packages: dict[str, str] = field(default_factory=dict)


def warn_if_not_reproducible(out: Path, environment: dict[str, Any], config: Config) -> None:
    """Warn about each setting, version and hardware that makes resuming not bit-exact.

    environment: from deit.core.accelerator.environment_info, of this process.
    """
    path = out / run_folder.ENVIRONMENT
    if not path.is_file():
        return
    try:
        before = load_json_as(path, MachineInfo)
    except CheckpointError as error:
        warn(f"{error}; so it is unknown whether resuming is bit-exact")
        return
    old = load_config(out / run_folder.CONFIG)
    pairs = {
        "optim.grad_accum_steps": (old.optim.grad_accum_steps, config.optim.grad_accum_steps),
        "run.linear_backend": (old.run.linear_backend, config.run.linear_backend),
        "run.compile": (old.run.compile, config.run.compile),
    }
    if max(before.processes or 1, environment["processes"]) > 1:
        pairs["run.sharding"] = old.run.sharding, config.run.sharding
    if config.loss.kind != "none":
        pairs["teacher.memory_format"] = tuple(
            ",".join(settings.teacher.memory_format) for settings in (old, config)
        )
    for name in ("device_name", "processes", "threads", "precision"):
        pairs[name] = getattr(before, name), environment[name]
    for name in _COMPUTING:
        pairs[name] = before.packages.get(name), environment["packages"][name]
    changes = [f"{name} from {was} to {now}" for name, (was, now) in pairs.items() if was != now]
    if changes:
        warn(f"{out}: resuming, but not bit-exactly; changed: {'; '.join(changes)}")
