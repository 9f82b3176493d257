"""Train and fine-tune from Python: the functions of the library, with a Run as their result."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

from deit.api.run import Run
from deit.config.arguments import checks_types
from deit.config.command_choices import check_path
from deit.config.recipes import recipe
from deit.config.schema import Config
from deit.core.console import obeys_verbose
from deit.training import finetune as training_finetune
from deit.training import train as training_train
from deit.training.epochs import EpochCallback


@checks_types
@obeys_verbose
def train(
    config: Config | str | PathLike,
    out: str | PathLike,
    *,
    resume: bool = False,
    callbacks: Sequence[EpochCallback] = (),
    verbose: bool = True,
    command: str = "",
) -> Run:
    """Train a student or a teacher, and return the finished run.

    config: a configuration, or the name of a recipe. out: the run folder; it must not hold a run,
    unless `resume` is set. resume: continue the run in the folder from its latest checkpoint, or
    begin it if there is none; a finished run is returned as it is. callbacks: functions called
    after each epoch with a dict of its metrics, a row of metrics.jsonl; in the main process only.
    An error in a callback ends the training, which can be resumed. verbose: show messages and
    progress; warnings are always shown. command: recorded in the run.

    Ctrl-C, or a notebook's stop button, saves a checkpoint and raises KeyboardInterrupt. A process
    trains one run at a time, because torch's random numbers are shared: SystemFault in a thread or
    a callback while another training runs. `compare` and `sweep` train in processes of their own.
    Raises the errors of `deit.errors`; what can be checked is checked before the first step.

    Example:
        >>> losses = []
        >>> config = recipe("digits-teacher", optim={"epochs": 3})
        >>> run = train(config, "runs/teacher", verbose=False,
        ...             callbacks=[lambda row: losses.append(row["train"]["loss"])])
        >>> len(losses), len(run.metrics)
        (3, 3)
    """
    config = config if isinstance(config, Config) else recipe(config)
    out = check_path("out", out)
    training_train.train(config, out, resume=resume, callbacks=callbacks, command=command)
    return Run(out)


@checks_types
@obeys_verbose
def dry_run(
    config: Config | str | PathLike,
    out: str | PathLike = "dry-run",
    *,
    resume: bool = False,
    verbose: bool = True,
) -> dict[str, Any]:
    """Make one training step and one evaluation step of a configuration, and write nothing.

    Returns epoch, step and other counts after the step. out: the folder that `train` would write,
    for messages. resume, verbose, and what is raised: as for `train`; also NumericsError if the
    loss is not finite.
    """
    config = config if isinstance(config, Config) else recipe(config)
    return training_train.train(config, check_path("out", out), resume=resume, dry_run=True)


@checks_types
@obeys_verbose
def finetune(
    source: str | PathLike,
    out: str | PathLike,
    config: Config | str | PathLike | None = None,
    *,
    resolution: int | None = None,
    schedule: str | None = None,
    epochs: int | None = None,
    resume: bool = False,
    callbacks: Sequence[EpochCallback] = (),
    verbose: bool = True,
    command: str = "",
    **sections: dict[str, Any],
) -> Run:
    """Train from given weights, and return the finished run.

    source: a run, a timm folder, a weight file or a timm name. config: data and training, or the
    name of a recipe; default: those of the run at `source`. resolution: side [px] of the input;
    images and the teachers' input are scaled with it. schedule: such as short, deit or
    linear-probe; default: short without a config. epochs: at least 1, instead of the schedule's.
    sections: fields by section that replace those of the
    resulting configuration, such as teacher={"source": "runs/teacher-16"}. The others, and what is
    raised: as for `train`.

    Example:
        >>> run = finetune("checkpoints/digits", "runs/digits-16", resolution=16, epochs=1,
        ...                verbose=False)
        >>> run.config.student.image_size
        16
    """
    source, out = check_path("source", source), check_path("out", out)
    config = config if config is None or isinstance(config, Config) else recipe(config)
    training_finetune.finetune(
        source,
        out,
        config,
        resolution=resolution,
        schedule=schedule,
        epochs=epochs,
        resume=resume,
        callbacks=callbacks,
        command=command,
        changes=sections,
    )
    return Run(out)
