"""Predicting: the run's own answers to pictures, from files and folders, drawn and as JSON."""

import json

import pytest
import torch
from PIL import Image

from deit.cli import run_command
from deit.config import derive
from deit.datasets.splits import load_splits
from deit.models.saved import load_student
from deit.models.teachers import load_teacher
from deit.presets import OBJECTIVES
from deit.recipes import digits, digits_teacher
from deit.records import head_logits
from deit.run import train
from deit.seats import members
from deit.validation import load

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A student, its teacher, and the first test images as PNG files."""
    folder = tmp_path_factory.mktemp("predict")
    train(derive(digits_teacher(), optim={"epochs": 3}), folder / "teacher")
    student = {"depth": 1, "embed_dim": 16, "num_heads": 2}
    config = derive(
        digits(),
        student=student,
        teacher={"source": (str(folder / "teacher"),)},
        loss=OBJECTIVES["deit-hard"],
        optim={"epochs": 2, "batch_size": 64, "warmup_epochs": 1},
    )
    train(config, folder / "run")
    (folder / "pictures" / "more").mkdir(parents=True)
    test = load_splits(config.data).test
    for index, pixels in enumerate(test.pixels[:3]):
        below = "pictures/more" if index == 2 else "pictures"
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / below / f"{index}.png")
    return folder


@pytest.fixture
def predict(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = run_command("predict", [str(word) for word in arguments], "deit predict")
        return code, capsys.readouterr()

    return run


def test_the_answers_are_the_runs_head_by_head_and_the_teachers(place, predict, tmp_path):
    code, said = predict(
        place / "run", place / "pictures", "--teacher", "run", "--json", "found.json"
    )
    assert code == 0, said.err
    found = json.loads((tmp_path / "found.json").read_text())
    config = load(place / "run" / "config.json")
    student, facts = load_student(place / "run" / "best")
    (member,) = members(config.teacher)
    teacher = load_teacher(member, facts.class_names, image_size=8)
    images = load_splits(config.data).test.pixels[:3].float() / 255
    with torch.no_grad():
        heads = {**head_logits(student.eval()(images)), "teacher": teacher(images)}
    names = [row["file"].rpartition("/")[2] for row in found["pictures"]]
    assert names == ["0.png", "1.png", "2.png"]
    for row, one in enumerate(found["pictures"]):
        assert set(one["heads"]) == {"class", "distillation", "fused", "teacher"}
        for head, ranked in one["heads"].items():
            shares = heads[head][row].softmax(dim=0)
            assert len(ranked) == 5
            for place_, answer in enumerate(ranked):
                expected = shares.sort(descending=True)
                assert answer["class"] == facts.class_names[expected.indices[place_]]
                assert answer["probability"] == pytest.approx(
                    expected.values[place_].item(), abs=1e-5
                )
    assert found["pictures"][0]["heads"]["fused"][0]["class"] in said.out


def test_the_attention_is_drawn(place, predict, tmp_path):
    code, said = predict(
        place / "run", place / "pictures" / "0.png", "--attention", "attention.png"
    )
    assert code == 0, said.err
    with Image.open(tmp_path / "attention.png") as picture:
        assert picture.width > 600
    assert "drew attention.png" in said.out
    code, said = predict(
        place / "run", place / "pictures" / "0.png", "--attention", "attention.png"
    )
    assert code == 5
    assert "--force replaces it" in said.err


def test_a_name_is_no_formula(place, predict, tmp_path):
    odd = tmp_path / "$\\foo$ $x$.png"
    odd.write_bytes((place / "pictures" / "0.png").read_bytes())
    code, said = predict(place / "run", odd, "--attention", "a.png", "--json", "a.json")
    assert code == 0, said.err
    assert (tmp_path / "a.json").is_file()


def test_top_more_than_there_are_classes_shows_all(place, predict, tmp_path):
    code, _ = predict(
        place / "teacher", place / "pictures" / "0.png", "--top", "99", "--json", "f.json"
    )
    assert code == 0
    (row,) = json.loads((tmp_path / "f.json").read_text())["pictures"]
    assert list(row["heads"]) == ["class"]
    shares = [one["probability"] for one in row["heads"]["class"]]
    assert len(shares) == 10
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)


BAD = {
    "no run": (("NONE", "PICTURE"), 4, "no such run folder"),
    "no checkpoint": (("EMPTY", "PICTURE"), 4, "no finished checkpoint"),
    "no picture": (("RUN", "gone.png"), 3, "gone.png: no such picture"),
    "empty folder": (("RUN", "EMPTY"), 3, "holds no pictures"),
    "no image": (("RUN", "TEXT"), 3, "text.png"),
    "top": (("RUN", "PICTURE", "--top", "0"), 2, "at least 1"),
    "no attention": (
        ("TEACHER", "PICTURE", "--attention", "a.png"),
        2,
        "no tokens whose attention",
    ),
    "no teacher": (("TEACHER", "PICTURE", "--teacher", "run"), 2, "0 teachers"),
    "bad teacher": (("RUN", "PICTURE", "--teacher", "gone/teacher"), 3, "no such file or folder"),
    "name": (("RUN", "PICTURE", "--attention", "a.gif"), 2, "should end in"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, place, predict, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    words = {
        "RUN": place / "run",
        "TEACHER": place / "teacher",
        "NONE": place / "none",
        "EMPTY": tmp_path / "empty",
        "TEXT": tmp_path / "text.png",
        "PICTURE": place / "pictures" / "0.png",
    }
    arguments, expected, message = BAD[name]
    code, said = predict(*(words.get(word, word) for word in arguments))
    assert code == expected, said.err
    assert message in said.err
    assert len(said.err.strip().splitlines()) == 1
