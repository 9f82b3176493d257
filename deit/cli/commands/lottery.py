"""Commands that find lottery tickets and measure the loss landscape of runs."""

import argparse
from collections.abc import Callable
from pathlib import Path

from deit.analysis import landscape_options
from deit.cli.grammar import ConfigCommand, option_of
from deit.cli.parser import (
    Names,
    Parser,
    command_of,
    parse_controls,
    parse_names,
    parse_numbers,
    parse_seeds,
)
from deit.cli.run_args import ALWAYS_RESUMES, parse_run, print_config_if_requested, run_name
from deit.config.input_paths import check_images, check_new_root
from deit.config.sparsity import SCOPES
from deit.core import run_folder
from deit.core.errors import ConfigError
from deit.experiments import lottery_options


def _lottery_parser(program: str) -> Parser:
    parser = Parser(prog=program, add_help=False)
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help=f"Number of pruning rounds; not with --scope N:M. (default: {lottery_options.ROUNDS})",
    )
    parser.add_argument(
        "--prune-rate",
        type=float,
        metavar="FRACTION",
        help="Fraction of the remaining weights that each round prunes; not with --scope N:M. "
        f"(default: {lottery_options.RATE})",
    )
    parser.add_argument(
        "--scope",
        default=lottery_options.LotteryOptions.scope,
        metavar=Names(SCOPES),
        help="Weights that are ranked together. global: those of all layers; layerwise: those of "
        "each layer; N:M: keep N of every M neighboring weights.",
    )
    parser.add_argument(
        "--rewind-epoch",
        type=float,
        metavar="EPOCHS",
        help="Epoch of the dense run to rewind to; 0: the initial weights. (default: the end of "
        "the warm-up)",
    )
    parser.add_argument(
        "--controls",
        default=",".join(lottery_options.CONTROLS),
        metavar=Names((*lottery_options.CONTROLS, "none"), many=True),
        help="Controls to train, or none. random: a random mask with the same density in each "
        "layer; reinitialized: the ticket's mask with new initial weights; one-shot: pruned once "
        "instead of in rounds.",
    )
    parser.add_argument(
        "--control-rounds",
        metavar="N,...",
        help="Rounds to train the controls for. (default: all)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=lottery_options.LotteryOptions.tolerance,
        metavar="POINTS",
        help="Largest drop of top-1 below the dense run at which a ticket counts as matching "
        "[percentage points].",
    )
    parser.add_multi_run_options()
    return parser


_LOTTERY = ConfigCommand(
    "lottery",
    "Train a recipe dense, then prune its smallest weights in rounds. Each round rewinds weights, "
    "schedule, order and views to an early step of the dense run and trains from there. Writes "
    "results.json, tables (results.md, results.tex, results.csv, points.csv), a plot and the runs "
    "to --out. Run the same command again to resume, also with more rounds, controls or seeds.",
    own_parser=_lottery_parser,
    help_overrides={
        "out": "Folder of all runs. (default: checkpoints/RECIPE-tickets in the working directory)",
        "dry_run": "List the runs; train and write nothing.",
    },
    excluded={**ALWAYS_RESUMES, "force": "existing results are kept; use another --out"},
)


def lottery(arguments: list[str], program: str) -> None:
    """Find lottery tickets: iterative magnitude pruning with rewinding, and controls."""
    parser = _lottery_parser(program)
    options, rest = parser.parse_known_args(arguments)
    run = parse_run(
        rest,
        _LOTTERY,
        program=program,
        own_parser=parser,
        live_teacher=False,
        out=_default_out(rest),
    )
    if any(argument.partition("=")[0] == "--run.seed" for argument in rest):
        raise ConfigError(f"--run.seed {run.config.run.seed}: use --seeds A,B instead")
    if print_config_if_requested(run):
        return
    control_rounds = parse_numbers(options.control_rounds, "--control-rounds", whole=True)
    search = lottery_options.LotteryOptions(
        scope=options.scope,
        rounds=options.rounds,
        prune_rate=options.prune_rate,
        rewind_epoch=options.rewind_epoch,
        controls=parse_controls(options.controls, lottery_options.CONTROLS),
        control_rounds=control_rounds or None,
        tolerance=options.tolerance,
    )
    lottery_options.check_options(search, run.config)
    seeds = parse_seeds(options.seeds)
    if not run.out.exists():  # finished runs do not need their images any longer
        check_images(run.config.data)
    from deit.experiments.lottery import lottery

    lottery(
        run.config,
        run.out,
        search,
        recipe=run.recipe,
        seeds=seeds,
        parallel=options.parallel,
        retries=options.retries,
        dry_run=run.dry_run,
        command=command_of(program, arguments),
    )


