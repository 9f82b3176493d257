"""deit quantize refuses a bad request or a bad int8 file and leaves nothing behind."""

import re
import shutil

import pytest

from deit.cli import run_command
from deit.core.errors import CheckpointError
from deit.deploy import int8_compare, onnx_student, quantize
from deit.deploy.export import BATCHES
from deit.deploy.formats import onnx_inference_fn
from deit.deploy.int8_layers import (
    prepare,
)
from deit.deploy.quantize import QuantizeOptions
from tests.helpers.errors import raises

pytest.importorskip("sklearn")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


# what is refused


def listing(folder):
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_a_file_that_answers_worse_is_not_kept(runs, tmp_path, capsys):
    before = listing(runs)
    given = [str(runs / "distilled"), "--percentile", "60", "--out", str(tmp_path / "q")]
    assert run_command("quantize", [*given, "--max-drop", "2.5"], "deit quantize") == 4
    said = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in said if line.startswith("deit: error")]
    assert len(lines) == 1
    drop, before_it, after_it = map(float, re.findall(r"\b\d+\.\d\d\b", lines[0]))
    assert drop == pytest.approx(before_it - after_it, abs=0.011)
    assert drop > 2.5
    for name in (f"{runs / 'distilled'}:", "--max-drop 2.5", "--method dynamic", "--sensitivity"):
        assert name in lines[0]
    assert not any(tmp_path.iterdir())
    assert listing(runs) == before


@pytest.mark.parametrize(
    ("right", "most", "refused"), [(99, 1.0, False), (98, 1.0, True), (100, 0.0, False)]
)
def test_the_drop_that_is_allowed_is_allowed(right, most, refused):
    heads = {"float": 1.0, "int8": right / 100}
    found = {name: {"heads": {"class": {"top1": one}}} for name, one in heads.items()}
    found |= {"calibration": None, "run": "runs/x"}
    worst = {"layer": "blocks.0.attn.qkv"}
    found["sensitivity"] = {"layers": [worst, {"layer": "head"}]}
    if refused:
        with raises(CheckpointError, "--max-drop 1", "--exclude 'blocks.0.attn.qkv'"):
            quantize.check_accuracy_drop(found, most, ["static"], trainable=False)
    else:
        drop = quantize.check_accuracy_drop(found, most, ["static"], trainable=True)
        assert drop["drop_points"] == pytest.approx(100 - right)


@pytest.mark.parametrize(
    ("how", "number", "ways"),
    [
        ("minmax", 128, ["--calibration-method percentile"]),
        ("entropy", 128, ["--calibration-method minmax", "--calibration-method percentile"]),
        ("percentile", 3, ["--calibration-method minmax", "--calibration-images 128"]),
        ("learnt", 0, []),
    ],
)
def test_ways_that_were_not_gone_are_named(how, number, ways):
    found = {name: {"heads": {"class": {"top1": one}}} for name, one in (("float", 1), ("int8", 0))}
    found |= {"calibration": {"how": how, "num_samples": number}, "run": "runs/x"}
    with raises(CheckpointError, "runs/x", "--max-drop 1", "--exclude") as refused:
        quantize.check_accuracy_drop(found, 1.0, [], trainable=False)
    assert re.findall(r"--calibration-\w+ \w+", str(refused.value)) == ways


