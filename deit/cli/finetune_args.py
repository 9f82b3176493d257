"""The command line of fine-tuning: what is started from, and whose configuration goes on."""

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from deit.cli.parser import Parser
from deit.cli.run_args import RunArguments, parse_data, parse_run, run_name, typed_epochs
from deit.config.data_section import DataConfig
from deit.config.finetune_schedules import (
    DATA_SIZED_SCHEDULES,
    FINETUNE_SCHEDULES,
    at_resolution,
    with_epochs,
    with_init,
)
from deit.config.recipes import RECIPES
from deit.config.schema import Config
from deit.config.student_section import StudentConfig
from deit.core import run_folder
from deit.core.errors import CheckpointError, ConfigError, did_you_mean
from deit.core.json_io import load_json_as, translate_value_errors
from deit.core.run_folder import CONFIG
from deit.core.user_code import HUB_PREFIXES

_SCHEDULES = (*FINETUNE_SCHEDULES, *DATA_SIZED_SCHEDULES)
_ABOUT = (
    "Train on from given weights, whose network and normalisation are taken over. Without RECIPE: "
    "by the configuration of the run at SOURCE."
)
_NO_START = "{}: needs --from, what to start from (a run, a folder or a weight file)"


def _start_parser(program: str = "") -> Parser:
    """The options of fine-tuning that are none of the configuration."""
    parser = Parser(prog=program, add_help=False)
    parser.add_argument(
        "--from",
        dest="source",
        metavar="SOURCE",
        help="What to start from: a run folder of ours, a timm folder, a weight file "
        "(.safetensors, .pth) or a timm name.",
    )
    parser.add_argument(
        "--resolution",
        type=int,
        metavar="PX",
        help="The student's; images, borders and the teachers' input follow.",
    )
    parser.add_argument(
        "--schedule",
        metavar="NAME",
        help=f"A schedule: {', '.join(_SCHEDULES)}; none named: short without RECIPE, else the "
        "recipe's own.",
    )
    return parser


def parse_finetune(arguments: list[str], program: str) -> RunArguments:
    """What a command line of fine-tuning says: without a recipe, the configuration of the run that
    is started from; with --resume, that of the run that goes on.

    Raises ConfigError, and CheckpointError where there is nothing to start from.
    """
    parser = _start_parser(program)
    options, rest = parser.parse_known_args(arguments)
    _check_options(options)
    if "--resume" in rest and (folder := _resumable_dir(rest, options.source)) is not None:
        return _resume(rest, folder, options, program)
    out, tuning = None, options.schedule
    helps = {"-h", "--help"} & set(arguments)
    config_from_run = not helps and (not rest or rest[0].startswith("-"))
    if config_from_run:
        own = _config_of(options.source, program, rest)
        rest, out = [str(own), *rest], Path(f"checkpoints/{own.resolve().parent.name}-finetuned")
        tuning = tuning or "short"

    if tuning in DATA_SIZED_SCHEDULES and options.resolution is not None:
        raise ConfigError(f"--resolution: is what --schedule {tuning} itself decides; leave it out")
    data = parse_data(rest) if tuning in DATA_SIZED_SCHEDULES and not helps else None

    def adapt(config: Config) -> Config:
        source = options.source or config.init.weights
        if helps:
            return config
        if source is None:
            raise ConfigError(_NO_START.format(program))
        from deit.models.load_weights import load_weights_from

        if config_from_run:  # what it did with the heads it began with is done
            config = config.replace(init={"head": "keep"})
        found = load_weights_from(source)
        config = with_init(config, source, found.student, heads_known=found.heads_known)
        if options.resolution is not None:
            _check_patches(options.resolution, config.student)
            config = at_resolution(config, options.resolution)
        if data is not None:
            return _sized(config, tuning, data)
        if tuning is None:
            return config
        return with_epochs(FINETUNE_SCHEDULES[tuning](config), typed_epochs(rest))

    return parse_run(
        rest,
        program=program,
        usage="[RECIPE] --from SOURCE",
        about=_ABOUT,
        command_parser=parser,
        help_overrides={
            "out": "Run folder. None: checkpoints/RECIPE, or SOURCE-finetuned without RECIPE."
        },
        adapt=adapt,
        out=out,
    )


def _check_options(options: argparse.Namespace) -> None:
    if options.schedule is not None and options.schedule not in _SCHEDULES:
        known = ", ".join(_SCHEDULES)
        raise ConfigError(
            f"--schedule {options.schedule}: should be one of {known}"
            f"{did_you_mean(options.schedule, _SCHEDULES)}"
        )
    if options.resolution is not None and options.resolution < 1:
        raise ConfigError(f"--resolution {options.resolution}: should be at least 1")


