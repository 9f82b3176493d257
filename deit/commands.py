"""The commands and their options, one function each; what they do lies elsewhere."""

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path

from deit import checkpoint
from deit import compression_commands as smaller
from deit.arguments import GOES_ON, TRAINS, RunArguments, parse_run, printed
from deit.config import Config, DataConfig, code_of
from deit.console import is_main_process, say, table
from deit.errors import ConfigError
from deit.finetune_arguments import parse_finetune
from deit.options import Parser, check_records, parse_seeds, parse_shard, read_numbers
from deit.recipes import RECIPES
from deit.sweep_file import Sweep, corners_of, points_of, under_command_line, with_fields
from deit.sweeps import SWEEPS, find_sweep
from deit.text import nearest

# torch and what needs it are imported inside the commands: --help and every mistake in the
# arguments answer at once.


# Names that options take, without importing what they name; tests hold them to that.
TEST_SETS = ("real", "v2", "a", "r", "sketch")
EXPORTS = ("timm", "transformers", "onnx", "pt2")

_TRAINS_NOT = dict.fromkeys(("resume", "dry_run", "print_config"), TRAINS)
"""Options of a run that commands without one have no use for."""


def train(arguments: list[str], program: str) -> None:
    """Train a student (or a teacher) by a recipe."""
    run = parse_run(arguments, program=program, about="Train by a recipe, with or without teacher.")
    _train(run, [program, *arguments])


def _train(run: RunArguments, arguments: list[str]) -> None:
    """Train as a command line says, or print its configuration. arguments: for the record."""
    if printed(run):
        return
    from deit.run import train

    train(run.config, run.out, resume=run.resume, dry_run=run.dry_run, arguments=arguments)


def finetune(arguments: list[str], program: str) -> None:
    """Fine-tune a run or a checkpoint: at a higher resolution, or on other images."""
    _train(parse_finetune(arguments, program), [program, *arguments])


def evaluate(arguments: list[str], program: str) -> None:
    """Measure a finished run, head by head."""
    parser = Parser(
        prog=program,
        description="Measure a run on its test split, head by head; or several runs, resolutions, "
        "crops and numbers of merged tokens in one table.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--checkpoint", choices=checkpoint.NAMES, default="best")
    parser.add_argument("--data.root", dest="root", metavar="DIR", help="images lie here now")
    parser.add_argument("--teacher", metavar="SOURCE", help="teacher to agree with; none: without")
    parser.add_argument("--run.device", dest="device", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--resolution", metavar="A,B", help="sides of the input [px]; positions are resized"
    )
    parser.add_argument("--crop", metavar="A,B", help="evaluation crops, as views.evaluation_crop")
    parser.add_argument(
        "--merge", metavar="A,B", help="tokens of a ViT that each block merges; none is retrained"
    )
    parser.add_argument(
        "--variant", metavar="NAME", help=f"ImageNet's {', '.join(TEST_SETS)}, from --data.root"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw throughput against accuracy"
    )
    parser.add_argument("--force", action="store_true", help="let --json and --plot replace files")
    options = parser.parse_args(arguments)
    sides = read_numbers(options.resolution, "--resolution", whole=True)
    crops = read_numbers(options.crop, "--crop", whole=False)
    merges = read_numbers(options.merge, "--merge", whole=True, least=0)
    if options.variant is not None and options.variant not in TEST_SETS:
        advice = f"should be one of {', '.join(TEST_SETS)}{nearest(options.variant, TEST_SETS)}"
        raise ConfigError(f"--variant {options.variant}: {advice}")
    if options.variant is not None and (options.teacher or options.split != "test"):
        raise ConfigError(
            "--variant is a test set of its own: neither --teacher nor --split go with it"
        )
    if options.variant is not None and options.root is None:
        raise ConfigError(f"--variant {options.variant}: needs --data.root, where its images lie")
    from deit.contact_sheet import check_picture
    from deit.disk import check_file
    from deit.evaluation import evaluate
    from deit.evaluation_tables import print_evaluation, write_evaluation

    check_file(options.json, option="--json", replace=options.force)
    if options.plot is not None:
        check_picture(options.plot, option="--plot")
        check_file(options.plot, option="--plot", replace=options.force)
    asked = {
        "checkpoint": options.checkpoint,
        "split": options.split,
        "root": options.root,
        "teacher": options.teacher,
        "device": options.device,
        "variant": options.variant,
    }
    if max(map(len, (options.runs, sides, crops, merges))) > 1 or options.plot is not None:
        from deit.survey import survey

        survey(
            options.runs,
            resolutions=sides,
            crops=crops,
            merges=merges,
            plot=options.plot,
            json_file=options.json,
            **asked,
        )
        return
    found = evaluate(
        options.runs[0],
        resolution=sides[0] if sides else None,
        crop=crops[0] if crops else None,
        merge=merges[0] if merges else None,
        cost=True,
        **asked,
    )
    print_evaluation(found)
    if options.json is not None:
        write_evaluation(options.json, found)


