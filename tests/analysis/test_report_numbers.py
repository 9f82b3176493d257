"""The numbers of a report by hand: schedules, calibration, confusion, hardest images, names."""

import re

import pytest
import torch

from deit.analysis import report
from deit.analysis.class_sections import reliability_bins
from deit.analysis.run_images import hardest_images
from deit.analysis.run_report import RunReport
from deit.analysis.run_sections import schedules_of
from deit.config.recipes.handwriting import digits
from deit.evaluation.cache import CachedEvaluation

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def test_slugs_of_names_differing_in_special_characters_are_distinct(tmp_path):
    paths = {tmp_path / name: name for name in ("lr-0.1", "lr-0-1", "Run", "run", "模", "型")}
    slugs = report._slugs(paths)
    assert list(slugs.values()) == ["lr-0-1", "lr-0-1-2", "run", "run-2", "run-3", "run-4"]


def test_names_of_sweep_runs_have_no_hash_unless_ambiguous(tmp_path):
    first, again, other = (
        tmp_path / sweep / "runs" / name
        for sweep, name in (
            ("x", "a-seed-0-0123456789ab"),
            ("y", "a-seed-0-ba9876543210"),
            ("x", "b-seed-0-0123456789ab"),
        )
    )
    for sweep in ("x", "y"):
        (tmp_path / sweep).mkdir()
        (tmp_path / sweep / "sweep.json").write_text("{}")
    assert report._names([first, other]) == {first: "a-seed-0", other: "b-seed-0"}
    names = report._names([first, again, other])
    assert list(names.values()) == [first.name, again.name, "b-seed-0"]
    in_other_sweep = tmp_path / "y" / "runs" / first.name
    assert report._names([first, in_other_sweep]) == {
        first: str(first),
        in_other_sweep: str(in_other_sweep),
    }
    single_run = tmp_path / "runs" / "exp-202405171530"  # not a run of a sweep
    assert report._names([single_run]) == {single_run: single_run.name}


def test_schedules_are_in_percent_of_their_maximum():
    """By hand: the peak is 100 %; the distillation weight rises for two epochs.

    The EMA decay at step n is (1 + n) / (10 + n).
    """
    config = digits().replace(
        optim={"ema_epochs": 1.0},
        loss={"distillation_warmup_epochs": 2.0, "distillation_weight": 0.5},
    )
    rows = [
        {"epoch": epoch, "step": 10 * epoch, "train": {"lr": lr}}
        for epoch, lr in ((1, 1e-3), (2, 2e-3), (3, 5e-4))
    ]
    run_report = RunReport("run", "run", config, {}, rows, {}, None)
    schedules = schedules_of(run_report)
    peaks = [re.fullmatch(r"\D+ \(([\d.]+)\)", name)[1] for name in schedules]
    assert peaks == ["0.002", "0.5", "0.769"]
    rate, weight, decay = ([share for _, share in line] for line in schedules.values())
    assert rate == pytest.approx([50, 100, 25])
    assert weight == pytest.approx([50, 100, 100])
    assert decay == pytest.approx([100 * (10 / 19) / (30 / 39), 100 * (20 / 29) / (30 / 39), 100])


def test_reliability_bins_by_hand():
    """Two bins: (0, 0.5] and (0.5, 1] (Guo et al. 2017)."""
    bins = reliability_bins([0, 1, 1, 0], [0.5, 0.4, 0.9, 1.0], [0, 0, 1, 0], bins=2)
    assert bins == [(pytest.approx(0.45), 0.5, 2), (pytest.approx(0.95), 1.0, 2)]
    assert reliability_bins([0], [0.0], [1]) == [(0.0, 0.0, 1)]


def test_reliability_bins_match_the_calibration_error_of_evaluate():

    from deit.core.metrics import calibration_error

    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(500, 7), torch.randint(0, 7, (500,))
    confidences, predictions = logits.double().softmax(dim=1).max(dim=1)
    bins = reliability_bins(predictions.tolist(), confidences.tolist(), labels.tolist())
    error = (
        sum(abs(confidence - accuracy) * samples for confidence, accuracy, samples in bins) / 500
    )
    assert error == pytest.approx(calibration_error(logits, labels))


def test_hardest_images_are_sorted_by_teacher_and_confidence():
    predictions = {"class": [0, 1, 1, 1, 0], "teacher": [0, 0, 1, 0, 1]}
    confidence = {"class": [0.9, 0.6, 0.8, 0.7, 0.5], "teacher": [1.0] * 5}
    evaluation = CachedEvaluation("", {}, predictions, confidence, [0, 0, 0, 0, 1])
    assert hardest_images(evaluation, 9) == [3, 1, 4, 2]
    assert hardest_images(evaluation, 2) == [3, 1]
    without_teacher = CachedEvaluation("", {}, {"class": [0, 1]}, {"class": [0.9, 0.6]}, [1, 0])
    assert hardest_images(without_teacher, 9) == [0, 1]