def test_refusals_come_before_the_work_and_leave_nothing(runs, tmp_path, capsys, monkeypatch):
    def exported(*nothing):
        pytest.fail("a network was exported, which takes the most")

    monkeypatch.setattr(onnx_student, "write_onnx_with_metadata", exported)

    def refused(code, names, *arguments):
        before = listing(runs)
        given = [str(word) for word in arguments]
        assert run_command("quantize", given, "deit quantize") == code
        said = capsys.readouterr()
        assert all(name in said.err for name in names), said.err
        assert said.out == ""
        assert listing(runs) == before

    run = runs / "distilled"
    there = tmp_path / "there"
    there.mkdir()
    out = ("--out", there / "x")
    refused(2, ["--calibration-images 0"], run, "--calibration-images", 0)
    refused(2, ["--calibration-images -3"], run, "--calibration-images", -3)
    refused(2, ["--max-drop -1"], run, "--max-drop", -1)
    refused(2, ["--max-drop nan"], run, "--max-drop", "nan")
    refused(2, ["--percentile 101"], run, "--percentile", 101)
    refused(2, ["--percentile nan"], run, "--percentile", "nan")
    both = ["--percentile", "--calibration-method", "minmax"]
    refused(2, both, run, "--percentile", 99, "--calibration-method", "minmax")
    both = ["--calibration-images", "--method dynamic"]
    refused(2, both, run, "--method", "dynamic", "--calibration-images", 5)
    refused(2, ["--exclude blocks["], run, "--exclude", "blocks[")
    layers = "patch_embed.proj, blocks.0"
    refused(2, ["--exclude block.0.*", layers], run, "--exclude", "block.0.*", *out)
    refused(2, ["--exclude .*:"], run, "--exclude", ".*", *out)
    refused(2, ["--exclude .*query_key", layers], run, "--exclude", ".*query_key", *out)
    both = ["--method dynamic", "--method static"]
    refused(2, both, runs / "convnet", "--method", "dynamic", *out)
    refused(
        3,
        ["--calibration-images 5000", "--method dynamic"],
        run,
        "--calibration-images",
        5000,
        *out,
    )
    refused(4, [f"{runs / 'none'}"], runs / "none")
    refused(5, [f"--out {there}", "--force"], run, "--out", there)
    refused(5, [f"--out {run}", "best"], run, "--out", run, "--force")
    refused(5, [f"--json {there}"], run, *out, "--json", there)
    assert not any(there.iterdir())


def test_a_run_that_is_not_finished_is_refused(runs, tmp_path):
    shutil.copytree(runs / "plain", tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    with raises(CheckpointError, tmp_path / "run", "--resume"):
        quantize.quantize(tmp_path / "run", tmp_path / "out", QuantizeOptions())
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(runs, monkeypatch, capsys):
    import deit.deploy.export

    monkeypatch.setattr(deit.deploy.export, "find_spec", lambda name: name != "onnxruntime" or None)
    assert run_command("quantize", [str(runs / "plain")], "deit quantize") == 5
    said = capsys.readouterr().err
    assert re.search(r"deit quantize\b.*\bonnxruntime\b.*pip install 'deit\[export\]'", said)


def test_a_file_that_fails_in_small_batches_is_not_kept(runs, tmp_path, monkeypatch):
    def broken(path, **options):
        answer = onnx_inference_fn(path, **options)
        if (
            "int8" not in str(path)
            and path.name == "model.onnx"
            and path.parent.name.startswith(".deit-new")
        ):
            return lambda images: {
                name: one + (len(images) == 1) for name, one in answer(images).items()
            }
        return answer

    monkeypatch.setattr(int8_compare, "onnx_inference_fn", broken)
    with raises(CheckpointError, "int8", "dB") as refused:
        quantize.quantize(runs / "plain", tmp_path / "out", QuantizeOptions(), max_drop=100)
    assert re.search(rf"\b{min(BATCHES)}\b.* dB\b.*\b{max(BATCHES)}\b", str(refused.value))
    assert not any(tmp_path.iterdir())


def test_attention_that_was_not_found_is_told(runs, tmp_path, monkeypatch):
    from deit.deploy import onnx_student

    def lacking(source, target):
        layers = prepare(source, target)
        return layers._replace(products=layers.products[1:])

    monkeypatch.setattr(onnx_student, "prepare", lacking)
    with raises(CheckpointError, "PyTorch", "ONNX Runtime") as refused:
        quantize.quantize(runs / "plain", tmp_path / "out", QuantizeOptions())
    assert re.findall(r"\d+", str(refused.value)) == ["1", "1", "2"]  # products, attention
