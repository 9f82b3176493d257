"""Splits of image folders, shards and tars: their names, and the images outside of them."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from deit.cli import run_command
from deit.config.sections.data import DataConfig
from deit.core.errors import DataError
from deit.datasets.sources import timm_readers
from deit.datasets.splits import load_splits
from tests.helpers.errors import raises
from tests.helpers.image_sources.layouts import (
    LAYOUTS,
    SPLIT_SIZES,
    skipped_notes,
    split_sizes,
    write_file,
    write_images,
)

# Splits.


@pytest.mark.fault("C25")
@pytest.mark.parametrize("way", LAYOUTS)
@pytest.mark.parametrize(
    "called",
    [
        ("train", "valid", "test"),
        ("Train", "Valid", "Test"),
        ("training", "dev", "evaluation"),
        ("TRAIN", "Validation", "testing"),
    ],
    ids=" ".join,
)
def test_split_folder_has_any_usual_name(way, called, tmp_path):
    config = write_images(way, tmp_path, dict(zip(SPLIT_SIZES, called)))
    assert split_sizes(config) == {split: 2 * count for split, count in SPLIT_SIZES.items()}
    assert skipped_notes(config) == ()


@pytest.mark.fault("C25")
@pytest.mark.parametrize("way", LAYOUTS)
@pytest.mark.parametrize("called", ["val", "valid", "Validation", "dev", "eval"])
def test_validation_split_without_test_is_the_test_split(way, called, tmp_path):
    config = write_images(way, tmp_path, {"train": "train", "validation": called})
    assert split_sizes(config) == {"train": 8, "test": 6}


@pytest.mark.fault("C25")
@pytest.mark.parametrize("way", LAYOUTS)
def test_two_names_of_one_split_raise(way, tmp_path):
    config = write_images(way, tmp_path, {"train": "train", "validation": "val", "test": "valid"})
    with raises(DataError, "'val'", "'valid'"):
        split_sizes(config)


@pytest.mark.parametrize("way", ["folder", "shards", "folder reader"])
def test_splits_without_training_split_raise(way, tmp_path):
    config = write_images(way, tmp_path, {"validation": "Valid", "test": "test"})
    with raises(DataError, "'Valid'"):
        split_sizes(config)


@pytest.mark.fault("C25")
@pytest.mark.parametrize("way", LAYOUTS)
def test_images_outside_splits_are_noted(way, tmp_path):
    config = write_images(way, tmp_path, {"train": "train", "validation": "val", "test": "fold2"})
    write_file(tmp_path / "notes" / "readme.txt", b"no images here")
    (note,) = skipped_notes(config)
    assert str(tmp_path / "fold2") in note
    assert load_splits(config).skipped == (note,)


class FakeHub:
    """A small replacement of a Hugging Face dataset with splits of usual names."""

    class_to_idx = {"ant": 0, "bee": 1}
    image_key, label_key = "image", "label"
    info = SimpleNamespace(splits={"train": None, "valid": None, "unsupervised": None})

    def __init__(self, name: str, root: Path, split: str = "train") -> None:
        self.dataset, self.size = self, {"train": 8, "valid": 6}[split]

    def remove_columns(self, key: str) -> dict[str, list[int]]:
        return {"label": [row % 2 for row in range(self.size)]}

    def __len__(self) -> int:
        return self.size


@pytest.mark.fault("C25")
def test_hub_splits_are_matched_by_the_same_names(tmp_path, monkeypatch):
    monkeypatch.setattr("timm.data.readers.create_reader", FakeHub)
    copied = SimpleNamespace(origin="there")
    monkeypatch.setattr(timm_readers.importlib.util, "find_spec", lambda name: copied)
    fields = {"source": "reader", "reader": "hfds/x", "download": True}
    config = DataConfig(root=str(tmp_path), **fields)
    assert split_sizes(config) == {"train": 8, "test": 6}
    (note,) = skipped_notes(config)
    assert "hfds/x unsupervised" in note


def test_scan_reports_files_outside_splits(tmp_path, monkeypatch, capsys):
    write_images(
        "folder", tmp_path / "data", {"train": "train", "validation": "val", "test": "fold2"}
    )
    for name in ("cover.png", "back.png", "train/stray.png"):
        write_file(tmp_path / "data" / name)
    write_file(tmp_path / "data" / "train" / "labels.csv", b"a,b\n")
    monkeypatch.chdir(tmp_path)
    assert run_command("check-data", ["data", "--json", "found.json"], "deit check-data") == 0
    output = capsys.readouterr().out
    result = json.loads((tmp_path / "found.json").read_text())
    folder, next_to, outside = result["not_read"]
    assert folder.startswith("data/fold2 ")
    assert next_to.startswith("2 ")
    assert outside.startswith("1 ")
    assert all(f" {item}\n" in output for item in result["not_read"])
    assert result["passed_over"] == {".csv": 1}


def test_run_logs_skipped_files(tmp_path, monkeypatch, capsys):
    write_images(
        "folder", tmp_path / "data", {"train": "Train", "validation": "fold2", "test": "Test"}
    )
    write_file(tmp_path / "data" / "Train" / "ant" / "photo.heic", b"x")
    monkeypatch.chdir(tmp_path)
    options = "--teacher.source none --loss none --optim.epochs 1 --optim.warmup_epochs 0"
    options += " --optim.batch_size 2 --data.image_size 8 --student.image_size 8 --student.depth 1"
    arguments = ["folder", "--data.root", "data", *options.split(), "--dry-run"]
    assert run_command("train", arguments, "deit train") == 0
    output = capsys.readouterr().out.splitlines()
    (at,) = [index for index, line in enumerate(output) if re.match(r"data +folder\b", line)]
    numbers = re.findall(r"(\d+) (classes|train|validation|test)\b", output[at])
    assert numbers == [("2", "classes"), ("6", "train"), ("2", "validation"), ("4", "test")]
    assert re.match(r" .*\b1 \.heic$", output[at + 1])
    assert re.match(r" .*\bdata/fold2\b", output[at + 2])


def test_images_without_classes_raise_with_remedy(tmp_path):
    """An unlabeled test split, as in competitions, or a class named train."""
    config = write_images("folder", tmp_path, {"train": "train"})
    write_file(tmp_path / "test" / "1.png")
    with raises(DataError, tmp_path / "test", "deit predict"):
        split_sizes(config)


# Classes.


def test_class_without_images_in_one_split_raises(tmp_path):
    config = write_images("folder", tmp_path, {"train": "train", "validation": "val"})
    for path in (tmp_path / "val" / "bee").iterdir():
        path.unlink()
    with raises(DataError, "val/bee: "):
        split_sizes(config)
    (tmp_path / "val" / "bee").rmdir()
    with raises(DataError, "'bee'"):
        split_sizes(config)
