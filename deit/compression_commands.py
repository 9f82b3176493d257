"""The commands that make a student smaller, and look at what that does; as deit/commands.py."""

import argparse
import re
from pathlib import Path

from deit import checkpoint, landscape_options, prune_options, ticket_options
from deit.arguments import GOES_ON, parse_run, printed, run_name, typed_epochs
from deit.config import Config
from deit.errors import CheckpointError, ConfigError
from deit.options import Parser, parse_seeds, read_numbers
from deit.text import nearest
from deit.tuning import TUNING, in_epochs

# Names that options take, without importing what they name; tests hold them to that.
QUANTIZATIONS = ("static", "dynamic")
CALIBRATIONS = ("minmax", "entropy", "percentile")


def quantize(arguments: list[str], program: str) -> None:
    """Write a run as int8 for ONNX Runtime on a CPU; kept only if it answers nearly as well."""
    parser = Parser(
        prog=program,
        description="Write a finished run's student with weights and activations of 8 bits, for "
        "ONNX Runtime on a CPU; measure it beside the float one on the test images, and keep it "
        "only if it answers nearly as well.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--method",
        choices=QUANTIZATIONS,
        default="static",
        help="static (ranges of activations from training images) or dynamic (from every batch)",
    )
    parser.add_argument(
        "--calibration", type=int, metavar="N", help="static: training images to look at (128)"
    )
    parser.add_argument("--calibrate", choices=CALIBRATIONS, help="static: which ranges (minmax)")
    parser.add_argument(
        "--percentile", type=float, metavar="P", help="of --calibrate percentile (99.99)"
    )
    parser.add_argument(
        "--quantize_attention", action="store_true", help="the products within attention as well"
    )
    parser.add_argument("--exclude", metavar="REGEX", help="layers that stay float, by whole name")
    parser.add_argument("--sensitivity", action="store_true", help="measure each layer alone, too")
    parser.add_argument(
        "--max-drop",
        "--max_drop",
        dest="max_drop",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="points of top-1 that may be lost (1.0)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder (RUN/quantized-METHOD)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--data.root", dest="root", metavar="DIR", help="images lie here now")
    parser.add_argument("--checkpoint", choices=checkpoint.NAMES, default="best")
    parser.add_argument("--force", action="store_true", help="let --out and --json be replaced")
    options = parser.parse_args(arguments)
    how = _check_quantize(options)
    from deit.quantize import Plan, quantize

    quantize(
        options.run,
        options.out,
        Plan(
            method=options.method,
            images=options.calibration,
            how=how,
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
    )


def _check_quantize(options: argparse.Namespace) -> str | None:
    """The way of calibrating, given or meant; None: neither. Raises ConfigError where options are
    wrong, or do not go together."""
    given = {
        "--calibration": options.calibration,
        "--calibrate": options.calibrate,
        "--percentile": options.percentile,
    }
    named = [name for name, value in given.items() if value is not None]
    if options.method == "dynamic" and named:
        raise ConfigError(f"{named[0]}: --method dynamic looks at no training images")
    if options.calibration is not None and options.calibration < 1:
        raise ConfigError(f"--calibration {options.calibration}: should be at least 1")
    if options.percentile is not None and not 50 < options.percentile <= 100:
        raise ConfigError(f"--percentile {options.percentile:g}: should be above 50, at most 100")
    if not 0 <= options.max_drop <= 100:
        raise ConfigError(f"--max-drop {options.max_drop:g}: should be in 0 ... 100")
    meant = None if options.percentile is None else "percentile"
    how = options.calibrate or meant
    if options.percentile is not None and how != "percentile":
        raise ConfigError(f"--percentile: goes with --calibrate percentile, not with {how}")
    try:
        re.compile(options.exclude or "")
    except re.error as error:
        raise ConfigError(f"--exclude {options.exclude}: no regular expression ({error})") from None
    return how


def tickets(arguments: list[str], program: str) -> None:
    """Lottery tickets: prune a recipe level by level with rewinding, beside controls."""
    parser = _ticket_parser(program)
    options, rest = parser.parse_known_args(arguments)
    run = parse_run(
        rest,
        program=program,
        about="Train a recipe dense, then prune its smallest weights level by level: each level "
        "goes back to the weights, schedule, order and views of an early update of the dense run, "
        "and is trained from there. Into --out: results.csv, results.json, results.md, tickets.png "
        "and the runs. The same command goes on, also with more levels, controls or seeds.",
        own=parser,
        told={
            "out": "Folder of the search. None: checkpoints/RECIPE-tickets below the working "
            "directory.",
            "dry_run": "List the runs; nothing is trained or written.",
        },
        without=GOES_ON,
        online=False,
        out=_tickets_of(rest),
    )
    if any(word.partition("=")[0] == "--run.seed" for word in rest):
        raise ConfigError(f"--run.seed {run.config.run.seed}: this command takes --seeds A,B")
    if printed(run):
        return
    asked = ticket_options.Asked(
        scope=options.scope,
        levels=options.levels,
        rate=options.rate,
        rewind=options.rewind,
        controls=_controls(options.controls, ticket_options.CONTROLS),
        at=read_numbers(options.controls_at, "--controls_at", whole=True) or None,
        tolerance=options.tolerance,
    )
    ticket_options.check_asked(asked, run.config)
    seeds = parse_seeds(options.seeds)
    from deit.tickets import tickets

    tickets(
        asked,
        run,
        seeds=seeds,
        at_once=options.at_once,
        retries=options.retries,
        arguments=arguments,
    )


def _ticket_parser(program: str) -> Parser:
    parser = Parser(prog=program, add_help=False)
    parser.add_argument(
        "--levels", type=int, metavar="N", help="How often weights are pruned. (default: 7)"
    )
    parser.add_argument(
        "--rate",
        type=float,
        metavar="SHARE",
        help="Share of the weights left that each level takes. (default: 0.2)",
    )
    parser.add_argument(
        "--scope",
        default="global",
        help="Which weights are ranked together: global (all), layerwise (each layer gives the "
        "same share) or N:M (N of each M neighbours stay).",
    )
    parser.add_argument(
        "--rewind",
        type=float,
        metavar="EPOCHS",
        help="Where levels go back to; 0: the initial weights. (default: where warm-up ends)",
    )
    parser.add_argument(
        "--controls",
        default=",".join(ticket_options.CONTROLS),
        metavar="A,B,...",
        help="Or none. random: as many weights of each layer, drawn; re-initialised: the ticket's "
        "masks over other initial weights; one-shot: pruned once instead of level by level.",
    )
    parser.add_argument(
        "--controls_at",
        metavar="A,B,...",
        help="The levels that have controls. (default: all)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="How far below the dense run a ticket still matches it.",
    )
    parser.add_search()
    return parser


def _tickets_of(words: list[str]) -> Path | None:
    """Where a search of a recipe lies if none is named: not where the recipe's own run does."""
    if not words or words[0].startswith("-"):
        return None
    return Path(f"checkpoints/{run_name(words[0])}-tickets")


def _controls(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The named ones of the known controls, in their own order. Raises ConfigError."""
    named = [] if text == "none" else [name.strip() for name in text.split(",") if name.strip()]
    for name in named:
        if name not in known:
            raise ConfigError(
                f"--controls {name}: should be of {', '.join(known)}, or none{nearest(name, known)}"
            )
    return tuple(name for name in known if name in named)


def prune(arguments: list[str], program: str) -> None:
    """Cut attention heads and hidden units out of a run, and teach what is left once more."""
    parser = _prune_parser(program)
    options, rest = parser.parse_known_args(arguments)
    asked = prune_options.asked_of(
        ratio=options.ratio,
        heads=options.heads,
        hidden=options.hidden,
        macs=options.macs,
        scope=options.scope,
        score=options.score,
        images=options.images,
    )
    controls = _controls(options.controls, tuple(prune_options.CONTROLS))
    if options.tuning not in TUNING:
        known = ", ".join(TUNING)
        raise ConfigError(
            f"--tuning {options.tuning}: should be one of {known}{nearest(options.tuning, TUNING)}"
        )
    run = Path(rest[0]).expanduser() if rest and not rest[0].startswith("-") else None
    helps = bool({"-h", "--help"} & set(rest))
    if run is None and not helps:
        raise ConfigError(f"name a finished run first: {program} RUN --ratio 0.5 --out DIR")
    if run is not None and not (run / checkpoint.CONFIG).is_file():
        raise CheckpointError(f"{run}: no run folder (no {checkpoint.CONFIG})")
    recovery = parse_run(
        rest if run is None else [str(run / checkpoint.CONFIG), *rest[1:]],
        program=program,
        usage="RUN",
        about="Cut the attention heads and hidden units that are worth least to a run's own "
        "objective, and train what is left by its own data and teacher, by a schedule (--tuning), "
        "any field of which may be named. Into --out: pruned, recovered, the controls, "
        "results.json, results.md. The same command goes on.",
        own=parser,
        told={
            "out": "Folder. None: checkpoints/RUN-pruned below the working directory.",
            "dry_run": "Tell what would stay, and how it would be trained; nothing is written.",
        },
        without=GOES_ON,
        adapt=lambda config: config if helps else _of_the_whole(config, options.tuning, rest),
        out=None if run is None else Path(f"checkpoints/{run.resolve().name}-pruned"),
    )
    if run is None or printed(recovery):
        return
    from deit.prune import prune

    prune(
        run,
        asked,
        recovery,
        name=options.checkpoint,
        controls=controls,
        at_once=options.at_once,
        arguments=arguments,
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
        "--score",
        default="taylor",
        help="What a part is worth: taylor (to the loss of training views) or magnitude (of its "
        "weights).",
    )
    parser.add_argument(
        "--images", type=int, default=1024, metavar="N", help="Training views for --score taylor."
    )
    parser.add_argument(
        "--checkpoint", choices=checkpoint.NAMES, default="best", help="Whose weights are cut."
    )
    parser.add_argument(
        "--tuning",
        default="short",
        metavar="NAME",
        help=f"Schedule of the recovery: {', '.join(TUNING)}. short: a third of the run's epochs.",
    )
    parser.add_argument(
        "--controls",
        default="none",
        metavar="A,B",
        help="Students of the same shape from random weights. short: trained as long as the "
        "recovery; long: as long as run and recovery together.",
    )
    parser.add_argument(
        "--at_once", type=int, default=1, metavar="N", help="Runs that share the machine."
    )
    return parser


def _of_the_whole(config: Config, tuning: str, words: list[str]) -> Config:
    """A configuration by a schedule, in as many epochs as the words of a command line say. Raises
    ConfigError where that trains only a part."""
    tuned = in_epochs(TUNING[tuning](config), typed_epochs(words))
    if tuned.optim.trained != "all":
        which = f"--tuning {tuning}" if config.optim.trained == "all" else "the run"
        raise ConfigError(
            f"{which}: trains {tuned.optim.trained} alone (optim.trained), and what is left of a "
            "cut student has to learn as a whole; prune a run, by a schedule, that trains all"
        )
    return tuned


def landscape(arguments: list[str], program: str) -> None:
    """The loss around trained weights: lines, planes, curvature, volume; over levels of pruning."""
    parser = Parser(
        prog=program,
        description="Look at the loss around finished runs and between them, or around the levels "
        "of a search for tickets: lines and their barriers, planes, eigenvalues, trace and "
        "spectrum of the Hessian, volumes of basins. One page, with every chart and number.",
    )
    usual = landscape_options.Asked()
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="runs, or a search")
    parser.add_argument("--out", type=Path, default=Path("landscape"), help="folder (landscape)")
    parser.add_argument(
        "--only", default=",".join(usual.parts), help=f"of {', '.join(usual.parts)}"
    )
    kinds = ", ".join(landscape_options.KINDS)
    parser.add_argument("--kinds", default=",".join(usual.kinds), help=f"of a search: of {kinds}")
    parser.add_argument("--levels", metavar="A,B", help="of a search (all); the dense run always")
    parser.add_argument("--run_seed", type=int, metavar="S", help="of a search (the first)")
    parser.add_argument("--checkpoint", choices=checkpoint.NAMES, default=usual.checkpoint)
    parser.add_argument("--data.root", dest="root", metavar="DIR", help="images lie here now")
    parser.add_argument("--split", choices=landscape_options.SPLITS, default=usual.split)
    for name, told in (
        ("images", "whose loss it is, spread over the classes"),
        ("points", "of a line"),
        ("grid", "points along each axis of a plane"),
        ("top", "largest eigenvalues"),
        ("steps", "of Lanczos at most, for these"),
        ("probes", "random vectors for the trace"),
        ("rays", "of a volume"),
        ("seed", "of everything that is drawn"),
    ):
        value = getattr(usual, name)
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{told} ({value})")
    told = f"of a plane, in lengths of the filters ({usual.span:g})"
    parser.add_argument("--span", type=float, default=usual.span, help=told)
    told = f"of the loss [nats] up to the rim of a basin ({usual.rise:g})"
    parser.add_argument("--rise", type=float, default=usual.rise, help=told)
    options = vars(parser.parse_args(arguments))
    runs, out, root = (options.pop(name) for name in ("runs", "out", "root"))
    asked = landscape_options.Asked(
        **options
        | {
            "parts": _words(options.pop("only")),
            "kinds": _words(options["kinds"]),
            "levels": _levels(options["levels"]),
        }
    )
    landscape_options.check_asked(asked)
    from deit.landscape import landscape

    landscape(runs, out, asked, root=root, arguments=arguments)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _levels(text: str | None) -> tuple[int, ...] | None:
    """`0,3,7` as levels; None for all. Raises ConfigError."""
    if text is None:
        return None
    words = _words(text)
    if not words or not all(word.isdecimal() for word in words):
        raise ConfigError(f"--levels {text}: should be whole numbers from 0, with commas")
    return tuple(map(int, words))


def ladder(arguments: list[str], program: str) -> None:
    """A run beside everything smaller that was made of it: accuracy, bytes, arithmetic, time."""
    parser = Parser(
        prog=program,
        description="Measure a run, the ONNX and int8 files in its folder, what deit prune made of "
        "it, and other runs, on the same test images; times in turns on this machine. Into the "
        "run's folder ladder: ladder.json, ladder.md, ladder.png.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("more", type=Path, nargs="*", metavar="OTHER", help="other runs beside it")
    parser.add_argument(
        "--merge", metavar="A,B", help="also the run with so many tokens merged in each block"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--data.root", dest="root", metavar="DIR", help="images lie here now")
    parser.add_argument("--force", action="store_true", help="let --json replace a file")
    options = parser.parse_intermixed_args(arguments)
    merges = read_numbers(options.merge, "--merge", whole=True, least=1)
    from deit.ladder import ladder

    ladder(
        options.run,
        options.more,
        merges=merges,
        root=options.root,
        json_file=options.json,
        force=options.force,
        arguments=arguments,
    )
