"""Commands with wrong arguments: the exit code, and a message that names them.

(test_security.py and test_peers.py start the script in a fresh process.)
"""

import json
import re

import pytest

from deit.cli.commands import _OTHER_NAMES, COMMANDS, suggest_command
from deit.core import run_folder
from tests.helpers.commands import COMMANDS_WITH_CONFIG, tree

TRAIN, EVALUATE, FINETUNE = "train_deit.py", "evaluate_deit.py", "finetune_deit.py"
BAD_ARGUMENTS = {
    "no recipe": ([TRAIN], "RECIPE", "digits-teacher"),
    "option before recipe": ([TRAIN, "--optim.epochs", "3"], "RECIPE", "digits-teacher"),
    "unknown recipe": ([TRAIN, "digtis"], "'digtis'; did you mean digits", "`deit recipes`"),
    "data as an option": ([TRAIN, "digits", "--data", "x"], "--data: ", " --data.root?"),
    "unknown field": (
        [TRAIN, "digits", "--optim.epoch", "3"],
        "--optim.epoch: ",
        " --optim.epochs?",
    ),
    "unknown option": ([TRAIN, "digits", "--rezume"], "--rezume: ", "--resume?"),
    "unexpected argument": ([TRAIN, "digits", "stray"], "arguments = 'stray'"),
    "several problems": (
        [TRAIN, "digits", "--optim.epochs=0", "--optim.batch_sise=3", "--views.flip=2"],
        "deit: error: 3 ",
        "optim.epochs = '0'",
        "optim.batch_size?",
        "views.flip = '2'",
    ),
    "wrong type": ([TRAIN, "digits", "--optim.epochs=many"], "optim.epochs = 'many'", "integer"),
    "out of range": ([TRAIN, "digits", "--views.flip=1.5"], "views.flip = '1.5'"),
    "not a number": ([TRAIN, "digits", "--optim.lr=nan"], "optim.lr = 'nan'", "finite"),
    "unknown choice": ([TRAIN, "digits", "--run.device=cdua"], "run.device = 'cdua'", "cuda?"),
    "no value": ([TRAIN, "digits", "--optim.epochs"], "optim.epochs"),
    "no output folder": ([TRAIN, "digits", "--out"], "--out"),
    "loss preset": ([TRAIN, "digits", "--loss=deit-hrad"], "'deit-hrad'", "deit-hard?"),
    "student name": ([TRAIN, "digits", "--student.name=deit_tniy"], "'deit_tniy'", "deit_tiny?"),
    "no distillation token": (
        [TRAIN, "digits", "--student.name=vit_micro"],
        "student.name = 'vit_micro'",
        "student.name deit_micro",
    ),
    "untrained head": (
        [TRAIN, "digits", "--loss=class-hard"],
        "loss.head = 'class'",
        "student.name vit_micro",
    ),
    "no teacher": ([TRAIN, "digits", "--teacher.source=none"], "teacher.source", "loss none"),
    "odd micro-batch with mixup": (
        [TRAIN, "digits", "--views.mixup_alpha=0.8", "--optim.batch_size=63"],
        "optim.batch_size = 63",
        "optim.grad_accum_steps",
    ),
    "accumulation": (
        [TRAIN, "digits", "--optim.grad_accum_steps=5"],
        "optim.grad_accum_steps = 5",
        "optim.batch_size (32)",
    ),
    "patch size": (
        [TRAIN, "digits", "--student.patch_size=3"],
        "student.patch_size = 3",
        "student.image_size (8)",
    ),
    "no recipe file": ([TRAIN, "mine.py:mine"], "recipe mine.py:mine: "),
    "no configuration": ([TRAIN, "gone/config.json"], "gone/config.json"),
    "fine-tuning": ([FINETUNE, "digits"], "finetune_deit.py: ", "--from"),
    "evaluate without run": ([EVALUATE], "RUN", "--help"),
    "double hyphen as value of compare": (
        ["deit", "compare", "digits", "--parallel=--"],
        "--parallel",
        "deit compare --help",
    ),
    "double hyphen as value of evaluate": (
        [EVALUATE, "run", "--json=--"],
        "--json",
        "evaluate_deit.py --help",
    ),
    "timeout too large": (
        [TRAIN, "digits", f"--run.timeout_s={2**63 - 1}"],
        "run.timeout_s",
        "1000000000",
    ),
    "evaluate split": ([EVALUATE, "run", "--split=train"], "'train'", "validation"),
    "evaluate option": ([EVALUATE, "run", "--jsno=x"], "--jsno=x; did you mean --json?", "--help"),
    "unknown option of a command without its required one": (
        ["deit", "export", "run", "--fromat", "onnx"],
        "--fromat; did you mean --format?",
    ),
    "unknown command": (["deit", "trian"], "'trian'", "train?"),
    "recipes option": (["deit", "recipes", "--long"], "--long", "--help"),
    "seeds": (["deit", "compare", "digits", "--seeds=a"], "--seeds a"),
    "unknown study": (
        ["deit", "compare", "digits", "--study=epoch"],
        "--study epoch",
        "epochs?",
    ),
    "unknown arm": (
        ["deit", "compare", "digits", "--study=view-modes", "--arms=same/cc"],
        "--arms same/cc",
    ),
    "arm of another study": (
        ["deit", "compare", "digits", "--arms=same/rc"],
        "--arms same/rc",
        "undistilled",
    ),
    "view mode": ([TRAIN, "digits", "--view-mode=same"], "--view-mode = 'same'", "same/rc"),
    "crops with a live teacher": (
        [TRAIN, "digits", "--view-mode=fix/ic_ens"],
        "views.teacher_view = 'crops'",
        "deit targets write",
    ),
    "independent view with mixup": (
        [TRAIN, "digits", "--views.teacher_view=independent"],
        "views.teacher_view = 'independent'",
        "--view-mode",
    ),
    "dkd with mixup": (
        [TRAIN, "digits", "--loss=dkd"],
        "loss.kind = 'dkd'",
        "--augmentation none",
    ),
    "targets without action": (["deit", "targets"], "deit targets: ", "write", "verify"),
    "targets action": (["deit", "targets", "wriet", "digits"], "'wriet'", "write?"),
    "no store": (["deit", "targets", "write", "digits"], "--out STORE"),
    "targets part": (["deit", "targets", "write", "digits", "--out=s", "--part=4/4"], "--part 4/4"),
    "targets content": (
        ["deit", "targets", "write", "digits", "--out=s", "--content=soft"],
        "--content soft",
        "top-10",
    ),
    "targets without epochs": (
        ["deit", "targets", "write", "digits", "--out=s", "--epochs=0"],
        "--epochs 0",
    ),
    "targets without teacher": (
        ["deit", "targets", "write", "digits-teacher", "--out=s"],
        "loss.kind = 'none'",
    ),
    "targets dry run": (
        ["deit", "targets", "write", "digits", "--out=s", "--dry-run"],
        "deit targets write: ",
        "--dry-run",
    ),
    "show-views resumed": (
        ["deit", "show-views", "digits", "--resume"],
        "deit show-views: ",
        "--resume",
    ),
    "ensemble of one teacher": (
        ["deit", "compare", "digits", "--study=ensemble"],
        "study ensemble",
        "teacher.source",
    ),
    "targets verify without queries": (
        ["deit", "targets", "verify", "s", "--num-queries=0"],
        "--num-queries 0",
    ),
}


