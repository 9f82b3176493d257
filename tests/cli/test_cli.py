"""The command lines as a user runs them: a process in another folder, codes and messages.

(test_security.py and test_peers.py start the script in a fresh one, test_processes.py `deit`.)
"""

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import deit
from deit.cli.grammar import SHARED, option_of
from deit.config.recipes import RECIPES
from deit.config.student_section import StudentConfig
from deit.config.validation import field_names
from deit.core import run_folder
from deit.experiments.studies import STUDIES
from deit.models.saved import ModelInfo, build_student
from tests.helpers.commands import TEN, assert_refused, fake_teacher, run_in, tree
from tests.helpers.odd_input import Try, run_try

TRAIN, EVALUATE, FINETUNE = "train_deit.py", "evaluate_deit.py", "finetune_deit.py"
# A run of seconds: a fifth of the training digits in two updates.
QUICK = (
    *("--optim.epochs=1", "--optim.warmup_epochs=0", "--optim.batch_size=128"),
    "--data.train_fraction=0.2",
)
SMALL = ("--student.embed_dim=16", "--student.depth=1", "--student.num_heads=2")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def bound(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return run_in(tmp_path, program, *arguments)

    return bound


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Callable[..., None]:
    """Asserts that a command is refused with this code and these words, and writes nothing."""

    def check(code: int, words: tuple[str, ...], *command: object) -> None:
        before = tree(tmp_path)
        assert_refused(run(*command), code, *words)
        assert tree(tmp_path) == before, "something was written"

    return check


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
    command, *words = BAD_ARGUMENTS[case]
    refused(2, words, *command)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def mine():\n    return 3", ("mine.py:mine", "Config", " int")),
        ("def other():\n    pass", ("mine.py:mine", "'mine'")),
        ("import nothing_like_this", ("mine.py:mine", "nothing_like_this")),
        ("import sys\nsys.exit('no')", ("mine.py:mine", "SystemExit: no")),
    ],
    ids=["no configuration", "no function", "broken", "leaves"],
)
def test_bad_recipe_file_is_refused(source, words, refused, tmp_path):
    (tmp_path / "mine.py").write_text(source)
    refused(2, words, TRAIN, "mine.py:mine")


