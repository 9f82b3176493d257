"""Commands that quantize or prune a run, and compare its variants."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from deit.cli.common_options import is_help_requested
from deit.cli.grammar import ConfigCommand
from deit.cli.parser import Names, Parser, command_of, parse_controls, parse_numbers
from deit.cli.run_args import (
    ALWAYS_RESUMES,
    given_epochs,
    parse_run,
    print_config_if_requested,
)
from deit.config.command_choices import CALIBRATION_METHODS, QUANTIZATION_METHODS, check_choice
from deit.config.finetune_schedules import FINETUNE_SCHEDULES
from deit.config.input_paths import check_new_root
from deit.config.schema import Config
from deit.config.sparsity import SCOPES
from deit.core import run_folder
from deit.core.errors import ConfigError
from deit.deploy import prune_options, quantize_options
from deit.deploy.prune_options import PruneOptions
from deit.deploy.quantize_options import QuantizeOptions


def quantize(arguments: list[str], program: str) -> None:
    """Quantize a run to int8 for ONNX Runtime on a CPU; keep it only if it stays accurate."""
    options = _quantize_parser(program).parse_args(arguments)
    names = [field.name for field in dataclasses.fields(QuantizeOptions)]
    quantization = QuantizeOptions(**{name: getattr(options, name) for name in names})
    quantize_options.check_options(quantization)
    run_folder.require_run(run_folder.run_dir_of(options.run))
    check_new_root(options.root)
    from deit.deploy.quantize import quantize

    quantize(
        options.run,
        options.out,
        quantization,
        checkpoint=options.checkpoint,
        root=options.root,
        json_file=options.json,
        force=options.force,
        command=command_of(program, arguments),
    )


def _quantize_parser(program: str) -> Parser:
    parser = Parser(
        name="quantize",
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
        default=QuantizeOptions.method,
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
        default=QuantizeOptions.max_drop,
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
        help="static: number of training images to calibrate on. "
        f"(default: {quantize_options.CALIBRATION_IMAGES})",
    )
    parser.add_argument(
        "--calibration-method",
        choices=CALIBRATION_METHODS,
        help="static: how activation ranges are chosen. "
        f"(default: {quantize_options.CALIBRATION_METHOD})",
    )
    parser.add_argument(
        "--percentile",
        type=float,
        metavar="P",
        help="Percentile of activations within the range, for --calibration-method percentile. "
        f"(default: {quantize_options.PERCENTILE})",
    )


def _prune_parser(program: str) -> Parser:
    parser = Parser(prog=program, add_help=False)
    for option, text in (
        (
            "--ratio",
            "Fraction of all heads and hidden units to remove. "
            f"(default: {prune_options.DEFAULT_RATIO})",
        ),
        ("--heads", "Fraction of the heads to remove, instead of --ratio."),
        ("--hidden", "Fraction of the hidden units to remove, instead of --ratio or with --heads."),
        ("--macs", "Fraction of the blocks' MACs to keep, instead of --ratio."),
    ):
        parser.add_argument(option, type=float, metavar="FRACTION", help=text)
    parser.add_argument(
        "--scope",
        default=PruneOptions.scope,
        metavar=Names(SCOPES),
        help="global: rank heads and hidden units of all blocks together; layerwise: remove the "
        "same fraction of each block.",
    )
    parser.add_argument(
        "--criterion",
        default=PruneOptions.criterion,
        metavar=Names(prune_options.CRITERIA),
        help="Importance of a head or hidden unit. taylor: its effect on the loss of training "
        "views; magnitude: the size of its weights.",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=PruneOptions.images,
        metavar="N",
        help="Number of training views for --criterion taylor.",
    )
    parser.add_checkpoint()
    parser.add_argument(
        "--schedule",
        default=prune_options.SCHEDULE,
        metavar=Names(_full_schedules()),
        help=f"Schedule of the recovery training: {', '.join(_full_schedules())}.",
    )
    parser.add_argument(
        "--controls",
        default="none",
        metavar=Names((*prune_options.CONTROLS, "none"), many=True),
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


_PRUNE = ConfigCommand(
    "prune",
    "Remove the least important attention heads and MLP hidden units of a run, and train the rest "
    "again on the run's data with its teacher. Fields of the configuration apply to that training. "
    "Writes the runs `pruned`, `recovered` and the controls, results.json and results.md to --out. "
    "Run the same command again to resume.",
    usage="RUN",
    own_parser=_prune_parser,
    help_overrides={
        "out": "Folder of all results. (default: checkpoints/RUN-pruned in the working directory)",
        "dry_run": "Print what would be kept and how it would be trained; write nothing.",
    },
    excluded={**ALWAYS_RESUMES, "force": "existing results are kept; use another --out"},
)


def prune(arguments: list[str], program: str) -> None:
    """Remove attention heads and MLP hidden units from a run, and train the rest again."""
    parser = _prune_parser(program)
    options, rest = parser.parse_known_args(arguments)
    names = [field.name for field in dataclasses.fields(PruneOptions)]
    pruning = PruneOptions(**{name: getattr(options, name) for name in names})
    prune_options.check_options(pruning)
    controls = parse_controls(options.controls, prune_options.CONTROLS)
    check_choice("schedule", options.schedule, FINETUNE_SCHEDULES)
    run = Path(rest[0]).expanduser() if rest and not rest[0].startswith("-") else None
    if run is None and not is_help_requested(rest):
        raise ConfigError(f"name a finished run first: {program} RUN --ratio 0.5 --out DIR")
    if run is not None:
        run_folder.require_run(run)
    recovery = parse_run(
        rest if run is None else [str(run / run_folder.CONFIG), *rest[1:]],
        _PRUNE,
        program=program,
        own_parser=parser,
        transform=lambda config: (
            config
            if run is None
            else prune_options.recovery_config(
                config, schedule=options.schedule, epochs=given_epochs(rest)
            )
        ),
        out=None if run is None else Path(f"checkpoints/{run.resolve().name}-pruned"),
    )
    if run is None or print_config_if_requested(recovery):
        return
    from deit.deploy.prune import prune

    prune(
        run,
        recovery.out,
        pruning,
        recovery=recovery.config,
        checkpoint=options.checkpoint,
        controls=controls,
        parallel=options.parallel,
        dry_run=recovery.dry_run,
        command=command_of(program, arguments),
    )


def _variants_parser(program: str) -> Parser:
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
        metavar="N,...",
        help="Numbers of tokens that each block merges; one more variant of the run for each.",
    )
    parser.add_data_root()
    parser.add_json()
    parser.add_force("RUN/variants", "--json")
    return parser


def variants(arguments: list[str], program: str) -> None:
    """Compare a run with its exported, quantized and pruned variants."""
    options = _variants_parser(program).parse_intermixed_args(arguments)
    merges = parse_numbers(options.merge_tokens, "--merge-tokens", whole=True, least=1)
    for run in options.runs:
        run_folder.require_run(run_folder.run_dir_of(run))
    check_new_root(options.root)
    from deit.deploy.variants import variants

    variants(
        options.runs[0],
        options.runs[1:],
        merge_tokens=merges,
        root=options.root,
        json_file=options.json,
        force=options.force,
        command=command_of(program, arguments),
    )


PARSERS: dict[str, Callable[[str], Parser]] = {
    "quantize": _quantize_parser,
    "prune": _PRUNE.parser,
    "variants": _variants_parser,
}
"""The parsers of all options, by the words that select the command."""
