"""Tests of `deit evaluate`: resolutions, crops, several runs, other test sets, costs."""

import json
import re
import shlex
import shutil

import pytest
import torch
from PIL import Image
from torch import nn

from deit.cli import run_command
from deit.config.command_choices import TEST_SETS
from deit.config.recipes.handwriting import digits_teacher
from deit.config.validation import load_config
from deit.core import host_memory
from deit.core.console import format_percent
from deit.core.errors import CheckpointError
from deit.core.metrics import calibration_error, topk_accuracy
from deit.core.run_folder import latest_checkpoint
from deit.core.types import logits_by_head
from deit.datasets.splits import load_splits
from deit.distill.inference import views_of_chunks
from deit.evaluation.evaluate import evaluate
from deit.evaluation.load_run import student_at_resolution
from deit.evaluation.tables import head_cells
from deit.models.pos_embed import resize_positions
from deit.models.saved_student import load_student
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.images import imagenet_classes, write_class_images

pytest.importorskip("sklearn")


@pytest.mark.parametrize("crop", [None, 0.8])
def test_evaluate_other_resolution_equals_resized_student(crop, runs):
    metrics = evaluate(runs / "student", resolution=16, crop=crop).metrics
    student, model_info = load_student(runs / "student" / "best")
    resized, resized_info = student_at_resolution(runs / "student" / "best", 16)
    assert (model_info.student.image_size, resized_info.student.image_size) == (8, 16)
    expected = resize_positions(student.network.pos_embed, prefix=2, side=8, kernel="deit")
    assert torch.equal(resized.network.pos_embed, expected.positions)
    config = load_config(runs / "student" / "config.json")
    side = round(16 / (crop or 1))
    config = config.replace(
        data={"image_size": side},
        student={"image_size": 16},
        views={"eval_crop_pct": crop or 1.0},
    )
    test = load_splits(config.data).test
    chunks = torch.arange(len(test.labels)).split(100)
    views = torch.cat(
        list(views_of_chunks(test, chunks, config.evaluation, device=torch.device("cpu")))
    )
    assert views.shape[-1] == 16
    with torch.no_grad():
        heads = logits_by_head(resized.eval()(views))
    for name in ("class", "distillation", "fused"):
        expected = topk_accuracy(heads[name], test.labels)
        assert metrics["heads"][name]["top1"] == pytest.approx(expected)
    assert (metrics["image_size"], metrics["eval_crop_pct"]) == (16, crop or 1.0)
    with raises(CheckpointError, "resolution = 15", "2 px"):
        evaluate(runs / "student", resolution=15)


def test_evaluate_prints_token_cosine_disagreement_and_cost(runs, capsys):
    metrics = evaluate(runs / "student").metrics
    assert len(metrics["token_cosine"]) == 3
    assert all(-1 <= value <= 1 for value in metrics["token_cosine"])
    assert evaluate(runs / "teacher").metrics["token_cosine"] is None
    assert run_command("evaluate", [str(runs / "student")], "deit evaluate") == 0
    output = capsys.readouterr().out
    assert " ".join(f"{value:.2f}" for value in metrics["token_cosine"]) in output
    shares = metrics["agreement"]
    names = ("truth", "teacher", "class", "distillation", "fused")
    (row,) = re.findall(r"^│ truth +│(.+)│$", output, re.MULTILINE)
    assert row.replace(" ", "").split("│") == [
        format_percent(1 - shares["truth"][name]) for name in names
    ]
    assert re.search(r"\d GMACs\b.* images/s .*\d+ to \d+.*\b1 thread\b.*torch \d", output)


