"""Commands about images, their views, and stored teacher outputs."""

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path

from deit.cli.common_options import is_help_requested
from deit.cli.grammar import ConfigCommand
from deit.cli.parser import Names, Parser, parse_part
from deit.cli.run_args import (
    ALWAYS_RESUMES,
    NOT_TRAINING,
    USE_TRAIN,
    parse_run,
    print_config_if_requested,
)
from deit.config.command_choices import (
    NUM_QUERIES,
    NUM_VIEWS,
    check_amount,
    check_at_least,
    check_content_name,
    check_epoch,
)
from deit.config.input_paths import check_images, check_inputs, check_new_root, check_store
from deit.config.sections.data import DataConfig
from deit.core.console import info
from deit.core.errors import ConfigError, did_you_mean


def check_data(arguments: list[str], program: str) -> None:
    """Decode every image of a dataset; list unreadable files, duplicates, sizes and formats."""
    options = _check_data_parser(program).parse_args(arguments)
    if (options.source == "reader") != (options.reader is not None):
        raise ConfigError("--source reader and --reader NAME need each other")
    data = DataConfig(
        source=options.source,
        root=options.root,
        reader=options.reader,
        download=options.download,
        exclude_list=options.exclude_list,
    )
    check_images(data)
    from deit.analysis.dataset_scan import print_scan, raise_if_unreadable, scan, write_exclude_list
    from deit.core.filesystem import check_file, write_json

    check_file(options.json, name="json_file", replace=options.force)
    check_file(options.write_exclude_list, name="write_exclude_list", replace=options.force)
    report = scan(data)
    print_scan(report)
    if options.write_exclude_list is not None:
        write_exclude_list(report, options.write_exclude_list)
    if options.json is not None:
        write_json(options.json, dataclasses.asdict(report))
        info(f"wrote {options.json}")
    raise_if_unreadable(report, options.write_exclude_list)


def _check_data_parser(program: str) -> Parser:
    parser = Parser(
        prog=program,
        usage="%(prog)s DATA [OPTIONS]",
        description="Decode every image of every split. List unreadable files, duplicates, sizes "
        "and formats. Exit code 3 if any image is unreadable.",
    )
    parser.add_argument("root", metavar="DATA", help="Folder of the images (data.root).")
    parser.add_argument(
        "--source",
        choices=("folder", "shards", "reader"),
        default="folder",
        help="How the images are stored (data.source).",
    )
    parser.add_argument(
        "--reader", metavar="NAME", help="timm reader for --source reader (data.reader)."
    )
    parser.add_argument(
        "--download", action="store_true", help="Allow the reader to download (data.download)."
    )
    parser.add_argument(
        "--exclude-list",
        metavar="FILE",
        help="Text file of images to exclude (data.exclude_list).",
    )
    parser.add_argument(
        "--write-exclude-list",
        type=Path,
        metavar="FILE",
        help="Write the unreadable images to this file, for data.exclude_list.",
    )
    parser.add_json()
    parser.add_force("--write-exclude-list", "--json")
    return parser


def _show_views_parser(program: str) -> Parser:
    parser = Parser(prog=program, add_help=False)
    parser.add_argument(
        "--out", type=Path, default=Path("views.png"), metavar="FILE.png", help="Image to write."
    )
    parser.add_force("--out")
    parser.add_argument(
        "--epoch", type=int, default=0, metavar="N", help="Epoch of the views, from 0."
    )
    parser.add_argument(
        "--num-views", type=int, default=NUM_VIEWS, metavar="N", help="Number of views to draw."
    )
    return parser


_SHOW_VIEWS = ConfigCommand(
    "show-views",
    "Draw the first training views of an epoch as student and teacher see them, with labels, "
    "mixing weights and the teacher's predictions.",
    own_parser=_show_views_parser,
    excluded=NOT_TRAINING,
)


def show_views(arguments: list[str], program: str) -> None:
    """Draw the first training views of an epoch as student and teacher see them."""
    parser = _show_views_parser(program)
    options, rest = parser.parse_known_args(arguments)
    run = parse_run(rest, _SHOW_VIEWS, program=program, own_parser=parser, live_teacher=False)
    check_epoch(options.epoch)
    check_at_least("num_views", options.num_views, 1)
    check_images(run.config.data)
    from deit.analysis.view_sheet import check_image_path, draw_view_sheet
    from deit.core.filesystem import check_file

    check_image_path(options.out, name="out")
    check_file(options.out, name="out", replace=options.force)
    draw_view_sheet(run.config, options.out, epoch=options.epoch, num_views=options.num_views)


