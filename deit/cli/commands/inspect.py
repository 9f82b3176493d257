"""The commands that ask a finished run for answers, or write it for others to ask."""

import argparse
from pathlib import Path

from deit.cli.parser import Parser, command_of, parse_numbers
from deit.config.choices import EXPORT_PACKAGES, TEST_SETS
from deit.core import run_folder
from deit.core.errors import ConfigError, did_you_mean


def evaluate(arguments: list[str], program: str) -> None:
    """Measure a finished run, head by head."""
    options = _evaluate_parser(program).parse_args(arguments)
    sides = parse_numbers(options.resolution, "--resolution", whole=True)
    crops = parse_numbers(options.crop, "--crop", whole=False)
    merges = parse_numbers(options.merge_tokens, "--merge-tokens", whole=True, least=0)
    if options.batch is not None and options.batch < 1:
        raise ConfigError(f"--run.eval_batch_size {options.batch}: should be at least 1")
    _check_test_set(options)
    from deit.analysis.view_sheet import check_image_path
    from deit.core.filesystem import check_file
    from deit.evaluation.evaluate import evaluate
    from deit.evaluation.tables import print_evaluation, write_evaluation

    check_file(options.json, option="--json", replace=options.force)
    if options.plot is not None:
        check_image_path(options.plot, option="--plot")
        check_file(options.plot, option="--plot", replace=options.force)
    asked = {
        "checkpoint": options.checkpoint,
        "split": options.split,
        "root": options.root,
        "teacher": options.teacher,
        "device": options.device,
        "batch": options.batch,
        "test_set": options.test_set,
    }
    command = command_of(program, arguments)
    if max(map(len, (options.runs, sides, crops, merges))) > 1 or options.plot is not None:
        from deit.evaluation.compare_runs import compare_evaluations

        compare_evaluations(
            options.runs,
            resolutions=sides,
            crops=crops,
            merges=merges,
            plot=options.plot,
            json_file=options.json,
            command=command,
            **asked,
        )
        return
    found = evaluate(
        options.runs[0],
        resolution=sides[0] if sides else None,
        crop=crops[0] if crops else None,
        merge_tokens=merges[0] if merges else None,
        cost=True,
        **asked,
    )
    print_evaluation(found)
    if options.json is not None:
        write_evaluation(options.json, found | {"command": command})


def _check_test_set(options: argparse.Namespace) -> None:
    """Refuse a test set that does not exist, or options that do not apply to it."""
    name = options.test_set
    if name is None:
        return
    if name not in TEST_SETS:
        advice = f"should be one of {', '.join(TEST_SETS)}{did_you_mean(name, TEST_SETS)}"
        raise ConfigError(f"--test-set {name}: {advice}")
    if options.teacher or options.split != "test":
        raise ConfigError(
            "--test-set is a test set of its own: neither --teacher nor --split go with it"
        )
    if options.root is None:
        raise ConfigError(f"--test-set {name}: needs --data.root, where its images lie")


def _evaluate_parser(program: str) -> Parser:
    parser = Parser(
        prog=program,
        description="Measure a run on its test split, head by head; or several runs, resolutions, "
        "crops and numbers of merged tokens in one table.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--checkpoint", choices=run_folder.NAMES, default="best")
    parser.add_argument("--data.root", dest="root", metavar="DIR", help="images lie here now")
    parser.add_argument("--teacher", metavar="SOURCE", help="teacher to agree with; none: without")
    parser.add_argument("--run.device", dest="device", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--run.eval_batch_size",
        dest="batch",
        type=int,
        metavar="N",
        help="images at once; the run's own number otherwise",
    )
    parser.add_argument(
        "--resolution", metavar="A,B", help="sides of the input [px]; positions are resized"
    )
    parser.add_argument("--crop", metavar="A,B", help="evaluation crops, as views.eval_crop_pct")
    parser.add_argument(
        "--merge-tokens",
        metavar="A,B",
        help="tokens of a ViT that each block merges; none is retrained",
    )
    parser.add_argument(
        "--test-set", metavar="NAME", help=f"ImageNet's {', '.join(TEST_SETS)}, from --data.root"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw throughput against accuracy"
    )
    parser.add_argument("--force", action="store_true", help="let --json and --plot replace files")
    return parser


def predict(arguments: list[str], program: str) -> None:
    """A run's answers to pictures of your own, head by head, and what its tokens look at."""
    options = _predict_parser(program).parse_args(arguments)
    if options.top_k < 1:
        raise ConfigError(f"--top-k {options.top_k}: should be at least 1")
    from deit.analysis.view_sheet import check_image_path
    from deit.core.filesystem import check_file
    from deit.evaluation.predict import predict

    check_file(options.json, option="--json", replace=options.force)
    if options.attention is not None:
        check_image_path(options.attention, option="--attention")
        check_file(options.attention, option="--attention", replace=options.force)
    predict(
        options.run,
        options.pictures,
        checkpoint=options.checkpoint,
        teacher=options.teacher,
        top_k=options.top_k,
        attention=options.attention,
        json_file=options.json,
    )


def _predict_parser(program: str) -> Parser:
    parser = Parser(
        prog=program,
        description="The likeliest classes of pictures by each head of a finished run. Pictures "
        "that cannot be read are listed after the answers to all others, with exit code 3.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "pictures",
        type=Path,
        nargs="+",
        metavar="IMAGE",
        help="pictures, or folders of them at any depth",
    )
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="classes to show (5)")
    parser.add_argument(
        "--teacher", metavar="SOURCE", help="ask a teacher as well; run: the run's own"
    )
    parser.add_argument(
        "--attention", type=Path, metavar="FILE.png", help="draw what each token looks at"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the answers here")
    parser.add_argument(
        "--force", action="store_true", help="let --json and --attention replace files"
    )
    parser.add_argument("--checkpoint", choices=run_folder.NAMES, default="best")
    return parser


def export(arguments: list[str], program: str) -> None:
    """Write a run for timm, transformers, ONNX Runtime or torch.export; verified, with a card."""
    options = _export_parser(program).parse_args(arguments)
    if options.format not in EXPORT_PACKAGES:
        near = did_you_mean(options.format, EXPORT_PACKAGES)
        advice = f"should be one of {', '.join(EXPORT_PACKAGES)}{near}"
        raise ConfigError(f"--format {options.format}: {advice}")
    if options.images < 1:
        raise ConfigError(f"--images {options.images}: should be at least 1")
    from deit.deploy.export import export

    export(
        options.run,
        options.out,
        name=options.format,
        checkpoint=options.checkpoint,
        root=options.root,
        images=options.images,
        licence=options.licence,
        force=options.force,
    )


def _export_parser(program: str) -> Parser:
    parser = Parser(
        prog=program,
        description="Write a finished run in another format, load it without our code, hold its "
        "answers against the run's on test images, and keep it only if they are the same.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--format", required=True, metavar="NAME", help=f"{', '.join(EXPORT_PACKAGES)}"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder (RUN/export-FORMAT)")
    parser.add_argument("--force", action="store_true", help="let --out replace a folder")
    parser.add_argument("--checkpoint", choices=run_folder.NAMES, default="best")
    parser.add_argument("--data.root", dest="root", metavar="DIR", help="images lie here now")
    parser.add_argument("--images", type=int, default=512, help="test images to verify on (512)")
    parser.add_argument("--license", dest="licence", metavar="NAME", help="of the weights")
    return parser
