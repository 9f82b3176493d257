"""Evaluation further: other resolutions and crops, several runs, ImageNet's variants, costs."""

import json
import re
import shlex
import shutil
from functools import cache
from importlib import resources

import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch import nn

from deit.cli import run_command
from deit.config.choices import TEST_SETS
from deit.config.recipes.handwriting import digits_teacher
from deit.config.validation import load_config
from deit.core import host_memory
from deit.core.console import format_percent
from deit.core.errors import CheckpointError, DataError
from deit.core.metrics import calibration_error, topk_accuracy
from deit.core.run_folder import latest_checkpoint
from deit.core.types import logits_by_head
from deit.datasets.imagenet_variants import VARIANTS, load_variant
from deit.datasets.splits import load_splits
from deit.distill.inference import evaluation_batches
from deit.evaluation.evaluate import evaluate
from deit.evaluation.load_run import student_at_resolution
from deit.models.pos_embed import resize_positions
from deit.models.saved import load_student
from deit.training.train import train
from tests.helpers.errors import raises

pytest.importorskip("sklearn")


@pytest.mark.parametrize("crop", [None, 0.8])
def test_another_resolution_by_hand(crop, runs):
    found = evaluate(runs / "student", resolution=16, crop=crop)
    student, facts = load_student(runs / "student" / "best")
    larger, at = student_at_resolution(runs / "student" / "best", 16)
    assert (facts.student.image_size, at.student.image_size) == (8, 16)
    expected = resize_positions(student.network.pos_embed, prefix=2, side=8, kernel="deit")
    assert torch.equal(larger.network.pos_embed, expected.positions)
    config = load_config(runs / "student" / "config.json")
    stored = round(16 / (crop or 1))
    config = config.replace(
        data={"image_size": stored},
        student={"image_size": 16},
        views={"eval_crop_pct": crop or 1.0},
    )
    test = load_splits(config.data).test
    chunks = torch.arange(len(test.labels)).split(100)
    views = torch.cat(
        list(evaluation_batches(test, chunks, config.evaluation, device=torch.device("cpu")))
    )
    assert views.shape[-1] == 16
    with torch.no_grad():
        heads = logits_by_head(larger.eval()(views))
    for name in ("class", "distillation", "fused"):
        assert found["heads"][name]["top1"] == pytest.approx(
            topk_accuracy(heads[name], test.labels)
        )
    assert (found["image_size"], found["eval_crop_pct"]) == (16, crop or 1.0)
    with raises(CheckpointError, "--resolution 15", "2 px"):
        evaluate(runs / "student", resolution=15)


def test_the_tokens_over_depth_are_told(runs, capsys):
    found = evaluate(runs / "student")
    assert len(found["token_cosine"]) == 3
    assert all(-1 <= value <= 1 for value in found["token_cosine"])
    assert evaluate(runs / "teacher")["token_cosine"] is None
    assert run_command("evaluate", [str(runs / "student")], "deit evaluate") == 0
    said = capsys.readouterr().out
    assert " ".join(f"{value:.2f}" for value in found["token_cosine"]) in said
    shares = found["agreement"]
    everyone = ("truth", "teacher", "class", "distillation", "fused")
    (row,) = re.findall(r"^│ truth +│(.+)│$", said, re.MULTILINE)
    assert row.replace(" ", "").split("│") == [
        format_percent(1 - shares["truth"][name]) for name in everyone
    ]
    assert re.search(r"\d GMACs\b.* images/s .*\d+ to \d+.*\b1 thread\b.*torch \d", said)


def test_several_runs_and_resolutions_in_one_table(runs, tmp_path, capsys):
    names = ("student", "labels")
    arguments = [*(str(runs / name) for name in names), "--resolution", "8,16"]
    arguments += ["--plot", str(tmp_path / "plot.png"), "--json", str(tmp_path / "found.json")]
    assert run_command("evaluate", arguments, "deit evaluate") == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    rows = found["rows"]
    assert list(rows) == ["student, 8 px", "student, 16 px", "labels, 8 px", "labels, 16 px"]
    assert found["command"] == f"deit evaluate {shlex.join(arguments)}"
    single_run = evaluate(runs / "labels", resolution=16)
    assert rows["labels, 16 px"]["heads"] == single_run["heads"]
    shares = found["agreement"]
    assert {"truth", "teacher of student, 8 px", *rows} <= set(shares)
    for name, row in rows.items():
        assert shares["truth"][name] == pytest.approx(row["heads"]["fused"]["top1"])
        assert shares[name][name] == 1
        teacher = "teacher of student, 8 px"
        assert shares[teacher][name] == shares[name][teacher]
        assert row["cost"]["parameters"] > 0
        assert name in said
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 500
    assert run_command("evaluate", arguments, "deit evaluate") == 5
    said = capsys.readouterr().err
    assert f"--json {tmp_path / 'found.json'}" in said
    assert "--force" in said


