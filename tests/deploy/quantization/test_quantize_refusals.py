"""Tests that `deit quantize` rejects bad options and inaccurate files, and leaves no files."""

import re
import shutil

import pytest

from deit.cli import run_command
from deit.core.errors import CheckpointError
from deit.deploy import int8_compare, quantize, quantize_input
from deit.deploy.export import BATCHES
from deit.deploy.export_formats import onnx_inference_fn
from deit.deploy.int8_layers import prepare
from deit.deploy.quantize_options import QuantizeOptions
from tests.helpers.errors import raises

pytest.importorskip("sklearn")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def listing(folder):
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_quantize_large_accuracy_drop_raises_and_leaves_nothing(runs, tmp_path, capsys):
    before = listing(runs)
    arguments = [str(runs / "distilled"), "--percentile", "60", "--out", str(tmp_path / "q")]
    assert run_command("quantize", [*arguments, "--max-drop", "2.5"], "deit quantize") == 4
    output = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in output if line.startswith("deit: error")]
    assert len(lines) == 1
    drop, top1_float, top1_int8 = map(float, re.findall(r"\b\d+\.\d\d\b", lines[0]))
    assert drop == pytest.approx(top1_float - top1_int8, abs=0.011)
    assert drop > 2.5
    for name in (f"{runs / 'distilled'}:", "max_drop 2.5", "method dynamic", "sensitivity"):
        assert name in lines[0]
    assert not any(tmp_path.iterdir())
    assert listing(runs) == before


@pytest.mark.parametrize(
    ("top1", "max_drop", "is_refused"), [(99, 1.0, False), (98, 1.0, True), (100, 0.0, False)]
)
def test_check_accuracy_drop_limit_is_inclusive(top1, max_drop, is_refused):
    heads = {"float": 1.0, "int8": top1 / 100}
    report = {name: {"heads": {"class": {"top1": value}}} for name, value in heads.items()}
    report |= {"calibration": None, "run": "runs/x"}
    worst = {"layer": "blocks.0.attn.qkv"}
    report["sensitivity"] = {"layers": [worst, {"layer": "head"}]}
    if is_refused:
        with raises(CheckpointError, "max_drop 1", "exclude 'blocks.0.attn.qkv'"):
            quantize.check_accuracy_drop(report, max_drop, ["static"], trainable=False)
    else:
        drop = quantize.check_accuracy_drop(report, max_drop, ["static"], trainable=True)
        assert drop["drop_points"] == pytest.approx(100 - top1)


@pytest.mark.parametrize(
    ("method", "num_images", "suggestions"),
    [
        ("minmax", 128, ["calibration_method percentile"]),
        ("entropy", 128, ["calibration_method minmax", "calibration_method percentile"]),
        ("percentile", 3, ["calibration_method minmax", "calibration_images 128"]),
        ("trained", 0, []),
    ],
)
def test_check_accuracy_drop_suggests_untried_methods(method, num_images, suggestions):
    top1 = {"float": 1, "int8": 0}
    report = {name: {"heads": {"class": {"top1": value}}} for name, value in top1.items()}
    report |= {"calibration": {"method": method, "num_samples": num_images}, "run": "runs/x"}
    with raises(CheckpointError, "runs/x", "max_drop 1", "exclude") as refused:
        quantize.check_accuracy_drop(report, 1.0, [], trainable=False)
    assert re.findall(r"\bcalibration_\w+ \w+", str(refused.value)) == suggestions


