"""Tests that the public functions of deit.evaluation accept paths as str."""

import pytest
from PIL import Image

from deit.evaluation.cache import EvaluationCache
from deit.evaluation.compare_runs import compare_evaluations
from deit.evaluation.evaluate import cost_of_run, evaluate
from deit.evaluation.load_run import load_run_config, resolve_run, student_at_resolution
from deit.evaluation.predict import predict
from deit.evaluation.tables import write_evaluation

pytest.importorskip("sklearn")


def test_evaluate_as_str_equals_path(runs, tmp_path):
    metrics = evaluate(str(runs / "labels")).metrics
    assert metrics["heads"] == evaluate(runs / "labels").metrics["heads"]
    assert metrics["run"] == str(runs / "labels")
    write_evaluation(str(tmp_path / "metrics.json"), metrics)
    assert (tmp_path / "metrics.json").is_file()
    assert cost_of_run(str(runs / "labels"))["parameters"] > 0


def test_load_run_path_as_str_equals_path(runs):
    run = runs / "student"
    assert resolve_run(str(run), "best") == resolve_run(run, "best")
    assert load_run_config(str(run)) == load_run_config(run)
    student, model_info = student_at_resolution(str(run / "best"), None)
    assert model_info.student.image_size == student.network.patch_embed.img_size[0]


def test_predict_paths_as_str_are_accepted(runs, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    json_file, plot = tmp_path / "result.json", tmp_path / "attention.png"
    result = predict(
        str(runs / "student"),
        str(tmp_path / "image.png"),
        attention=str(plot),
        json_file=str(json_file),
    )
    assert [row["file"] for row in result["images"]] == [str(tmp_path / "image.png")]
    assert json_file.is_file()
    assert plot.is_file()


def test_compare_evaluations_paths_as_str_are_accepted(runs, tmp_path):
    report = compare_evaluations(
        [str(runs / "student"), str(runs / "labels")],
        plot=str(tmp_path / "plot.png"),
        json_file=str(tmp_path / "report.json"),
    )
    assert list(report["rows"]) == ["student", "labels"]
    assert (tmp_path / "plot.png").is_file()
    assert (tmp_path / "report.json").is_file()


def test_evaluation_cache_paths_as_str_are_accepted(runs, tmp_path):
    cache_path = tmp_path / "evaluation.json"
    computed = EvaluationCache().get(str(runs / "labels"), cache_path=str(cache_path))
    assert cache_path.is_file()
    assert EvaluationCache().get(runs / "labels", cache_path=cache_path) == computed