def test_runs_of_other_images_are_not_held_against_each_other(runs, tmp_path):
    few = digits_teacher().replace(data={"classes": ("1", "2")}, optim={"epochs": 1})
    train(few.replace(optim={"warmup_epochs": 0}), tmp_path / "few")
    arguments = [str(runs / "labels"), str(tmp_path / "few"), "--json", str(tmp_path / "f.json")]
    assert run_command("evaluate", arguments, "deit evaluate") == 0
    assert "agreement" not in json.loads((tmp_path / "f.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("--resolution", "8,x"), 2, ["--resolution 8,x"]),
        (("--resolution", "0"), 2, ["--resolution 0"]),
        (("--crop", "1.5"), 2, ["--crop 1.5"]),
        (("--test-set", "b", "--data.root", "x"), 2, ["--test-set b", *TEST_SETS]),
        (("--test-set", "a"), 2, ["--test-set a", "--data.root"]),
        (("--test-set", "a", "--data.root", "none"), 3, ["data.root none"]),
        (
            ("--test-set", "a", "--data.root", "x", "--split", "validation"),
            2,
            ["--test-set", "--split"],
        ),
        (("--crop", "0.875,0.8750001"), 2, ["--crop 0.875,0.8750001"]),
        (("--plot", "x.txt"), 2, ["--plot x.txt", ".png"]),
        (("--resolution", "15"), 4, ["--resolution 15", "2 px"]),
        (("--resolution", "8,15"), 4, ["--resolution 15", "2 px"]),
        (("--crop", "nan"), 2, ["--crop nan"]),
        (("--run.eval_batch_size", "0"), 2, ["--run.eval_batch_size 0"]),
    ],
)
def test_bad_options_are_one_line(arguments, code, named, runs, capsys):
    assert run_command("evaluate", [str(runs / "student"), *arguments], "deit evaluate") == code
    said = capsys.readouterr().err
    assert [one for one in named if one not in said] == []
    assert len(said.strip().splitlines()) == 1


def test_so_many_images_as_have_room_are_evaluated_at_once(runs, monkeypatch, capsys):
    monkeypatch.setattr(host_memory, "free_memory", lambda device: 2**17)
    command = [str(runs / "student"), "--resolution", "16"]
    assert run_command("evaluate", command, "deit evaluate") == 5
    said = capsys.readouterr().err
    assert re.search(r"run\.eval_batch_size = 256\b.* 16 px\b", said)
    _, option, advice = said.partition("--run.eval_batch_size ")
    number = advice.split()[0]
    assert 1 <= int(number) < 256
    assert run_command("evaluate", [*command, option.strip(), number], "deit evaluate") == 0


def test_the_number_of_images_at_once_changes_no_answer(runs):
    one, other = (evaluate(runs / "student", batch=batch)["heads"] for batch in (None, 7))
    for head, found in one.items():
        assert found["top1"] == other[head]["top1"]


# ImageNet's variants


@cache
def synsets():
    return tuple(ImageNetInfo().label_names())


@cache
def classes_of(variant):
    return tuple((resources.files("timm.data") / "_info" / VARIANTS[variant]).read_text().split())


def write_class_images(root, names, files=("a.png",)):
    for index, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for file in files:
            Image.new("RGB", (4, 4), (index % 256, 0, 0)).save(root / name / file)
    return root


def test_the_variants_are_those_of_the_command_line():
    assert tuple(VARIANTS) == TEST_SETS


