"""Runs exported to int8: the outputs, the report and the model card of the files."""

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
from deit.deploy.formats import onnx_inference_fn
from deit.deploy.int8_graph import calibrate, signal_to_noise
from deit.deploy.quantize import QuantizeOptions
from tests.helpers.exports import QUANTIZABLE, quantization_report, split_views

pytest.importorskip("sklearn")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

FILES = ["README.md", "model.onnx", "quantization.json"]


# calibration images


def test_calibration_sees_training_images_in_their_evaluation_view(runs, tmp_path, monkeypatch):
    seen = []

    def watched(path, batches, **how):
        batches = list(batches)
        seen.extend(torch.cat(batches))
        return calibrate(path, batches, **how)

    monkeypatch.setattr(quantize, "calibrate", watched)
    folder = quantize.quantize(
        runs / "distilled", tmp_path / "q", QuantizeOptions(images=40), max_drop=5
    )
    images, labels, _ = split_views(runs / "distilled", "train")
    others = torch.cat(
        [split_views(runs / "distilled", name)[0] for name in ("validation", "test")]
    )
    rows = stratified_indices(labels, 40, seed=0, stream="calibration")
    assert torch.equal(torch.stack(seen), images[rows])
    assert not any((one == others).flatten(1).all(1).any() for one in seen)
    assert quantization_report(folder)["calibration"] == {
        "split": "train",
        "view": "evaluation",
        "num_samples": 40,
        "seed": 0,
        "how": "minmax",
        "percentile": None,
    }


# a run, quantized


@pytest.mark.parametrize(("name", "method"), QUANTIZABLE)
def test_what_is_told_is_what_the_file_answers(name, method, runs, folders):
    folder = folders[name, method]
    assert sorted(file.name for file in folder.iterdir()) == FILES
    found = quantization_report(folder)
    inputs, labels, heads = split_views(runs / name, "test")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    outputs = [one.name for one in session.get_outputs()]
    parts = [session.run(None, {"pixel_values": part.numpy()}) for part in inputs.split(64)]
    logits = {key: numpy.concatenate(values) for key, values in zip(outputs, zip(*parts))}
    order = {"class_logits": "class", "distillation_logits": "distillation", "logits": "fused"}
    named = {order[key] if len(logits) > 1 else "class": value for key, value in logits.items()}
    assert list(found["int8"]["heads"]) == [one for one in order.values() if one in named]
    for head, after in named.items():
        before = heads[head].numpy()
        for kind, one in (("float", before), ("int8", after)):
            top1 = (one.argmax(1) == labels.numpy()).mean()
            assert found[kind]["heads"][head]["top1"] == pytest.approx(top1)
        same = (before.argmax(1) == after.argmax(1)).mean()
        assert found["agreement"][head] == pytest.approx(same)
        assert same > 0.95
        ratio = 10 * numpy.log10((before**2).sum() / ((after - before) ** 2).sum())
        assert found["sqnr_db"][head] == pytest.approx(ratio, abs=0.05)
        assert ratio > 25
    assert (found["num_samples"], found["split"]) == (len(labels), "test")
    assert found["int8"]["bytes"] == (folder / "model.onnx").stat().st_size
    assert found["int8"]["bytes"] < 0.4 * found["float"]["bytes"]
    for kind in ("float", "int8"):
        assert list(found[kind]["latency"]) == ["1", "64"]
        assert all(one["p10_ms"] <= one["median_ms"] for one in found[kind]["latency"].values())
    assert found["command"] == f"deit quantize {name} --method {method}"
    assert found["environment"]["command"] == found["command"]
    assert found["environment"]["threads"] == 1
    assert found["environment"]["packages"]["onnxruntime"] == onnxruntime.__version__


@pytest.mark.parametrize(("name", "method"), QUANTIZABLE)
def test_only_dynamic_depends_on_who_else_is_in_the_batch(name, method, runs, folders):
    found = quantization_report(folders[name, method])["batches"]
    inputs, _, _ = split_views(runs / name, "test")
    answer = onnx_inference_fn(folders[name, method] / "model.onnx")
    rows = torch.linspace(0, len(inputs) - 1, 64).round().long()
    one_by_one = torch.cat([answer(one)["logits"] for one in inputs[rows].split(1)])
    difference = (one_by_one - answer(inputs[rows])["logits"]).abs().max().item()
    assert difference <= found["difference"] + 1e-5
    assert (found["difference"] > 1e-3) == (method == "dynamic")
    assert found["other_answers"] <= 3