@pytest.mark.fault("E10")
@pytest.mark.parametrize("text", ["", "{", "[1]", '{"optim": {"epochs": -1}, "nonsense": {}}'])
def test_bad_configuration_file_is_refused(text, refused, tmp_path):
    (tmp_path / "config.json").write_text(text)
    words = ("optim.epochs", "nonsense") if "nonsense" in text else ("config.json",)
    refused(2, words, TRAIN, "config.json")


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
    words = (word.replace("RUN", place) for word in OF_A_RUN[command])
    refused(4, (f"deit: error: {place}: ",), *words)


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
    ("words", "named"),
    [
        (("lottery", "digits", "--control_rounds=9"), "--control-rounds 9: "),
        (("lottery", "digits", "--parallel", "0", "--dry-run"), "--parallel 0: "),
        (("targets", "write", "digits", "--con-tent", "x"), "con_tent: "),
        (("quantize", "run", "--quantize_attention", "--max_drop=-1"), "--max-drop -1: "),
        (("show-views", "digits", "--dry-run"), "--dry-run"),
    ],
)
def test_hyphens_within_options_are_underscores(run, words, named):
    """Fields are spelled with underscores, the options of commands with hyphens; both are read."""
    done = run("deit", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert named in done.stderr


def test_help_names_every_study(run):
    told = run("deit", "compare", "--help").stdout.partition("--arms")[0]
    told = " ".join(told.split())
    assert [name for name in STUDIES if f" {name} (" not in told] == []


def test_a_mistyped_option_of_the_command_itself_is_recognised(run):
    done = run("deit", "lottery", "digits", "--rouds", "3")
    assert done.returncode == 2
    assert re.search(r" rouds: .*\brounds\?", done.stderr)


@pytest.mark.parametrize("words", [(EVALUATE, "--help"), ("deit", "--help"), ("deit", "help")])
def test_help_of_the_other_programs(run, words):
    done = run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage" in done.stdout


def test_help_names_a_command(run):
    assert run("deit", "help", "show-views").stdout == run("deit", "show-views", "--help").stdout
    for word in ("help", "--version"):
        assert run("deit", "help", word).stdout == run("deit", "--help").stdout
    unknown = run("deit", "help", "shw-views")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert re.search(r"'shw-views'.*\bshow-views\?", unknown.stderr)


def test_no_command_is_an_error_that_shows_them_all(run):
    """An error goes to standard error, even a whole list."""
    none, asked = run("deit"), run("deit", "--help")
    assert (none.returncode, none.stdout, none.stderr) == (2, "", asked.stdout)


def test_deit_lists_recipes_and_version(run, tmp_path):
    listed = run("deit", "recipes")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert [name for name in RECIPES if f" {name} " not in listed.stdout] == []
    version = run("deit", "--version")
    assert (version.returncode, version.stdout) == (0, f"deit {deit.__version__}\n")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("recipe", ["digits", "imagenet-subset"])
def test_printed_configuration_is_a_recipe(run, recipe, tmp_path):
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


def test_a_file_of_the_user_is_a_recipe(run, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from deit.config.recipes import find_recipe\n\n"
        "def short():\n    short = {'epochs': 7, 'warmup_epochs': 1}\n"
        "    return find_recipe('digits').replace(optim=short)\n"
    )
    done = run(TRAIN, "mine.py:short", "--run.seed=3", "--print-config")
    assert (done.returncode, done.stderr) == (0, "")
    values = json.loads(done.stdout)
    assert (values["optim"]["epochs"], values["run"]["seed"]) == (7, 3)


def folders(root: Path, *names: str, number: int = 6) -> Path:
    """A folder of class folders with grey images."""
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(number):
            Image.new("RGB", (8, 8), (20 * index,) * 3).save(root / name / f"{index}.png")
    return root


FOLDER = ("folder-teacher", "--data.root=images", "--out=run", "--optim.batch_size=2")


@pytest.mark.fault("C12")
def test_missing_folder_is_named(refused):
    refused(3, ("data.root images", "train/CLASS/IMAGE"), TRAIN, *FOLDER)


def test_missing_cifar_says_how_to_get_it(refused):
    words = ("data.root data", "cifar-10-batches-py", "--data.download")
    refused(3, words, TRAIN, "cifar10-micro-teacher", "--out=run")


@pytest.mark.fault("C12")
def test_empty_folder_is_named(refused, tmp_path):
    (tmp_path / "images").mkdir()
    refused(3, ("images: ", "images/CLASS/IMAGE"), TRAIN, *FOLDER)


@pytest.mark.fault("C13")
def test_empty_class_is_named(refused, tmp_path):
    folders(tmp_path / "images", "ant", "bee")
    (tmp_path / "images" / "cat").mkdir()
    refused(3, ("images/cat: ",), TRAIN, *FOLDER)


@pytest.mark.fault("C2")
def test_corrupt_image_is_named(refused, tmp_path):
    folders(tmp_path / "images", "ant", "bee")
    (tmp_path / "images" / "bee" / "3.png").write_bytes(b"no image at all")
    refused(3, ("images/bee/3.png: ", "15 bytes"), TRAIN, *FOLDER)


@pytest.mark.fault("C19")
def test_batch_larger_than_the_data_is_refused(refused):
    command = (TRAIN, "digits-teacher", "--out=run", "--optim.batch_size=5000")
    refused(3, ("optim.batch_size = 5000", "1295"), *command)


def test_missing_teacher_says_how_to_train_one(refused):
    words = ("teacher.source checkpoints/digits-teacher", "train_deit.py digits-teacher")
    refused(3, words, TRAIN, "digits", "--out=run")


@pytest.mark.fault("D1")
def test_teacher_of_other_classes_is_refused(refused, tmp_path):
    fake_teacher(tmp_path / "teacher", ("zero", *TEN[1:]))
    words = ("from teacher", " 1: '0'")  # so many it lacks
    refused(3, words, TRAIN, "digits", "--out=run", "--teacher.source=teacher")


@pytest.mark.fault("D2")
def test_teacher_near_chance_is_refused_unless_allowed(run, tmp_path):
    fake_teacher(tmp_path / "teacher", TEN)
    before = tree(tmp_path)
    command = (TRAIN, "digits", *QUICK, *SMALL, "--out=run", "--teacher.source=teacher")
    done = run(*command)
    assert_refused(done, 3, "from teacher", "10.5 %", "--teacher.allow")  # that is chance
    assert tree(tmp_path) == before, "something was written"
    allowed = run(*command, "--dry-run", re.search(r"--teacher\.allow_near_chance", done.stderr)[0])
    assert allowed.returncode == 0, allowed.stderr
    assert re.search(r"deit: warning: .*from teacher\b.*10\.5 %", allowed.stderr)
    assert tree(tmp_path) == before, "the dry run wrote something"


FILE_TEACHER = ("--teacher.architecture=small_convnet", "--teacher.image_size=8")
FILE_TEACHER += ("--teacher.mean=0.5,0.5,0.5", "--teacher.std=0.5,0.5,0.5")


class Malicious:
    """Unpickled, it would run a command that leaves a canary."""

    def __reduce__(self):
        return os.system, ("touch canary",)


def garbage(folder: Path) -> Path:
    path = folder / "teacher.pth"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def truncated(folder: Path) -> Path:
    path = folder / "teacher.safetensors"
    save_file({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def malicious(folder: Path) -> Path:
    path = folder / "teacher.pth"
    torch.save({"model": Malicious()}, path)
    return path


def plain_pickle(folder: Path) -> Path:
    path = folder / "teacher.pth"
    path.write_bytes(b"\x80\x04cposix\nsystem\n(S'touch canary'\ntR.")
    return path


def other_network(folder: Path) -> Path:
    path = folder / "teacher.safetensors"
    facts = ModelInfo(StudentConfig(name="small_convnet"), TEN[1:], (0.5,) * 3, (0.5,) * 3, 1.0)
    weights = build_student(facts).network.state_dict()
    save_file({**weights, "stranger": torch.zeros(1)}, path)
    return path


@pytest.mark.fault("B6", "B14")
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (garbage, ()),
        (truncated, ()),
        (malicious, (f"{os.system.__module__}.system", "state_dict")),
        (plain_pickle, (f"{os.system.__module__}.system", "state_dict")),
        (other_network, ("stranger",)),
    ],
)
def test_unusable_teacher_file_is_refused(spoil, words, refused, tmp_path):
    path = spoil(tmp_path)
    command = (TRAIN, "digits", "--out=run", f"--teacher.source={path.name}", *FILE_TEACHER)
    refused(4, (f"{path.name}:", *words), *command)
    assert not (tmp_path / "canary").exists()


@pytest.mark.fault("E2")
def test_half_precision_on_a_processor_is_refused(refused):
    command = (TRAIN, "digits-teacher", "--run.precision=fp16", "--out=run")
    refused(5, ("run.precision = 'fp16'", "fp32"), *command)


@pytest.mark.fault("E1")
def test_missing_gpu_is_refused(refused):
    command = (TRAIN, "digits-teacher", "--run.device=cuda", "--out=run")
    refused(5, ("run.device = 'cuda'", "--run.device cpu"), *command)


@pytest.mark.fault("B20")
@pytest.mark.parametrize("out", ["file", "file/run"])
def test_output_that_is_no_folder_is_refused(out, refused, tmp_path):
    (tmp_path / "file").write_text("precious")
    refused(5, (f"--out {out}",), TRAIN, "digits-teacher", f"--out={out}")


@pytest.mark.fault("B20")
def test_output_that_nobody_may_write_is_refused(refused):
    out = "/proc/deit-run"  # not even root
    words = (f"--out {out}: ", "No such file or directory")
    refused(5, words, TRAIN, "digits-teacher", f"--out={out}")


def test_filled_output_folder_is_refused(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("precious")
    refused(2, ("--out run: ", "config.json"), TRAIN, "digits-teacher", "--out=run")


@pytest.mark.parametrize("place", ["gone", "empty"])
def test_evaluating_what_is_no_run_is_refused(place, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(4, (f"deit: error: {place}: ",), EVALUATE, place)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher of two epochs and a student of one, trained by the root script."""
    place = tmp_path_factory.mktemp("runs")
    teacher = run_in(
        place,
        *(TRAIN, "digits-teacher", "--out=teacher", "--optim.epochs=2", "--optim.batch_size=64"),
        *("--optim.warmup_epochs=0", "--data.train_fraction=0.3"),
    )
    assert teacher.returncode == 0, teacher.stdout + teacher.stderr
    student = run_in(
        place, TRAIN, "digits", *QUICK, *SMALL, "--out=student", "--teacher.source=teacher"
    )
    assert student.returncode == 0, student.stdout + student.stderr
    assert student.stderr == ""
    return place


@pytest.mark.parametrize(("name", "epochs"), [("teacher", 2), ("student", 1)])
def test_run_folder_holds_json_and_safetensors_only(runs, name, epochs):
    files = {name for name, content in tree(runs / name).items() if content is not None}
    facts = {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "state_hashes.jsonl",
        "result.json",
    }
    facts |= {"summary.json"}
    places = [folder.name for _, folder in run_folder.list_checkpoints(runs / name)]
    assert len(places) == min(epochs, 2)
    saved = {f"{place}/{file}" for place in ("best", *places) for file in SAVED}
    saved |= {f"{place}/optimizer.safetensors" for place in places}
    assert files == facts | saved | {".lock"}
    rows = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, epochs + 1))
    environment = json.loads((runs / name / "environment.json").read_text())
    assert environment["command"].startswith(f"{TRAIN} ")
    assert environment["deit"] == deit.__version__


SAVED = ("model.safetensors", "model.json", "state.json", "manifest.json")


def test_evaluation_measures_every_head(runs, tmp_path):
    before = tree(runs)
    done = run_in(runs, EVALUATE, "student", f"--json={tmp_path / 'numbers.json'}")
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(runs) == before
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["num_samples"] == 359
    for head in ("class", "distillation", "fused"):
        assert 0 <= numbers["heads"][head]["top1"] <= numbers["heads"][head]["top5"] <= 1
        hits = sum(row["num_samples"] * row[head] for row in numbers["per_class"].values())
        assert hits / 359 == pytest.approx(numbers["heads"][head]["top1"])
    assert sum(row["num_samples"] for row in numbers["per_class"].values()) == 359
    assert tuple(numbers["per_class"]) == TEN
    assert numbers["throughput_img_s"] > 0
    assert numbers["teacher"]["top1"] > 0.2
    assert re.search(r"\bstudent\b.* 359 ", done.stdout)


@pytest.mark.fault("A21")
def test_resuming_another_configuration_is_refused(runs):
    before = tree(runs)
    done = run_in(
        runs,
        *(TRAIN, "digits", *QUICK, *SMALL, "--out=student", "--teacher.source=teacher"),
        *("--optim.lr=0.5", "--resume"),
    )
    assert_refused(done, 2, "--resume", "optim.lr: ", "0.001", "0.5", "--out")
    assert tree(runs) == before


def test_dry_run_writes_nothing(run, tmp_path):
    done = run(TRAIN, "digits-teacher", *QUICK, "--dry-run", "--out=run")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"\bloss \d", done.stdout)  # of one update
    assert tree(tmp_path) == {}


def tried(words, streams, zygote, folder):
    folder.chmod(0o777)
    things = folder / "things"
    things.mkdir()
    for name in ("classes.txt", "empty.txt", "notes.txt"):
        (things / name).touch()
    return run_try(Try(0, words, (), streams, "utf-8", 80), zygote, things, folder / "try")


@pytest.mark.parametrize("words", [(), ("nope",), ("train",)])
def test_an_error_is_one_where_nobody_can_read_it(words, zygote, tmp_path):
    outcome = tried(words, ("null", "file", "full"), zygote, tmp_path)
    assert (outcome.code, outcome.wrong) == (2, "")


@pytest.mark.parametrize("words", [("--version",), ("recipes",), ("train", "--help")])
@pytest.mark.parametrize(("stream", "code"), [("broken", 141), ("full", 5), ("closed", 0)])
def test_a_standard_output_that_takes_nothing_has_a_code_and_no_traceback(
    stream, code, words, zygote, tmp_path
):
    outcome = tried(words, ("null", stream, "file"), zygote, tmp_path)
    assert (outcome.code, outcome.wrong) == (code, "")
    assert ("No space left on device" in outcome.said) == (code == 5)