def _sized(config: Config, tuning: str, data: DataConfig) -> Config:
    """The configuration by a schedule that depends on the number of training images. data: which
    images the command line asks for."""
    from deit.datasets.splits import load_split

    config = replace(config, data=data)
    return DATA_SIZED_SCHEDULES[tuning](config, images=len(load_split(data, "train")[1].labels))


def _resumable_dir(rest: list[str], source: str | None) -> Path | None:
    """The folder of the run that a command line would resume; None where there is none yet."""
    named = [rest[place + 1] for place, word in enumerate(rest[:-1]) if word == "--out"]
    named += [word.partition("=")[2] for word in rest if word.startswith("--out=")]
    if named:
        folder = Path(named[-1])
    elif rest and not rest[0].startswith("-"):
        folder = Path("checkpoints") / run_name(rest[0])
    else:
        folder = Path(f"checkpoints/{_folder_of(source or '').resolve().name}-finetuned")
    return folder if (folder / CONFIG).is_file() and run_folder.list_checkpoints(folder) else None


def _resume(
    rest: list[str], folder: Path, options: argparse.Namespace, program: str
) -> RunArguments:
    """Resume a fine-tuning by its own configuration: what it started from may be gone."""
    recipe = None if rest[0].startswith("-") else rest[0]
    rest = rest if recipe is None else rest[1:]
    saved = folder / "config.json"
    run = parse_run([str(saved), *rest], program=program, about="", out=folder)
    side, start = run.config.student.image_size, run.config.init.weights
    if options.source is not None and not _same_source(options.source, start):
        raise ConfigError(
            f"--resume: the run in {folder} started from {start}, not from {options.source}; "
            f"give --from {start}, or another --out"
        )
    _check_same_command(folder, recipe, options.schedule)
    if options.resolution not in (None, side):
        raise ConfigError(
            f"--resume: the run in {folder} is at {side} px, not {options.resolution}; leave out "
            "--resolution, or give another --out"
        )
    return run


def _same_source(one: str, other: str | None) -> bool:
    if other is None:
        return False
    paths = [Path(source).expanduser() for source in (one, other)]
    return one == other or (paths[0].exists() and paths[0].resolve() == paths[1].resolve())


def _check_same_command(folder: Path, recipe: str | None, tuning: str | None) -> None:
    """Refuse a recipe or a schedule other than the command named that began the run: its
    configuration says neither. Raises ConfigError."""
    environment = folder / run_folder.ENVIRONMENT
    told = load_json_as(environment, dict[str, Any]) if environment.is_file() else {}
    command = told.get("command") or ""
    with translate_value_errors(environment):
        if not isinstance(command, str):
            raise TypeError(f"command is {command!r}")
        words = shlex.split(command)
        words = words[2:] if words[:1] == ["deit"] else words[1:]
        before, rest = _start_parser().parse_known_args(words)
    named = rest[0] if rest and not rest[0].startswith("-") else None
    for option, was, now in (("RECIPE", named, recipe), ("--schedule", before.schedule, tuning)):
        if words and was != now:
            raise ConfigError(
                f"--resume: the run in {folder} was begun {_with(option, was)}, not "
                f"{_with(option, now)}; give the same, or another --out"
            )


def _with(option: str, value: str | None) -> str:
    return f"without {option}" if value is None else f"with {option} {value}"


def _folder_of(source: str) -> Path:
    folder = Path(source).expanduser()
    return folder.parent if run_folder.is_checkpoint_dir(folder) else folder


def _check_patches(side: int, student: StudentConfig) -> None:
    """Refuse a resolution that the patches of the weights do not divide. Raises CheckpointError."""
    patch = student.patch_size
    if student.is_transformer and side % patch:
        below = side // patch * patch
        fitting = f"{below} or {below + patch}" if below else f"{patch}"
        raise CheckpointError(
            f"--resolution {side}: the weights have patches of {patch} px, which do not divide it; "
            f"try {fitting}"
        )


def _config_of(source: str | None, program: str, rest: list[str]) -> Path:
    """The config.json of the run to start from, which stands for a recipe. Raises ConfigError."""
    # A data source may be called as a recipe is: what follows an option is its value.
    takes = [word.startswith("--") and "=" not in word for word in ["", *rest]]
    if late := [word for before, word in zip(takes, rest) if word in RECIPES and not before]:
        raise ConfigError(f"{program}: RECIPE comes before its options; move {late[0]} there")
    if source is None:
        raise ConfigError(_NO_START.format(program))
    folder = Path(source).expanduser()
    if not (folder.exists() or source.startswith(HUB_PREFIXES)) and (
        "/" in source or folder.suffix
    ):
        raise CheckpointError(f"--from {source}: no such file or folder")
    folder = _folder_of(source)
    if not (folder / CONFIG).is_file() or not (folder / "best").is_dir():
        raise ConfigError(
            f"{program} --from {source}: is no run of ours, so name a recipe for data and "
            f"schedule: {program} --from {source} RECIPE"
        )
    return folder / "config.json"
