"""Saving a run after each epoch, and putting a stopped one back to where it was."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from deit import checkpoint
from deit.config import Config, derive, to_dict
from deit.console import say
from deit.errors import CheckpointError, ConfigError, DataError
from deit.models.saved import WEIGHTS, save_student, save_weights
from deit.models.weights import load_weights, read_weights
from deit.parts import Parts, State
from deit.typed_json import read_typed
from deit.validation import load

AVERAGE = "average.safetensors"
# Settings that say where and how to compute, not what: a resumed run may change them.
RESUMABLE = (
    "data.root",
    "data.download",
    "data.memory_fraction",
    "run.device",
    "teacher.targets",  # that it is the same store is told by its digest
)


def selected_top1(validation: dict[str, float]) -> float:
    """The number that selects `best`: of the average if there is one, fused if there are two."""
    for name in ("average_fused_top1", "average_class_top1", "fused_top1"):
        if name in validation:
            return validation[name]
    return validation["class_top1"]


def save(parts: Parts, row: dict[str, Any]) -> None:
    """Write `last`, and `best` unless the selected accuracy fell; then the epoch's metrics."""
    state, accelerator = parts.state, parts.accelerator
    top1 = selected_top1(row["validation"]) if "validation" in row else float("-inf")
    # A tie goes to the later epoch: on a small validation split it comes early by luck, and the
    # weights still move a lot then.
    improved = top1 >= state.best["top1"]
    if improved:
        state.best = {"epoch": state.epoch, "top1": top1, **row["validation"]}
    if not accelerator.is_main_process:
        return
    student = accelerator.unwrap_model(parts.student)
    if parts.average is not None:
        state.average_updates = parts.average.updates
    state.scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()

    def write_best(folder: Path) -> None:
        chosen = student if parts.average is None else parts.average.model
        save_student(folder, chosen.network.state_dict(), parts.facts)
        checkpoint.write_json(folder / checkpoint.STATE, asdict(state))

    def write_last(folder: Path) -> None:
        save_student(folder, student.network.state_dict(), parts.facts)
        checkpoint.save_optimizer(folder / checkpoint.OPTIMIZER, parts.optimizer, student.network)
        if parts.average is not None:
            save_weights(folder / AVERAGE, parts.average.model.network.state_dict())
        checkpoint.write_json(folder / checkpoint.STATE, asdict(state))

    # In this order a kill at any point loses nothing: resuming drops the rows beyond `last`.
    checkpoint.append_metrics(parts.out, row)
    if improved:
        checkpoint.replace_folder(parts.out / "best", write_best)
    checkpoint.replace_folder(parts.out / "last", write_last)


def read_state(folder: Path) -> State:
    """The state.json of a checkpoint. Raises CheckpointError."""
    path = folder / checkpoint.STATE
    state = read_typed(path, State)
    if state.format_version != checkpoint.FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {state.format_version}, this release reads "
            f"{checkpoint.FORMAT_VERSION}"
        )
    return state


def as_begun(config: Config, out: Path) -> Config:
    """The configuration with the normalisation that the run in `out` took over from its start."""
    saved = out / checkpoint.CONFIG
    if config.start.source is None or config.views.mean is not None or not saved.is_file():
        return config
    before = load(saved).views
    return derive(config, views={"mean": before.mean, "std": before.std})


def restore(parts: Parts) -> None:
    """Put a run back to its last finished epoch; the configuration and data must be the same."""
    saved = parts.out / checkpoint.CONFIG
    if not saved.is_file():
        return  # an empty folder: the same command serves for the first start
    _check_same(load(saved), parts.config)
    last = parts.out / "last"
    if not last.is_dir():
        say(f"{parts.out}: no finished epoch yet, starting from the beginning")
        return
    state = read_state(last)
    if state.fingerprint != parts.splits.fingerprint:
        raise DataError(
            f"{parts.out}: the images differ from those the run started with (class names, pixels "
            "or labels); resume with the same data, or start anew in another --out"
        )
    if state.targets != parts.state.targets:
        raise DataError(
            f"{parts.out}: the stored targets differ from those the run started with; resume with "
            "the same store, or start anew in another --out"
        )
    student = parts.accelerator.unwrap_model(parts.student)
    load_weights(student.network, read_weights(last / WEIGHTS), origin=str(last / WEIGHTS))
    checkpoint.load_optimizer(last / checkpoint.OPTIMIZER, parts.optimizer, student.network)
    if parts.average is not None:
        weights = read_weights(last / AVERAGE)
        load_weights(parts.average.model.network, weights, origin=str(last / AVERAGE))
        parts.average.updates = state.average_updates
    if parts.accelerator.scaler is not None and state.scaler is not None:
        parts.accelerator.scaler.load_state_dict(state.scaler)
    parts.state = state
    if parts.accelerator.is_main_process:
        checkpoint.cut_metrics(parts.out, state.epoch)
    say(f"{parts.out}: resuming after epoch {state.epoch} of {parts.config.optim.epochs}")


def _check_same(before: Config, now: Config) -> None:
    differences = []
    for section, values in to_dict(before).items():
        for leaf, value in values.items():
            current = getattr(getattr(now, section), leaf)
            if current != value and f"{section}.{leaf}" not in RESUMABLE:
                differences.append(f"\n  {section}.{leaf}: {value!r} before, {current!r} now")
    if differences:
        raise ConfigError(
            "--resume: the configuration differs from the run's; give the same one, or another "
            f"--out:{''.join(differences)}"
        )
