"""Fine-tune a run or pretrained weights: the configuration, and the training."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deit.config.finetune_schedules import (
    DATA_SIZED_SCHEDULES,
    DEFAULT_SCHEDULE,
    FINETUNE_SCHEDULES,
    at_resolution,
    check_finetuning,
    with_epochs,
    with_init,
)
from deit.config.recipes import with_changes
from deit.config.schema import Config
from deit.config.sections.data import DataConfig
from deit.config.sections.student import StudentConfig
from deit.config.validation import load_config
from deit.core import run_folder
from deit.core.console import count_noun
from deit.core.errors import CheckpointError, ConfigError
from deit.datasets.splits import load_split
from deit.models.load_weights import load_weights_from
from deit.models.registry import is_published_name
from deit.training.epochs import EpochCallback
from deit.training.train import train


def finetune(
    source: str | Path,
    out: str | Path,
    config: Config | None = None,
    *,
    resolution: int | None = None,
    schedule: str | None = None,
    epochs: int | None = None,
    resume: bool = False,
    dry_run: bool = False,
    callbacks: Sequence[EpochCallback] = (),
    command: str = "",
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train from given weights; return the content of result.json.

    source, config, resolution, schedule, epochs: as for `finetune_config`. changes: fields by
    section that replace those of the resulting configuration. out, resume, dry_run, callbacks,
    command: as for deit.training.train.train. A run whose source was removed can be resumed without
    `config` and `schedule`, which cannot be compared then. Raises the errors of deit.core.errors.

    Example:
        >>> from deit.core.console import quiet
        >>> with quiet():
        ...     result = finetune("checkpoints/digits", "runs/digits-16", resolution=16, epochs=1)
        >>> result["epochs"]
        1
    """
    source, out = str(source), Path(out)
    if resume and run_folder.list_checkpoints(out) and _was_removed(source):
        if config is not None or schedule is not None:
            raise ConfigError(
                f"source = {source}: no longer exists, so config and schedule cannot be compared "
                f"with those of the run in {out}; resume it without them"
            )
        config = load_config(out / run_folder.CONFIG)
        check_same_start(out, config, source, resolution, epochs)
    else:
        config = finetune_config(
            source, config, resolution=resolution, schedule=schedule, epochs=epochs
        )
    if changes:
        config = with_changes(config, changes)
    return train(config, out, resume=resume, dry_run=dry_run, callbacks=callbacks, command=command)


def _was_removed(source: str) -> bool:
    """Return whether a source of weights is a path that does not exist."""
    return not is_published_name(source) and not Path(source).expanduser().exists()


def check_same_start(
    out: Path, config: Config, source: str | None, resolution: int | None, epochs: int | None = None
) -> None:
    """Raise ConfigError if a run to resume was started with other arguments.

    config: that of the run in `out`. source, resolution, epochs: as given now; None: not given.
    """
    weights = config.init.weights
    if source is not None and weights is None:
        raise ConfigError(
            f"source = {source}: the run in {out} started from random weights, so it is no "
            "fine-tuning; resume it with its own command, or use another folder (--out)"
        )
    if source is not None and not _is_same_source(source, weights):
        raise ConfigError(
            f"source = {source}: the run in {out} started from {weights}; resume it with that, or "
            "use another folder (--out)"
        )
    if resolution not in (None, config.student.image_size):
        raise ConfigError(
            f"resolution = {resolution}: the run in {out} has a resolution of "
            f"{config.student.image_size} px; leave it out, or use another folder (--out)"
        )
    if epochs not in (None, config.optim.epochs):
        raise ConfigError(
            f"epochs = {epochs}: the run in {out} has {count_noun(config.optim.epochs, 'epoch')}; "
            "leave it out, or use another folder (--out)"
        )


def _is_same_source(a: str, b: str) -> bool:
    """Return whether two names of weights are equal, or paths to the same place."""
    return a == b or os.path.realpath(Path(a).expanduser()) == os.path.realpath(
        Path(b).expanduser()
    )


def finetune_config(
    source: str | Path,
    config: Config | None = None,
    *,
    resolution: int | None = None,
    schedule: str | None = None,
    epochs: int | None = None,
) -> Config:
    """Return the configuration of a training that starts from given weights.

    source: a run folder, a timm folder, a weight file or a timm name. config: data and training;
    its student gets the network of the weights. Default: that of the run at `source`. resolution:
    side [px] of the student's input; images and the teachers' input are scaled with it. schedule: a
    key of FINETUNE_SCHEDULES or DATA_SIZED_SCHEDULES. Default: DEFAULT_SCHEDULE without a `config`,
    otherwise that of `config`. epochs: instead of the schedule's.

    Raises ConfigError, and CheckpointError if the weights do not exist or do not fit.
    """
    from_run = config is None
    if config is None:
        folder = run_folder.run_dir_of(source)
        run_folder.require_run(folder)
        config, schedule = load_config(folder / run_folder.CONFIG), schedule or DEFAULT_SCHEDULE
    return with_weights(
        config,
        str(source),
        from_run=from_run,
        resolution=resolution,
        schedule=schedule,
        epochs=epochs,
        data=config.data,
    )


def with_weights(
    config: Config,
    source: str,
    *,
    from_run: bool,
    resolution: int | None,
    schedule: str | None,
    epochs: int | None,
    data: DataConfig,
) -> Config:
    """Return a configuration with given weights, their network, a resolution and a schedule.

    from_run: whether the configuration is that of the run at `source`. data: to count the training
    images of, for DATA_SIZED_SCHEDULES. The others are as for `finetune_config`.
    """
    check_finetuning(schedule=schedule, resolution=resolution, epochs=epochs)
    if from_run:  # init.head was for the weights which that run started from
        config = config.replace(init={"head": "keep"})
    loaded = load_weights_from(source)
    config = with_init(config, source, loaded.student, heads_known=loaded.heads_known)
    if resolution is not None:
        _check_patches(resolution, config.student)
        config = at_resolution(config, resolution)
    if schedule in DATA_SIZED_SCHEDULES:
        config = replace(config, data=data)
        num_images = len(load_split(data, "train")[1].labels)
        config = DATA_SIZED_SCHEDULES[schedule](config, images=num_images)
    elif schedule is not None:
        config = FINETUNE_SCHEDULES[schedule](config)
    return with_epochs(config, epochs)


def _check_patches(resolution: int, student: StudentConfig) -> None:
    """Raise CheckpointError if the patches of the weights do not divide the resolution."""
    patch = student.patch_size
    if student.is_transformer and resolution % patch:
        below = resolution // patch * patch
        multiples = f"{below} or {below + patch}" if below else f"{patch}"
        raise CheckpointError(
            f"resolution = {resolution}: is not a multiple of the patch size of the weights "
            f"({patch} px); try {multiples}"
        )
