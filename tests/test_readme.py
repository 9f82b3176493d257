"""Every command of the README is executed, shortened; its tables and links are up to date."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from deit.cli.commands import COMMANDS
from deit.config.recipes import RECIPES

pytest.importorskip("sklearn")
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
QUICK = shlex.split("--optim.epochs 1 --optim.warmup_epochs 0 --run.eval_every_epochs 1")
PICTURES = shlex.split("--data.image_size 8 --student.image_size 8 --optim.batch_size 8")
FEW = shlex.split("--data.train_fraction 0.1")  # 129 digits
NARROW = shlex.split("--student.depth 1 --student.embed_dim 16 --student.num_heads 2")
CROPS = ["--views.teacher_num_crops", "3"]
STUDENT = [*QUICK, *NARROW, "--teacher.allow_near_chance"]
SMALL = {
    "digits-teacher": [*QUICK, *FEW],
    "digits": [*STUDENT, *FEW],
    # Starts and teachers: runs that the commands before them leave.
    "digits-ensemble": [
        *(*STUDENT, *FEW, "--teacher.source", "checkpoints/digits-teacher,checkpoints/hard"),
    ],
    "digits-finetune": [
        *(*STUDENT, *FEW, "--init.weights", "checkpoints/digits/best"),
        *("--teacher.source", "checkpoints/teacher-16"),
    ],
    "cifar10-micro": [
        *(*STUDENT, "--optim.batch_size", "32", "--teacher.source", "checkpoints/folder-teacher"),
    ],
    "mine.py:narrow": [*QUICK, *FEW, "--student.depth", "1", "--teacher.allow_near_chance"],
    "folder-teacher": [
        *(*QUICK, *PICTURES),
        *("--student.name", "small_convnet", "--student.drop_path", "0"),
    ],
    "tiny-imagenet-micro": [
        *(*STUDENT, "--optim.batch_size", "32", "--teacher.source", "checkpoints/folder-teacher"),
    ],
    "folder": [*STUDENT, *PICTURES, "--optim.min_lr", "0", "--student.patch_size", "2"],
}
PROGRAMS = ("python", "make", "deit", "torchrun", "accelerate", "pip", "source")


def readme_commands():
    """The commands of the README in order: lines of sh blocks and code spans that start as one."""
    found = []
    for block, span in re.findall(r"```sh\n(.*?)```|`([^`\n]+)`", README, re.DOTALL):
        for line in (block or span).splitlines():
            command = line.split("   #")[0].strip()
            named_only = re.fullmatch(r"deit (?!recipes)\w+", command)
            if command.split(" ")[0] in PROGRAMS and " " in command and not named_only:
                found.append(command)
    return list(dict.fromkeys(found))


def test_the_readme_has_commands_and_the_first_screen_has_picture_and_two_of_them():
    assert len(OURS) > 10
    assert len(OTHERS) > 3
    screen = README.split("## ")[0]
    assert screen.count("make ") == 3  # two commands, one of them named again
    assert "docs/images/digits.png" in screen


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the README's commands expect: pictures, names, a recipe of one's own."""
    from tests.helpers.images import write_class_folders

    place = tmp_path_factory.mktemp("readme")
    write_class_folders(place / "pictures", number=12)
    write_class_folders(place / "data" / "cifar10", number=48, size=(32, 32))
    write_class_folders(
        place / "data" / "tiny-imagenet-200", number=48, size=(64, 64), splits=("train", "val")
    )
    (place / "names.txt").write_text("ant\nbee\n")
    recipe = re.search(r"```python\n(# mine\.py\n.*?)```", README, re.DOTALL).group(1)
    (place / "mine.py").write_text(recipe)
    sweep = re.search(r"```yaml\n(# heat\.yaml.*?)```", README, re.DOTALL).group(1)
    (place / "heat.yaml").write_text(sweep)
    return place


def as_ours(command):
    """(name of our command, its arguments) of a README command line, or None."""
    arguments = shlex.split(command)
    if arguments[0] == "python" and arguments[1].endswith("_deit.py"):
        return arguments[1].removesuffix("_deit.py"), arguments[2:]
    if arguments[0] == "deit" and arguments[1] in COMMANDS:
        return arguments[1], arguments[2:]
    return None


OURS = [command for command in readme_commands() if as_ours(command)]
OTHERS = [command for command in readme_commands() if not as_ours(command)]


