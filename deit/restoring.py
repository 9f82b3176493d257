"""A run put back to where it was; what differs from the run that began is refused or told."""

import dataclasses
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from deit import checkpoint, journal
from deit.config import RESUMABLE, Config, to_dict
from deit.console import say, warn
from deit.environment import in_main_process
from deit.errors import CheckpointError, ConfigError, DataError, EnvironmentFault
from deit.manifest import FORMAT_VERSION
from deit.manifest import check as check_manifest
from deit.models.base import read_base
from deit.models.facts import WEIGHTS
from deit.models.masks import MASKS, Held, read_masks
from deit.models.start import reader_of
from deit.models.weights import load_weights
from deit.optimizer_state import load_optimizer
from deit.parts import Parts, State
from deit.saving import AVERAGE
from deit.typed_json import read_typed
from deit.validation import load


def read_state(folder: Path) -> State:
    """The state.json of a checkpoint. Raises CheckpointError."""
    path = folder / checkpoint.STATE
    state = read_typed(path, State)
    there = read_typed(path, dict[str, Any])  # the dataclass would fill in what is missing
    for one in dataclasses.fields(State):
        if one.name not in there:
            raise CheckpointError(f"{path}: {one.name}: is missing")
    if state.format_version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {state.format_version}, this release reads {FORMAT_VERSION}"
        )
    return state


def as_begun(config: Config, out: Path) -> Config:
    """The configuration with what the run in `out` settled when it began: the normalisation of its
    start, who computes linear layers (torch in runs that do not say), and the teachers' layouts
    (contiguous)."""
    if not (out / checkpoint.CONFIG).is_file():
        return config
    before = load(out / checkpoint.CONFIG)
    if config.start.source is not None and config.views.mean is None:
        config = config.replace(views={"mean": before.views.mean, "std": before.views.std})
    if config.run.linear == "auto" and config.run.compile == "none":
        known = "torch" if before.run.linear == "auto" else before.run.linear
        config = config.replace(run={"linear": known})
    if set(config.teacher.layout) <= {"auto"}:
        number = max(len(before.teacher.source), len(before.teacher.targets))
        known = before.teacher.layout or ("contiguous",) * number
        config = config.replace(teacher={"layout": known})
    return config


def restore(parts: Parts) -> bool:
    """Put a run back to its newest sound checkpoint; the configuration and data must be the same.
    Whether there was one.

    Raises CheckpointError where there were checkpoints and none is sound: a run never starts over
    unasked.
    """
    _check_config(parts)
    folder = _chosen(parts.out, parts.accelerator)
    if folder is None:
        _check_fresh(parts.out)
        say(f"{parts.out}: no checkpoint yet, starting from the beginning")
        _cut(parts, State())
        return False
    state = read_state(folder)
    _check_data(parts, state.fingerprint, state.targets)
    _check_teachers(parts, state.teachers)
    steps = parts.loader.steps_per_epoch
    if not state.epoch * steps < state.step <= (state.epoch + 1) * steps:
        raise CheckpointError(
            f"{folder}: update {state.step} is not in epoch {state.epoch + 1} of {steps} updates; "
            "give another --out to start from the beginning"
        )
    if (state.scaler is None) != (parts.accelerator.scaler is None):
        raise CheckpointError(
            f"{folder}: the scale of fp16 gradients is in only one of checkpoint and run; resume "
            "in the same precision"
        )
    student = parts.accelerator.unwrap_model(parts.student)
    parts.base = read_base(folder)
    read = reader_of(folder, parts.facts)
    weights = _finite(read(WEIGHTS), origin=folder / WEIGHTS)
    load_weights(student.network, weights, origin=str(folder / WEIGHTS))
    load_optimizer(folder / checkpoint.OPTIMIZER, parts.optimizer, student.network)
    if (folder / MASKS).is_file():
        parts.held = Held(read_masks(folder / MASKS), student.network)
    if parts.average is not None:
        weights = _finite(read(AVERAGE), origin=folder / AVERAGE)
        load_weights(parts.average.model.network, weights, origin=str(folder / AVERAGE))
        parts.average.updates.fill_(state.average_updates)
    if state.scaler is not None:
        parts.accelerator.scaler.load_state_dict(state.scaler)
    parts.state = state
    check_best(parts)
    _cut(parts, state)
    epochs = parts.config.optim.epochs
    say(
        f"{parts.out}: resuming after update {state.step} of {epochs * steps} "
        f"(epoch {state.epoch + 1} of {epochs})"
    )
    return True


def check_best(parts: Parts) -> None:
    """Where the best weights so far are gone, damaged or of another evaluation than the state
    knows, the next evaluation takes their place; in a finished run they are only told."""
    best = parts.out / checkpoint.BEST
    if in_main_process(parts.accelerator, lambda: int(_best_is_lost(parts)), best):
        parts.state.best = State().best  # in all processes: they decide alike what is better


def _best_is_lost(parts: Parts) -> bool:
    """Tell what is wrong with the best weights so far; whether they are to be forgotten."""
    best, known = parts.out / checkpoint.BEST, parts.state.best
    finished = checkpoint.result_of(parts.out) is not None
    if known["epoch"] == 0 and not finished:
        return False
    advice = "the next evaluation takes its place"
    if finished:
        advice = "the newest checkpoint is there still (--checkpoint last)"
    try:
        check_manifest(best)
        there = read_state(best)
    except (CheckpointError, EnvironmentFault) as error:
        if error.exit_code == EnvironmentFault.exit_code and not finished:
            raise  # it may well be sound
        warn(f"{error}; {advice}")
    else:
        if finished or there.best == known:
            return False
        # That of this very moment: the run ended between it and the next checkpoint.
        if there.step != parts.state.step:
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