def test_evaluate_several_runs_and_resolutions_share_one_table(runs, tmp_path, capsys):
    names = ("student", "labels")
    arguments = [*(str(runs / name) for name in names), "--resolution", "8,16"]
    arguments += ["--plot", str(tmp_path / "plot.png"), "--json", str(tmp_path / "report.json")]
    assert run_command("evaluate", arguments, "deit evaluate") == 0
    output = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    rows = report["rows"]
    assert list(rows) == ["student, 8 px", "student, 16 px", "labels, 8 px", "labels, 16 px"]
    assert report["command"] == f"deit evaluate {shlex.join(arguments)}"
    assert {row["environment"]["command"] for row in rows.values()} == {report["command"]}
    expected = evaluate(runs / "labels", resolution=16).metrics["heads"]
    assert rows["labels, 16 px"]["heads"] == expected
    shares = report["agreement"]
    assert {"truth", "teacher of student, 8 px", *rows} <= set(shares)
    for name, row in rows.items():
        assert shares["truth"][name] == pytest.approx(row["heads"]["fused"]["top1"])
        assert shares[name][name] == 1
        teacher = "teacher of student, 8 px"
        assert shares[teacher][name] == shares[name][teacher]
        assert row["cost"]["parameters"] > 0
        assert name in output
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > 500
    assert run_command("evaluate", arguments, "deit evaluate") == 5
    output = capsys.readouterr().err
    assert f"--json {tmp_path / 'report.json'}" in output
    assert "--force" in output


@pytest.mark.parametrize("num_images", [60, 1000])
@pytest.mark.parametrize("num_classes", [4, 5, 6])
def test_table_of_heads_has_margins_of_few_images_and_top5_of_many_classes(num_images, num_classes):
    row = {"top1": 38 / 60, "top5": 0.987, "calibration_error": 0.1}
    columns, cells = head_cells({"class": row}, num_images, num_classes)
    margin = {"correct": "38 of 60", "95 % interval": "50.7 to 74.4"} if num_images < 1000 else {}
    top5 = {"top-5 %": "98.7"} if num_classes > 5 else {}
    expected = {
        "head": "class head",
        "top-1 %": "63.3",
        **margin,
        **top5,
        "calibration error %": "10.0",
    }
    assert dict(zip(columns, cells[0], strict=True)) == expected
    assert columns == list(expected)


def test_evaluate_runs_on_different_classes_have_no_agreement(runs, tmp_path):
    few = digits_teacher().replace(data={"classes": ("1", "2")}, optim={"epochs": 1})
    train(few.replace(optim={"warmup_epochs": 0}), tmp_path / "few")
    arguments = [str(runs / "labels"), str(tmp_path / "few"), "--json", str(tmp_path / "f.json")]
    assert run_command("evaluate", arguments, "deit evaluate") == 0
    assert "agreement" not in json.loads((tmp_path / "f.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (("--resolution", "8,x"), 2, ["--resolution 8,x"]),
        (("--resolution", "0"), 2, ["--resolution 0"]),
        (("--crop", "1.5"), 2, ["--crop 1.5"]),
        (("--test-set", "b", "--data.root", "x"), 2, ["--test-set b", *TEST_SETS]),
        (("--test-set", "imagenet-a"), 2, ["--test-set imagenet-a", "data.root"]),
        (("--test-set", "imagenet-a", "--data.root", "none"), 3, ["data.root none"]),
        (
            ("--test-set", "imagenet-a", "--data.root", "x", "--split", "validation"),
            2,
            ["--test-set imagenet-a", "split"],
        ),
        (("--crop", "0.875,0.8750001"), 2, ["--crop 0.875,0.8750001"]),
        (("--plot", "x.txt"), 2, ["--plot x.txt", ".png"]),
        (("--resolution", "15"), 4, ["--resolution 15", "2 px"]),
        (("--resolution", "8,15"), 4, ["--resolution 15", "2 px"]),
        (("--crop", "nan"), 2, ["--crop nan"]),
        (("--run.eval_batch_size", "0"), 2, ["run.eval_batch_size = 0"]),
    ],
)
def test_evaluate_invalid_options_print_one_line(arguments, code, parts, runs, capsys):
    assert run_command("evaluate", [str(runs / "student"), *arguments], "deit evaluate") == code
    output = capsys.readouterr().err
    assert [part for part in parts if part not in output] == []
    assert len(output.strip().splitlines()) == 1