def predict(arguments: list[str], program: str) -> None:
    """A run's answers to pictures of your own, head by head, and what its tokens look at."""
    parser = Parser(
        prog=program,
        description="The likeliest classes of pictures by each head of a finished run.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "pictures", type=Path, nargs="+", metavar="IMAGE", help="pictures, or folders of them"
    )
    parser.add_argument("--top", type=int, default=5, help="classes to show (5)")
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
    parser.add_argument("--checkpoint", choices=checkpoint.NAMES, default="best")
    options = parser.parse_args(arguments)
    if options.top < 1:
        raise ConfigError(f"--top {options.top}: should be at least 1")
    from deit.contact_sheet import check_picture
    from deit.disk import check_file
    from deit.predict import predict

    check_file(options.json, option="--json", replace=options.force)
    if options.attention is not None:
        check_picture(options.attention, option="--attention")
        check_file(options.attention, option="--attention", replace=options.force)
    predict(
        options.run,
        options.pictures,
        name=options.checkpoint,
        teacher=options.teacher,
        top=options.top,
        attention=options.attention,
        json_file=options.json,
    )


def export(arguments: list[str], program: str) -> None:
    """Write a run for timm, transformers, ONNX Runtime or torch.export; verified, with a card."""
    parser = Parser(
        prog=program,
        description="Write a finished run in another format, load it without our code, hold its "
        "answers against the run's on test images, and keep it only if they are the same.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--format", required=True, metavar="NAME", help=f"{', '.join(EXPORTS)}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder (RUN/export-FORMAT)")
    parser.add_argument("--force", action="store_true", help="let --out replace a folder")
    parser.add_argument("--checkpoint", choices=checkpoint.NAMES, default="best")
    parser.add_argument("--data.root", dest="root", metavar="DIR", help="images lie here now")
    parser.add_argument("--images", type=int, default=512, help="test images to verify on (512)")
    parser.add_argument("--license", dest="licence", metavar="NAME", help="of the weights")
    options = parser.parse_args(arguments)
    if options.format not in EXPORTS:
        advice = f"should be one of {', '.join(EXPORTS)}{nearest(options.format, EXPORTS)}"
        raise ConfigError(f"--format {options.format}: {advice}")
    if options.images < 1:
        raise ConfigError(f"--images {options.images}: should be at least 1")
    from deit.export import export

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


def compare(arguments: list[str], program: str) -> None:
    """What the teacher is worth, or another study of a recipe, in one table."""
    parser = Parser(prog=program, add_help=False)
    parser.add_argument(
        "--study",
        default="worth",
        metavar="NAME",
        help="worth (the student with and without teacher), teaching (every teaching mode), "
        "patience (epochs), ensemble (teachers together and alone) or resolution (a fine-tuning by "
        "its teachers and none).",
    )
    parser.add_argument(
        "--only", default="", metavar="A,B", help="Some students of the study; none named: all."
    )
    parser.add_search(retries=False)
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write the numbers here.")
    options, rest = parser.parse_known_args(arguments)
    seeds = parse_seeds(options.seeds)
    run = parse_run(
        rest,
        program=program,
        about="Train a recipe's teachers and several students beside each other, and evaluate all "
        "on the test split. data.* and run.* apply to the teachers too. The same command goes on: "
        "a finished run is not trained again.",
        own=parser,
        told={"out": "Folder of all runs. None: checkpoints/RECIPE below the working directory."},
        without={**GOES_ON, "dry_run": TRAINS},
    )
    if printed(run):
        return
    from deit.comparison import compare

    compare(
        run,
        study=options.study,
        only=tuple(name.strip() for name in options.only.split(",") if name.strip()),
        seeds=seeds,
        at_once=options.at_once,
        json_file=options.json,
        arguments=arguments,
    )