@pytest.mark.parametrize(("name", "number"), [("a", 200), ("r", 200), ("sketch", 1000)])
def test_a_variant_is_cut_to_its_classes(name, number, tmp_path):
    expected = classes_of(name)
    assert len(expected) == number
    root = write_class_images(tmp_path / name, expected)
    found = load_variant(name, str(root), synsets())
    assert len(found.columns) == number
    assert {synsets()[column] for column in found.columns} == set(expected)
    # Every image's right answer is the column of its own folder.
    for row in (0, number // 2, number - 1):
        column = found.columns[int(found.accepted[row].long().argmax())]
        assert f"/{synsets()[column]}/" in found.images.name(row).replace("\\", "/")
        assert found.accepted[row].sum() == 1


def test_v2_is_named_by_number(tmp_path):
    root = write_class_images(tmp_path / "v2", [str(number) for number in range(1000)])
    found = load_variant("v2", str(root), synsets())
    assert found.columns == tuple(range(1000))
    for row in (0, 11, 999):
        number = int(found.images.name(row).replace("\\", "/").split("/")[-2])
        assert int(found.accepted[row].long().argmax()) == number


def test_a_network_of_some_classes_sees_their_images_alone(tmp_path):
    expected = classes_of("a")
    root = write_class_images(tmp_path / "a", expected)
    known = (expected[7], "n00000000", expected[3])
    found = load_variant("a", str(root), known)
    assert found.columns == (0, 2)
    assert len(found.images.labels) == 2
    assert re.findall(r"\d+", found.note) == ["2", "200", "2", "200"]  # of images, of classes


def test_real_has_several_right_answers(tmp_path):
    names = [f"ILSVRC2012_val_{number + 1:08d}.JPEG" for number in range(50_000)]
    labels = RealLabelsImagenet(names).real_labels
    several = next(name for name in names if len(labels[name]) > 1)
    nothing = next(name for name in names if not labels[name])
    single = next(name for name in names if len(labels[name]) == 1)
    root = write_class_images(tmp_path / "real", synsets())
    for file in root.rglob("a.png"):
        file.rename(file.with_name(single))
    folder = root / synsets()[0]
    for name in (several, nothing):
        Image.new("RGB", (4, 4)).save(folder / name)
    found = load_variant("real", str(root), synsets())
    assert len(found.images.labels) == 1001  # the image without a label is left out
    rows = {found.images.name(row).rpartition("/")[2]: row for row in range(1001)}
    accepted = found.accepted[rows[several]]
    assert accepted.nonzero().flatten().tolist() == sorted(labels[several])
    (folder / several).rename(folder / "other.JPEG")
    with raises(DataError, "other.JPEG", names[0]):
        load_variant("real", str(root), synsets())


def test_another_folder_is_refused(tmp_path):
    root = write_class_images(tmp_path / "cats", ["cat", "dog"])
    with raises(DataError, "'cat'"):
        load_variant("a", str(root), synsets())
    whole = write_class_images(tmp_path / "a", classes_of("a"))
    with raises(DataError, "variant a", "'ant'"):
        load_variant("a", str(whole), ("ant", "bee"))


def test_a_variant_is_evaluated_from_the_command_line(tmp_path, capsys):
    """A student of three ImageNet classes, on ImageNet-A; the numbers by hand."""
    expected = classes_of("a")
    names = sorted(expected[:3])
    for split in ("train", "test"):
        write_class_images(tmp_path / "data" / split, names, [f"{n}.png" for n in range(12)])
    config = digits_teacher().replace(
        data={"source": "folder", "root": str(tmp_path / "data")},
        optim={"epochs": 1, "warmup_epochs": 0, "batch_size": 8},
    )
    train(config, tmp_path / "run")
    root = write_class_images(tmp_path / "a", expected, ("x.png", "y.png"))
    arguments = [str(tmp_path / "run"), "--test-set", "a", "--data.root", str(root)]
    code = run_command(
        "evaluate", [*arguments, "--json", str(tmp_path / "f.json")], "deit evaluate"
    )
    assert code == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "f.json").read_text())
    assert (found["split"], found["num_samples"]) == ("ImageNet a", 6)
    assert found["command"].startswith("deit evaluate ")
    assert found["command"].endswith(f"--json {tmp_path / 'f.json'}")
    assert re.search(r"\b6\b.*\b400\b.*\b3\b.*\b200\b", capsys.readouterr().out)
    assert found["teacher"] is None


# metrics


def test_several_right_answers_count_by_hand():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [1.0, 2.0, 3.0]])
    accepted = torch.tensor([[True, True, False], [True, False, True], [True, False, False]])
    assert topk_accuracy(logits, accepted) == pytest.approx(1 / 3)
    assert topk_accuracy(logits, accepted, k=2) == pytest.approx(2 / 3)
    single = torch.tensor([0, 2, 0])
    as_bool = nn.functional.one_hot(single, 3).bool()
    assert topk_accuracy(logits, as_bool) == topk_accuracy(logits, single)
    assert calibration_error(logits, as_bool) == calibration_error(logits, single)


