"""The commands about images, their views and a teacher's answers to them."""

import dataclasses
import shlex
from pathlib import Path

from deit.arguments import GOES_ON, TRAINS, TRAINS_NOT, parse_run, printed
from deit.config import DataConfig
from deit.console import say
from deit.errors import ConfigError
from deit.options import Parser, check_records, parse_shard
from deit.text import nearest


def scan(arguments: list[str], program: str) -> None:
    """Look at every image of a data set: what is there, what is bad, what lies there twice."""
    parser = Parser(
        prog=program,
        description="Decode every image of every split, and name what is beside them and is not "
        "read; exit code 3 if any image cannot be used.",
    )
    parser.add_argument("root", metavar="DATA", help="as data.root: the folder of the images")
    parser.add_argument("--source", choices=("folder", "shards", "reader"), default="folder")
    parser.add_argument("--reader", metavar="NAME", help="as data.reader")
    parser.add_argument("--download", action="store_true", help="as data.download")
    parser.add_argument("--quarantine", metavar="FILE", help="leave out the images listed here")
    parser.add_argument("--write", type=Path, metavar="FILE", help="list the bad images here")
    parser.add_argument("--force", action="store_true", help="let --json and --write replace files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all findings here")
    options = parser.parse_args(arguments)
    if (options.source == "reader") != (options.reader is not None):
        raise ConfigError("--source reader and --reader NAME go together")
    from deit.disk import check_file, write_json
    from deit.scan import print_scan, require_sound, scan, write_quarantine

    check_file(options.json, option="--json", replace=options.force)
    check_file(options.write, option="--write", replace=options.force)
    found = scan(
        DataConfig(
            source=options.source,
            root=options.root,
            reader=options.reader,
            download=options.download,
            quarantine=options.quarantine,
        )
    )
    print_scan(found)
    if options.write is not None:
        write_quarantine(options.write, found)
    if options.json is not None:
        write_json(options.json, dataclasses.asdict(found))
        say(f"wrote {options.json}")
    require_sound(found, options.write)


def views(arguments: list[str], program: str) -> None:
    """Draw what student and teacher see of the first views of an epoch."""
    parser = Parser(prog=program, add_help=False)
    parser.add_argument(
        "--out", type=Path, default=Path("views.png"), metavar="FILE.png", help="The picture."
    )
    parser.add_argument("--force", action="store_true", help="Let --out replace a file.")
    parser.add_argument("--epoch", type=int, default=0, metavar="N", help="Of which epoch.")
    parser.add_argument("--number", type=int, default=12, metavar="VIEWS", help="How many.")
    options, rest = parser.parse_known_args(arguments)
    run = parse_run(
        rest,
        program=program,
        about="Draw what student and teacher see of the first training views of an epoch, with "
        "labels, mixing weights and the teacher's answers.",
        own=parser,
        without=TRAINS_NOT,
        online=False,
    )
    if not 0 <= options.epoch < 2**32:
        raise ConfigError(f"--epoch {options.epoch}: should be in 0 ... 4294967295")
    if options.number < 1:
        raise ConfigError(f"--number {options.number}: should be at least 1")
    from deit.contact_sheet import check_picture, draw_views
    from deit.disk import check_file

    check_picture(options.out, option="--out")
    check_file(options.out, option="--out", replace=options.force)
    draw_views(run.config, options.out, epoch=options.epoch, number=options.number)


def targets(arguments: list[str], program: str) -> None:
    """Store a teacher's answers to every view, or verify a store of them."""
    actions = {"write": _write_targets, "verify": _verify_targets}
    if arguments and arguments[0] in actions:
        actions[arguments[0]](arguments[1:], f"{program} {arguments[0]}")
        return
    if {"-h", "--help"} & set(arguments[:1]):
        say(f"usage: {program} write RECIPE --out STORE [options]\n       {program} verify STORE")
        say("(each with --help tells more)")
        return
    found = f"{arguments[0]!r}{nearest(arguments[0], actions)}" if arguments else "nothing"
    raise ConfigError(f"{program}: should be followed by write or verify, not by {found}")


def _write_targets(arguments: list[str], program: str) -> None:
    parser = Parser(prog=program, add_help=False)
    parser.add_argument("--out", type=Path, metavar="STORE", help="The folder to write.")
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="Of how many epochs; none named: all of the run."
    )
    parser.add_argument(
        "--records",
        metavar="KIND",
        help="hard, full or top-K; none named: what the objective needs.",
    )
    parser.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="Part I of N, from 0, each written by a command of its own, at any time.",
    )
    parser.add_argument(
        "--only",
        type=int,
        metavar="N",
        help="Of several teachers the answers of one, counted from 1, to the views that all see.",
    )
    options, rest = parser.parse_known_args(arguments)
    run = parse_run(
        rest,
        program=program,
        about="Write the answers of a recipe's teachers to its training views into a store, for "
        "--teacher.targets. Interrupted, the same command goes on.",
        own=parser,
        without={**GOES_ON, "dry_run": TRAINS},
        online=False,
    )
    if printed(run):
        return
    records, shard = check_records(options.records), parse_shard(options.shard)
    if options.out is None:
        raise ConfigError(f"{program} {run.recipe}: needs --out STORE, the folder to write")
    if options.epochs is not None and not 0 < options.epochs < 2**32:
        raise ConfigError(f"--epochs {options.epochs}: should be at least 1")
    from deit.target_writer import write_targets

    complete = write_targets(
        run.config,
        options.out,
        epochs=options.epochs,
        records=records,
        shard=shard,
        only=options.only,
    )
    if complete:
        store = shlex.quote(str(options.out.resolve()))
        say(f"next: deit train {shlex.join(rest)} --teacher.targets {store}")


def _verify_targets(arguments: list[str], program: str) -> None:
    parser = Parser(
        prog=program,
        description="Read a store whole: its checksums, then a sample of its views, made anew from "
        "the data, and of its answers, asked of the teacher anew. Exit code 3 or 4 if one differs.",
    )
    parser.add_argument("store", type=Path, metavar="STORE", help="folder of the store")
    parser.add_argument("--root", metavar="DIR", help="where the images lie now")
    parser.add_argument("--teacher", metavar="A,B", help="where the teachers lie now; or none")
    parser.add_argument("--rows", type=int, default=2048, help="answers to ask anew (2048)")
    options = parser.parse_args(arguments)
    if options.rows < 1:
        raise ConfigError(f"--rows {options.rows}: should be at least 1")
    from deit.target_verifier import verify_targets

    verify_targets(options.store, root=options.root, teacher=options.teacher, rows=options.rows)
