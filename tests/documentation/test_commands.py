"""Every command of README, tutorials and guides runs, with shorter training."""

import re
import shlex
import subprocess

import numpy as np
import pytest
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from torch.distributed.run import get_args_parser

from tests.documentation.documents import (
    ROOT,
    as_deit_command,
    blocks,
    commands,
    documents,
    documents_with_commands,
)
from tests.helpers.images import write_class_folders

pytest.importorskip("sklearn")
QUICK = shlex.split("--optim.epochs 1 --optim.warmup_epochs 0 --run.eval_every_epochs 1")
SMALL_IMAGES = shlex.split("--data.image_size 8 --student.image_size 8 --optim.batch_size 8")
FEW = shlex.split("--data.train_fraction 0.1")  # 129 digits
NARROW = shlex.split("--student.depth 1 --student.embed_dim 16 --student.num_heads 2")
CROPS = ["--views.teacher_num_crops", "3"]
ARMS = {
    "view-modes": "same/rc,fix/ic_ens,none",
    "ensemble": "one token per teacher,none",
    "epochs": "distilled-1,undistilled-1",
}
"""Some points of each study; other tests train all of them."""
STUDENT = [*QUICK, *NARROW, "--teacher.allow_near_chance"]
SMALL = {
    "digits-teacher": [*QUICK, *FEW],
    "digits": [*STUDENT, *FEW],
    "digits-held-out": [*STUDENT, *FEW],
    # Its teachers are runs of earlier commands.
    "digits-ensemble": [
        *(*STUDENT, *FEW, "--teacher.source", "checkpoints/digits-teacher,checkpoints/by-name"),
    ],
    "mine.py:narrow": [*QUICK, *FEW, "--student.depth", "1", "--teacher.allow_near_chance"],
    "folder-teacher": [
        *(*QUICK, *SMALL_IMAGES),
        *("--student.name", "small_convnet", "--student.drop_path", "0"),
    ],
    "folder": [*STUDENT, *SMALL_IMAGES, "--optim.min_lr", "0", "--student.patch_size", "2"],
    # Their teacher or images would have to be downloaded, so they are parsed and printed only.
    "imagenet-subset": ["--print-config"],
}
CLASSES = ("goldfish", "ladybug", "monarch", "penguin")
ALL = commands()
DEIT_COMMANDS = [line for line in ALL if as_deit_command(line)]
OTHER_COMMANDS = [line for line in ALL if not as_deit_command(line)]


def test_documents_have_commands():
    for name, text in documents_with_commands().items():
        assert blocks(text, "sh"), name
    assert len(DEIT_COMMANDS) > 50
    assert len(OTHER_COMMANDS) > 5


