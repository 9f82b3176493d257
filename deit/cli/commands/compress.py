"""Commands that quantize or prune a run, and compare its variants."""

import argparse
import re
from pathlib import Path

from deit.cli.parser import Parser, command_of, parse_controls, parse_numbers
from deit.cli.run_args import (
    ALWAYS_RESUMES,
    given_epochs,
    parse_run,
    print_config_if_requested,
)
from deit.config.command_choices import CALIBRATION_METHODS, QUANTIZATION_METHODS
from deit.config.finetune_schedules import FINETUNE_SCHEDULES, with_epochs
from deit.config.schema import Config
from deit.core import run_folder
from deit.core.errors import ConfigError, did_you_mean
from deit.deploy import prune_options

_PERCENTILE = 99.99


def quantize(arguments: list[str], program: str) -> None:
    """Quantize a run to int8 for ONNX Runtime on a CPU; keep it only if it stays accurate."""
    options = _quantize_parser(program).parse_args(arguments)
    range_method = _calibration_method(options)
    percentile = options.percentile or _PERCENTILE
    from deit.deploy.quantize import QuantizeOptions, quantize

    quantize(
        options.run,
        options.out,
        QuantizeOptions(
            method=options.method,
            images=options.calibration_images,
            range_method=range_method,
            percentile=percentile if range_method == "percentile" else None,
            attention=options.quantize_attention,
            exclude=options.exclude,
        ),
        max_drop=options.max_drop,
        sensitivity=options.sensitivity,
        checkpoint=options.checkpoint,
        root=options.root,
        json_file=options.json,
        force=options.force,
        command=command_of(program, arguments),
    )


def _quantize_parser(program: str) -> Parser:
    parser = Parser(
        prog=program,
        usage="%(prog)s RUN [OPTIONS]",
        description="Write the student of a finished run with weights and activations of 8 bits, "
        "for ONNX Runtime on a CPU. It is compared with the float student on the test images, and "
        "kept only if top-1 accuracy drops by at most --max-drop.",
    )
    parser.add_run()
    parser.add_checkpoint()
    parser.add_data_root()
    parser.add_argument(
        "--method",
        choices=QUANTIZATION_METHODS,
        default="static",
        help="static: activation ranges are calibrated on training images; dynamic: they are "
        "computed for each batch.",
    )
    _add_calibration_options(parser)
    parser.add_argument(
        "--quantize-attention",
        action="store_true",
        help="Also quantize the matrix products of attention (queries with keys, weights with "
        "values).",
    )
    parser.add_argument(
        "--exclude",
        metavar="REGEX",
        help="Layers to keep in float; the expression has to match the whole name.",
    )
    parser.add_argument(
        "--sensitivity",
        action="store_true",
        help="Also measure accuracy with each layer quantized alone.",
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="Largest drop of top-1 accuracy on the test images [percentage points].",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="Folder to write. (default: RUN/quantized-METHOD)"
    )
    parser.add_json()
    parser.add_force("--out", "--json")
    return parser


def _add_calibration_options(parser: Parser) -> None:
    """Add the options of the static method's calibration."""
    parser.add_argument(
        "--calibration-images",
        type=int,
        metavar="N",
        help="static: number of training images to calibrate on. (default: 128)",
    )
    parser.add_argument(
        "--calibration-method",
        choices=CALIBRATION_METHODS,
        help="static: how activation ranges are chosen. (default: minmax)",
    )
    parser.add_argument(
        "--percentile",
        type=float,
        metavar="P",
        help="Percentile of activations within the range, for --calibration-method percentile. "
        f"(default: {_PERCENTILE})",
    )


def _calibration_method(options: argparse.Namespace) -> str | None:
    """Check the options of quantize and return the calibration method: the given one, or percentile
    if --percentile is given, or None. Raises ConfigError."""
    calibration = {
        "--calibration-images": options.calibration_images,
        "--calibration-method": options.calibration_method,
        "--percentile": options.percentile,
    }
    given = [name for name, value in calibration.items() if value is not None]
    if options.method == "dynamic" and given:
        raise ConfigError(f"{given[0]}: --method dynamic does not calibrate; leave it out")
    if options.calibration_images is not None and options.calibration_images < 1:
        raise ConfigError(
            f"--calibration-images {options.calibration_images}: should be at least 1"
        )
    if options.percentile is not None and not 50 < options.percentile <= 100:
        raise ConfigError(f"--percentile {options.percentile:g}: should be above 50, at most 100")
    if not 0 <= options.max_drop <= 100:
        raise ConfigError(f"--max-drop {options.max_drop:g}: should be in 0 ... 100")
    default = None if options.percentile is None else "percentile"
    method = options.calibration_method or default
    if options.percentile is not None and method != "percentile":
        raise ConfigError(f"--percentile: needs --calibration-method percentile, not {method}")
    try:
        re.compile(options.exclude or "")
    except re.error as error:
        raise ConfigError(
            f"--exclude {options.exclude}: is not a regular expression ({error})"
        ) from None
    return method


