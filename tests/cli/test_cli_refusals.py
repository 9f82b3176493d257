"""Commands in a folder of their own: what they print, and what they refuse by name."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import deit
from deit.config.recipes import RECIPES
from deit.config.student_section import StudentConfig
from deit.core import run_folder
from deit.experiments.studies import STUDIES
from deit.models.saved import ModelInfo, build_student
from tests.helpers.commands import TEN, assert_refused, fake_teacher, run_in, tree
from tests.helpers.odd_input.run import run_try
from tests.helpers.odd_input.tries import Try

TRAIN, EVALUATE, FINETUNE = "train_deit.py", "evaluate_deit.py", "finetune_deit.py"
# A run of seconds: a fifth of the training digits in two updates.
QUICK = (
    *("--optim.epochs=1", "--optim.warmup_epochs=0", "--optim.batch_size=128"),
    "--data.train_fraction=0.2",
)
SMALL = ("--student.embed_dim=16", "--student.depth=1", "--student.num_heads=2")


def test_help_names_every_study(run):
    told = run("deit", "compare", "--help").stdout.partition("--arms")[0]
    told = " ".join(told.split())
    assert [name for name in STUDIES if f" {name} (" not in told] == []


def test_a_mistyped_option_of_the_command_itself_is_recognised(run):
    done = run("deit", "lottery", "digits", "--rouds", "3")
    assert done.returncode == 2
    assert re.search(r" rouds: .*\brounds\?", done.stderr)


@pytest.mark.parametrize("arguments", [(EVALUATE, "--help"), ("deit", "--help"), ("deit", "help")])
def test_help_of_the_other_programs(run, arguments):
    done = run(*arguments)
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
    fragments = ("data.root data", "cifar-10-batches-py", "--data.download")
    refused(3, fragments, TRAIN, "cifar10-micro-teacher", "--out=run")


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
    fragments = ("teacher.source checkpoints/digits-teacher", "train_deit.py digits-teacher")
    refused(3, fragments, TRAIN, "digits", "--out=run")


@pytest.mark.fault("D1")
def test_teacher_of_other_classes_is_refused(refused, tmp_path):
    fake_teacher(tmp_path / "teacher", ("zero", *TEN[1:]))
    fragments = ("from teacher", " 1: '0'")  # so many it lacks
    refused(3, fragments, TRAIN, "digits", "--out=run", "--teacher.source=teacher")


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
    ("spoil", "fragments"),
    [
        (garbage, ()),
        (truncated, ()),
        (malicious, (f"{os.system.__module__}.system", "state_dict")),
        (plain_pickle, (f"{os.system.__module__}.system", "state_dict")),
        (other_network, ("stranger",)),
    ],
)
def test_unusable_teacher_file_is_refused(spoil, fragments, refused, tmp_path):
    path = spoil(tmp_path)
    command = (TRAIN, "digits", "--out=run", f"--teacher.source={path.name}", *FILE_TEACHER)
    refused(4, (f"{path.name}:", *fragments), *command)
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
    fragments = (f"--out {out}: ", "No such file or directory")
    refused(5, fragments, TRAIN, "digits-teacher", f"--out={out}")


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


def tried(arguments, streams, command_server, folder):
    folder.chmod(0o777)
    things = folder / "things"
    things.mkdir()
    for name in ("classes.txt", "empty.txt", "notes.txt"):
        (things / name).touch()
    return run_try(
        Try(0, arguments, (), streams, "utf-8", 80), command_server, things, folder / "try"
    )


@pytest.mark.parametrize("arguments", [(), ("nope",), ("train",)])
def test_an_error_is_one_where_nobody_can_read_it(arguments, command_server, tmp_path):
    outcome = tried(arguments, ("null", "file", "full"), command_server, tmp_path)
    assert (outcome.code, outcome.wrong) == (2, "")


@pytest.mark.parametrize("arguments", [("--version",), ("recipes",), ("train", "--help")])
@pytest.mark.parametrize(("stream", "code"), [("broken", 141), ("full", 5), ("closed", 0)])
def test_a_standard_output_that_takes_nothing_has_a_code_and_no_traceback(
    stream, code, arguments, command_server, tmp_path
):
    outcome = tried(arguments, ("null", stream, "file"), command_server, tmp_path)
    assert (outcome.code, outcome.wrong) == (code, "")
    assert ("No space left on device" in outcome.said) == (code == 5)