def _cut(parts: Parts, state: State) -> None:
    """Drop the rows of the logs that the checkpoint does not know."""
    if parts.accelerator.is_main_process:
        journal.cut(parts.out / journal.METRICS, state.metrics_bytes)
        journal.cut(parts.out / journal.CHAIN, state.chain_bytes)
        journal.cut_steps(parts.out / journal.ANOMALIES, state.step)


def _chosen(out: Path, accelerator: Accelerator) -> Path | None:
    """The checkpoint to go on from, the same in all processes; damaged later ones are set aside.

    Raises CheckpointError where none is sound, EnvironmentFault where one cannot be read now.
    """

    def find() -> int:
        folder = checkpoint.newest(out)
        if folder is None:
            return 0
        step = checkpoint.step_of(folder)
        checkpoint.set_aside(out, after=step)
        return 1 + step

    step = in_main_process(accelerator, find, f"the checkpoints in {out}") - 1
    return None if step < 0 else checkpoint.folder_of(out, step)


def _check_fresh(out: Path) -> None:
    """Refuse a run that had checkpoints, and has none. Raises CheckpointError."""
    # One link of the chain may be of a first checkpoint that a kill kept from being there.
    several = len(journal.read(out / journal.CHAIN)) > 1 or bool(checkpoint.set_aside_in(out))
    if several or (out / checkpoint.BEST).is_dir() or journal.read(out / journal.METRICS):
        raise CheckpointError(
            f"{out}: its checkpoints are gone, so the run cannot go on; give another --out to "
            "start anew"
        )


def check_same_run(parts: Parts, finished: dict[str, Any]) -> None:
    """Hold the configuration and the data against those of a finished run. Raises ConfigError and
    DataError."""
    _check_config(parts)
    _check_data(parts, finished["fingerprint"], finished["targets"])
    _check_teachers(parts, finished.get("teachers", parts.state.teachers))


def _check_data(parts: Parts, fingerprint: str, targets: list[str]) -> None:
    if fingerprint != parts.splits.fingerprint:
        raise DataError(
            f"{parts.out}: the images differ from those the run started with (class names, pixels "
            "or labels; another version of Pillow may decode other pixels); resume with the same "
            "data (data.source, data.root), or start again in another --out"
        )
    if targets != parts.state.targets:
        raise DataError(
            f"{parts.out}: the stored targets differ from those the run started with; resume with "
            "the same teacher.targets, or start again in another --out"
        )


def _check_teachers(parts: Parts, before: list[str]) -> None:
    """Of a teacher that only its stored answers speak for, nothing is known here: "" then."""
    now = parts.state.teachers
    if len(before) != len(now) or any(a and b and a != b for a, b in zip(before, now)):
        raise DataError(
            f"{parts.out}: a teacher's weights differ from those the run started with; resume "
            "with the same teacher.source, or start again in another --out"
        )


def _check_config(parts: Parts) -> None:
    differences = []
    for section, values in to_dict(load(parts.out / checkpoint.CONFIG)).items():
        for leaf, value in values.items():
            current = getattr(getattr(parts.config, section), leaf)
            if current != value and f"{section}.{leaf}" not in RESUMABLE:
                differences.append(f"\n  {section}.{leaf}: {value!r} before, {current!r} now")
    if differences:
        ways = ["give the same one", "another --out"]
        if (parts.out / checkpoint.BEST).is_dir():
            ways.append(
                f"deit finetune --from {shlex.quote(str(parts.out))} to train its weights on"
            )
        raise ConfigError(
            f"--resume: the configuration differs from the run's; {', or '.join(ways)}:"
            + "".join(differences)
        )


_COMPUTING = ("torch", "torchvision", "timm", "accelerate", "numpy", "pillow")
"""Packages whose versions may change what is computed, pictures that are decoded among it."""


@dataclass(frozen=True)
class _Machine:
    """What deit.environment.describe says that a result depends on to the bit."""

    device_name: str | None = None
    processes: int | None = None
    threads: int | None = None
    precision: str | None = None
    packages: dict[str, str] = field(default_factory=dict)


def warn_of_another_machine(out: Path, now: dict[str, Any], config: Config) -> None:
    """Say where a run began on other ground: it goes on, but no longer to the bit.

    now: what deit.environment.describe returns.
    """
    path = out / checkpoint.ENVIRONMENT
    if not path.is_file():
        return
    try:
        before = read_typed(path, _Machine)
    except CheckpointError as error:
        warn(f"{error}; so whether it goes on to the bit is not known")
        return
    begun = as_begun(load(out / checkpoint.CONFIG), out)
    settings = {
        "optim.accumulate": (begun.optim.accumulate, config.optim.accumulate),
        "run.linear": (begun.run.linear, config.run.linear),
        "run.compile": (begun.run.compile, config.run.compile),
    }
    if max(before.processes or 1, now["processes"]) > 1:
        settings["run.shard"] = begun.run.shard, config.run.shard
    if config.loss.kind != "none":
        settings["teacher.layout"] = tuple(",".join(one.teacher.layout) for one in (begun, config))
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