def prune(arguments: list[str], program: str) -> None:
    """Remove attention heads and MLP hidden units from a run, and train the rest again."""
    parser = _prune_parser(program)
    options, rest = parser.parse_known_args(arguments)
    pruning = prune_options.prune_options(
        ratio=options.ratio,
        heads=options.heads,
        hidden=options.hidden,
        macs=options.macs,
        scope=options.scope,
        criterion=options.criterion,
        images=options.images,
    )
    controls = parse_controls(options.controls, prune_options.CONTROLS)
    _check_schedule(options.schedule)
    run = Path(rest[0]).expanduser() if rest and not rest[0].startswith("-") else None
    is_help = bool({"-h", "--help"} & set(rest))
    if run is None and not is_help:
        raise ConfigError(f"name a finished run first: {program} RUN --ratio 0.5 --out DIR")
    if run is not None:
        run_folder.require_run(run)
    recovery = parse_run(
        rest if run is None else [str(run / run_folder.CONFIG), *rest[1:]],
        program=program,
        usage="RUN",
        about="Remove the least important attention heads and MLP hidden units of a run, and train "
        "the rest again on the run's data with its teacher. Fields of the configuration apply to "
        "that training. Writes the runs `pruned`, `recovered` and the controls, results.json and "
        "results.md to --out. Run the same command again to resume.",
        command_parser=parser,
        help_overrides={
            "out": "Folder of all results. (default: checkpoints/RUN-pruned in the working "
            "directory)",
            "dry_run": "Print what would be kept and how it would be trained; write nothing.",
        },
        excluded={**ALWAYS_RESUMES, "force": "existing results are kept; use another --out"},
        transform=lambda config: (
            config if run is None else _recovery_config(config, options.schedule, rest)
        ),
        out=None if run is None else Path(f"checkpoints/{run.resolve().name}-pruned"),
    )
    if run is None or print_config_if_requested(recovery):
        return
    from deit.deploy.prune import prune

    prune(
        run,
        pruning,
        recovery.config,
        recovery.out,
        dry_run=recovery.dry_run,
        checkpoint=options.checkpoint,
        controls=controls,
        parallel=options.parallel,
        command=command_of(program, arguments),
    )


def _check_schedule(name: str) -> None:
    if name not in FINETUNE_SCHEDULES:
        known = ", ".join(FINETUNE_SCHEDULES)
        raise ConfigError(
            f"--schedule {name}: should be one of {known}{did_you_mean(name, FINETUNE_SCHEDULES)}"
        )


def _prune_parser(program: str) -> Parser:
    parser = Parser(prog=program, add_help=False)
    for option, text in (
        ("--ratio", "Fraction of all heads and hidden units to remove. (default: 0.5)"),
        ("--heads", "Fraction of the heads to remove, instead of --ratio."),
        ("--hidden", "Fraction of the hidden units to remove, instead of --ratio or with --heads."),
        ("--macs", "Fraction of the blocks' MACs to keep, instead of --ratio."),
    ):
        parser.add_argument(option, type=float, metavar="FRACTION", help=text)
    parser.add_argument(
        "--scope",
        default="global",
        metavar="NAME",
        help="global: rank heads and hidden units of all blocks together; layerwise: remove the "
        "same fraction of each block.",
    )
    parser.add_argument(
        "--criterion",
        default="taylor",
        metavar="NAME",
        help="Importance of a head or hidden unit. taylor: its effect on the loss of training "
        "views; magnitude: the size of its weights.",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=1024,
        metavar="N",
        help="Number of training views for --criterion taylor.",
    )
    parser.add_checkpoint()
    parser.add_argument(
        "--schedule",
        default="short",
        metavar="NAME",
        help=f"Schedule of the recovery training: {', '.join(_full_schedules())}.",
    )
    parser.add_argument(
        "--controls",
        default="none",
        metavar="A,B",
        help="Also train students of the same shape from random weights. short: as long as the "
        "recovery; long: as long as the run and the recovery together.",
    )
    parser.add_parallel()
    return parser


def _full_schedules() -> list[str]:
    """Return the names of the schedules that train all weights."""
    return [
        name
        for name, schedule in FINETUNE_SCHEDULES.items()
        if schedule(Config()).optim.trainable == "all"
    ]


def _recovery_config(config: Config, schedule: str, arguments: list[str]) -> Config:
    """Return a configuration with a schedule and the epochs of a command line. Raises ConfigError
    if it would not train all weights."""
    recovery = with_epochs(FINETUNE_SCHEDULES[schedule](config), given_epochs(arguments))
    if recovery.optim.trainable != "all":
        cause = f"--schedule {schedule}" if config.optim.trainable == "all" else "the run"
        raise ConfigError(
            f"{cause}: trains only {recovery.optim.trainable} (optim.trainable), but a pruned "
            "student needs all its weights trained; use a run and a schedule that train all"
        )
    return recovery


def variants(arguments: list[str], program: str) -> None:
    """Compare a run with its exported, quantized and pruned variants."""
    parser = Parser(
        prog=program,
        usage="%(prog)s RUN [RUN ...] [OPTIONS]",
        description="Compare a run with the ONNX and int8 files in its folder, its pruned students "
        "and other runs, on the same test images: accuracy, size, MACs and latency on this "
        "machine. Writes variants.json, variants.md and variants.png to RUN/variants.",
    )
    parser.add_run(many=True, text="The run, then other runs to compare it with.")
    parser.add_argument(
        "--merge-tokens",
        metavar="A,B",
        help="Numbers of tokens that each block merges; one more variant of the run for each.",
    )
    parser.add_data_root()
    parser.add_json()
    parser.add_force("RUN/variants", "--json")
    options = parser.parse_intermixed_args(arguments)
    merges = parse_numbers(options.merge_tokens, "--merge-tokens", whole=True, least=1)
    from deit.deploy.variants import variants

    variants(
        options.runs[0],
        options.runs[1:],
        merges=merges,
        root=options.root,
        json_file=options.json,
        force=options.force,
        command=command_of(program, arguments),
    )