@pytest.mark.parametrize("word", ["evaluate", "predict"])
def test_files_that_are_there_are_not_replaced_unasked(word, runs, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    mine = tmp_path / "mine.json"
    mine.write_text("mine")
    arguments = [str(runs / "student"), *([str(picture)] if word == "predict" else [])]
    arguments += ["--json", str(mine)]
    assert run_command(word, arguments, word) == 5
    said = capsys.readouterr().err
    assert f"--json {mine}" in said
    assert "--force" in said
    assert mine.read_text() == "mine"
    assert run_command(word, [*arguments, "--force"], word) == 0
    assert mine.read_text().startswith("{")


def test_other_images_of_the_same_labels_are_not_held_against_each_other(tmp_path):
    """Two sets of two classes, as many images of each."""
    quick = {"epochs": 1, "batch_size": 4, "warmup_epochs": 0}
    for name, classes in (("one", "ab"), ("other", "cd")):
        for label in classes:
            place = tmp_path / f"pictures-{name}" / label
            place.mkdir(parents=True)
            for index in range(10):
                noise = torch.randint(256, (8, 8, 3), dtype=torch.uint8)
                Image.fromarray(noise.numpy()).save(place / f"{index}.png")
        data = {"source": "folder", "root": str(tmp_path / f"pictures-{name}"), "image_size": 8}
        train(digits_teacher().replace(data=data, optim=quick), tmp_path / name)
    runs = [tmp_path / name for name in ("one", "other")]
    labels = [load_splits(load_config(run / "config.json").data).test.labels for run in runs]
    assert torch.equal(*labels)
    arguments = [*map(str, runs), "--json", str(tmp_path / "f.json")]
    assert run_command("evaluate", arguments, "deit evaluate") == 0
    assert "agreement" not in json.loads((tmp_path / "f.json").read_text())


def test_the_checkpoint_that_was_measured_is_named(runs):
    newest_one = latest_checkpoint(runs / "student")
    assert evaluate(newest_one)["checkpoint"] == newest_one.name
    assert evaluate(runs / "student", checkpoint="last")["checkpoint"] == newest_one.name
    assert evaluate(runs / "student" / "best", checkpoint="last")["checkpoint"] == "best"


def test_a_survey_of_a_variant_begins_with_its_mistakes(runs, tmp_path, capsys):
    arguments = [str(runs / "labels"), str(runs / "student"), "--test-set", "a"]
    assert run_command("evaluate", [*arguments, "--data.root", str(tmp_path)], "deit evaluate") == 3
    said = capsys.readouterr()
    assert re.search(r"\bvariant a\b.*'0'", said.err)
    assert said.out == ""


STORAGE = {"memory": {"storage": "memory"}, "files": {"storage": "files", "num_workers": 0}}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Runs of the same pictures, in memory and in files, with the same weights."""
    folder = tmp_path_factory.mktemp("stored")
    for label in "ab":
        place = folder / "pictures" / label
        place.mkdir(parents=True)
        for index in range(8):
            noise = torch.randint(256, (40 + index, 50, 3), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(place / f"{index}.png")
    data = {"source": "folder", "root": str(folder / "pictures"), "image_size": 24}
    config = digits_teacher().replace(data=data, student={"image_size": 16})
    config = config.replace(optim={"epochs": 1, "batch_size": 4, "warmup_epochs": 0})
    for storage, how in STORAGE.items():
        train(config.replace(data=how), folder / storage)
    shutil.rmtree(folder / "files" / "best")
    shutil.copytree(folder / "memory" / "best", folder / "files" / "best")
    return folder


@pytest.mark.parametrize("crop", [None, 0.8, 1.0])
def test_a_picture_is_resized_once_wherever_it_lies(crop, stored):
    """From memory and from files, at any crop, the views are the same."""
    found = [evaluate(stored / storage, crop=crop)["heads"]["class"] for storage in STORAGE]
    assert found[0] == found[1]


@pytest.mark.parametrize("deeper", [False, True])
def test_a_teacher_that_lay_beside_its_student_is_found_where_both_are_now(
    deeper, runs, tmp_path, capsys
):
    """As in a comparison, and, a folder deeper, in a sweep."""
    place = tmp_path / "runs" if deeper else tmp_path
    shutil.copytree(runs / "teacher", tmp_path / "teacher")
    shutil.copytree(runs / "student", place / "student")
    config = json.loads((place / "student" / "config.json").read_text())
    config["teacher"]["source"] = ["elsewhere/teacher"]
    (place / "student" / "config.json").write_text(json.dumps(config))
    before = evaluate(runs / "student")["teacher"]
    assert evaluate(place / "student")["teacher"] == before
    config["teacher"]["source"] = ["elsewhere/other"]
    (place / "student" / "config.json").write_text(json.dumps(config))
    assert evaluate(place / "student")["teacher"] is None
    assert "elsewhere/other" in capsys.readouterr().err