def test_evaluate_batch_above_memory_names_a_size_that_fits(runs, monkeypatch, capsys):
    monkeypatch.setattr(host_memory, "free_memory", lambda device: 2**17)
    command = [str(runs / "student"), "--resolution", "16"]
    assert run_command("evaluate", command, "deit evaluate") == 5
    output = capsys.readouterr().err
    assert re.search(r"run\.eval_batch_size = 256\b.* 16 px\b", output)
    _, option, advice = output.partition("--run.eval_batch_size ")
    batch = advice.split()[0]
    assert 1 <= int(batch) < 256
    assert run_command("evaluate", [*command, option.strip(), batch], "deit evaluate") == 0


def test_evaluate_batch_size_does_not_change_accuracy(runs):
    default, small = (
        evaluate(runs / "student", batch_size=batch).metrics["heads"] for batch in (None, 7)
    )
    for head, metrics in default.items():
        assert metrics["top1"] == small[head]["top1"]


def test_evaluate_test_set_from_command_line(tmp_path, capsys):
    """Evaluate a student of three ImageNet classes on ImageNet-A; the numbers are known."""
    expected = imagenet_classes("imagenet-a")
    names = sorted(expected[:3])
    for split in ("train", "test"):
        write_class_images(tmp_path / "data" / split, names, [f"{n}.png" for n in range(12)])
    config = digits_teacher().replace(
        data={"source": "folder", "root": str(tmp_path / "data")},
        optim={"epochs": 1, "warmup_epochs": 0, "batch_size": 8},
    )
    train(config, tmp_path / "run")
    root = write_class_images(tmp_path / "a", expected, ("x.png", "y.png"))
    arguments = [str(tmp_path / "run"), "--test-set", "imagenet-a", "--data.root", str(root)]
    code = run_command(
        "evaluate", [*arguments, "--json", str(tmp_path / "f.json")], "deit evaluate"
    )
    assert code == 0, capsys.readouterr().err
    metrics = json.loads((tmp_path / "f.json").read_text())
    assert (metrics["split"], metrics["num_samples"]) == ("imagenet-a", 6)
    assert metrics["command"].startswith("deit evaluate ")
    assert metrics["environment"]["command"] == metrics["command"]
    assert metrics["command"].endswith(f"--json {tmp_path / 'f.json'}")
    assert re.search(r"\b6\b.*\b400\b.*\b3\b.*\b200\b", capsys.readouterr().out)
    assert metrics["teacher"] is None


# metrics


def test_topk_accuracy_several_labels_by_hand():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0]])
    accepted = torch.tensor([[True, True, False], [True, False, True], [True, False, False]])
    assert topk_accuracy(logits, accepted) == pytest.approx(1 / 3)
    assert topk_accuracy(logits, accepted, k=2) == pytest.approx(2 / 3)
    single = torch.tensor([0, 2, 0])
    as_bool = nn.functional.one_hot(single, 3).bool()
    assert topk_accuracy(logits, as_bool) == topk_accuracy(logits, single)
    assert calibration_error(logits, as_bool) == calibration_error(logits, single)


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_json_existing_file_is_replaced_with_force_only(command, runs, tmp_path, capsys):
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(image)
    existing = tmp_path / "existing.json"
    existing.write_text("existing")
    arguments = [str(runs / "student"), *([str(image)] if command == "predict" else [])]
    arguments += ["--json", str(existing)]
    assert run_command(command, arguments, command) == 5
    output = capsys.readouterr().err
    assert f"--json {existing}" in output
    assert "--force" in output
    assert existing.read_text() == "existing"
    assert run_command(command, [*arguments, "--force"], command) == 0
    assert existing.read_text().startswith("{")