def test_the_file_keeps_its_metadata_and_knows_no_other_operations(runs, folders):
    for folder in folders.values():
        model = onnx.load(folder / "model.onnx")
        about = {one.key: one.value for one in model.metadata_props}
        assert json.loads(about["class_names"]) == [str(label) for label in range(10)]
        assert not any(key.startswith("onnx.") for key in about)
        assert {one.domain for one in model.opset_import} == {""}


def test_each_layer_alone_is_measured_on_validation_images(runs, tmp_path, capsys):
    place = tmp_path / "q"
    options = ("--out", place, "--sensitivity", "--json", tmp_path / "all.json", "--max-drop", 5)
    given = [str(word) for word in (runs / "distilled", *options, "--exclude", "head_dist")]
    assert run_command("quantize", given, "deit quantize") == 0
    said = capsys.readouterr().out
    found = quantization_report(place)
    assert found == json.loads((tmp_path / "all.json").read_text())
    assert found["environment"]["command"] == f"deit quantize {shlex.join(given)}"
    rows = found["sensitivity"]["layers"]
    assert {row["layer"] for row in rows} == set(found["int8_layers"])
    for row in rows:
        assert re.search(rf"{re.escape(row['layer'])}\D+{row['sqnr_db']:.1f}\b", said)
    assert "head_dist" in found["float_layers"]
    ratios = [row["sqnr_db"] for row in rows]
    assert ratios == sorted(ratios)
    assert sum(row["noise_share"] for row in rows) == pytest.approx(1)
    powers = [10 ** (-ratio / 10) for ratio in ratios]
    assert rows[0]["noise_share"] == pytest.approx(powers[0] / sum(powers))
    inputs, labels, heads = split_views(runs / "distilled", "validation")
    assert found["sensitivity"]["num_samples"] == len(labels)
    top1 = (heads["fused"].argmax(1) == labels).double().mean().item()
    assert found["sensitivity"]["top1"] == pytest.approx(top1)
    # The noises of the layers add up to that of the whole file, but for what they have in common.
    whole = onnx_inference_fn(place / "model.onnx")(inputs)["logits"]
    assert -10 * math.log10(sum(powers)) == pytest.approx(
        signal_to_noise(heads["fused"], whole), abs=2
    )
    # One layer, by another way: all others excluded.
    worst = rows[0]["layer"]
    others = f"(?!{re.escape(worst)}$).*"
    plan = QuantizeOptions(exclude=others)
    single_layer = quantize.quantize(
        runs / "distilled", tmp_path / "single-layer", plan, max_drop=5
    )
    assert quantization_report(single_layer)["int8_layers"] == [worst]
    logits = onnx_inference_fn(single_layer / "model.onnx")(inputs)["logits"]
    assert signal_to_noise(heads["fused"], logits) == pytest.approx(ratios[0], abs=0.01)


def test_the_card_tells_it_and_its_snippet_runs(runs, folders, tmp_path, monkeypatch, capsys):
    """The same snippet runs in a process of its own in tests/deploy/test_export.py."""
    folder = folders["distilled", "static"]
    card, found = (folder / "README.md").read_text(), quantization_report(folder)
    assert re.search(r"minmax\D*\b128\b", card)
    assert f"{len(found['products'])} products" in card
    assert f"| fused | {100 * found['int8']['heads']['fused']['top1']:.1f} |" in card
    assert f"metric_value: {found['int8']['heads']['fused']['top1']:.4f}".rstrip("0") in card or (
        "value:" in card
    )
    place = tmp_path / "copy"
    shutil.copytree(folder, place)
    config = load_config(runs / "distilled" / "config.json")
    pixels = load_splits(config.data).test.pixels[0]
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(place / "picture.png")
    inputs, _, _ = split_views(runs / "distilled", "test")
    answer = onnx_inference_fn(place / "model.onnx")(inputs[:1])["logits"].argmax().item()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (tmp_path / "snippet.py").write_text(snippet)
    monkeypatch.chdir(place)
    capsys.readouterr()
    runpy.run_path(str(tmp_path / "snippet.py"), run_name="__main__")
    assert capsys.readouterr().out.strip() == str(answer)


@pytest.mark.slow
def test_the_command_from_elsewhere(runs, command_server, tmp_path):
    done = command_server.run(
        *("quantize", runs / "plain", "--method", "dynamic", "--out", "q", "--max-drop", "100"),
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    assert re.search(r"\bdynamic\b.*\b359\b", done.out)
    assert "Finding optimal" not in done.out
    assert sorted(file.name for file in (tmp_path / "q").iterdir()) == FILES