def shortened(name, arguments, taught):
    """The arguments of a command of ours, and those that make it short. taught: the option that
    names the teacher of digits, once a comparison has trained it."""
    if name == "compare":
        few = [*SMALL[arguments[0]], "--seeds", "0"]
        few += taught if arguments[0] == "digits" else []
        if "view-modes" in arguments:
            some = () if "--arms" in arguments else ("--arms", "same/rc,fix/ic_ens,none")
            few += [*CROPS, *some]  # all of them: test_target_store.py
        return [*arguments, *few]
    if name == "train":
        return [*arguments, *SMALL[arguments[0]]]
    if name == "sweep":
        return [*arguments, *SMALL["digits"], *taught, "--seeds", "0"]
    if name == "lottery":
        return [*arguments, *SMALL["digits"], *taught]
    if name == "prune":
        return [*arguments, *QUICK, *FEW, "--images", "64", "--teacher.allow_near_chance"]
    if name == "loss-landscape":
        few = (
            "--images 16 --grid 3 --points 3 --rays 2 --num-eigenvalues 1 --steps 2 --probes 2 "
            "--rounds 1"
        )
        return [*arguments, *few.split()]
    if name == "finetune":
        return [*arguments, *QUICK, *FEW, "--teacher.allow_near_chance"]
    if name == "export":
        return [*arguments, "--images", "64"]
    if name == "profile":
        return [*arguments, *NARROW, "--teacher.allow_near_chance"]
    if name == "targets" and arguments[0] == "write":
        return [*arguments, *SMALL[arguments[1]]]
    return arguments


def test_our_commands_run_in_the_readmes_order(place, command_server):
    taught = []
    for command in OURS:
        name, arguments = as_ours(command)
        done = command_server.run(name, *shortened(name, arguments, taught), cwd=place)
        assert done.code == 0, (command, done.err)
        if name == "compare" and not taught:
            out = arguments[arguments.index("--out") + 1]
            taught = ["--teacher.source", f"{out}/teacher"]
    assert (place / "digits.json").is_file()
    assert (place / "checkpoints" / "compare" / "runs.png").stat().st_size > 10_000


def test_the_other_commands_are_real(place, command_server):
    arguments = ("digits-teacher", *SMALL["digits-teacher"], "--out", "taught")
    teacher = command_server.run("train", *arguments, cwd=place)
    assert teacher.code == 0, teacher.err
    for command in OTHERS:
        arguments = shlex.split(command)
        if arguments[0] == "make":
            planned = subprocess.run(
                ["make", "-n", *arguments[1:]], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout
            assert {"quickstart": "deit compare digits", "test": "-m pytest"}[
                arguments[1]
            ] in planned
        elif arguments[0] in ("torchrun", "accelerate"):
            dry_run(arguments, place, command_server)
        elif arguments[:2] == ["python", "scripts/benchmark.py"]:
            # It takes minutes: here its options, in test_benchmark.py what it does.
            script, *options = arguments[1:]
            done = command_server.run(*options, "--rows", "no such row", script=script, cwd=ROOT)
            assert "no such row" in done.err
        else:
            assert arguments[0] == "source" or arguments[:2] in (
                ["pip", "install"],
                ["python", "scripts/results.py"],
            )


def dry_run(arguments, place, command_server):
    """Run what a launcher's line starts for one step, on the CPU; the launcher's own parser reads
    the line. (test_peers.py runs the script by both launchers themselves.)"""
    if arguments[0] == "torchrun":
        asked = get_args_parser().parse_args(arguments[1:])
        number, recipe, environment = int(asked.nproc_per_node), asked.training_script_args, {}
        assert number == 2
    else:
        asked = launch_command_parser().parse_args(arguments[2:])
        assert (arguments[1], asked.multi_gpu, asked.num_processes) == ("launch", True, 8)
        # No eight GPUs here: one process, and a recipe without data.
        number, recipe = 1, ["digits"]
        assert asked.training_script_args[0] in RECIPES
        environment = {"ACCELERATE_MIXED_PRECISION": asked.mixed_precision}
    done = command_server.run_processes(
        *(*recipe, "--teacher.source", "taught", "--teacher.allow_near_chance"),
        *("--dry-run", "--out", "dry"),
        processes=number,
        script=asked.training_script,
        cwd=place,
        **environment,
    )
    assert [one.code for one in done] == [0] * number, "".join(one.err for one in done)
    assert re.search(r"\bloss \d", done[0].out)  # of the one update
    assert not (place / "dry").exists()
    assert "bf16" in done[0].out or not environment


def test_links_and_pictures_of_the_documents_exist():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_tests_that_documents_name_exist():
    """`test_file::test_name` in a document is a test of that name, in that file."""
    named = {
        found
        for path in (ROOT / "docs").glob("*.md")
        for found in re.findall(r"`(test_\w+)::(test_\w+)`", path.read_text())
    }
    assert len(named) > 40
    for file, name in named:
        (path,) = (ROOT / "tests").rglob(f"{file}.py")
        text = path.read_text()
        assert f"\ndef {name}(" in text, (file, name)


def test_the_results_are_those_of_the_files(command_server):
    done = command_server.run("--check", script="scripts/results.py", cwd=ROOT)
    assert done.code == 0, "run: python scripts/results.py"


def test_every_folder_of_the_code_stands_in_the_architecture():
    text = (ROOT / "docs" / "architecture.md").read_text()
    packages = [path for path in (ROOT / "deit").iterdir() if (path / "__init__.py").is_file()]
    for folder in (*packages, ROOT / "models", ROOT / "datasets"):
        assert f"| `{folder.relative_to(ROOT)}/` |" in text, folder
