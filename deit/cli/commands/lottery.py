"""The commands that look for lottery tickets, and at the loss around what was found."""

from pathlib import Path

from deit.analysis import landscape_options
from deit.cli.parser import Parser, command_of, parse_controls, parse_numbers, parse_seeds
from deit.cli.run_args import GOES_ON, parse_run, print_config_if_asked, run_name
from deit.core import run_folder
from deit.core.errors import ConfigError
from deit.experiments import lottery_options


def lottery(arguments: list[str], program: str) -> None:
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
        command_parser=parser,
        help_overrides={
            "out": "Folder of the search. None: checkpoints/RECIPE-tickets below the working "
            "directory.",
            "dry_run": "List the runs; nothing is trained or written.",
        },
        excluded={**GOES_ON, "force": "what is there is kept; give another --out"},
        online=False,
        out=_tickets_of(rest),
    )
    if any(word.partition("=")[0] == "--run.seed" for word in rest):
        raise ConfigError(f"--run.seed {run.config.run.seed}: this command takes --seeds A,B")
    if print_config_if_asked(run):
        return
    asked = lottery_options.LotteryOptions(
        scope=options.scope,
        levels=options.rounds,
        rate=options.prune_rate,
        rewind=options.rewind_epoch,
        controls=parse_controls(options.controls, lottery_options.CONTROLS),
        at=parse_numbers(options.control_rounds, "--control-rounds", whole=True) or None,
        tolerance=options.tolerance,
    )
    lottery_options.check_asked(asked, run.config)
    seeds = parse_seeds(options.seeds)
    from deit.experiments.lottery import lottery

    lottery(
        asked,
        run.config,
        run.out,
        recipe=run.recipe,
        dry_run=run.dry_run,
        seeds=seeds,
        parallel=options.parallel,
        retries=options.retries,
        command=command_of(program, arguments),
    )


def _ticket_parser(program: str) -> Parser:
    parser = Parser(prog=program, add_help=False)
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="How often weights are pruned; not with --scope N:M. (default: 7)",
    )
    parser.add_argument(
        "--prune-rate",
        type=float,
        metavar="SHARE",
        help="Share of the weights left that each level takes, likewise. (default: 0.2)",
    )
    parser.add_argument(
        "--scope",
        default="global",
        help="Which weights are ranked together: global (all), layerwise (each layer gives the "
        "same share) or N:M (N of each M neighbours stay).",
    )
    parser.add_argument(
        "--rewind-epoch",
        type=float,
        metavar="EPOCHS",
        help="Where levels go back to; 0: the initial weights. (default: where warm-up ends)",
    )
    parser.add_argument(
        "--controls",
        default=",".join(lottery_options.CONTROLS),
        metavar="A,B,...",
        help="Or none. random: as many weights of each layer, drawn; re-initialised: the ticket's "
        "masks over other initial weights; one-shot: pruned once instead of level by level.",
    )
    parser.add_argument(
        "--control-rounds",
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
    parser.add_multi_run_options()
    return parser


def _tickets_of(words: list[str]) -> Path | None:
    """Where a search of a recipe lies if none is named: not where the recipe's own run does."""
    if not words or words[0].startswith("-"):
        return None
    return Path(f"checkpoints/{run_name(words[0])}-tickets")


def loss_landscape(arguments: list[str], program: str) -> None:
    """The loss around trained weights: lines, planes, curvature, volume; over levels of pruning."""
    parser = Parser(
        prog=program,
        description="Look at the loss around finished runs and between them, or around the levels "
        "of a search for tickets: lines and their barriers, planes, eigenvalues, trace and "
        "spectrum of the Hessian, volumes of basins. One page, with every chart and number.",
    )
    usual = landscape_options.LandscapeOptions()
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="runs, or a search")
    parser.add_argument(
        "--out", type=Path, default=Path("loss-landscape"), help="folder (loss-landscape)"
    )
    parser.add_argument(
        "--measure", default=",".join(usual.parts), help=f"of {', '.join(usual.parts)}"
    )
    kinds = ", ".join(landscape_options.KINDS)
    parser.add_argument("--kinds", default=",".join(usual.kinds), help=f"of a search: of {kinds}")
    parser.add_argument("--rounds", metavar="A,B", help="of a search (all); the dense run always")
    parser.add_argument("--run-seed", type=int, metavar="S", help="of a search (the first)")
    parser.add_argument("--checkpoint", choices=run_folder.NAMES, default=usual.checkpoint)
    parser.add_argument("--data.root", dest="root", metavar="DIR", help="images lie here now")
    parser.add_argument("--split", choices=landscape_options.SPLITS, default=usual.split)
    for name, told in (
        ("images", "whose loss it is, spread over the classes"),
        ("points", "of a line"),
        ("grid", "points along each axis of a plane"),
        ("num_eigenvalues", "largest eigenvalues"),
        ("steps", "of Lanczos at most, for these"),
        ("probes", "random vectors for the trace"),
        ("rays", "of a volume"),
        ("seed", "of everything that is drawn"),
    ):
        value = getattr(usual, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=value, help=f"{told} ({value})"
        )
    told = f"of a plane, in lengths of the filters ({usual.plane_extent:g})"
    parser.add_argument("--plane-extent", type=float, default=usual.plane_extent, help=told)
    told = f"of the loss [nats] up to the rim of a basin ({usual.loss_rise:g})"
    parser.add_argument("--loss-rise", type=float, default=usual.loss_rise, help=told)
    options = vars(parser.parse_args(arguments))
    runs, out, root = (options.pop(name) for name in ("runs", "out", "root"))
    asked = landscape_options.LandscapeOptions(
        **options
        | {
            "parts": _words(options.pop("measure")),
            "kinds": _words(options["kinds"]),
            "levels": _levels(options.pop("rounds")),
        }
    )
    landscape_options.check_asked(asked)
    from deit.analysis.landscape import landscape

    landscape(runs, out, asked, root=root, command=command_of(program, arguments))


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _levels(text: str | None) -> tuple[int, ...] | None:
    """`0,3,7` as levels; None for all. Raises ConfigError."""
    if text is None:
        return None
    words = _words(text)
    if not words or not all(word.isdecimal() for word in words):
        raise ConfigError(f"--rounds {text}: should be whole numbers from 0, with commas")
    return tuple(map(int, words))
