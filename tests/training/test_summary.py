"""The summary at the end of a run: as plain values and as a few lines of text."""

import json
import re

import pytest

from deit.config.recipes.handwriting import digits, digits_teacher
from deit.config.sections.loss import LossConfig
from deit.core import run_folder, run_log
from deit.deploy.export_formats import FORMATS
from deit.training.progress_log import log_epoch
from deit.training.summary import (
    SUMMARY,
    print_summary,
    rising_accuracy,
    sparkline,
    summary_of,
)
from deit.training.train import train


def test_sparkline_spans_the_lowest_to_the_highest_value():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([0.3]) == "▁"
    assert sparkline([0.2, 0.2]) == "▁▁"
    long = sparkline([index / 99 for index in range(100)], width=8)
    assert long == "▁▂▃▄▅▆▇█"
    assert len(sparkline(list(range(41)))) == 40


def test_summary_of_a_run_is_printed_and_saved(tmp_path, capsys):
    pytest.importorskip("sklearn")
    config = digits_teacher().replace(optim={"epochs": 4, "warmup_epochs": 1})
    train(config, tmp_path / "my run")
    output = capsys.readouterr().out
    result = run_folder.read_result(tmp_path / "my run")
    summary = summary_of(config, tmp_path / "my run", result)
    print_summary(summary)
    summary_text = capsys.readouterr().out
    assert output.endswith(summary_text)
    rows = run_log.read(tmp_path / "my run" / run_log.METRICS)
    assert summary["curve"] == [
        [row["epoch"], row["validation"]["class_top1"]] for row in rows if "validation" in row
    ]
    assert summary["best"] == {"class": result["best"]["top1"]}
    assert summary["selected"] == result["best"]["top1"]
    assert summary["teacher"] is result["teacher_top1"] is None
    assert json.loads((tmp_path / "my run" / SUMMARY).read_text()) == summary
    best = f"{100 * summary['best']['class']:.1f}"
    assert re.search(rf"\bclass head {best}\b.*\bepoch {summary['best_epoch']}\b", summary_text)
    assert re.search(r"\b4 epochs\b", summary_text)
    assert summary["memory_mb"] == max(row["memory_mb"] for row in rows) > 100  # torch alone
    assert f", peak memory {summary['memory_mb']:,.0f} MB" in summary_text
    assert f"deit evaluate '{tmp_path / 'my run'}'" in summary_text
    assert summary["validation_images"] == result["validation_images"] > 50
    assert re.search(rf"\b{best} % is \d+ of {summary['validation_images']} images", summary_text)
    assert len(summary_text.splitlines()) <= 10


def test_epoch_line_names_heads_and_share_of_the_loader(capsys):
    row = {
        "epoch": 2,
        "seconds": 4.0,
        "images_per_s": 873.0,
        "loader": {"share": 0.019},
        "train": {"loss": 1.75, "label_loss": 2.3, "distillation_loss": 1.2},
        "validation": {"class_top1": 0.972, "distillation_top1": 0.981, "fused_top1": 0.983},
    }
    log_epoch(row, 10, LossConfig(kind="soft"))
    parts = capsys.readouterr().out.strip().split(" | ")
    assert parts[2] == "validation class head 97.2, distillation head 98.1, fused 98.3"
    assert parts[3] == "873 images/s (1.9 % of time in loader)"


ROW = {
    "epoch": 8,
    "seconds": 100.0,
    "images_per_s": 873.0,
    "loader": {"share": 0.019},
    "train": {"loss": 1.75, "label_loss": 2.3, "distillation_loss": 1.2},
    "validation": {
        "class_top1": 0.972,
        "distillation_top1": 0.981,
        "fused_top1": 0.983,
        "agreement": 0.95,
    },
}
PARTS = ["(labels ", "% of time in loader", "agreement", "class head", "fused 98.3"]


@pytest.mark.parametrize(
    ("width", "num_dropped"),
    [(None, 0), (250, 0), (170, 1), (150, 2), (125, 3), (100, 4), (80, 4), (20, 4)],
)
def test_epoch_line_fits_the_terminal(width, num_dropped, capsys, monkeypatch):
    monkeypatch.setattr("deit.training.progress_log.terminal_width", lambda: width)
    log_epoch(ROW, 10, LossConfig(kind="soft"))
    line = capsys.readouterr().out.rstrip("\n")
    assert "\n" not in line
    assert len(line) <= (width or 1000) or width == 20
    assert [part in line for part in PARTS] == [False] * num_dropped + [True] * (5 - num_dropped)
    assert line.startswith("epoch  8/10 | loss 1.750")
    assert line.endswith("ETA 25 s")


@pytest.mark.parametrize(
    ("before", "eta"),
    [((0, 0), "25 s"), ((6, 90.0), "10 s"), ((7.5, 95.0), "20 s"), ((8, 99), "25 s")],
)
def test_eta_of_a_resumed_run_is_from_its_own_epochs(before, eta, capsys):
    log_epoch(ROW, 10, LossConfig(kind="soft"), before=before)
    assert capsys.readouterr().out.endswith(f" ETA {eta}\n")


