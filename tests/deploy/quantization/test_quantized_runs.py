"""Tests of quantized runs: outputs, quantization.json, model card."""

import json
import math
import re
import runpy
import shlex
import shutil

import numpy
import pytest
import torch
from PIL import Image

from deit.cli import run_command
from deit.config.validation import load_config
from deit.datasets.splits import load_splits, stratified_indices
from deit.deploy import quantize
from deit.deploy.export_formats import onnx_inference_fn
from deit.deploy.int8_calibration import calibrate
from deit.deploy.int8_graph import signal_to_noise
from deit.deploy.quantize_options import QuantizeOptions
from tests.helpers.exports import QUANTIZABLE, quantization_report, split_views

pytest.importorskip("sklearn")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

FILES = ["README.md", "model.onnx", "quantization.json"]


def test_quantize_calibrates_on_training_images_in_evaluation_view(runs, tmp_path, monkeypatch):
    calibrated = []

    def recording_calibrate(path, batches, **options):
        batches = list(batches)
        calibrated.extend(torch.cat(batches))
        return calibrate(path, batches, **options)

    monkeypatch.setattr(quantize, "calibrate", recording_calibrate)
    folder = quantize.quantize(
        str(runs / "distilled"),
        str(tmp_path / "q"),
        QuantizeOptions(calibration_images=40, max_drop=5),
    )
    images, labels, _ = split_views(runs / "distilled", "train")
    others = torch.cat(
        [split_views(runs / "distilled", name)[0] for name in ("validation", "test")]
    )
    rows = stratified_indices(labels, 40, seed=0, stream="calibration")
    assert torch.equal(torch.stack(calibrated), images[rows])
    assert not any((image == others).flatten(1).all(1).any() for image in calibrated)
    assert quantization_report(folder)["calibration"] == {
        "split": "train",
        "view": "evaluation",
        "num_samples": 40,
        "seed": 0,
        "method": "minmax",
        "percentile": None,
    }


@pytest.mark.parametrize(("name", "method"), QUANTIZABLE)
def test_quantize_report_equals_outputs_of_file(name, method, runs, folders):
    folder = folders[name, method]
    assert sorted(file.name for file in folder.iterdir()) == FILES
    report = quantization_report(folder)
    inputs, labels, heads = split_views(runs / name, "test")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    batches = [session.run(None, {"pixel_values": batch.numpy()}) for batch in inputs.split(64)]
    logits = {key: numpy.concatenate(values) for key, values in zip(names, zip(*batches))}
    order = {"class_logits": "class", "distillation_logits": "distillation", "logits": "fused"}
    by_head = {order[key] if len(logits) > 1 else "class": value for key, value in logits.items()}
    assert list(report["int8"]["heads"]) == [head for head in order.values() if head in by_head]
    for head, after in by_head.items():
        before = heads[head].numpy()
        for kind, values in (("float", before), ("int8", after)):
            top1 = (values.argmax(1) == labels.numpy()).mean()
            assert report[kind]["heads"][head]["top1"] == pytest.approx(top1)
        agreement = (before.argmax(1) == after.argmax(1)).mean()
        assert report["agreement"][head] == pytest.approx(agreement)
        assert agreement > 0.95
        decibels = 10 * numpy.log10((before**2).sum() / ((after - before) ** 2).sum())
        assert report["sqnr_db"][head] == pytest.approx(decibels, abs=0.05)
        assert decibels > 25
    assert (report["num_samples"], report["split"]) == (len(labels), "test")
    assert report["int8"]["bytes"] == (folder / "model.onnx").stat().st_size
    assert report["int8"]["bytes"] < 0.4 * report["float"]["bytes"]
    for kind in ("float", "int8"):
        assert list(report[kind]["latency"]) == ["1", "64"]
        assert all(row["p10_ms"] <= row["median_ms"] for row in report[kind]["latency"].values())
    assert report["command"] == f"deit quantize {name} --method {method}"
    assert report["environment"]["command"] == report["command"]
    assert report["environment"]["threads"] == 1
    assert report["environment"]["packages"]["onnxruntime"] == onnxruntime.__version__


@pytest.mark.parametrize(("name", "method"), QUANTIZABLE)
def test_quantize_only_dynamic_depends_on_batch(name, method, runs, folders):
    batches = quantization_report(folders[name, method])["batches"]
    inputs, _, _ = split_views(runs / name, "test")
    infer = onnx_inference_fn(folders[name, method] / "model.onnx")
    rows = torch.linspace(0, len(inputs) - 1, 64).round().long()
    one_by_one = torch.cat([infer(image)["logits"] for image in inputs[rows].split(1)])
    difference = (one_by_one - infer(inputs[rows])["logits"]).abs().max().item()
    assert difference <= batches["difference"] + 1e-5
    assert (batches["difference"] > 1e-3) == (method == "dynamic")
    assert batches["num_changed_predictions"] <= 3