def sweep(arguments: list[str], program: str) -> None:
    """Every combination of a grid, or the runs of a file or study: one table, mean and std."""
    helps = bool({"-h", "--help"} & set(arguments))
    if arguments and not arguments[0].startswith("-"):
        plan, rest = find_sweep(arguments[0]), arguments[1:]
    elif helps:
        plan, rest = Sweep("sweep"), arguments
    else:
        raise ConfigError(
            f"name a sweep first: {program} FILE.yaml --out DIR, or one of {', '.join(SWEEPS)}"
        )
    parser = Parser(prog=program, add_help=False)
    parser.add_argument(
        "--recipe", default=plan.recipe, metavar="RECIPE", help="Instead of the file's."
    )
    parser.add_search(seeds=",".join(map(str, plan.seeds)))
    parser.add_argument(
        "--best", type=int, default=5, metavar="N", help="How many are named in the end."
    )
    options, rest = parser.parse_known_args(rest)
    plan = dataclasses.replace(plan, recipe=options.recipe, seeds=parse_seeds(options.seeds))
    check_records(plan.records)
    asked: list[Config] = []
    trusted: set[str] = set()

    def adapt(config: Config) -> Config:
        if not plan.recipe.endswith(".json"):
            trusted.update(code_of(config.teacher))  # a recipe that is code itself may name more
        asked.append(with_fields(config, plan.set, where=f"sweep {plan.name}, set"))
        return asked[0]

    run = parse_run(
        [plan.recipe, *rest],
        program=program,
        usage="SWEEP [--recipe RECIPE]",
        about="Train and evaluate every run of a sweep for each seed. SWEEP: a YAML or JSON file "
        f"(docs/sweeps.md), or one of {', '.join(SWEEPS)}. Into --out: results.csv, results.json, "
        "results.md, pictures and the runs. The same command goes on; what is finished is kept, "
        "also when the file changes.",
        own=parser,
        told={
            "out": "Folder of the sweep. None: checkpoints/SWEEP below the working directory.",
            "dry_run": "List the runs; nothing is trained or written.",
        },
        without=GOES_ON,
        adapt=adapt,
        out=Path("checkpoints") / plan.name,
        online=False,
    )
    if printed(run):
        return
    plan = under_command_line(plan, asked[0], run.config)
    # Every mistake in the file, before torch is there.
    points = corners_of(plan, run.config) if plan.search else points_of(plan, run.config)
    if run.names_teachers:
        trusted.update(code_of(run.config.teacher))
    for point in points:
        if named := sorted({*code_of(point.config.teacher)} - trusted):
            raise ConfigError(
                f"sweep {plan.name}, {point.name}: its teacher {named[0]} is code, which no file "
                f"but the command line may have run; add --teacher.source {named[0]} if you trust "
                "it"
            )
    from deit.sweep import sweep

    sweep(
        plan,
        run,
        asked=asked[0],
        at_once=options.at_once,
        retries=options.retries,
        best=options.best,
        arguments=arguments,
    )


def report(arguments: list[str], program: str) -> None:
    """One page about runs and sweeps: curves, classes, calibration, attention, views; PNG, CSV."""
    parser = Parser(
        prog=program,
        description="Write one self-contained HTML page about finished runs and sweeps, with every "
        "chart as PNG and every table as CSV beside it.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run or sweep folder")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder (report)")
    parser.add_argument("--data.root", dest="root", metavar="DIR", help="images lie here now")
    parser.add_argument("--force", action="store_true", help="let --out replace a report")
    options = parser.parse_args(arguments)
    from deit.report import report

    report(options.runs, options.out, root=options.root, force=options.force)


def scan(arguments: list[str], program: str) -> None:
    """Look at every image of a data set: what is there, what is bad, what lies there twice."""
    parser = Parser(
        prog=program,
        description="Decode every image of every split; exit code 3 if any cannot be used.",
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
        without=_TRAINS_NOT,
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
        say(f"next: the same recipe with --teacher.targets {store}")


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


def profile(arguments: list[str], program: str) -> None:
    """Where the time of an update goes, by part and by operation, with a trace to look into."""
    parser = Parser(prog=program, add_help=False)
    parser.add_argument("--updates", type=int, default=10, metavar="N", help="How many to time.")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE.json", help="Write a trace, for ui.perfetto.dev."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="Also write the numbers here.")
    parser.add_argument(
        "--force", action="store_true", help="Let --trace and --json replace files."
    )
    options, rest = parser.parse_known_args(arguments)
    run = parse_run(
        rest,
        program=program,
        about="Train some updates of a recipe and print where their time went: views, teacher, "
        "student, backward pass, optimizer, average, and the operations by their own time. Nothing "
        "is written but what is named.",
        own=parser,
        without={**_TRAINS_NOT, "out": "it writes no run; --trace and --json name files"},
    )
    if options.updates < 1:
        raise ConfigError(f"--updates {options.updates}: should be at least 1")
    from deit.disk import check_file, write_json
    from deit.profiling import profile_run

    for option, path in (("--trace", options.trace), ("--json", options.json)):
        check_file(path, option=option, replace=options.force)
    found = profile_run(run.config, updates=options.updates, trace=options.trace)
    if options.json is not None and is_main_process():
        write_json(options.json, found)
        say(f"wrote {options.json}")


def recipes(arguments: list[str], program: str) -> None:
    """The named recipes and what they are."""
    Parser(prog=program, description="List the named recipes.").parse_args(arguments)
    rows = []
    for name, recipe in RECIPES.items():
        config = recipe()
        student = f"{config.student.name} {config.student.image_size} px"
        epochs = str(config.optim.epochs)
        rows.append((name, student, epochs, (recipe.__doc__ or "").strip().split("\n")[0]))
    table("recipes", ("name", "student", "epochs", "what"), rows, text=True)


COMMANDS: dict[str, Callable[[list[str], str], None]] = {
    "train": train,
    "finetune": finetune,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "compare": compare,
    "sweep": sweep,
    "quantize": smaller.quantize,
    "prune": smaller.prune,
    "tickets": smaller.tickets,
    "landscape": smaller.landscape,
    "ladder": smaller.ladder,
    "report": report,
    "scan": scan,
    "views": views,
    "targets": targets,
    "profile": profile,
    "recipes": recipes,
}
"""Every command by name: (its arguments, the program's name for messages)."""