def _rows(training, validation, every=1):
    return [
        {
            "epoch": epoch,
            "train": {"class_top1": 0.1, "fused_top1": accuracy},
            **({"validation": {"fused_top1": on_validation}} if epoch % every == 0 else {}),
        }
        for epoch, (accuracy, on_validation) in enumerate(zip(training, validation), start=1)
    ]


RISING = [0.2 + 0.02 * epoch for epoch in range(20)]
FLAT = [min(0.2 + 0.04 * epoch, 0.6) for epoch in range(20)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (_rows(RISING, RISING), 0.58),
        (_rows(RISING, RISING, every=5), 0.58),
        (_rows(RISING[10:], RISING[10:]), 0.58),
        (_rows(RISING[11:], RISING[11:]), None),  # too few epochs
        (_rows(FLAT, FLAT), None),
        (_rows(RISING, FLAT), None),  # only the training images are learned better
        (_rows(FLAT, RISING), None),
        (_rows([0.25 + value for value in RISING], RISING), None),  # not low
        (_rows(RISING, RISING, every=30), None),
        ([], None),
    ],
)
def test_low_and_rising_training_accuracy_is_recognized(rows, expected):
    assert rising_accuracy(rows) == (None if expected is None else pytest.approx(expected))


def test_summary_prints_every_known_value(capsys):
    summary = {
        "run": "r",
        "student": "deit_micro",
        "use": "onnx",
        "selected": 0.93,
        "validation_images": 100,
        "rising": 0.612,
        "epochs": 300,
        "seconds": 7000.0,
        "images_per_s": 12345.6,
        "loader_share": 0.021,
        "memory_mb": 1234.5,
        "skipped": 2,
        "best_epoch": 290,
        "best": {"class": 0.9, "distillation": 0.91, "fused": 0.92, "average_fused": 0.93},
        "agreement": 0.95,
        "teacher": 0.96,
        "curve": [[1, 0.1], [300, 0.93]],
    }
    print_summary(summary)
    output = capsys.readouterr().out
    for text in ("1 h 56 min", "300 epochs", "12,346 images/s", "(2.1 % of time in loader)"):
        assert text in output
    assert "peak memory 1,234 MB" in output
    assert re.search(r"\b2 steps\b", output)
    for head in ("class head 90.0", "distillation head 91.0", "fused 92.0", "average fused 93.0"):
        assert head in output
    assert re.search(r"\bteacher\D*\b95\.0\b.*\bteacher\D*\b96\.0\b.*\bepoch 290\b", output)
    assert re.search(r"▁█ 10\.0\b\D*\b93\.0\b", output)
    for command in ("evaluate r ", "predict r PHOTO.jpg ", "export r --format onnx "):
        assert f"deit {command}" in output
    assert "93.0 % is 93 of 100 images; 95 % interval 86.3 to 96.6" in output
    assert "training accuracy 61.2 % was still rising: more epochs may help" in output
    print_summary(summary | {"validation_images": 1000, "rising": None})
    output = capsys.readouterr().out
    assert "interval" not in output
    assert "rising" not in output
    names = ("images_per_s", "memory_mb", "agreement", "teacher", "validation_images")
    print_summary(summary | dict.fromkeys(names) | {"curve": []})
    assert "None" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("student", "command"),
    [
        ({}, "export {} --format onnx"),
        ({"adapters": "convpass"}, "export {} --format onnx"),
        ({"name": "small_convnet"}, "export {} --format onnx"),
        ({"qat": "int8"}, "quantize {}"),
    ],
)
def test_summary_suggests_a_command_that_supports_the_student(tmp_path, capsys, student, command):
    result = {"epochs": 1, "seconds": 1.0, "skipped": 0, "best": {"top1": 0.5, "epoch": 1}}
    (tmp_path / run_log.METRICS).touch()
    config = digits().replace(student=student)
    print_summary(summary_of(config, tmp_path, result))
    assert f"deit {command.format(tmp_path)} " in capsys.readouterr().out


@pytest.mark.parametrize("missing_package", [None, *FORMATS["onnx"].needs])
def test_summary_names_missing_export_packages(missing_package, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "deit.training.summary.find_spec",
        lambda name: None if name == missing_package else object(),
    )
    result = {"epochs": 1, "seconds": 1.0, "skipped": 0, "best": {"top1": 0.5, "epoch": 1}}
    (tmp_path / run_log.METRICS).touch()
    config = digits().replace(student={"name": "small_convnet"})
    print_summary(summary_of(config, tmp_path, result))
    is_suggested = "pip install 'deit[export]'" in capsys.readouterr().out
    assert is_suggested == (missing_package is not None)
