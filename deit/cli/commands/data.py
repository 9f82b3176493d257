"""The commands about images, their views and a teacher's answers to them."""

import dataclasses
import shlex
from pathlib import Path

from deit.cli.parser import Parser, check_content, parse_part
from deit.cli.run_args import GOES_ON, TRAINS, TRAINS_NOT, parse_run, print_config_if_asked
from deit.config.data_section import DataConfig
from deit.core.console import info
from deit.core.errors import ConfigError, did_you_mean


def check_data(arguments: list[str], program: str) -> None:
    """Decode every image of a dataset: list unreadable files, duplicates, sizes and formats."""
    parser = Parser(
        prog=program,
        description="Decode every image of every split and list the files that are not read. Exit "
        "code "
        "3 if any image is unusable.",
    )
    parser.add_argument("root", metavar="DATA", help="as data.root: the folder of the images")
    parser.add_argument("--source", choices=("folder", "shards", "reader"), default="folder")
    parser.add_argument("--reader", metavar="NAME", help="as data.reader")
    parser.add_argument("--download", action="store_true", help="as data.download")
    parser.add_argument("--exclude-list", metavar="FILE", help="as data.exclude_list")
    parser.add_argument(
        "--write-exclude-list", type=Path, metavar="FILE", help="write the unusable images here"
    )
    parser.add_argument("--force", action="store_true", help="replace existing files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all findings here")
    options = parser.parse_args(arguments)
    if (options.source == "reader") != (options.reader is not None):
        raise ConfigError("--source reader and --reader NAME go together")
    from deit.analysis.dataset_scan import print_scan, raise_if_unreadable, scan, write_exclude_list
    from deit.core.filesystem import check_file, write_json

    check_file(options.json, option="--json", replace=options.force)
    check_file(options.write_exclude_list, option="--write-exclude-list", replace=options.force)
    found = scan(
        DataConfig(
            source=options.source,
            root=options.root,
            reader=options.reader,
            download=options.download,
            exclude_list=options.exclude_list,
        )
    )
    print_scan(found)
    if options.write_exclude_list is not None:
        write_exclude_list(options.write_exclude_list, found)
    if options.json is not None:
        write_json(options.json, dataclasses.asdict(found))
        info(f"wrote {options.json}")
    raise_if_unreadable(found, options.write_exclude_list)


def show_views(arguments: list[str], program: str) -> None:
    """Draw what student and teacher see of the first views of an epoch."""
    parser = Parser(prog=program, add_help=False)
    parser.add_argument(
        "--out", type=Path, default=Path("views.png"), metavar="FILE.png", help="The picture."
    )
    parser.add_argument("--force", action="store_true", help="Let --out replace a file.")
    parser.add_argument("--epoch", type=int, default=0, metavar="N", help="Of which epoch.")
    parser.add_argument("--num-views", type=int, default=12, metavar="VIEWS", help="How many.")
    options, rest = parser.parse_known_args(arguments)
    run = parse_run(
        rest,
        program=program,
        about="Draw what student and teacher see of the first training views of an epoch, with "
        "labels, mixing weights and the teacher's answers.",
        command_parser=parser,
        excluded=TRAINS_NOT,
        online=False,
    )
    if not 0 <= options.epoch < 2**32:
        raise ConfigError(f"--epoch {options.epoch}: should be in 0 ... 4294967295")
    if options.num_views < 1:
        raise ConfigError(f"--num-views {options.num_views}: should be at least 1")
    from deit.analysis.view_sheet import check_image_path, draw_view_sheet
    from deit.core.filesystem import check_file

    check_image_path(options.out, option="--out")
    check_file(options.out, option="--out", replace=options.force)
    draw_view_sheet(run.config, options.out, epoch=options.epoch, number=options.num_views)


def targets(arguments: list[str], program: str) -> None:
    """Store a teacher's answers to every view, or verify a store of them."""
    actions = {"write": _write_targets, "verify": _verify_targets}
    if arguments and arguments[0] in actions:
        actions[arguments[0]](arguments[1:], f"{program} {arguments[0]}")
        return
    if {"-h", "--help"} & set(arguments[:1]):
        info(f"usage: {program} write RECIPE --out STORE [options]\n       {program} verify STORE")
        info("(each with --help tells more)")
        return
    found = f"{arguments[0]!r}{did_you_mean(arguments[0], actions)}" if arguments else "nothing"
    raise ConfigError(f"{program}: should be followed by write or verify, not by {found}")


def _write_targets(arguments: list[str], program: str) -> None:
    parser = Parser(prog=program, add_help=False)
    parser.add_argument("--out", type=Path, metavar="STORE", help="The folder to write.")
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="Epochs to write. (default: all epochs of the run)"
    )
    parser.add_argument(
        "--content",
        metavar="KIND",
        help="hard, full or top-K. (default: what the loss needs)",
    )
    parser.add_argument(
        "--part",
        default="0/1",
        metavar="I/N",
        help="Part I (from 0) of N; each part is written by its own command.",
    )
    parser.add_argument(
        "--teacher-index",
        type=int,
        metavar="N",
        help="Write the outputs of the Nth teacher only (1-based).",
    )
    options, rest = parser.parse_known_args(arguments)
    run = parse_run(
        rest,
        program=program,
        about="Write the answers of a recipe's teachers to its training views into a store, for "
        "--teacher.target_stores. Interrupted, the same command goes on.",
        command_parser=parser,
        excluded={**GOES_ON, "dry_run": TRAINS},
        online=False,
    )
    if print_config_if_asked(run):
        return
    records, part = check_content(options.content), parse_part(options.part)
    if options.out is None:
        raise ConfigError(f"{program} {run.recipe}: needs --out STORE, the folder to write")
    if options.epochs is not None and not 0 < options.epochs < 2**32:
        raise ConfigError(f"--epochs {options.epochs}: should be at least 1")
    from deit.distill.write_targets import write_targets

    complete = write_targets(
        run.config,
        options.out,
        epochs=options.epochs,
        content=records,
        part=part,
        teacher_index=options.teacher_index,
    )
    if complete:
        store = shlex.quote(str(options.out.resolve()))
        info(f"next: deit train {shlex.join(rest)} --teacher.target_stores {store}")


def _verify_targets(arguments: list[str], program: str) -> None:
    parser = Parser(
        prog=program,
        description="Read a store whole: its checksums, then a sample of its views, made anew from "
        "the data, and of its answers, asked of the teacher anew. Exit code 3 or 4 if one differs.",
    )
    parser.add_argument("store", type=Path, metavar="STORE", help="folder of the store")
    parser.add_argument("--root", metavar="DIR", help="where the images lie now")
    parser.add_argument("--teacher", metavar="A,B", help="where the teachers lie now; or none")
    parser.add_argument(
        "--num-queries", type=int, default=2048, help="teacher outputs to recompute (2048)"
    )
    options = parser.parse_args(arguments)
    if options.num_queries < 1:
        raise ConfigError(f"--num-queries {options.num_queries}: should be at least 1")
    from deit.distill.verify_targets import verify_targets

    verify_targets(
        options.store, root=options.root, teacher=options.teacher, num_queries=options.num_queries
    )