def test_quantize_invalid_arguments_fail_before_export(runs, tmp_path, capsys, monkeypatch):
    def export(*arguments):
        pytest.fail("a network was exported")

    monkeypatch.setattr(quantize_input, "write_onnx_with_metadata", export)

    def check_refused(code, parts, *arguments):
        before = listing(runs)
        arguments = [str(argument) for argument in arguments]
        assert run_command("quantize", arguments, "deit quantize") == code
        output = capsys.readouterr()
        assert all(part in output.err for part in parts), output.err
        assert output.out == ""
        assert listing(runs) == before

    run = runs / "distilled"
    existing = tmp_path / "existing"
    existing.mkdir()
    out = ("--out", existing / "x")
    check_refused(2, ["--calibration-images 0"], run, "--calibration-images", 0)
    check_refused(2, ["--calibration-images -3"], run, "--calibration-images", -3)
    check_refused(2, ["--max-drop -1"], run, "--max-drop", -1)
    check_refused(2, ["--max-drop nan"], run, "--max-drop", "nan")
    check_refused(2, ["--percentile 101"], run, "--percentile", 101)
    check_refused(2, ["--percentile nan"], run, "--percentile", "nan")
    options = ["--percentile 99", "calibration_method", "minmax"]
    check_refused(2, options, run, "--percentile", 99, "--calibration-method", "minmax")
    options = ["--calibration-images 5", "dynamic"]
    check_refused(2, options, run, "--method", "dynamic", "--calibration-images", 5)
    check_refused(2, ["--exclude blocks["], run, "--exclude", "blocks[")
    layers = "patch_embed.proj, blocks.0"
    check_refused(2, ["--exclude block.0.*", layers], run, "--exclude", "block.0.*", *out)
    check_refused(2, ["--exclude .*:"], run, "--exclude", ".*", *out)
    check_refused(2, ["--exclude .*query_key", layers], run, "--exclude", ".*query_key", *out)
    options = ["--method dynamic", "use method static"]
    check_refused(2, options, runs / "convnet", "--method", "dynamic", *out)
    check_refused(
        3,
        ["--calibration-images 5000", "dynamic method"],
        run,
        "--calibration-images",
        5000,
        *out,
    )
    check_refused(4, [f"{runs / 'none'}"], runs / "none")
    check_refused(5, [f"--out {existing}", "--force"], run, "--out", existing)
    check_refused(5, [f"--out {run}", "best"], run, "--out", run, "--force")
    check_refused(5, [f"--json {existing}"], run, *out, "--json", existing)
    assert not any(existing.iterdir())


def test_quantize_unfinished_run_raises(runs, tmp_path):
    shutil.copytree(runs / "plain", tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    with raises(CheckpointError, tmp_path / "run", "--resume"):
        quantize.quantize(tmp_path / "run", tmp_path / "out", QuantizeOptions())
    assert not (tmp_path / "out").exists()


def test_quantize_missing_package_raises(runs, monkeypatch, capsys):
    import deit.deploy.export

    monkeypatch.setattr(deit.deploy.export, "find_spec", lambda name: name != "onnxruntime" or None)
    assert run_command("quantize", [str(runs / "plain")], "deit quantize") == 5
    output = capsys.readouterr().err
    assert re.search(r"deit quantize\b.*\bonnxruntime\b.*pip install 'deit\[export\]'", output)


def test_quantize_noisy_small_batches_raise(runs, tmp_path, monkeypatch):
    def broken(path, **options):
        infer = onnx_inference_fn(path, **options)
        if (
            "int8" not in str(path)
            and path.name == "model.onnx"
            and path.parent.name.startswith(".deit-new")
        ):
            return lambda images: {
                name: logits + (len(images) == 1) for name, logits in infer(images).items()
            }
        return infer

    monkeypatch.setattr(int8_compare, "onnx_inference_fn", broken)
    with raises(CheckpointError, "int8", "dB") as refused:
        quantize.quantize(runs / "plain", tmp_path / "out", QuantizeOptions(max_drop=100))
    assert re.search(rf"\b{min(BATCHES)}\b.* dB\b.*\b{max(BATCHES)}\b", str(refused.value))
    assert not any(tmp_path.iterdir())


def test_quantize_unknown_attention_products_raise(runs, tmp_path, monkeypatch):
    from deit.deploy import quantize_input

    def prepare_without_one(source, target):
        layers = prepare(source, target)
        return layers._replace(products=layers.products[1:])

    monkeypatch.setattr(quantize_input, "prepare", prepare_without_one)
    with raises(CheckpointError, "PyTorch", "ONNX Runtime") as refused:
        quantize.quantize(runs / "plain", tmp_path / "out", QuantizeOptions())
    assert re.findall(r"\d+", str(refused.value)) == [
        "1",
        "1",
        "2",
    ]  # products, layers, expected products
