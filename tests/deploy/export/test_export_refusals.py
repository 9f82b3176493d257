"""An export that differs from its run, or cannot be written, is refused and leaves nothing."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deit.cli import run_command
from deit.config.sections.student import StudentConfig
from deit.core.errors import CheckpointError, ConfigError, SystemFault
from deit.deploy.export import export, verify
from deit.deploy.export_formats import FORMATS
from deit.models.saved_student import ModelInfo, student_from_info
from deit.models.timm_format import timm_config
from deit.models.transformers_format import transformers_config
from tests.helpers.errors import raises

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")


# verification and refusal


def sabotage(form, change):
    """Return the format, with files that are changed after they are written."""

    original = FORMATS[form]

    def write(folder, student, model_info):
        original.write(folder, student, model_info)
        change(folder)

    return original._replace(write=write)


def other_epsilon(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-2}))


def shifted_head(folder):
    weights = load_file(folder / "model.safetensors")
    weights["head.bias"] = weights["head.bias"] + 0.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("form", "change"), [("transformers", other_epsilon), ("timm", shifted_head)]
)
def test_export_different_logits_raise_and_leave_nothing(form, change, runs, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, form, sabotage(form, change))
    with raises(CheckpointError, form, "logits", FORMATS[form].tolerance):
        export(runs / "distilled", tmp_path / "out", format=form)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [float("nan"), 1e-3])
def test_verify_difference_in_any_batch_raises(error):
    inputs = torch.arange(80.0).reshape(80, 1)
    expected = {"logits": torch.stack([inputs[:, 0] / 80, -inputs[:, 0] / 80], dim=1)}

    def exact(images):
        return {"logits": torch.cat([images / 80, -images / 80], dim=1)}

    verification = verify("here", exact, inputs, expected, tolerance=1e-5)
    assert (verification.images, verification.difference, verification.allowed) == (80, 0.0, 1e-5)
    for row in (0, 3, 40, 79):

        def broken(images, row=row):
            logits = exact(images)["logits"]
            logits[(images == row)[:, 0], 0] += error
            return {"logits": logits}

        with raises(CheckpointError, "here", "logits", 1e-5):
            verify("here", broken, inputs, expected, tolerance=1e-5)


def test_verify_other_class_within_tolerance_raises():
    expected = {"logits": torch.tensor([[0.5, 0.500001]])}

    def infer(images):
        return {"logits": torch.tensor([[0.500001, 0.5]])}

    with raises(CheckpointError, "here", "logits") as refused:
        verify("here", infer, torch.zeros(1, 1), expected, tolerance=1e-5)
    assert "1e-05" not in str(refused.value)  # as in the message on logits


@pytest.mark.parametrize("check", [timm_config, transformers_config])
@pytest.mark.parametrize(
    "student",
    [
        StudentConfig(name="small_convnet"),
        StudentConfig(name="rednet_micro"),
        StudentConfig(name="deit_micro", num_distillation_tokens=2),
        StudentConfig(name="regnety_002_small_stem"),
    ],
    ids=lambda student: student.name,
)
def test_format_unsupported_network_raises_with_reason(check, student):
    model_info = ModelInfo(student, tuple("abc"), (0.5,) * 3, (0.5,) * 3, 1.0)
    network = student_from_info(model_info).network
    arguments = (model_info, network) if check is timm_config else (model_info,)
    field = f"student.name = {student.name!r}"
    if student.num_distillation_tokens > 1:
        field = f"student.num_distillation_tokens = {student.num_distillation_tokens}"
    with raises(ConfigError, field, "format", "onnx", "pt2"):
        check(*arguments)


# the command and the card


def test_export_invalid_arguments_fail_before_evaluation(runs, tmp_path, capsys, monkeypatch):
    def evaluate(*arguments, **options):
        pytest.fail("the run was evaluated")

    monkeypatch.setattr("deit.deploy.export.evaluate", evaluate)

    def check_refused(code, parts, *arguments):
        before = sorted(runs.rglob("*"))
        assert run_command("export", [str(a) for a in arguments], "deit export") == code
        output = capsys.readouterr()
        assert all(part in output.err for part in parts), output.err
        assert output.out == ""
        assert sorted(runs.rglob("*")) == before

    run, existing = runs / "distilled", tmp_path / "existing"
    check_refused(2, ["--format onx", "onnx?"], run, "--format", "onx")
    check_refused(2, ["--images 0"], run, "--format", "onnx", "--images", "0")
    parts = ["student.name = 'small_convnet'", "format", "onnx", "pt2"]
    check_refused(2, parts, runs / "convnet", "--format", "timm", "--out", tmp_path / "x")
    check_refused(4, [f"{runs / 'none'}"], runs / "none", "--format", "timm")
    existing.mkdir()
    check_refused(5, [f"--out {existing}", "--force"], run, "--format", "pt2", "--out", existing)
    check_refused(5, [f"--out {run}", "best"], run, "--format", "pt2", "--out", run, "--force")
    (existing / "thesis.txt").write_text("years of work")
    options = ("--out", existing, "--force")
    check_refused(5, [f"--out {existing}", "thesis.txt"], run, "--format", "pt2", *options)


def test_export_force_replaces_export(runs, tmp_path):
    out = str(tmp_path / "out")  # paths may be str
    folder = export(str(runs / "cropped"), out, format="pt2", images=64)
    export(runs / "cropped", folder, format="timm", force=True)
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }


def test_export_missing_package_raises(runs, tmp_path, monkeypatch):
    import deit.deploy.export

    monkeypatch.setattr(deit.deploy.export, "find_spec", lambda name: None)
    packages = ("onnx, ", "onnxscript", "onnxruntime")
    with raises(SystemFault, "format onnx", *packages, "pip install 'deit[export]'"):
        export(runs / "distilled", tmp_path / "out", format="onnx")