def test_evaluate_runs_on_different_images_have_no_agreement(tmp_path):
    """Two data sets with equal labels, but other images and class names."""
    optim = {"epochs": 1, "batch_size": 4, "warmup_epochs": 0}
    for name, classes in (("one", "ab"), ("other", "cd")):
        for label in classes:
            folder = tmp_path / f"images-{name}" / label
            folder.mkdir(parents=True)
            for index in range(10):
                noise = torch.randint(256, (8, 8, 3), dtype=torch.uint8)
                Image.fromarray(noise.numpy()).save(folder / f"{index}.png")
        data = {"source": "folder", "root": str(tmp_path / f"images-{name}"), "image_size": 8}
        train(digits_teacher().replace(data=data, optim=optim), tmp_path / name)
    runs = [tmp_path / name for name in ("one", "other")]
    labels = [load_splits(load_config(run / "config.json").data).test.labels for run in runs]
    assert torch.equal(*labels)
    arguments = [*map(str, runs), "--json", str(tmp_path / "f.json")]
    assert run_command("evaluate", arguments, "deit evaluate") == 0
    assert "agreement" not in json.loads((tmp_path / "f.json").read_text())


def test_evaluate_reports_name_of_checkpoint(runs):
    newest = latest_checkpoint(runs / "student")
    assert evaluate(newest).metrics["checkpoint"] == newest.name
    assert evaluate(runs / "student", checkpoint="last").metrics["checkpoint"] == newest.name
    assert evaluate(runs / "student" / "best", checkpoint="last").metrics["checkpoint"] == "best"


def test_evaluate_several_runs_unknown_classes_fail_first(runs, tmp_path, capsys):
    arguments = [str(runs / "labels"), str(runs / "student"), "--test-set", "imagenet-a"]
    assert run_command("evaluate", [*arguments, "--data.root", str(tmp_path)], "deit evaluate") == 3
    output = capsys.readouterr()
    assert re.search(r"\btest set imagenet-a\b.*'0'", output.err)
    assert output.out == ""


STORAGE = {"memory": {"storage": "memory"}, "files": {"storage": "files", "num_workers": 0}}


@pytest.fixture(scope="module")
def runs_by_storage(tmp_path_factory):
    """Return runs on the same images, in memory and in files, with the same weights."""
    folder = tmp_path_factory.mktemp("runs_by_storage")
    for label in "ab":
        class_folder = folder / "images" / label
        class_folder.mkdir(parents=True)
        for index in range(8):
            noise = torch.randint(256, (40 + index, 50, 3), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(class_folder / f"{index}.png")
    data = {"source": "folder", "root": str(folder / "images"), "image_size": 24}
    config = digits_teacher().replace(data=data, student={"image_size": 16})
    config = config.replace(optim={"epochs": 1, "batch_size": 4, "warmup_epochs": 0})
    for storage, data in STORAGE.items():
        train(config.replace(data=data), folder / storage)
    shutil.rmtree(folder / "files" / "best")
    shutil.copytree(folder / "memory" / "best", folder / "files" / "best")
    return folder


@pytest.mark.parametrize("crop", [None, 0.8, 1.0])
def test_evaluate_images_in_memory_and_in_files_are_equal(crop, runs_by_storage):
    """Images are resized once, wherever they are stored."""
    folders = [runs_by_storage / storage for storage in STORAGE]
    in_memory, in_files = (evaluate(run, crop=crop).metrics["heads"]["class"] for run in folders)
    assert in_memory == in_files


@pytest.mark.parametrize("in_sweep", [False, True])
def test_evaluate_moved_run_finds_moved_teacher(in_sweep, runs, tmp_path, capsys):
    """A teacher is next to the run in a comparison, one folder above in a sweep."""
    folder = tmp_path / "runs" if in_sweep else tmp_path
    shutil.copytree(runs / "teacher", tmp_path / "teacher")
    shutil.copytree(runs / "student", folder / "student")
    config = json.loads((folder / "student" / "config.json").read_text())
    config["teacher"]["source"] = ["elsewhere/teacher"]
    (folder / "student" / "config.json").write_text(json.dumps(config))
    before = evaluate(runs / "student").metrics["teacher"]
    assert evaluate(folder / "student").metrics["teacher"] == before
    config["teacher"]["source"] = ["elsewhere/other"]
    (folder / "student" / "config.json").write_text(json.dumps(config))
    assert evaluate(folder / "student").metrics["teacher"] is None
    assert "elsewhere/other" in capsys.readouterr().err
