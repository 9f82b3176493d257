"""Commands that evaluate a finished run, predict with it, or export it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from deit.cli.parser import Names, Parser, command_of, parse_numbers
from deit.config.command_choices import (
    EXPORT_IMAGES,
    EXPORT_PACKAGES,
    TEST_SETS,
    TOP_K,
    check_at_least,
    check_choice,
    check_test_set,
)
from deit.config.input_paths import check_image_files, check_new_root
from deit.core import run_folder
from deit.core.errors import ConfigError


def evaluate(arguments: list[str], program: str) -> None:
    """Evaluate finished runs on a test set: metrics of every head, cost and speed."""
    options = _evaluate_parser(program).parse_args(arguments)
    resolutions = parse_numbers(options.resolution, "--resolution", whole=True)
    crops = parse_numbers(options.crop, "--crop", whole=False)
    merges = parse_numbers(options.merge_tokens, "--merge-tokens", whole=True, least=0)
    if options.batch_size is not None:
        check_at_least("run.eval_batch_size", options.batch_size, 1)
    check_test_set(
        options.test_set, split=options.split, root=options.root, teacher=options.teacher
    )
    for run in options.runs:
        run_folder.require_run(run_folder.run_dir_of(run))
    check_new_root(options.root)
    variants = max(map(len, (options.runs, resolutions, crops, merges)))
    is_comparison = variants > 1 or options.plot is not None
    _check_outputs(options, is_comparison=is_comparison)
    names = ("checkpoint", "split", "root", "teacher", "device", "batch_size", "test_set")
    settings = {name: getattr(options, name) for name in names}
    command = command_of(program, arguments)
    if is_comparison:
        from deit.evaluation.compare_runs import compare_evaluations

        compare_evaluations(
            options.runs,
            resolutions=resolutions,
            crops=crops,
            merge_tokens=merges,
            plot=options.plot,
            json_file=options.json,
            command=command,
            **settings,
        )
        return
    from deit.evaluation.evaluate import evaluate

    result = evaluate(
        options.runs[0],
        resolution=resolutions[0] if resolutions else None,
        crop=crops[0] if crops else None,
        merge_tokens=merges[0] if merges else None,
        cost=True,
        command=command,
        **settings,
    )
    from deit.evaluation.prediction_table import write_predictions
    from deit.evaluation.tables import print_evaluation, write_evaluation

    print_evaluation(result.metrics)
    if options.json is not None:
        write_evaluation(options.json, result.metrics | {"command": command})
    if options.predictions is not None:
        images = {"split": options.split, "root": options.root}
        write_predictions(options.predictions, result, options.runs[0], **images)


def _check_outputs(options: Any, *, is_comparison: bool) -> None:
    """Check the files to write; predictions can only be written of one split of one run."""
    from deit.analysis.view_sheet import check_image_path
    from deit.core.filesystem import check_file

    if options.plot is not None:
        check_image_path(options.plot, name="plot")
    if options.predictions is not None and (is_comparison or options.test_set is not None):
        raise ConfigError(
            f"predictions = {options.predictions}: is for the split of one run; not with several "
            "runs or settings, --plot or --test-set"
        )
    check_file(options.json, name="json_file", replace=options.force)
    check_file(options.plot, name="plot", replace=options.force)
    check_file(options.predictions, name="predictions", replace=options.force)


def _evaluate_parser(program: str) -> Parser:
    parser = Parser(
        name="evaluate",
        prog=program,
        usage="%(prog)s RUN [RUN ...] [OPTIONS]",
        description="Evaluate a run on its test split: accuracy and calibration of every head, "
        "agreement with the teacher, cost and speed. Several runs, resolutions, crops or numbers "
        "of merged tokens are compared in one table.",
    )
    parser.add_run(many=True)
    parser.add_checkpoint()
    parser.add_argument(
        "--split", choices=("test", "validation"), default="test", help="Split to evaluate."
    )
    parser.add_data_root()
    parser.add_argument(
        "--test-set",
        metavar=Names(TEST_SETS),
        help="Evaluate another test set of ImageNet, stored in --data.root, instead of the split: "
        f"{', '.join(TEST_SETS)}.",
    )
    parser.add_argument(
        "--teacher",
        metavar="SOURCE",
        help="Teacher to compare with; none: no teacher. (default: the run's)",
    )
    _add_variant_options(parser)
    parser.add_argument(
        "--run.device",
        dest="device",
        choices=("auto", "cpu", "cuda"),
        help="Device to evaluate on. (default: the run's)",
    )
    parser.add_argument(
        "--run.eval_batch_size",
        dest="batch_size",
        type=int,
        metavar="N",
        help="Images per batch and process. (default: the run's)",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="Plot accuracy against throughput to this file.",
    )
    parser.add_json()
    parser.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE.csv",
        help="Also write path, label and prediction of every image to this CSV file.",
    )
    parser.add_force("--plot", "--json", "--predictions")
    return parser


def _add_variant_options(parser: Parser) -> None:
    """Add options with lists of values, each of which is one row of the table."""
    parser.add_argument(
        "--resolution",
        metavar="N,...",
        help="Sides [px] of the student's input; the position embedding is resized. (default: the "
        "run's)",
    )
    parser.add_argument(
        "--crop",
        metavar="FRACTION,...",
        help="Evaluation crops, as views.eval_crop_pct. (default: the run's)",
    )
    parser.add_argument(
        "--merge-tokens",
        metavar="N,...",
        help="Numbers of tokens that each block of a ViT merges; without training. (default: no "
        "merging)",
    )


def predict(arguments: list[str], program: str) -> None:
    """Classify images with a finished run; with --attention, also draw attention maps."""
    options = _predict_parser(program).parse_args(arguments)
    check_at_least("top_k", options.top_k, 1)
    run_folder.require_folder(options.run)
    if (options.run / run_folder.BEST).is_dir():
        check_image_files(options.images)
    from deit.analysis.view_sheet import check_image_path
    from deit.core.filesystem import check_file
    from deit.evaluation.predict import predict, raise_if_unreadable

    check_file(options.json, name="json_file", replace=options.force)
    if options.attention is not None:
        check_image_path(options.attention, name="attention")
        check_file(options.attention, name="attention", replace=options.force)
    result = predict(
        options.run,
        options.images,
        checkpoint=options.checkpoint,
        teacher=options.teacher,
        top_k=options.top_k,
        attention=options.attention,
        json_file=options.json,
    )
    raise_if_unreadable(result)


def _predict_parser(program: str) -> Parser:
    parser = Parser(
        prog=program,
        usage="%(prog)s RUN IMAGE [IMAGE ...] [OPTIONS]",
        description="Print the most probable classes of images by every head of a finished run. "
        "Unreadable images are listed at the end, with exit code 3.",
    )
    parser.add_run()
    parser.add_argument(
        "images",
        type=Path,
        nargs="+",
        metavar="IMAGE",
        help="Image files, or folders that are searched recursively.",
    )
    parser.add_checkpoint()
    parser.add_argument(
        "--top-k", type=int, default=TOP_K, metavar="K", help="Number of classes to print."
    )
    parser.add_argument(
        "--teacher",
        metavar="SOURCE",
        help="Also print the predictions of this teacher; run: the run's teacher. (default: no "
        "teacher)",
    )
    parser.add_argument(
        "--attention",
        type=Path,
        metavar="FILE.png",
        help="Draw the attention map of each token to this file.",
    )
    parser.add_json()
    parser.add_force("--attention", "--json")
    return parser


def export(arguments: list[str], program: str) -> None:
    """Export a run to timm, transformers, ONNX Runtime or torch.export, and verify it."""
    options = _export_parser(program).parse_args(arguments)
    check_choice("format", options.format, EXPORT_PACKAGES)
    check_at_least("images", options.images, 1)
    run_folder.require_run(run_folder.run_dir_of(options.run))
    check_new_root(options.root)
    from deit.deploy.export import export

    export(
        options.run,
        options.out,
        format=options.format,
        checkpoint=options.checkpoint,
        root=options.root,
        images=options.images,
        license=options.license,
        force=options.force,
    )


def _export_parser(program: str) -> Parser:
    parser = Parser(
        prog=program,
        usage="%(prog)s RUN --format NAME [OPTIONS]",
        description="Write a finished run in another format, with a model card. The export is "
        "loaded without deit, and its outputs are compared with the run's on test images; it is "
        "kept only if they agree.",
    )
    parser.add_run()
    parser.add_argument(
        "--format",
        required=True,
        metavar=Names(EXPORT_PACKAGES),
        help=f"Format of the export (required): {', '.join(EXPORT_PACKAGES)}.",
    )
    parser.add_checkpoint()
    parser.add_data_root()
    parser.add_argument(
        "--images",
        type=int,
        default=EXPORT_IMAGES,
        metavar="N",
        help="Number of test images to verify the export on.",
    )
    parser.add_argument(
        "--license", metavar="NAME", help="License of the weights, for the model card."
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="Folder of the export. (default: RUN/export-FORMAT)"
    )
    parser.add_force("--out")
    return parser


PARSERS: dict[str, Callable[[str], Parser]] = {
    "evaluate": _evaluate_parser,
    "predict": _predict_parser,
    "export": _export_parser,
}
"""The parsers of all options, by the words that select the command."""