def _default_out(arguments: list[str]) -> Path | None:
    """Return the default folder for a recipe's tickets; None without a recipe."""
    if not arguments or arguments[0].startswith("-"):
        return None
    return Path(f"checkpoints/{run_name(arguments[0])}-tickets")


def loss_landscape(arguments: list[str], program: str) -> None:
    """Measure the loss around trained weights: lines, planes, curvature, basin volume."""
    options = vars(_landscape_parser(program).parse_args(arguments))
    runs, out, root = (options.pop(name) for name in ("runs", "out", "root"))
    options["measure"] = parse_names(options["measure"])
    options["kinds"] = parse_names(options["kinds"])
    options["rounds"] = _parse_rounds(options["rounds"])
    request = landscape_options.LandscapeOptions(**options)
    landscape_options.check_options(request)
    for run in runs:
        run_folder.require_folder(run)
    check_new_root(root)
    from deit.analysis.landscape import landscape

    landscape(runs, out, request, root=root, command=command_of(program, arguments))


def _landscape_parser(program: str) -> Parser:
    parser = Parser(
        name="loss-landscape",
        prog=program,
        usage="%(prog)s RUN [RUN ...] [OPTIONS]",
        description="Measure the loss around and between the weights of finished runs, or of the "
        "rounds of a lottery ticket search: along lines with their barriers, on planes; the "
        "eigenvalues, trace and spectral density of the Hessian; and basin volumes. Writes an HTML "
        "page with all charts and numbers to --out. Run the same command again to resume.",
    )
    defaults = landscape_options.LandscapeOptions()
    parser.add_run(many=True, text="Run folders, or one folder of `deit lottery`.")
    parser.add_argument(
        "--out", type=Path, default=Path("loss-landscape"), metavar="DIR", help="Folder to write."
    )
    parser.add_argument(
        "--measure",
        default=",".join(defaults.measure),
        metavar=Names(landscape_options.PARTS, many=True),
        help="Measurements to make.",
    )
    parser.add_checkpoint(default=defaults.checkpoint)
    parser.add_data_root()
    parser.add_argument(
        "--split",
        choices=landscape_options.SPLITS,
        default=defaults.split,
        help="Split of the images.",
    )

    def add_number(group: argparse._ActionsContainer, name: str, text: str) -> None:
        default = getattr(defaults, name)
        metavar = "N" if isinstance(default, int) else "X"
        group.add_argument(
            option_of(name), type=type(default), default=default, metavar=metavar, help=text
        )

    add_number(parser, "images", "Number of images to compute the loss on, stratified by class.")
    add_number(parser, "seed", "Seed of all random choices: images, directions, probes.")
    group = parser.add_argument_group("lines and planes")
    add_number(group, "points", "Points of a line.")
    add_number(group, "grid", "Points along each axis of a plane.")
    add_number(
        group, "plane_extent", "Extent of a plane from its center, relative to the filter norms."
    )
    group = parser.add_argument_group("curvature")
    add_number(group, "num_eigenvalues", "Number of largest eigenvalues of the Hessian.")
    add_number(group, "steps", "Largest number of Lanczos steps for the eigenvalues.")
    add_number(group, "probes", "Number of random vectors for the trace.")
    group = parser.add_argument_group("basin volume")
    add_number(group, "rays", "Number of random directions.")
    add_number(group, "loss_rise", "Rise of the loss [nats] at which a basin ends.")
    _add_lottery_options(parser)
    return parser


def _add_lottery_options(parser: Parser) -> None:
    """Add the options that select runs in a folder of `deit lottery`."""
    group = parser.add_argument_group("for a folder of deit lottery")
    group.add_argument(
        "--kinds",
        default=",".join(landscape_options.LandscapeOptions().kinds),
        metavar=Names(landscape_options.KINDS, many=True),
        help=f"Kinds of runs to measure in each round: {', '.join(landscape_options.KINDS)}.",
    )
    group.add_argument(
        "--rounds",
        metavar="N,...",
        help="Rounds to measure in addition to the dense run. (default: all)",
    )
    group.add_argument(
        "--run-seed",
        type=int,
        metavar="N",
        help="Seed of the runs to measure. (default: the first)",
    )


def _parse_rounds(text: str | None) -> tuple[int, ...] | None:
    """Return `0,3,7` as rounds; None for all. Raises ConfigError."""
    if text is None:
        return None
    rounds = parse_names(text)
    if not rounds or not all(part.isdecimal() for part in rounds):
        raise ConfigError(f"--rounds {text}: should be integers of at least 0, separated by commas")
    return tuple(map(int, rounds))


PARSERS: dict[str, Callable[[str], Parser]] = {
    "lottery": _LOTTERY.parser,
    "loss-landscape": _landscape_parser,
}
"""The parsers of all options, by the words that select the command."""