def targets(arguments: list[str], program: str) -> None:
    """Store a teacher's outputs for every training view, or verify such a store."""
    actions = {"write": _write_targets, "verify": _verify_targets}
    if arguments and arguments[0] in actions:
        actions[arguments[0]](arguments[1:], f"{program} {arguments[0]}")
        return
    if is_help_requested(arguments[:1]):
        info(
            f"usage: {program} write RECIPE --out STORE [OPTIONS]\n"
            f"       {program} verify STORE [OPTIONS]\n\n"
            "write   Store the outputs of a recipe's teachers for its training views.\n"
            "verify  Check a store against its checksums, the data and the teachers.\n\n"
            f"{program} write --help and {program} verify --help list their options."
        )
        return
    action = f"{arguments[0]!r}{did_you_mean(arguments[0], actions)}" if arguments else "nothing"
    raise ConfigError(f"{program}: should be followed by write or verify, not by {action}")


def _write_targets_parser(program: str) -> Parser:
    parser = Parser(prog=program, add_help=False)
    parser.add_argument(
        "--out", type=Path, metavar="STORE", help="Folder of the store to write (required)."
    )
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="Epochs to write. (default: all epochs of the run)"
    )
    parser.add_argument(
        "--content",
        metavar=Names(("hard", "full", "top-10")),
        help="Outputs to store for each view. hard: the predicted label; full: also the "
        "log-probabilities of all classes; top-K: of the K most probable. (default: what the loss "
        "needs)",
    )
    parser.add_argument(
        "--part",
        default="0/1",
        metavar="I/N",
        help="Write part I (from 0) of N; run one command for each part.",
    )
    parser.add_argument(
        "--teacher-index",
        type=int,
        metavar="N",
        help="Write the outputs of the Nth teacher only (from 1). (default: all teachers)",
    )
    return parser


_WRITE_TARGETS = ConfigCommand(
    "targets write",
    "Store the outputs of a recipe's teachers for its training views. Runs can then use the store "
    "instead of the teachers (--teacher.target_stores). Run the same command again to resume.",
    own_parser=_write_targets_parser,
    excluded={**ALWAYS_RESUMES, "dry_run": USE_TRAIN},
)


def _write_targets(arguments: list[str], program: str) -> None:
    parser = _write_targets_parser(program)
    options, rest = parser.parse_known_args(arguments)
    run = parse_run(rest, _WRITE_TARGETS, program=program, own_parser=parser, live_teacher=False)
    if print_config_if_requested(run):
        return
    check_content_name(options.content, "--content")
    part = parse_part(options.part)
    if options.out is None:
        raise ConfigError(f"{program} {run.recipe}: needs --out STORE, the folder to write")
    check_amount(options.epochs, part)
    check_inputs(run.config)
    from deit.distill.write_targets import write_targets

    written = write_targets(
        run.config,
        options.out,
        epochs=options.epochs,
        content=options.content,
        part=part,
        teacher_index=options.teacher_index,
    )
    if written is not None:
        store = shlex.quote(str(options.out.resolve()))
        info(f"next: deit train {shlex.join(rest)} --teacher.target_stores {store}")


def _verify_targets_parser(program: str) -> Parser:
    parser = Parser(
        prog=program,
        usage="%(prog)s STORE [OPTIONS]",
        description="Read a store and verify its checksums, then recompute a sample of its views "
        "from the data and a sample of its outputs with the teachers. Exit code 3 if data, views "
        "or teachers differ; exit code 4 if files are damaged.",
    )
    parser.add_argument("store", type=Path, metavar="STORE", help="Folder of the store.")
    parser.add_data_root(since="the store was written")
    parser.add_argument(
        "--teacher",
        metavar="SOURCE,...",
        help="Teachers, if they have moved since the store was written; none: skip their check.",
    )
    parser.add_argument(
        "--num-queries",
        type=int,
        default=NUM_QUERIES,
        metavar="N",
        help="Number of teacher outputs to recompute.",
    )
    return parser


def _verify_targets(arguments: list[str], program: str) -> None:
    options = _verify_targets_parser(program).parse_args(arguments)
    check_at_least("num_queries", options.num_queries, 1)
    check_store(options.store)
    check_new_root(options.root)
    from deit.distill.verify_targets import verify_targets

    verify_targets(
        options.store, root=options.root, teacher=options.teacher, num_queries=options.num_queries
    )


PARSERS: dict[str, Callable[[str], Parser]] = {
    "check-data": _check_data_parser,
    "show-views": _SHOW_VIEWS.parser,
    "targets write": _WRITE_TARGETS.parser,
    "targets verify": _verify_targets_parser,
}
"""The parsers of all options, by the words that select the command."""
