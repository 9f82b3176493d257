"""The commands that make a run smaller: int8, fewer parts, and the ladder of what there is."""

import argparse
import re
from pathlib import Path

from deit.cli.parser import Parser, command_of, parse_controls, parse_numbers
from deit.cli.run_args import GOES_ON, parse_run, print_config_if_asked, typed_epochs
from deit.config.choices import CALIBRATION_METHODS, QUANTIZATION_METHODS
from deit.config.finetune_schedules import FINETUNE_SCHEDULES, with_epochs
from deit.config.schema import Config
from deit.core import run_folder
from deit.core.errors import ConfigError, did_you_mean
from deit.deploy import prune_options


def quantize(arguments: list[str], program: str) -> None:
    """Write a run as int8 for ONNX Runtime on a CPU; kept only if it answers nearly as well."""
    options = _quantize_parser(program).parse_args(arguments)
    how = _check_quantize(options)
    from deit.deploy.quantize import QuantizeOptions, quantize

    quantize(
        options.run,
        options.out,
        QuantizeOptions(
            method=options.method,
            images=options.calibration_images,
            range_method=how,
            percentile=(options.percentile or 99.99) if how == "percentile" else None,
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
        description="Write a finished run's student with weights and activations of 8 bits, for "
        "ONNX Runtime on a CPU; measure it beside the float one on the test images, and keep it "
        "only if it answers nearly as well.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--method",
        choices=QUANTIZATION_METHODS,
        default="static",
        help="static (ranges of activations from training images) or dynamic (from every batch)",
    )
    parser.add_argument(
        "--calibration-images",
        type=int,
        metavar="N",
        help="static: number of training images (128)",
    )
    parser.add_argument(
        "--calibration-method",
        choices=CALIBRATION_METHODS,
        help="static: how ranges are chosen (minmax)",
    )
    parser.add_argument(
        "--percentile", type=float, metavar="P", help="of --calibration-method percentile (99.99)"
    )
    parser.add_argument(
        "--quantize-attention", action="store_true", help="the products within attention as well"
    )
    parser.add_argument("--exclude", metavar="REGEX", help="layers that stay float, by whole name")
    parser.add_argument("--sensitivity", action="store_true", help="measure each layer alone, too")
    parser.add_argument(
        "--max-drop",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="points of top-1 that may be lost (1.0)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder (RUN/quantized-METHOD)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--data.root", dest="root", metavar="DIR", help="images lie here now")
    parser.add_argument("--checkpoint", choices=run_folder.NAMES, default="best")
    parser.add_argument("--force", action="store_true", help="let --out and --json be replaced")
    return parser


def _check_quantize(options: argparse.Namespace) -> str | None:
    """The way of calibrating, given or meant; None: neither. Raises ConfigError where options are
    wrong, or do not go together."""
    given = {
        "--calibration-images": options.calibration_images,
        "--calibration-method": options.calibration_method,
        "--percentile": options.percentile,
    }
    named = [name for name, value in given.items() if value is not None]
    if options.method == "dynamic" and named:
        raise ConfigError(f"{named[0]}: --method dynamic looks at no training images")
    if options.calibration_images is not None and options.calibration_images < 1:
        raise ConfigError(
            f"--calibration-images {options.calibration_images}: should be at least 1"
        )
    if options.percentile is not None and not 50 < options.percentile <= 100:
        raise ConfigError(f"--percentile {options.percentile:g}: should be above 50, at most 100")
    if not 0 <= options.max_drop <= 100:
        raise ConfigError(f"--max-drop {options.max_drop:g}: should be in 0 ... 100")
    meant = None if options.percentile is None else "percentile"
    how = options.calibration_method or meant
    if options.percentile is not None and how != "percentile":
        raise ConfigError(
            f"--percentile: goes with --calibration-method percentile, not with {how}"
        )
    try:
        re.compile(options.exclude or "")
    except re.error as error:
        raise ConfigError(f"--exclude {options.exclude}: no regular expression ({error})") from None
    return how


def prune(arguments: list[str], program: str) -> None:
    """Cut attention heads and hidden units out of a run, and teach what is left once more."""
    parser = _prune_parser(program)
    options, rest = parser.parse_known_args(arguments)
    asked = prune_options.prune_options(
        ratio=options.ratio,
        heads=options.heads,
        hidden=options.hidden,
        macs=options.macs,
        scope=options.scope,
        criterion=options.criterion,
        images=options.images,
    )
    controls = parse_controls(options.controls, tuple(prune_options.CONTROLS))
    _check_schedule(options.schedule)
    run = Path(rest[0]).expanduser() if rest and not rest[0].startswith("-") else None
    helps = bool({"-h", "--help"} & set(rest))
    if run is None and not helps:
        raise ConfigError(f"name a finished run first: {program} RUN --ratio 0.5 --out DIR")
    if run is not None:
        run_folder.require_run(run)
    recovery = parse_run(
        rest if run is None else [str(run / run_folder.CONFIG), *rest[1:]],
        program=program,
        usage="RUN",
        about="Cut the attention heads and hidden units that are worth least to a run's own "
        "objective, and train what is left by its own data and teacher, by a schedule "
        "(--schedule), "
        "any field of which may be named. Into --out: pruned, recovered, the controls, "
        "results.json, results.md. The same command goes on.",
        command_parser=parser,
        help_overrides={
            "out": "Folder. None: checkpoints/RUN-pruned below the working directory.",
            "dry_run": "Tell what would stay, and how it would be trained; nothing is written.",
        },
        excluded={**GOES_ON, "force": "what is there is kept; give another --out"},
        adapt=lambda config: (
            config if run is None else _of_the_whole(config, options.schedule, rest)
        ),
        out=None if run is None else Path(f"checkpoints/{run.resolve().name}-pruned"),
    )
    if run is None or print_config_if_asked(recovery):
        return
    from deit.deploy.prune import prune

    prune(
        run,
        asked,
        recovery.config,
        recovery.out,
        dry_run=recovery.dry_run,
        name=options.checkpoint,
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
    for option, told in (
        ("--ratio", "Share of all heads and hidden units that goes. (default: 0.5)"),
        ("--heads", "Share of the heads that goes, apart from that of the hidden units."),
        ("--hidden", "Share of the hidden units that goes, apart from that of the heads."),
        ("--macs", "Instead: share of the blocks' arithmetic that stays."),
    ):
        parser.add_argument(option, type=float, metavar="SHARE", help=told)
    parser.add_argument(
        "--scope",
        default="global",
        help="global (all blocks ranked together) or layerwise (the same share of each).",
    )
    parser.add_argument(
        "--criterion",
        default="taylor",
        help="What a part is worth: taylor (to the loss of training views) or magnitude (of its "
        "weights).",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=1024,
        metavar="N",
        help="Training views for --criterion taylor.",
    )
    parser.add_argument(
        "--checkpoint", choices=run_folder.NAMES, default="best", help="Whose weights are cut."
    )
    parser.add_argument(
        "--schedule",
        default="short",
        metavar="NAME",
        help=f"Schedule of the recovery: {', '.join(_of_all())}. short: a third of the epochs.",
    )
    parser.add_argument(
        "--controls",
        default="none",
        metavar="A,B",
        help="Students of the same shape from random weights. short: trained as long as the "
        "recovery; long: as long as run and recovery together.",
    )
    parser.add_argument(
        "--parallel", type=int, default=1, metavar="N", help="Runs that share the machine."
    )
    return parser


def _of_all() -> list[str]:
    """The schedules that train all of a student."""
    return [
        name
        for name, tuned in FINETUNE_SCHEDULES.items()
        if tuned(Config()).optim.trainable == "all"
    ]


def _of_the_whole(config: Config, tuning: str, words: list[str]) -> Config:
    """A configuration by a schedule, in as many epochs as the words of a command line say. Raises
    ConfigError where that trains only a part."""
    tuned = with_epochs(FINETUNE_SCHEDULES[tuning](config), typed_epochs(words))
    if tuned.optim.trainable != "all":
        which = f"--schedule {tuning}" if config.optim.trainable == "all" else "the run"
        raise ConfigError(
            f"{which}: trains {tuned.optim.trainable} alone (optim.trainable), and what is left of "
            "a "
            "cut student has to learn as a whole; prune a run, by a schedule, that trains all"
        )
    return tuned


def variants(arguments: list[str], program: str) -> None:
    """A run beside everything smaller that was made of it: accuracy, bytes, arithmetic, time."""
    parser = Parser(
        prog=program,
        description="Measure a run, the ONNX and int8 files in its folder, what deit prune made of "
        "it, and other runs, on the same test images; times in turns on this machine. Into the "
        "folder RUN/variants: variants.json, variants.md, variants.png.",
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="a run, then others to stand beside it"
    )
    parser.add_argument(
        "--merge-tokens",
        metavar="A,B",
        help="also the run with so many tokens merged in each block",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--data.root", dest="root", metavar="DIR", help="images lie here now")
    parser.add_argument(
        "--force", action="store_true", help="replace RUN/variants and --json be replaced"
    )
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
