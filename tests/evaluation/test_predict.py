"""Predicting: the run's own answers to pictures, from files and folders, drawn and as JSON."""

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
from deit.models.saved import load_student
from deit.models.teacher_sources import load_teacher
from deit.models.teachers import BY_NAME
from deit.training.train import train

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A student, its teacher, and the first test images as PNG files."""
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
    config = load_config(place / "run" / "config.json")
    student, facts = load_student(place / "run" / "best")
    (member,) = teacher_specs(config.teacher)
    teacher = load_teacher(member, facts.class_names, image_size=8)
    images = load_splits(config.data).test.pixels[:3].float() / 255
    with torch.no_grad():
        heads = {**logits_by_head(student.eval()(images)), "teacher": teacher(images)}
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
    assert "attention.png" in said.out
    code, said = predict(
        place / "run", place / "pictures" / "0.png", "--attention", "attention.png"
    )
    assert code == 5
    assert all(word in said.err for word in ("--attention attention.png", "--force"))


def test_a_name_is_no_formula(place, predict, tmp_path):
    odd = tmp_path / "$\\foo$ $x$.png"
    odd.write_bytes((place / "pictures" / "0.png").read_bytes())
    code, said = predict(place / "run", odd, "--attention", "a.png", "--json", "a.json")
    assert code == 0, said.err
    assert (tmp_path / "a.json").is_file()


def test_top_more_than_there_are_classes_shows_all(place, predict, tmp_path):
    code, _ = predict(
        place / "teacher", place / "pictures" / "0.png", "--top-k", "99", "--json", "f.json"
    )
    assert code == 0
    (row,) = json.loads((tmp_path / "f.json").read_text())["pictures"]
    assert list(row["heads"]) == ["class"]
    shares = [one["probability"] for one in row["heads"]["class"]]
    assert len(shares) == 10
    assert sum(shares) == pytest.approx(1)
    assert shares == sorted(shares, reverse=True)


@pytest.mark.fault("C29")
def test_the_others_are_answered_and_all_bad_ones_are_listed(place, predict, tmp_path):
    sound = [place / "pictures" / name for name in ("0.png", "1.png", "more/2.png")]
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<html>")
    (tmp_path / "none").mkdir()
    bad = {"empty.png": "empty", "page.jpg": "6 bytes", "gone.png": "", "none": ".webp"}
    first, *rest = bad
    options = ("--json", "found.json", "--attention", "look.png", "--top-k", "1")
    code, said = predict(place / "run", first, sound[0], *rest, *sound[1:], *options)
    assert code == 3
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["file"] for row in found["pictures"]] == [str(path) for path in sound]
    assert found["unreadable"].keys() == bad.keys()
    assert all(str(path) in said.out for path in sound)
    assert (tmp_path / "look.png").is_file()
    head, *lines = said.err.strip().splitlines()
    assert re.search(r"\b4\b.*\b7\b", head)
    reasons = found["unreadable"]
    assert sorted(lines) == sorted(f"  {name}: {reason}" for name, reason in reasons.items())
    assert all(word in reasons[name] for name, word in bad.items())
    code, said = predict(place / "run", *bad, "--json", "none.json", "--attention", "none.png")
    assert code == 3
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 5
    assert not list(tmp_path.glob("none.*"))


@pytest.mark.fault("C29")
def test_a_teacher_of_larger_pictures_sees_the_same_ones(place, predict, tmp_path, monkeypatch):
    (tmp_path / "empty.png").write_bytes(b"")
    seen = []

    class Larger:
        image_size = 24
        class_order = BY_NAME

        def __call__(self, views):
            seen.append(tuple(views.shape))
            return torch.zeros(len(views), 10)

    monkeypatch.setattr(
        "deit.evaluation.predict.load_teacher", lambda *arguments, **options: Larger()
    )
    arguments = ("--teacher", "run", "--json", "found.json")
    code, _ = predict(place / "run", "empty.png", place / "pictures", *arguments)
    assert code == 3
    assert seen == [(3, 3, 24, 24)]
    found = json.loads((tmp_path / "found.json").read_text())
    assert [set(row["heads"]) for row in found["pictures"]] == [
        {"class", "distillation", "fused", "teacher"}
    ] * 3


@pytest.mark.fault("C14")
def test_a_folder_is_read_as_training_reads_it(place, predict, tmp_path):
    content = (place / "pictures" / "0.png").read_bytes()
    for name in ("a.png", "._a.png", ".ipynb_checkpoints/a.png", "Thumbs.db", "b.heic", "c.jfif"):
        file = tmp_path / "mine" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (tmp_path / "lake").mkdir()
    (tmp_path / "lake" / "d.png").write_bytes(content)
    (tmp_path / "mine" / "linked").symlink_to(tmp_path / "lake")
    (tmp_path / "mine" / "again").symlink_to(".")
    code, said = predict(place / "run", "mine", "--json", "found.json")
    assert code == 0, said.err
    found = json.loads((tmp_path / "found.json").read_text())
    files = [row["file"] for row in found["pictures"]]
    assert files == ["mine/a.png", "mine/c.jfif", "mine/linked/d.png"]
    assert re.search(r"\b1 \.heic\b", said.out)
    assert re.search(r"mine/again\b.* link\b", said.out)


BAD = {
    "no run": (("NONE", "PICTURE"), 4, ("NONE",)),
    "no checkpoint": (("EMPTY", "PICTURE"), 4, ("EMPTY", "'best'")),
    "no picture": (("RUN", "gone.png"), 3, ("gone.png",)),
    "empty folder": (("RUN", "EMPTY"), 3, ("EMPTY", ".webp")),
    "no image": (("RUN", "TEXT"), 3, ("TEXT", "10 bytes")),
    "top": (("RUN", "PICTURE", "--top-k", "0"), 2, ("--top-k 0",)),
    "no attention": (
        ("TEACHER", "PICTURE", "--attention", "a.png"),
        2,
        ("SmallConvNet", "deit_*", "vit_*"),
    ),
    "no teacher": (("TEACHER", "PICTURE", "--teacher", "run"), 2, ("--teacher run", " 0 ")),
    "bad teacher": (
        ("RUN", "PICTURE", "--teacher", "gone/teacher"),
        3,
        ("teacher.source gone/teacher",),
    ),
    "name": (("RUN", "PICTURE", "--attention", "a.gif"), 2, ("--attention a.gif", ".png")),
}
"""Arguments, the exit code, and what the message names; words in capitals are paths."""


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, place, predict, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    paths = {
        "RUN": place / "run",
        "TEACHER": place / "teacher",
        "NONE": place / "none",
        "EMPTY": tmp_path / "empty",
        "TEXT": tmp_path / "text.png",
        "PICTURE": place / "pictures" / "0.png",
    }
    arguments, expected, named = BAD[name]
    code, said = predict(*(paths.get(word, word) for word in arguments))
    assert code == expected, said.err
    assert [one for one in named if str(paths.get(one, one)) not in said.err] == [], said.err
    assert len(said.err.strip().splitlines()) == 1