def test_quantize_file_has_metadata_and_default_opset_only(runs, folders):
    for folder in folders.values():
        model = onnx.load(folder / "model.onnx")
        metadata = {prop.key: prop.value for prop in model.metadata_props}
        assert json.loads(metadata["class_names"]) == [str(label) for label in range(10)]
        assert not any(key.startswith("onnx.") for key in metadata)
        assert {opset.domain for opset in model.opset_import} == {""}


def test_quantize_sensitivity_uses_validation_images(runs, tmp_path, capfd):
    folder = tmp_path / "q"
    options = ("--out", folder, "--sensitivity", "--json", tmp_path / "all.json", "--max-drop", 5)
    arguments = [str(a) for a in (runs / "distilled", *options, "--exclude", "head_dist")]
    assert run_command("quantize", arguments, "deit quantize") == 0
    output = capfd.readouterr().out
    report = quantization_report(folder)
    assert report == json.loads((tmp_path / "all.json").read_text())
    assert report["environment"]["command"] == f"deit quantize {shlex.join(arguments)}"
    rows = report["sensitivity"]["layers"]
    assert {row["layer"] for row in rows} == set(report["int8_layers"])
    for row in rows:
        assert re.search(rf"{re.escape(row['layer'])}\D+{row['sqnr_db']:.1f}\b", output)
    assert "head_dist" in report["float_layers"]
    decibels = [row["sqnr_db"] for row in rows]
    assert decibels == sorted(decibels)
    assert sum(row["noise_share"] for row in rows) == pytest.approx(1)
    powers = [10 ** (-value / 10) for value in decibels]
    assert rows[0]["noise_share"] == pytest.approx(powers[0] / sum(powers))
    inputs, labels, heads = split_views(runs / "distilled", "validation")
    assert report["sensitivity"]["num_samples"] == len(labels)
    top1 = (heads["fused"].argmax(1) == labels).double().mean().item()
    assert report["sensitivity"]["top1"] == pytest.approx(top1)
    # The noise of the layers adds up to that of the whole file, except for correlations.
    int8_logits = onnx_inference_fn(folder / "model.onnx")(inputs)["logits"]
    assert -10 * math.log10(sum(powers)) == pytest.approx(
        signal_to_noise(heads["fused"], int8_logits), abs=2
    )
    # The same for one layer, with all others excluded.
    noisiest = rows[0]["layer"]
    options = QuantizeOptions(exclude=f"(?!{re.escape(noisiest)}$).*", max_drop=5)
    capfd.readouterr()
    one_layer = quantize.quantize(runs / "distilled", tmp_path / "one", options, verbose=False)
    assert capfd.readouterr() == ("", "")
    assert quantization_report(one_layer)["int8_layers"] == [noisiest]
    logits = onnx_inference_fn(one_layer / "model.onnx")(inputs)["logits"]
    assert signal_to_noise(heads["fused"], logits) == pytest.approx(decibels[0], abs=0.01)


def test_quantize_model_card_describes_file_and_snippet_runs(
    runs, folders, tmp_path, monkeypatch, capsys
):
    """tests/deploy/export/test_model_card.py runs the same snippet in a process without deit."""
    folder = folders["distilled", "static"]
    card, report = (folder / "README.md").read_text(), quantization_report(folder)
    assert re.search(r"minmax\D*\b128\b", card)
    assert f"{len(report['products'])} products" in card
    assert f"| fused | {100 * report['int8']['heads']['fused']['top1']:.1f} |" in card
    assert f"metric_value: {report['int8']['heads']['fused']['top1']:.4f}".rstrip("0") in card or (
        "value:" in card
    )
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    config = load_config(runs / "distilled" / "config.json")
    pixels = load_splits(config.data).test.pixels[0]
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(copied / "image.png")
    inputs, _, _ = split_views(runs / "distilled", "test")
    predicted = onnx_inference_fn(copied / "model.onnx")(inputs[:1])["logits"].argmax().item()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (tmp_path / "snippet.py").write_text(snippet)
    monkeypatch.chdir(copied)
    capsys.readouterr()
    runpy.run_path(str(tmp_path / "snippet.py"), run_name="__main__")
    assert capsys.readouterr().out.strip() == str(predicted)


@pytest.mark.slow
def test_quantize_command_in_other_directory_writes_files(runs, command_server, tmp_path):
    done = command_server.run(
        *("quantize", runs / "plain", "--method", "dynamic", "--out", "q", "--max-drop", "100"),
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    assert re.search(r"\bdynamic\b.*\b359\b", done.out)
    assert "Finding optimal" not in done.out
    assert sorted(file.name for file in (tmp_path / "q").iterdir()) == FILES
