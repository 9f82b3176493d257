"""An export that differs from its run, or cannot be written, is refused and leaves nothing."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deit.cli import run_command
from deit.config.student_section import StudentConfig
from deit.core.errors import CheckpointError, ConfigError, SystemFault
from deit.deploy.export import export, verify
from deit.deploy.formats import FORMATS
from deit.models.saved import ModelInfo, build_student
from deit.models.timm_format import timm_config
from deit.models.transformers_format import transformers_config
from tests.helpers.errors import raises

pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")


# verification and refusal


def sabotage(form, change):
    """The format with files that are changed after they are written."""

    original = FORMATS[form]

    def write(folder, student, facts):
        original.write(folder, student, facts)
        change(folder)

    return original._replace(write=write)


def other_epsilon(folder):
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "layer_norm_eps": 1e-2}))


def shifted_head(folder):
    weights = load_file(folder / "model.safetensors")
    weights["head.bias"] = weights["head.bias"] + 0.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("form", "change"), [("transformers", other_epsilon), ("timm", shifted_head)]
)
def test_an_export_that_answers_otherwise_is_not_kept(form, change, runs, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, form, sabotage(form, change))
    with raises(CheckpointError, form, "logits", FORMATS[form].tolerance):
        export(runs / "distilled", tmp_path / "out", name=form)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [float("nan"), 1e-3])
def test_verifying_finds_a_difference_in_any_batch(wrong):
    inputs = torch.arange(80.0).reshape(80, 1)
    expected = {"logits": torch.stack([inputs[:, 0] / 80, -inputs[:, 0] / 80], dim=1)}

    def exact(images):
        return {"logits": torch.cat([images / 80, -images / 80], dim=1)}

    found = verify("here", exact, inputs, expected, tolerance=1e-5)
    assert (found.images, found.difference, found.allowed) == (80, 0.0, 1e-5)
    for row in (0, 3, 40, 79):

        def broken(images, row=row):
            logits = exact(images)["logits"]
            logits[(images == row)[:, 0], 0] += wrong
            return {"logits": logits}

        with raises(CheckpointError, "here", "logits", 1e-5):
            verify("here", broken, inputs, expected, tolerance=1e-5)


def test_another_answer_within_the_tolerance_is_a_difference():
    expected = {"logits": torch.tensor([[0.5, 0.500001]])}

    def answer(images):
        return {"logits": torch.tensor([[0.500001, 0.5]])}

    with raises(CheckpointError, "here", "logits") as refused:
        verify("here", answer, torch.zeros(1, 1), expected, tolerance=1e-5)
    assert "1e-05" not in str(refused.value)  # as where a logit differs by more


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
def test_what_a_format_cannot_hold_is_refused_with_the_reason(check, student):
    facts = ModelInfo(student, tuple("abc"), (0.5,) * 3, (0.5,) * 3, 1.0)
    network = build_student(facts).network
    arguments = (facts, network) if check is timm_config else (facts,)
    field = f"student.name = {student.name!r}"
    if student.num_distillation_tokens > 1:
        field = f"student.num_distillation_tokens = {student.num_distillation_tokens}"
    with raises(ConfigError, field, "--format", "onnx", "pt2"):
        check(*arguments)


# the command and the card


def test_refusals_come_before_the_work_and_leave_nothing(runs, tmp_path, capsys, monkeypatch):
    def evaluated(*nothing, **neither):
        pytest.fail("the run was evaluated, which comes first")

    monkeypatch.setattr("deit.deploy.export.evaluate", evaluated)

    def refused(code, names, *arguments):
        before = sorted(runs.rglob("*"))
        assert run_command("export", [str(word) for word in arguments], "deit export") == code
        said = capsys.readouterr()
        assert all(name in said.err for name in names), said.err
        assert said.out == ""
        assert sorted(runs.rglob("*")) == before

    run, there = runs / "distilled", tmp_path / "there"
    refused(2, ["--format onx", "onnx?"], run, "--format", "onx")
    refused(2, ["--images 0"], run, "--format", "onnx", "--images", "0")
    able = ["student.name = 'small_convnet'", "--format", "onnx", "pt2"]
    refused(2, able, runs / "convnet", "--format", "timm", "--out", tmp_path / "x")
    refused(4, [f"{runs / 'none'}"], runs / "none", "--format", "timm")
    there.mkdir()
    refused(5, [f"--out {there}", "--force"], run, "--format", "pt2", "--out", there)
    refused(5, [f"--out {run}", "best"], run, "--format", "pt2", "--out", run, "--force")
    (there / "thesis.txt").write_text("years of work")
    mine = ("--out", there, "--force")
    refused(5, [f"--out {there}", "thesis.txt"], run, "--format", "pt2", *mine)


def test_an_export_is_replaced_by_force(runs, tmp_path):
    folder = export(runs / "cropped", tmp_path / "out", name="pt2", images=64)
    export(runs / "cropped", folder, name="timm", force=True)
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }


def test_a_missing_package_is_named(runs, tmp_path, monkeypatch):
    import deit.deploy.export

    monkeypatch.setattr(deit.deploy.export, "find_spec", lambda name: None)
    packages = ("onnx, ", "onnxscript", "onnxruntime")
    with raises(SystemFault, "--format onnx", *packages, "pip install 'deit[export]'"):
        export(runs / "distilled", tmp_path / "out", name="onnx")