@pytest.mark.fault("D16")
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_argument_is_refused(case, refused):
    command, *fragments = BAD_ARGUMENTS[case]
    refused(2, fragments, *command)


@pytest.mark.parametrize(
    ("source", "fragments"),
    [
        ("def mine():\n    return 3", ("mine.py:mine", "Config", " int")),
        ("def other():\n    pass", ("mine.py:mine", "'mine'")),
        ("import nothing_like_this", ("mine.py:mine", "nothing_like_this")),
        ("import sys\nsys.exit('no')", ("mine.py:mine", "SystemExit: no")),
    ],
    ids=["returns no Config", "no function", "import error", "calls sys.exit"],
)
def test_bad_recipe_file_is_refused(source, fragments, refused, tmp_path):
    (tmp_path / "mine.py").write_text(source)
    refused(2, fragments, TRAIN, "mine.py:mine")


@pytest.mark.fault("E10")
@pytest.mark.parametrize("text", ["", "{", "[1]", '{"optim": {"epochs": -1}, "nonsense": {}}'])
def test_bad_configuration_file_is_refused(text, refused, tmp_path):
    (tmp_path / "config.json").write_text(text)
    fragments = ("optim.epochs", "nonsense") if "nonsense" in text else ("config.json",)
    refused(2, fragments, TRAIN, "config.json")


COMMANDS_WITH_RUN = {
    "evaluate": ["deit", "evaluate", "RUN"],
    "evaluate_deit.py": [EVALUATE, "RUN"],
    "predict": ["deit", "predict", "RUN", "image.png"],
    "export": ["deit", "export", "RUN", "--format=timm"],
    "quantize": ["deit", "quantize", "RUN"],
    "prune": ["deit", "prune", "RUN"],
    "loss-landscape": ["deit", "loss-landscape", "RUN"],
    "variants": ["deit", "variants", "RUN"],
    "report": ["deit", "report", "RUN"],
}


