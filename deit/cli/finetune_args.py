"""Parse the command line of fine-tuning: initial weights, schedule and configuration."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from deit.cli.common_options import is_help_requested
from deit.cli.grammar import ConfigCommand
from deit.cli.parser import Names, Parser
from deit.cli.run_args import RunArguments, given_epochs, parse_data, parse_run, run_name
from deit.config.command_choices import check_at_least
from deit.config.finetune_schedules import (
    DATA_SIZED_SCHEDULES,
    DEFAULT_SCHEDULE,
    FINETUNE_SCHEDULES,
    check_finetuning,
)
from deit.config.recipes import RECIPES
from deit.config.schema import Config
from deit.core import run_folder
from deit.core.errors import CheckpointError, ConfigError
from deit.core.json_io import load_json_as, translate_value_errors
from deit.core.run_folder import CONFIG
from deit.core.user_code import HUB_PREFIXES

_SCHEDULES = (*FINETUNE_SCHEDULES, *DATA_SIZED_SCHEDULES)
_NO_SOURCE = "{}: needs --from SOURCE, the initial weights (a run, a folder or a weight file)"


def _finetune_parser(program: str = "") -> Parser:
    """Return the parser of the options that are not fields of the configuration."""
    parser = Parser(prog=program, add_help=False)
    parser.add_argument(
        "--from",
        dest="source",
        metavar="SOURCE",
        help="Initial weights: a run folder, a timm folder, a weight file (.safetensors, .pth) or "
        "a timm name.",
    )
    parser.add_argument(
        "--resolution",
        type=int,
        metavar="PX",
        help="Side [px] of the student's input. Stored images, crop padding and the teachers' "
        "input are scaled with it. (default: that of the configuration)",
    )
    parser.add_argument(
        "--schedule",
        metavar=Names(_SCHEDULES),
        help=f"Training schedule: {', '.join(_SCHEDULES)}. (default: {DEFAULT_SCHEDULE} without "
        "RECIPE, else the recipe's)",
    )
    return parser


FINETUNE = ConfigCommand(
    "finetune",
    "Train from given weights. The network and its input normalization are those of SOURCE. "
    "Without RECIPE, the configuration is that of the run at SOURCE.",
    usage="[RECIPE] --from SOURCE",
    own_parser=_finetune_parser,
    help_overrides={
        "out": "Run folder. (default: checkpoints/RECIPE, or checkpoints/SOURCE-finetuned without "
        "RECIPE)"
    },
)


def parse_finetune(arguments: list[str], program: str) -> RunArguments:
    """Parse the command line of fine-tuning.

    The configuration is that of RECIPE; without RECIPE that of the run at --from; with --resume
    that of the run that is resumed. Raises ConfigError, and CheckpointError if --from does not
    exist or does not fit.
    """
    parser = _finetune_parser(program)
    options, rest = parser.parse_known_args(arguments)
    check_finetuning(schedule=options.schedule, resolution=None)
    if options.resolution is not None:
        check_at_least("resolution", options.resolution, 1)
    if "--resume" in rest and (folder := _resumable_dir(rest, options.source)) is not None:
        return _resume(rest, folder, options, program)
    out, schedule = None, options.schedule
    is_help = is_help_requested(arguments)
    config_from_run = not is_help and (not rest or rest[0].startswith("-"))
    if config_from_run:
        saved = _source_config(options.source, program, rest)
        rest = [str(saved), *rest]
        out = Path(f"checkpoints/{saved.resolve().parent.name}-finetuned")
        schedule = schedule or DEFAULT_SCHEDULE
    check_finetuning(schedule=schedule, resolution=options.resolution)
    data = parse_data(rest) if schedule in DATA_SIZED_SCHEDULES and not is_help else None

    def transform(config: Config) -> Config:
        source = options.source or config.init.weights
        if is_help:
            return config
        if source is None:
            raise ConfigError(_NO_SOURCE.format(program))
        _check_source(source)
        from deit.training.finetune import with_weights

        return with_weights(
            config,
            source,
            from_run=config_from_run,
            resolution=options.resolution,
            schedule=schedule,
            # parse_run sets the epochs where no schedule depends on them.
            epochs=given_epochs(rest) if schedule in FINETUNE_SCHEDULES else None,
            data=data or config.data,
        )

    return parse_run(
        rest, FINETUNE, program=program, own_parser=parser, transform=transform, out=out
    )


def _resumable_dir(rest: list[str], source: str | None) -> Path | None:
    """Return the folder of the run to resume; None if it has no checkpoint."""
    given = [rest[index + 1] for index, word in enumerate(rest[:-1]) if word == "--out"]
    given += [word.partition("=")[2] for word in rest if word.startswith("--out=")]
    if given:
        folder = Path(given[-1])
    elif rest and not rest[0].startswith("-"):
        folder = Path("checkpoints") / run_name(rest[0])
    else:
        folder = Path(f"checkpoints/{run_folder.run_dir_of(source or '').resolve().name}-finetuned")
    return folder if (folder / CONFIG).is_file() and run_folder.list_checkpoints(folder) else None


def _resume(
    rest: list[str], folder: Path, options: argparse.Namespace, program: str
) -> RunArguments:
    """Return the command line of a run to resume, by its own configuration: the weights that it
    started from may no longer exist."""
    from deit.training.finetune import check_same_start  # imports torch

    recipe = None if rest[0].startswith("-") else rest[0]
    rest = rest if recipe is None else rest[1:]
    saved = folder / "config.json"
    run = parse_run([str(saved), *rest], FINETUNE, program=program, out=folder)
    check_same_start(folder, run.config, options.source, options.resolution)
    _check_same_command(folder, recipe, options.schedule)
    return run


def _check_same_command(folder: Path, recipe: str | None, schedule: str | None) -> None:
    """Raise ConfigError if recipe or schedule differ from the command that started the run. The
    configuration of a run contains neither."""
    environment = folder / run_folder.ENVIRONMENT
    record = load_json_as(environment, dict[str, Any]) if environment.is_file() else {}
    command = record.get("command") or ""
    with translate_value_errors(environment):
        if not isinstance(command, str):
            raise TypeError(f"command is {command!r}")
        arguments = shlex.split(command)
        arguments = arguments[2:] if arguments[:1] == ["deit"] else arguments[1:]
        before, rest = _finetune_parser().parse_known_args(arguments)
    old_recipe = rest[0] if rest and not rest[0].startswith("-") else None
    options = (("RECIPE", old_recipe, recipe), ("--schedule", before.schedule, schedule))
    for option, old, new in options:
        if arguments and old != new:
            raise ConfigError(
                f"resume = True: the run in {folder} was started {_with(option, old)}, not "
                f"{_with(option, new)}; use the same, or another --out"
            )


def _with(option: str, value: str | None) -> str:
    return f"without {option}" if value is None else f"with {option} {value}"


def _source_config(source: str | None, program: str, rest: list[str]) -> Path:
    """Return the config.json of the run at --from, to use instead of a recipe. Raises
    ConfigError."""
    # The value of an option may have the same name as a recipe, as `--data.source digits`.
    is_option = [word.startswith("--") and "=" not in word for word in ["", *rest]]
    if late := [word for before, word in zip(is_option, rest) if word in RECIPES and not before]:
        raise ConfigError(f"{program}: RECIPE comes before the options; move {late[0]} there")
    if source is None:
        raise ConfigError(_NO_SOURCE.format(program))
    _check_source(source)
    folder = run_folder.run_dir_of(source)
    if not (folder / CONFIG).is_file() or not (folder / "best").is_dir():
        raise ConfigError(
            f"{program} --from {source}: is not a run folder, so data and schedule need a recipe: "
            f"{program} --from {source} RECIPE"
        )
    return folder / "config.json"


def _check_source(source: str) -> None:
    """Raise CheckpointError if the initial weights are a path that does not exist.

    A name without a slash can be that of a timm model, also with a dot.
    """
    path = Path(source).expanduser()
    if "/" in source and not source.startswith(HUB_PREFIXES) and not path.exists():
        raise CheckpointError(f"--from {source}: no such file or folder")
