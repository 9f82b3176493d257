"""Tests of `deit predict`: predictions for files and folders, drawn and as JSON."""

import json
import re

import pytest
import torch
from PIL import Image

from deit.cli import run_command
from deit.config.presets import LOSS_PRESETS
from deit.config.recipes.handwriting import digits, digits_teacher
from deit.config.teachers import teacher_specs
from deit.config.validation import load_config
from deit.core.types import logits_by_head
from deit.datasets.splits import load_splits
from deit.models.saved_student import load_student
from deit.models.teacher_sources import teacher_from_spec
from deit.models.teachers import BY_NAME
from deit.training.train import train

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Return a folder with a student, its teacher, and the first test images as PNG files."""
    folder = tmp_path_factory.mktemp("predict")
    train(digits_teacher().replace(optim={"epochs": 3}), folder / "teacher")
    student = {"depth": 1, "embed_dim": 16, "num_heads": 2}
    config = digits().replace(
        student=student,
        teacher={"source": (str(folder / "teacher"),)},
        loss=LOSS_PRESETS["deit-hard"],
        optim={"epochs": 2, "batch_size": 64, "warmup_epochs": 1},
    )
    train(config, folder / "run")
    (folder / "pictures" / "more").mkdir(parents=True)
    test = load_splits(config.data).test
    for index, pixels in enumerate(test.pixels[:3]):
        subfolder = "pictures/more" if index == 2 else "pictures"
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / subfolder / f"{index}.png")
    return folder


@pytest.fixture
def predict(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = run_command("predict", [str(argument) for argument in arguments], "deit predict")
        return code, capsys.readouterr()

    return run


def test_predict_probabilities_equal_student_and_teacher(workspace, predict, tmp_path):
    code, output = predict(
        workspace / "run", workspace / "pictures", "--teacher", "run", "--json", "result.json"
    )
    assert code == 0, output.err
    result = json.loads((tmp_path / "result.json").read_text())
    config = load_config(workspace / "run" / "config.json")
    student, model_info = load_student(workspace / "run" / "best")
    (spec,) = teacher_specs(config.teacher)
    teacher = teacher_from_spec(spec, model_info.class_names, image_size=8)
    images = load_splits(config.data).test.pixels[:3].float() / 255
    with torch.no_grad():
        heads = {**logits_by_head(student.eval()(images)), "teacher": teacher(images)}
    names = [row["file"].rpartition("/")[2] for row in result["images"]]
    assert names == ["0.png", "1.png", "2.png"]
    for row, prediction in enumerate(result["images"]):
        assert set(prediction["heads"]) == {"class", "distillation", "fused", "teacher"}
        for head, ranked in prediction["heads"].items():
            expected = heads[head][row].softmax(dim=0).sort(descending=True)
            assert len(ranked) == 5
            for rank, top in enumerate(ranked):
                assert top["class"] == model_info.class_names[expected.indices[rank]]
                assert top["probability"] == pytest.approx(expected.values[rank].item(), abs=1e-5)
    assert result["images"][0]["heads"]["fused"][0]["class"] in output.out


def test_predict_attention_is_drawn_and_replaced_with_force_only(workspace, predict, tmp_path):
    code, output = predict(
        workspace / "run", workspace / "pictures" / "0.png", "--attention", "attention.png"
    )
    assert code == 0, output.err
    with Image.open(tmp_path / "attention.png") as image:
        assert image.width > 600
    assert "attention.png" in output.out
    code, output = predict(
        workspace / "run", workspace / "pictures" / "0.png", "--attention", "attention.png"
    )
    assert code == 5
    assert all(text in output.err for text in ("--attention attention.png", "--force"))


def test_predict_file_name_is_not_drawn_as_formula(workspace, predict, tmp_path):
    file = tmp_path / "$\\foo$ $x$.png"
    file.write_bytes((workspace / "pictures" / "0.png").read_bytes())
    code, output = predict(workspace / "run", file, "--attention", "a.png", "--json", "a.json")
    assert code == 0, output.err
    assert (tmp_path / "a.json").is_file()


def test_predict_top_k_above_number_of_classes_lists_all(workspace, predict, tmp_path):
    code, _ = predict(
        workspace / "teacher", workspace / "pictures" / "0.png", "--top-k", "99", "--json", "f.json"
    )
    assert code == 0
    (row,) = json.loads((tmp_path / "f.json").read_text())["images"]
    assert list(row["heads"]) == ["class"]
    probabilities = [top["probability"] for top in row["heads"]["class"]]
    assert len(probabilities) == 10
    assert sum(probabilities) == pytest.approx(1)
    assert probabilities == sorted(probabilities, reverse=True)


@pytest.mark.fault("C29")
def test_predict_unreadable_images_are_listed_after_the_others(workspace, predict, tmp_path):
    readable = [workspace / "pictures" / name for name in ("0.png", "1.png", "more/2.png")]
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<html>")
    (tmp_path / "none").mkdir()
    unreadable = {"empty.png": "empty", "page.jpg": "6 bytes", "gone.png": "", "none": ".webp"}
    first, *rest = unreadable
    options = ("--json", "result.json", "--attention", "attention.png", "--top-k", "1")
    code, output = predict(workspace / "run", first, readable[0], *rest, *readable[1:], *options)
    assert code == 3
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["file"] for row in result["images"]] == [str(path) for path in readable]
    assert result["unreadable"].keys() == unreadable.keys()
    assert all(str(path) in output.out for path in readable)
    assert (tmp_path / "attention.png").is_file()
    head, *lines = output.err.strip().splitlines()
    assert re.search(r"\b4\b.*\b7\b", head)
    reasons = result["unreadable"]
    assert sorted(lines) == sorted(f"  {name}: {reason}" for name, reason in reasons.items())
    assert all(reason in reasons[name] for name, reason in unreadable.items())
    code, output = predict(
        workspace / "run", *unreadable, "--json", "none.json", "--attention", "none.png"
    )
    assert code == 3
    assert output.out == ""
    assert len(output.err.strip().splitlines()) == 5
    assert not list(tmp_path.glob("none.*"))


@pytest.mark.fault("C29")
def test_predict_teacher_of_larger_images_gets_larger_views(
    workspace, predict, tmp_path, monkeypatch
):
    (tmp_path / "empty.png").write_bytes(b"")
    shapes = []

    class LargerTeacher:
        image_size = 24
        class_order = BY_NAME

        def __call__(self, views):
            shapes.append(tuple(views.shape))
            return torch.zeros(len(views), 10)

    monkeypatch.setattr(
        "deit.evaluation.predict.teacher_from_spec", lambda *arguments, **options: LargerTeacher()
    )
    options = ("--teacher", "run", "--json", "result.json")
    code, _ = predict(workspace / "run", "empty.png", workspace / "pictures", *options)
    assert code == 3
    assert shapes == [(3, 3, 24, 24)]
    result = json.loads((tmp_path / "result.json").read_text())
    assert [set(row["heads"]) for row in result["images"]] == [
        {"class", "distillation", "fused", "teacher"}
    ] * 3


@pytest.mark.fault("C14")
def test_predict_folder_is_listed_like_training_data(workspace, predict, tmp_path):
    content = (workspace / "pictures" / "0.png").read_bytes()
    for name in ("a.png", "._a.png", ".ipynb_checkpoints/a.png", "Thumbs.db", "b.heic", "c.jfif"):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "d.png").write_bytes(content)
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "outside")
    (tmp_path / "images" / "again").symlink_to(".")
    code, output = predict(workspace / "run", "images", "--json", "result.json")
    assert code == 0, output.err
    result = json.loads((tmp_path / "result.json").read_text())
    files = [row["file"] for row in result["images"]]
    assert files == ["images/a.png", "images/c.jfif", "images/linked/d.png"]
    assert re.search(r"\b1 \.heic\b", output.out)
    assert re.search(r"images/again\b.* link\b", output.out)


INVALID = {
    "no run": (("NONE", "IMAGE"), 4, ("NONE",)),
    "no checkpoint": (("EMPTY", "IMAGE"), 4, ("EMPTY", "'best'")),
    "missing image": (("RUN", "gone.png"), 3, ("gone.png",)),
    "empty folder": (("RUN", "EMPTY"), 3, ("EMPTY", ".webp")),
    "no image": (("RUN", "TEXT"), 3, ("TEXT", "10 bytes")),
    "top": (("RUN", "IMAGE", "--top-k", "0"), 2, ("--top-k 0",)),
    "no attention": (
        ("TEACHER", "IMAGE", "--attention", "a.png"),
        2,
        ("SmallConvNet", "deit_*", "vit_*"),
    ),
    "no teacher": (("TEACHER", "IMAGE", "--teacher", "run"), 2, ("--teacher run", " 0 ")),
    "bad teacher": (
        ("RUN", "IMAGE", "--teacher", "gone/teacher"),
        3,
        ("teacher.source gone/teacher",),
    ),
    "name": (("RUN", "IMAGE", "--attention", "a.gif"), 2, ("--attention a.gif", ".png")),
}
"""Arguments, exit code, and parts of the message; names in capitals are replaced by paths."""


@pytest.mark.parametrize("name", INVALID)
def test_predict_invalid_input_prints_one_line(name, workspace, predict, tmp_path):
    (tmp_path / "text.png").write_text("not image!")
    (tmp_path / "empty").mkdir()
    paths = {
        "RUN": workspace / "run",
        "TEACHER": workspace / "teacher",
        "NONE": workspace / "none",
        "EMPTY": tmp_path / "empty",
        "TEXT": tmp_path / "text.png",
        "IMAGE": workspace / "pictures" / "0.png",
    }
    arguments, expected, parts = INVALID[name]
    code, output = predict(*(paths.get(argument, argument) for argument in arguments))
    assert code == expected, output.err
    assert [part for part in parts if str(paths.get(part, part)) not in output.err] == [], (
        output.err
    )
    assert len(output.err.strip().splitlines()) == 1
