"""Every command of the README runs, with shorter training; its tables and links are up to date."""

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
SMALL_IMAGES = shlex.split("--data.image_size 8 --student.image_size 8 --optim.batch_size 8")
FEW = shlex.split("--data.train_fraction 0.1")  # 129 digits
NARROW = shlex.split("--student.depth 1 --student.embed_dim 16 --student.num_heads 2")
CROPS = ["--views.teacher_num_crops", "3"]
STUDENT = [*QUICK, *NARROW, "--teacher.allow_near_chance"]
SMALL = {
    "digits-teacher": [*QUICK, *FEW],
    "digits": [*STUDENT, *FEW],
    # Their initial weights and teachers are runs of earlier commands.
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
        *(*QUICK, *SMALL_IMAGES),
        *("--student.name", "small_convnet", "--student.drop_path", "0"),
    ],
    "tiny-imagenet-micro": [
        *(*STUDENT, "--optim.batch_size", "32", "--teacher.source", "checkpoints/folder-teacher"),
    ],
    "folder": [*STUDENT, *SMALL_IMAGES, "--optim.min_lr", "0", "--student.patch_size", "2"],
}
PROGRAMS = ("python", "make", "deit", "torchrun", "accelerate", "pip", "source")


def readme_commands():
    """Return the README's commands in order, from sh blocks and code spans."""
    commands = []
    for block, span in re.findall(r"```sh\n(.*?)```|`([^`\n]+)`", README, re.DOTALL):
        for line in (block or span).splitlines():
            command = line.split("   #")[0].strip()
            is_bare_name = re.fullmatch(r"deit (?!recipes)\w+", command)
            if command.split(" ")[0] in PROGRAMS and " " in command and not is_bare_name:
                commands.append(command)
    return list(dict.fromkeys(commands))


def test_readme_has_commands_and_a_figure_on_the_first_screen():
    assert len(DEIT_COMMANDS) > 10
    assert len(OTHER_COMMANDS) > 3
    screen = README.split("## ")[0]
    assert screen.count("make ") == 3  # two commands, one of them twice
    assert "docs/images/digits.png" in screen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the inputs of the README's commands: images, class names, a recipe."""
    from tests.helpers.images import write_class_folders

    folder = tmp_path_factory.mktemp("readme")
    write_class_folders(folder / "pictures", images_per_class=12)
    write_class_folders(folder / "data" / "cifar10", images_per_class=48, size=(32, 32))
    write_class_folders(
        folder / "data" / "tiny-imagenet-200",
        images_per_class=48,
        size=(64, 64),
        splits=("train", "val"),
    )
    (folder / "names.txt").write_text("ant\nbee\n")
    recipe = re.search(r"```python\n(# mine\.py\n.*?)```", README, re.DOTALL).group(1)
    (folder / "mine.py").write_text(recipe)
    sweep = re.search(r"```yaml\n(# heat\.yaml.*?)```", README, re.DOTALL).group(1)
    (folder / "heat.yaml").write_text(sweep)
    return folder


def as_deit_command(line):
    """Return (name, arguments) of a command line of deit, or None for other programs."""
    program, *arguments = shlex.split(line)
    if program == "python" and arguments[0].endswith("_deit.py"):
        return arguments[0].removesuffix("_deit.py"), arguments[1:]
    if program == "deit" and arguments[0] in COMMANDS:
        return arguments[0], arguments[1:]
    return None


DEIT_COMMANDS = [line for line in readme_commands() if as_deit_command(line)]
OTHER_COMMANDS = [line for line in readme_commands() if not as_deit_command(line)]


def shortened(name, arguments, teacher):
    """Return the arguments of a deit command with those that make it short.

    teacher: the option that names the teacher of digits, after a comparison has trained it.
    """
    if name == "compare":
        few = [*SMALL[arguments[0]], "--seeds", "0"]
        few += teacher if arguments[0] == "digits" else []
        if "view-modes" in arguments:
            arms = () if "--arms" in arguments else ("--arms", "same/rc,fix/ic_ens,none")
            few += [*CROPS, *arms]  # test_target_store.py runs all view modes
        return [*arguments, *few]
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