@pytest.mark.parametrize("folder", ["missing", "empty"])
@pytest.mark.parametrize("command", COMMANDS_WITH_RUN)
def test_missing_run_has_same_message_in_every_command(command, folder, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    arguments = (word.replace("RUN", folder) for word in COMMANDS_WITH_RUN[command])
    refused(4, (f"deit: error: {folder}: ",), *arguments)


def test_folder_of_runs_is_refused_with_the_name_of_one_run(refused, tmp_path):
    (tmp_path / "out" / "recovered").mkdir(parents=True)
    (tmp_path / "out" / "recovered" / run_folder.CONFIG).touch()
    refused(4, ("out: ", "config.json", "out/recovered"), "deit", "evaluate", "out")


def test_debug_option_prints_traceback(run):
    done = run(TRAIN, "digits", "--optim.epochs=0", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.count("deit: error: ") == 1


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (command, option)
        for command, (_, refused) in COMMANDS_WITH_CONFIG.items()
        for option in refused.split()
        if command != "prune"  # needs a run first; see its own tests
    ],
)
def test_excluded_option_is_refused_with_advice(command, option, run, tmp_path):
    first = "teacher" if command == "sweep" else "digits"
    done = run("deit", *command.split(), first, f"--{option}")
    assert (done.returncode, done.stdout) == (2, "")
    message = re.fullmatch(rf"deit: error: deit {command}: .*--{option}\b(.*)\n", done.stderr)
    assert len(message[1].split()) > 3  # what to do instead
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("lottery", "digits", "--control_rounds=9"), "--control-rounds 9: "),
        (("lottery", "digits", "--parallel", "0", "--dry-run"), "--parallel 0: "),
        (("targets", "write", "digits", "--con_tent", "x"), "--con_tent: "),
        (("quantize", "run", "--quantize_attention", "--max_drop=-1"), "--max-drop -1: "),
        (("show-views", "digits", "--dry-run"), "--dry-run"),
    ],
)
def test_options_accept_hyphens_and_underscores(run, arguments, fragment):
    """Messages use underscores for fields and hyphens for the options of commands."""
    done = run("deit", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert fragment in done.stderr


def test_mistyped_option_of_a_command_is_suggested(run):
    done = run("deit", "lottery", "digits", "--rouds", "3")
    assert done.returncode == 2
    assert re.search(r" --rouds: .* --rounds\?", done.stderr)


@pytest.mark.parametrize("recipe", ["digits", "imagenet-subset"])
def test_printed_configuration_can_be_used_as_recipe(run, recipe, tmp_path):
    options = ("--optim.lr=0.00123", "--data.classes=1,2", "--views.mean=0.1,0.2,0.3")
    options += ("--views.std=1,2,3", "--optim.clip_grad_norm=none", "--loss=deit-soft")
    first = run(TRAIN, recipe, *options, "--print-config")
    assert (first.returncode, first.stderr) == (0, "")
    values = json.loads(first.stdout)
    assert values["optim"]["lr"] == 0.00123
    assert values["data"]["classes"] == ["1", "2"]
    assert values["loss"]["temperature"] == 3
    assert tree(tmp_path) == {}
    (tmp_path / "config.json").write_text(first.stdout)
    again = run(TRAIN, "config.json", "--print-config")
    assert (again.returncode, again.stdout) == (0, first.stdout)


def test_function_in_python_file_is_a_recipe(run, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from deit.config.recipes import find_recipe\n\n"
        "def short():\n    short = {'epochs': 7, 'warmup_epochs': 1}\n"
        "    return find_recipe('digits').replace(optim=short)\n"
    )
    done = run(TRAIN, "mine.py:short", "--run.seed=3", "--print-config")
    assert (done.returncode, done.stderr) == (0, "")
    values = json.loads(done.stdout)
    assert (values["optim"]["epochs"], values["run"]["seed"]) == (7, 3)


@pytest.mark.parametrize("name", _OTHER_NAMES)
def test_other_name_of_a_command_leads_to_it(name):
    assert name not in COMMANDS
    assert _OTHER_NAMES[name] in COMMANDS
    assert suggest_command(name) == f"; did you mean {_OTHER_NAMES[name]}?"


@pytest.mark.parametrize("command", COMMANDS)
def test_command_with_a_missing_letter_leads_to_it(command):
    assert suggest_command(command[:2] + command[3:]) == f"; did you mean {command}?"
