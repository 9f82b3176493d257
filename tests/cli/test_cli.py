"""The command lines as a user runs them: a process in another folder, codes and messages.

(test_security.py and test_peers.py start the script in a fresh one, test_processes.py `deit`.)
"""

import re

import pytest

from deit.cli.grammar import SHARED, option_of
from deit.config.validation import field_names
from deit.core import run_folder
from tests.helpers.commands import tree

TRAIN, EVALUATE, FINETUNE = "train_deit.py", "evaluate_deit.py", "finetune_deit.py"
BAD_ARGUMENTS = {
    "no recipe": ([TRAIN], "RECIPE", "digits-teacher"),
    "option before recipe": ([TRAIN, "--optim.epochs", "3"], "RECIPE", "digits-teacher"),
    "unknown recipe": ([TRAIN, "digtis"], "'digtis'", "digits?"),
    "unknown field": ([TRAIN, "digits", "--optim.epoch", "3"], "optim.epoch: ", "optim.epochs?"),
    "unknown option": ([TRAIN, "digits", "--rezume"], "rezume: "),
    "stray word": ([TRAIN, "digits", "stray"], "arguments = 'stray'"),
    "several": (
        [TRAIN, "digits", "--optim.epochs=0", "--optim.batch_sise=3", "--views.flip=2"],
        "deit: error: 3 ",
        "optim.epochs = '0'",
        "optim.batch_size?",
        "views.flip = '2'",
    ),
    "wrong type": ([TRAIN, "digits", "--optim.epochs=many"], "optim.epochs = 'many'", "integer"),
    "out of range": ([TRAIN, "digits", "--views.flip=1.5"], "views.flip = '1.5'"),
    "not a number": ([TRAIN, "digits", "--optim.lr=nan"], "optim.lr = 'nan'", "finite"),
    "wrong word": ([TRAIN, "digits", "--run.device=cdua"], "run.device = 'cdua'", "cuda?"),
    "no value": ([TRAIN, "digits", "--optim.epochs"], "optim.epochs"),
    "no output named": ([TRAIN, "digits", "--out"], "--out"),
    "objective": ([TRAIN, "digits", "--loss=deit-hrad"], "'deit-hrad'", "deit-hard?"),
    "student": ([TRAIN, "digits", "--student.name=deit_tniy"], "'deit_tniy'", "deit_tiny?"),
    "no token": (
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
    "odd micro-batch": (
        [TRAIN, "digits", "--views.mixup_alpha=0.8", "--optim.batch_size=63"],
        "optim.batch_size = 63",
        "optim.grad_accum_steps",
    ),
    "accumulation": (
        [TRAIN, "digits", "--optim.grad_accum_steps=5"],
        "optim.grad_accum_steps = 5",
        "optim.batch_size (32)",
    ),
    "patch": (
        [TRAIN, "digits", "--student.patch_size=3"],
        "student.patch_size = 3",
        "student.image_size (8)",
    ),
    "no recipe file": ([TRAIN, "mine.py:mine"], "recipe mine.py:mine: "),
    "no configuration": ([TRAIN, "gone/config.json"], "gone/config.json"),
    "fine-tuning": ([FINETUNE, "digits"], "finetune_deit.py: ", "--from"),
    "evaluate nothing": ([EVALUATE], "RUN", "--help"),
    "compare no value": (
        ["deit", "compare", "digits", "--parallel=--"],
        "--parallel",
        "deit compare --help",
    ),
    "evaluate no value": (
        [EVALUATE, "run", "--json=--"],
        "--json",
        "evaluate_deit.py --help",
    ),
    "for ever": ([TRAIN, "digits", f"--run.timeout_s={2**63 - 1}"], "run.timeout_s", "1000000000"),
    "evaluate split": ([EVALUATE, "run", "--split=train"], "'train'", "validation"),
    "evaluate option": ([EVALUATE, "run", "--jsno=x"], "--jsno=x", "--help"),
    "command": (["deit", "trian"], "'trian'", "train?"),
    "recipes option": (["deit", "recipes", "--long"], "--long", "--help"),
    "seeds": (["deit", "compare", "digits", "--seeds=a"], "--seeds a"),
    "study": (
        ["deit", "compare", "digits", "--study=epoch"],
        "--study epoch",
        "epochs?",
    ),
    "arm": (
        ["deit", "compare", "digits", "--study=view-modes", "--arms=same/cc"],
        "--arms same/cc",
    ),
    "no arm": (["deit", "compare", "digits", "--arms=same/rc"], "--arms same/rc", "undistilled"),
    "teaching": ([TRAIN, "digits", "--view-mode=same"], "--view-mode = 'same'", "same/rc"),
    "crops online": (
        [TRAIN, "digits", "--view-mode=fix/ic_ens"],
        "views.teacher_view = 'crops'",
        "deit targets write",
    ),
    "two views of a pair": (
        [TRAIN, "digits", "--views.teacher_view=independent"],
        "views.teacher_view = 'independent'",
        "--view-mode",
    ),
    "two classes": (
        [TRAIN, "digits", "--loss=dkd"],
        "loss.kind = 'dkd'",
        "--augmentation none",
    ),
    "targets": (["deit", "targets"], "deit targets: ", "write", "verify"),
    "targets action": (["deit", "targets", "wriet", "digits"], "'wriet'", "write?"),
    "no store": (["deit", "targets", "write", "digits"], "--out STORE"),
    "shard": (["deit", "targets", "write", "digits", "--out=s", "--part=4/4"], "--part 4/4"),
    "records": (
        ["deit", "targets", "write", "digits", "--out=s", "--content=soft"],
        "--content soft",
        "top-10",
    ),
    "no epochs": (["deit", "targets", "write", "digits", "--out=s", "--epochs=0"], "--epochs 0"),
    "nothing to ask": (
        ["deit", "targets", "write", "digits-teacher", "--out=s"],
        "loss.kind = 'none'",
    ),
    "dry writing": (
        ["deit", "targets", "write", "digits", "--out=s", "--dry-run"],
        "deit targets write: ",
        "--dry-run",
    ),
    "resumed views": (
        ["deit", "show-views", "digits", "--resume"],
        "deit show-views: ",
        "--resume",
    ),
    "lone ensemble": (
        ["deit", "compare", "digits", "--study=ensemble"],
        "--study ensemble",
        "--teacher.source",
    ),
    "rows": (["deit", "targets", "verify", "s", "--num-queries=0"], "--num-queries 0"),
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
    ids=["no configuration", "no function", "broken", "leaves"],
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


OF_A_RUN = {
    "evaluate": ["deit", "evaluate", "RUN"],
    "evaluate, by its script": [EVALUATE, "RUN"],
    "predict": ["deit", "predict", "RUN", "picture.png"],
    "export": ["deit", "export", "RUN", "--format=timm"],
    "quantize": ["deit", "quantize", "RUN"],
    "prune": ["deit", "prune", "RUN"],
    "loss-landscape": ["deit", "loss-landscape", "RUN"],
    "variants": ["deit", "variants", "RUN"],
    "report": ["deit", "report", "RUN"],
}


@pytest.mark.parametrize("place", ["nowhere", "empty"])
@pytest.mark.parametrize("command", OF_A_RUN)
def test_a_run_that_is_not_there_is_refused_alike_by_all(command, place, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    arguments = (word.replace("RUN", place) for word in OF_A_RUN[command])
    refused(4, (f"deit: error: {place}: ",), *arguments)


def test_a_folder_of_runs_names_one_of_them(refused, tmp_path):
    (tmp_path / "out" / "recovered").mkdir(parents=True)
    (tmp_path / "out" / "recovered" / run_folder.CONFIG).touch()
    refused(4, ("out: ", "config.json", "out/recovered"), "deit", "evaluate", "out")


def test_debug_shows_where(run):
    done = run(TRAIN, "digits", "--optim.epochs=0", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.count("deit: error: ") == 1


@pytest.mark.parametrize("command", [(TRAIN,), (TRAIN, "cifar10"), ("deit", "train", "folder")])
def test_help_shows_every_field_and_its_default(run, command):
    done = run(*command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    _, *options = re.split(r"\n  --", done.stdout)
    switches = ("resume", "dry-run", "print-config")
    for name in ("out", "loss", "augmentation", "view-mode", *switches, *field_names()):
        texts = [text for text in options if re.match(rf"{re.escape(name)}[,\s]", text)]
        assert len(texts) == 1, name
        assert name in switches or re.search(r"default[:,]\s+\S", texts[0], re.IGNORECASE), name


# Each command that takes a configuration: its own options, and shared ones it has no use for.
_OF_RUNS = {
    "train": ("", ""),
    "finetune": ("from resolution schedule", ""),
    "compare": ("study arms seeds parallel retries", "resume"),
    "sweep": ("recipe seeds parallel retries top", "resume"),
    "prune": (
        "ratio heads hidden macs scope criterion images checkpoint schedule controls parallel",
        "resume",
    ),
    "lottery": (
        "rounds prune-rate scope rewind-epoch controls control-rounds tolerance seeds parallel "
        "retries",
        "resume",
    ),
    "show-views": ("out force epoch num-views", "resume dry-run print-config"),
    "targets write": ("out epochs content part teacher-index", "resume dry-run"),
    "profile": ("updates trace json force", "out resume dry-run print-config"),
}
_NAMED_FIRST = {"sweep": "teacher"}


@pytest.mark.parametrize("command", _OF_RUNS)
def test_help_tells_a_commands_own_options_first_and_none_it_refuses(run, command, tmp_path):
    own, refused = (names.split() for names in _OF_RUNS[command])
    done = run("deit", *command.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    first = done.stdout.partition("data options")[0]
    listed = re.findall(r"^  --([\w.-]+)", first, re.MULTILINE)
    shared = [option_of(name)[2:] for name in SHARED]
    shared = [name for name in shared if name not in own and name not in refused]
    assert listed == [*own, *shared]
    for option in re.split(r"\n  --", first)[1:]:
        assert len(option.split()) > 4, f"says nothing: {option}"
    assert "RECIPE" in first.partition("[OPTIONS]")[0] or command == "prune"


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (command, option)
        for command, (_, refused) in _OF_RUNS.items()
        for option in refused.split()
        if command != "prune"  # which asks for a run first; see its own tests
    ],
)
def test_an_option_that_a_command_has_no_use_for_says_what_to_do(command, option, run, tmp_path):
    done = run("deit", *command.split(), _NAMED_FIRST.get(command, "digits"), f"--{option}")
    assert (done.returncode, done.stdout) == (2, "")
    said = re.fullmatch(rf"deit: error: deit {command}: .*--{option}\b(.*)\n", done.stderr)
    assert len(said[1].split()) > 3  # what to do instead
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("lottery", "digits", "--control_rounds=9"), "--control-rounds 9: "),
        (("lottery", "digits", "--parallel", "0", "--dry-run"), "--parallel 0: "),
        (("targets", "write", "digits", "--con-tent", "x"), "con_tent: "),
        (("quantize", "run", "--quantize_attention", "--max_drop=-1"), "--max-drop -1: "),
        (("show-views", "digits", "--dry-run"), "--dry-run"),
    ],
)
def test_hyphens_within_options_are_underscores(run, arguments, named):
    """Fields are spelled with underscores, the options of commands with hyphens; both are read."""
    done = run("deit", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert named in done.stderr