def named_block(language: str, file: str) -> str:
    """Return the one code block of the documents that begins with the comment `# FILE`."""
    matching = [
        block
        for text in documents().values()
        for block in blocks(text, language)
        if re.match(rf"# {re.escape(file)}\b", block)
    ]
    (block,) = dict.fromkeys(matching)
    return block


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the inputs of the commands: images, a recipe, a sweep, a teacher."""
    folder = tmp_path_factory.mktemp("documents")
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (folder / "pictures" / name).mkdir(parents=True)
        for index in range(12):
            pixels = generator.integers(256, size=(8, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / name / f"{index}.png")
    damaged = folder / "pictures" / "ladybug" / "11.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    write_class_folders(folder / "photos", images_per_class=12)
    (folder / "mine.py").write_text(named_block("python", "mine.py"))
    (folder / "heat.yaml").write_text(named_block("yaml", "heat.yaml"))
    return folder


def write_teacher(folder, command_server) -> None:
    """Run the training program of a tutorial for one epoch."""
    program = named_block("python", "train_resnet.py").replace("range(8)", "range(1)")
    (folder / "train_resnet.py").write_text(program)
    done = command_server.run(script=str(folder / "train_resnet.py"), cwd=folder)
    assert done.code == 0, done.err


def shortened(name, arguments, teacher):
    """Return the arguments of a deit command with those that make it short.

    teacher: the option that names the teacher of digits, after a comparison has trained it.
    """
    if name == "compare":
        few = [*SMALL[arguments[0]], "--seeds", "0"]
        few += teacher if arguments[0] == "digits" else []
        if "view-modes" in arguments:
            few += CROPS
        if "--study" in arguments and "--arms" not in arguments:
            few += ["--arms", ARMS[arguments[arguments.index("--study") + 1]]]
        return [*arguments, *few]
    if name == "train" and "teacher.pth" in arguments:
        return [*arguments, *SMALL["folder"], "--teacher.image_size", "32"]
    if name == "train":
        return [*arguments, *SMALL[arguments[0]]]
    if name == "sweep":
        return [*arguments, *SMALL["digits"], *teacher, "--seeds", "0"]
    if name == "lottery":
        return [*arguments, *SMALL["digits"], *teacher]
    if name == "prune":
        return [*arguments, *QUICK, *FEW, "--images", "64", "--teacher.allow_near_chance"]
    if name == "loss-landscape":
        few = (
            "--images 16 --grid 3 --points 3 --rays 2 --num-eigenvalues 1 --steps 2 --probes 2 "
            "--rounds 1"
        )
        few += "" if "--measure" in arguments else " --measure lines"
        return [*arguments, *few.split()]
    if name == "finetune":
        return [*arguments, *QUICK, *FEW, "--teacher.allow_near_chance"]
    if name == "export":
        return [*arguments, "--images", "64"]
    if name == "profile":
        return [*arguments, "--steps", "2", *NARROW, "--teacher.allow_near_chance"]
    if name == "targets" and arguments[0] == "write":
        size = ["--teacher.image_size", "32"] if "teacher.pth" in arguments else []
        return [*arguments, *SMALL[arguments[1]], *size]
    return arguments


def test_deit_commands_run_in_the_order_of_the_documents(folder, command_server):
    teacher = []
    write_teacher(folder, command_server)
    for line in DEIT_COMMANDS:
        name, arguments = as_deit_command(line)
        done = command_server.run(name, *shortened(name, arguments, teacher), cwd=folder)
        # The images of the tutorial have one damaged file, which the check reports.
        expected = 3 if line.startswith("deit check-data pictures") else 0
        assert done.code == expected, (line, done.err)
        if name == "compare" and not teacher:
            out = arguments[arguments.index("--out") + 1]
            teacher = ["--teacher.source", f"{out}/teacher"]
    assert (folder / "digits.json").is_file()
    assert (folder / "checkpoints" / "compare" / "runs.png").stat().st_size > 10_000


def test_other_commands_of_the_documents_are_valid(folder, command_server):
    arguments = ("digits-teacher", *SMALL["digits-teacher"], "--out", "teacher")
    done = command_server.run("train", *arguments, cwd=folder)
    assert done.code == 0, done.err
    for line in OTHER_COMMANDS:
        program, *arguments = shlex.split(line)
        if program == "make":
            check_make(arguments)
        elif program in ("torchrun", "accelerate"):
            check_launch(program, arguments, folder, command_server)
        elif program == "python" and arguments[0] == "scripts/benchmark.py":
            # It takes minutes: only its options are tested here, the rest in test_benchmark.py.
            script, *options = arguments
            done = command_server.run(*options, "--rows", "no such row", script=script, cwd=ROOT)
            assert "no such row" in done.err
        elif program == "sbatch":
            assert (ROOT / arguments[0]).is_file()
        else:
            known = (("pip", "install"), ("python", "train_resnet.py"))
            assert program == "source" or (program, arguments[0]) in known, line


def check_make(arguments: list[str]) -> None:
    """Check what a make command would run."""
    planned = subprocess.run(
        ["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    expected = {"quickstart": "deit", "test": "-m pytest", "docs": "scripts/docs.py"}
    assert expected[arguments[0]] in planned


def check_launch(launcher, arguments, folder, command_server):
    """Parse a launcher's command with the launcher's parser, and run it without the launcher.

    (test_peers.py runs both launchers.) With at most two processes one step is run; for more
    the configuration is printed.
    """
    if launcher == "torchrun":
        options = get_args_parser().parse_args(arguments)
        processes = int(options.nproc_per_node) * int(options.nnodes.rpartition(":")[2])
        recipe = options.training_script_args
        environment = {}
    else:
        options = launch_command_parser().parse_args(arguments[1:])
        assert arguments[0] == "launch"
        assert options.config_file is None or (ROOT / options.config_file).is_file()
        # There are no eight GPUs: one process, and a recipe that needs no data.
        processes = 1 if options.mixed_precision else 8
        recipe = ["digits"] if options.mixed_precision else options.training_script_args
        environment = {"ACCELERATE_MIXED_PRECISION": options.mixed_precision or "no"}
    if processes > 2:
        done = command_server.run("train", *recipe, "--print-config", cwd=folder)
        assert done.code == 0, done.err
        return
    done = command_server.run_processes(
        *(*recipe, "--teacher.source", "teacher", "--teacher.allow_near_chance"),
        *("--dry-run", "--out", "dry"),
        processes=processes,
        script=options.training_script,
        cwd=folder,
        **environment,
    )
    assert [rank.code for rank in done] == [0] * processes, "".join(rank.err for rank in done)
    assert re.search(r"\bloss \d", done[0].out)  # of the single update
    assert not (folder / "dry").exists()
    assert "bf16" in done[0].out or not environment