def test_deit_commands_run_in_the_order_of_the_readme(folder, command_server):
    teacher = []
    for line in DEIT_COMMANDS:
        name, arguments = as_deit_command(line)
        done = command_server.run(name, *shortened(name, arguments, teacher), cwd=folder)
        assert done.code == 0, (line, done.err)
        if name == "compare" and not teacher:
            out = arguments[arguments.index("--out") + 1]
            teacher = ["--teacher.source", f"{out}/teacher"]
    assert (folder / "digits.json").is_file()
    assert (folder / "checkpoints" / "compare" / "runs.png").stat().st_size > 10_000


def test_other_commands_of_the_readme_are_valid(folder, command_server):
    arguments = ("digits-teacher", *SMALL["digits-teacher"], "--out", "teacher")
    done = command_server.run("train", *arguments, cwd=folder)
    assert done.code == 0, done.err
    for line in OTHER_COMMANDS:
        program, *arguments = shlex.split(line)
        if program == "make":
            planned = subprocess.run(
                ["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout
            assert {"quickstart": "deit compare digits", "test": "-m pytest"}[
                arguments[0]
            ] in planned
        elif program in ("torchrun", "accelerate"):
            dry_run(program, arguments, folder, command_server)
        elif program == "python" and arguments[0] == "scripts/benchmark.py":
            # It takes minutes: only its options are tested here, the rest in test_benchmark.py.
            script, *options = arguments
            done = command_server.run(*options, "--rows", "no such row", script=script, cwd=ROOT)
            assert "no such row" in done.err
        else:
            assert program == "source" or (program, arguments[0]) in (
                ("pip", "install"),
                ("python", "scripts/results.py"),
            )


def dry_run(launcher, arguments, folder, command_server):
    """Run one step of a launcher's command on the CPU, without the launcher itself.

    The launcher's parser reads the arguments. (test_peers.py runs both launchers.)
    """
    if launcher == "torchrun":
        options = get_args_parser().parse_args(arguments)
        processes, recipe = int(options.nproc_per_node), options.training_script_args
        environment = {}
        assert processes == 2
    else:
        options = launch_command_parser().parse_args(arguments[1:])
        assert (arguments[0], options.multi_gpu, options.num_processes) == ("launch", True, 8)
        # There are no eight GPUs: one process, and a recipe that needs no data.
        processes, recipe = 1, ["digits"]
        assert options.training_script_args[0] in RECIPES
        environment = {"ACCELERATE_MIXED_PRECISION": options.mixed_precision}
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


def test_links_and_images_of_the_documents_exist():
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_tests_that_documents_name_exist():
    """`test_file::test_name` in a document is a test of that name, in that file."""
    named = {
        reference
        for path in (ROOT / "docs").glob("*.md")
        for reference in re.findall(r"`(test_\w+)::(test_\w+)`", path.read_text())
    }
    assert len(named) > 40
    for file, name in named:
        (path,) = (ROOT / "tests").rglob(f"{file}.py")
        text = path.read_text()
        assert f"\ndef {name}(" in text, (file, name)


def test_generated_tables_match_the_result_files(command_server):
    done = command_server.run("--check", script="scripts/results.py", cwd=ROOT)
    assert done.code == 0, "run: python scripts/results.py"


def test_architecture_lists_every_folder_of_the_code():
    text = (ROOT / "docs" / "architecture.md").read_text()
    packages = [path for path in (ROOT / "deit").iterdir() if (path / "__init__.py").is_file()]
    for folder in (*packages, ROOT / "models", ROOT / "datasets"):
        assert f"| `{folder.relative_to(ROOT)}/` |" in text, folder
