"""Unseen classes: removed from training, kept in the test split, reported separately."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from deit.config.presets import LOSS_PRESETS
from deit.config.recipes.handwriting import digits, digits_teacher
from deit.config.sections.data import DataConfig
from deit.core.errors import DataError
from deit.datasets.splits import load_splits
from deit.evaluation.evaluate import evaluate
from deit.evaluation.tables import print_evaluation
from deit.experiments.base_runs import BaseRuns, Experiment
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.images import folder_data, write_class_folders

pytest.importorskip("sklearn")
UNSEEN = ("6", "7", "8", "9")


def test_unseen_classes_have_no_training_images_and_others_keep_their_split():
    whole = load_splits(DataConfig(source="digits", image_size=8))
    part = load_splits(DataConfig(source="digits", image_size=8, unseen_classes=UNSEEN))
    assert part.class_names == whole.class_names
    for name in ("train", "validation"):
        before, now = getattr(whole, name), getattr(part, name)
        remaining = before.labels < 6
        assert torch.equal(now.labels, before.labels[remaining])
        assert torch.equal(now.pixels, before.pixels[remaining])
    assert torch.equal(part.test.pixels, whole.test.pixels)
    assert torch.equal(part.test.labels, whole.test.labels)
    assert part.fingerprint != whole.fingerprint
    assert part.mean != whole.mean  # of what training sees
    (note,) = set(part.notes) - set(whole.notes)
    assert "6, 7, 8, 9" in note


@pytest.mark.parametrize("storage", ["memory", "files"])
def test_unseen_classes_of_folder_have_no_training_images(tmp_path, storage):
    root = write_class_folders(tmp_path, images_per_class=8)
    listed = tmp_path / "names.txt"
    listed.write_text("bee\n")
    splits = load_splits(folder_data(root, storage=storage, unseen_classes=(f"@{listed}",)))
    assert set(splits.train.labels.tolist()) == set(splits.validation.labels.tolist()) == {0, 2}
    assert set(splits.test.labels.tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("names", "result"),
    [
        (("six",), ("data.unseen_classes", "'six'")),
        (tuple("123456789"), ("data.unseen_classes", "10 classes")),
        (("@nowhere.txt",), ("data.unseen_classes", "@nowhere.txt")),
    ],
)
def test_invalid_unseen_classes_raise(names, result):
    with raises(DataError, *result):
        load_splits(DataConfig(source="digits", image_size=8, unseen_classes=names))


def test_teacher_recipe_trains_unseen_classes():
    config = digits().replace(data={"unseen_classes": UNSEEN, "train_fraction": 0.5})
    run = Experiment("digits", config, None)
    ground = BaseRuns(run, config, Path("out"))
    ground.with_local_paths(config)
    (teacher,) = ground.runs.values()
    assert teacher.data.unseen_classes == ()
    assert teacher.data.train_fraction == 0.5


def test_custom_recipe_has_data_of_its_teacher():
    """The teacher of a recipe in a file is trained with the same data settings."""
    trained = digits().replace(
        data={"train_fraction": 0.5, "image_size": 16, "unseen_classes": UNSEEN}
    )
    typed = trained.replace(data={"split_seed": 3})
    run = Experiment("mine.py:recipe", typed, None)
    ground = BaseRuns(run, typed, Path("out"), recipe_config=trained)
    ground.with_local_paths(typed)
    (teacher,) = ground.runs.values()
    changed = {"train_fraction": 0.5, "split_seed": 3}
    assert teacher.data == digits_teacher().replace(data=changed).data


def test_evaluation_reports_seen_and_unseen_classes(tmp_path, capsys):
    small = digits_teacher().replace(
        data={"unseen_classes": UNSEEN},
        loss=LOSS_PRESETS["none"],
        optim={"epochs": 3, "warmup_epochs": 0},
    )
    train(small, tmp_path / "run")
    result = evaluate(tmp_path / "run").metrics
    assert result["held_out"] == list(UNSEEN)
    rows = result["per_class"]
    for group, names in (("seen", tuple("012345")), ("unseen", UNSEEN)):
        count = sum(rows[name]["num_samples"] for name in names)
        right = sum(rows[name]["class"] * rows[name]["num_samples"] for name in names)
        assert result[group]["class"] == pytest.approx(right / count)
    # Labels alone never name a class that they do not hold.
    assert result["seen"]["class"] > 0.5 > result["unseen"]["class"] == 0
    capsys.readouterr()
    print_evaluation(result)
    output = capsys.readouterr().out
    rows = [line.split("│")[1].strip() for line in output.splitlines() if line[:1] == "│"]
    assert [row for row in rows if row.isdigit()] == list("012345")  # the others are marked
    assert [row[:1] for row in rows if "unseen" in row and row[:1].isdigit()] == list(UNSEEN)
    assert sum("unseen" in row for row in rows) == len(UNSEEN) + 1  # and all of them together


def idx(path, values):
    """Write a file in MNIST's format: type, dimensions, bytes."""
    header = struct.pack(">HBB", 0, 8, values.ndim)
    path.write_bytes(header + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes())


@pytest.fixture
def mnist(tmp_path):
    """MNIST's files with 60 training and 20 test images of random gray values."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, count in (("train", 60), ("t10k", 20)):
        pixels = generator.integers(256, size=(count, 28, 28), dtype=np.uint8)
        idx(raw / f"{split}-images-idx3-ubyte", pixels)
        idx(raw / f"{split}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    return tmp_path


def test_mnist_is_read_in_torchvision_layout(mnist):
    splits = load_splits(DataConfig(source="mnist", root=str(mnist), image_size=28))
    assert (len(splits.train.labels), len(splits.validation.labels)) == (50, 10)
    assert splits.test.pixels.shape == (20, 3, 28, 28)
    assert splits.test.labels.tolist() == [*range(10)] * 2
    raw = (mnist / "MNIST" / "raw" / "t10k-images-idx3-ubyte").read_bytes()[16:]
    first = torch.frombuffer(bytearray(raw), dtype=torch.uint8)[: 28 * 28].reshape(28, 28)
    assert all(torch.equal(channel, first) for channel in splits.test.pixels[0])


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_missing_mnist_raises_with_expected_path(mnist, damage):
    path = mnist / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:100])
    with raises(DataError, "--data.download"):
        load_splits(DataConfig(source="mnist", root=str(mnist), image_size=28))
