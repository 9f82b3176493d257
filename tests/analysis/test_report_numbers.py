"""The numbers of a report by hand: schedules, calibration, confusion, hardest images, names."""

import re

import pytest
import torch

from deit.analysis import report
from deit.analysis.class_sections import confusion, reliability_bins
from deit.analysis.run_images import hardest_images
from deit.analysis.run_report import RunReport
from deit.analysis.run_sections import schedules_of
from deit.config.recipes.handwriting import digits
from deit.evaluation.cache import CachedEvaluation

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_names_that_differ_in_signs_alone_have_files_of_their_own(tmp_path):
    paths = {tmp_path / name: name for name in ("lr-0.1", "lr-0-1", "Run", "run", "模", "型")}
    found = report._slugs(paths)
    assert list(found.values()) == ["lr-0-1", "lr-0-1-2", "run", "run-2", "run-3", "run-4"]


def test_runs_of_a_sweep_are_called_without_their_hash_where_that_tells_them_apart(tmp_path):
    first, again, other = (
        tmp_path / place / "runs" / name
        for place, name in (
            ("x", "a-seed-0-0123456789ab"),
            ("y", "a-seed-0-ba9876543210"),
            ("x", "b-seed-0-0123456789ab"),
        )
    )
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "sweep.json").write_text("{}")
    assert report._names([first, other]) == {first: "a-seed-0", other: "b-seed-0"}
    whole = report._names([first, again, other])
    assert list(whole.values()) == [first.name, again.name, "b-seed-0"]
    elsewhere = tmp_path / "y" / "runs" / first.name
    assert report._names([first, elsewhere]) == {first: str(first), elsewhere: str(elsewhere)}
    mine = tmp_path / "runs" / "exp-202405171530"  # no run of a sweep
    assert report._names([mine]) == {mine: mine.name}


def test_schedules_are_those_that_were_applied():
    """By hand: the peak is 100 %; the teacher's term grows for two epochs; the average's decay at
    update n is (1 + n) / (10 + n)."""
    config = digits().replace(
        optim={"ema_epochs": 1.0},
        loss={"distillation_warmup_epochs": 2.0, "distillation_weight": 0.5},
    )
    rows = [
        {"epoch": epoch, "step": 10 * epoch, "train": {"lr": lr}}
        for epoch, lr in ((1, 1e-3), (2, 2e-3), (3, 5e-4))
    ]
    view = RunReport("run", "run", config, {}, rows, {}, None)
    found = schedules_of(view)
    peaks = [re.fullmatch(r"\D+ \(([\d.]+)\)", name)[1] for name in found]
    assert peaks == ["0.002", "0.5", "0.769"]
    rate, weight, decay = ([share for _, share in line] for line in found.values())
    assert rate == pytest.approx([50, 100, 25])
    assert weight == pytest.approx([50, 100, 100])
    assert decay == pytest.approx([100 * (10 / 19) / (30 / 39), 100 * (20 / 29) / (30 / 39), 100])


def test_bins_of_confidence_by_hand():
    """Guo et al. 2017: bins (0, 0.5] and (0.5, 1] of two."""
    bins = reliability_bins([0, 1, 1, 0], [0.5, 0.4, 0.9, 1.0], [0, 0, 1, 0], bins=2)
    assert bins == [(pytest.approx(0.45), 0.5, 2), (pytest.approx(0.95), 1.0, 2)]
    assert reliability_bins([0], [0.0], [1]) == [(0.0, 0.0, 1)]


def test_bins_give_the_calibration_error_of_evaluation():

    from deit.core.metrics import calibration_error

    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(500, 7), torch.randint(0, 7, (500,))
    sure, answers = logits.double().softmax(dim=1).max(dim=1)
    bins = reliability_bins(answers.tolist(), sure.tolist(), labels.tolist())
    error = sum(abs(confidence - right) * number for confidence, right, number in bins) / 500
    assert error == pytest.approx(calibration_error(logits, labels))


def test_confusion_counts_truth_by_answer():
    assert confusion([0, 1, 1, 2], [0, 0, 1, 1], 3) == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_the_hardest_are_those_a_teacher_gets_right_the_surest_first():
    answers = {"class": [0, 1, 1, 1, 0], "teacher": [0, 0, 1, 0, 1]}
    confidence = {"class": [0.9, 0.6, 0.8, 0.7, 0.5], "teacher": [1.0] * 5}
    said = CachedEvaluation("", {}, answers, confidence, [0, 0, 0, 0, 1])
    assert hardest_images(said, 9) == [3, 1, 4, 2]
    assert hardest_images(said, 2) == [3, 1]
    without_teacher = CachedEvaluation("", {}, {"class": [0, 1]}, {"class": [0.9, 0.6]}, [1, 0])
    assert hardest_images(without_teacher, 9) == [0, 1]
