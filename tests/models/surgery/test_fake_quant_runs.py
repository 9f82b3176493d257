"""Runs with fake quantization: ranges in every file, bit-exact resume, the int8 file."""

import json
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from deit.analysis.landscape_options import LandscapeOptions
from deit.analysis.landscape_runs import LandscapePoint, load_landscape_data
from deit.cli import run_command
from deit.config.finetune_schedules import FINETUNE_SCHEDULES, with_init
from deit.config.presets import LOSS_PRESETS
from deit.config.recipes.handwriting import digits
from deit.config.schema import Config
from deit.config.teachers import teacher_specs
from deit.core import run_folder
from deit.core.errors import CheckpointError, ConfigError
from deit.core.hardware import int8_flags, int8_sums_saturate
from deit.deploy.export import export
from deit.deploy.export_formats import FORMATS
from deit.deploy.int8_graph import signal_to_noise
from deit.deploy.quantize import check_accuracy_drop, quantize
from deit.deploy.quantize_options import QuantizeOptions
from deit.evaluation.evaluate import evaluate
from deit.models.load_weights import infer_student_config, load_weights_from
from deit.models.saved_student import load_student, save_weights, write_student
from deit.models.surgery.fake_quant import (
    fake_quant_layers,
    fake_quant_weight,
    range_names,
)
from deit.models.surgery.pruning_masks import MASKS
from deit.models.teacher_sources import teacher_from_spec
from deit.training.build import build_run
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.images import random_batch
from tests.helpers.resume_helpers import assert_same_end, stop_and_resume, stop_at

pytest.importorskip("sklearn")
SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "drop_path": 0.1}
QUICK = {"epochs": 2, "batch_size": 64, "warmup_epochs": 1, "ema_epochs": 0.5, "lr": 2e-3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of a float student, and of one fine-tuned from it with fake quantization."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("rounding")
    train(base_config(), folder / "base")
    train(config_of(folder), folder / "int8")
    return folder


def base_config() -> Config:
    return digits().replace(
        data={"train_fraction": 0.3},
        student=SMALL,
        teacher={"source": ()},
        loss=LOSS_PRESETS["none"],
        optim={**QUICK, "epochs": 6},
        run={"linear_backend": "torch", "eval_every_epochs": 1},
    )


def config_of(folder: Path, **more: dict) -> Config:
    config = FINETUNE_SCHEDULES["int8"](
        base_config().replace(init={"weights": str(folder / "base")})
    )
    return config.replace(**{**more, "optim": {**QUICK, "min_lr": 1e-5, **more.get("optim", {})}})


def ranges_of(file: Path) -> torch.Tensor:
    weights = load_file(file)
    return torch.stack([weights[name] for name in sorted(range_names(weights))])


def test_checkpoints_store_ranges_containing_zero(runs):
    newest = run_folder.latest_checkpoint(runs / "int8")
    files = [runs / "int8" / "best" / "model.safetensors"]
    files += [newest / f"{name}.safetensors" for name in ("model", "average")]
    for file in files:
        result = ranges_of(file)
        assert result.shape == (11, 2)
        assert (result[:, 0] <= 0).all()
        assert (result[:, 1] > 0).all()
        assert not any(name.endswith(".observed") for name in load_file(file))
    model, average = map(ranges_of, files[1:])
    torch.testing.assert_close(model, average, rtol=0.1, atol=0.02)
    notes = json.loads((runs / "int8" / "init.json").read_text())["notes"]
    assert [re.findall(r"\d+", note) for note in notes] == [["11"]]


def test_run_starts_with_outputs_of_init_weights(runs):
    began = build_run(config_of(runs)).student.eval()(random_batch(8, 8)).class_logits
    before = load_student(runs / "base" / "best")[0].eval()(random_batch(8, 8)).class_logits
    assert 20 < signal_to_noise(before, began) < 60


@pytest.mark.parametrize("fault", ["step:2:term", "step:7:term", "metrics:1:term"])
def test_qat_run_resumes_bit_equal(runs, tmp_path, fault):
    stop_and_resume(config_of(runs), tmp_path / "run", fault)
    assert_same_end(tmp_path / "run", runs / "int8")


def test_skipped_step_does_not_move_ranges(runs, tmp_path):
    result = []
    for name, fault in (("one", "step:3:term"), ("two", "loss:3:nan,step:3:term")):
        stop_at(config_of(runs), tmp_path / name, fault)
        result.append(
            ranges_of(run_folder.latest_checkpoint(tmp_path / name) / "model.safetensors")
        )
    stop_at(config_of(runs), tmp_path / "before", "step:2:term")
    before = ranges_of(run_folder.latest_checkpoint(tmp_path / "before") / "model.safetensors")
    assert torch.equal(result[1], before)
    assert not torch.equal(result[0], before)


def test_pruning_masks_hold_with_fake_quant(runs, tmp_path):
    weights = load_file(runs / "base" / "best" / "model.safetensors")
    name = "blocks.0.mlp.fc1.weight"
    masks = {name: torch.rand(weights[name].shape) > 0.5}
    save_weights(tmp_path / "m.safetensors", masks)
    config = config_of(runs, init={"pruning_masks": str(tmp_path / "m.safetensors")})
    train(config.replace(optim={"epochs": 1, "warmup_epochs": 0}), tmp_path / "run")
    best = tmp_path / "run" / "best"
    assert (best / MASKS).is_file()
    layer = load_student(best)[0].network.blocks[0].mlp.fc1
    assert not layer.weight[~masks[name]].any()
    rounded = fake_quant_weight(layer.weight)[0]
    assert not rounded[~masks[name]].any()
    assert rounded[masks[name]].count_nonzero() > 0.9 * masks[name].sum()


def test_trainable_attention_updates_ranges(runs, tmp_path):
    config = config_of(runs, optim={"trainable": "attention", "epochs": 1, "warmup_epochs": 0})
    train(config, tmp_path / "run")
    result = ranges_of(tmp_path / "run" / "best" / "model.safetensors")
    assert (result[:, 1] > 0).all()


def test_init_keeps_or_drops_ranges(runs, tmp_path):
    start = str(runs / "int8")
    config = with_init(config_of(runs), start, load_weights_from(start).student)
    on = build_run(config)
    assert on.init_report["notes"] == []
    saved = load_file(runs / "int8" / "best" / "model.safetensors")
    for name in range_names(saved):
        assert torch.equal(on.student.network.state_dict()[name], saved[name])
    config = config.replace(student={"qat": "none"})
    off = build_run(config)
    assert [re.findall(r"\d+", note) for note in off.init_report["notes"]] == [["11"]]
    assert not range_names(off.student.network.state_dict())
    wider = config_of(runs, init={"weights": start, "head": "new"}).replace(
        student={"num_distillation_tokens": 1, "image_size": 16, "name": "vit_micro"},
        data={"image_size": 16, "classes": ("1", "3", "7")},
    )
    fitted = build_run(wider).student.network
    assert torch.equal(fitted.head.range, saved["head.range"])
    assert infer_student_config(saved).name == "deit_micro"


def test_qat_model_json_loads(runs, tmp_path):
    shutil.copytree(runs / "base" / "best", tmp_path / "best")
    (tmp_path / "best" / "manifest.json").unlink()
    path = tmp_path / "best" / "model.json"
    model_info = json.loads(path.read_text())
    del model_info["student"]["qat"]
    path.write_text(json.dumps(model_info))
    assert load_student(tmp_path / "best")[1] == load_student(runs / "base" / "best")[1]


def test_qat_student_as_teacher_matches_its_export(runs):
    student = load_student(runs / "int8" / "best")[0].eval()
    assert fake_quant_layers(student.network)
    (member,) = teacher_specs(digits().replace(teacher={"source": (str(runs / "int8"),)}).teacher)
    teacher = teacher_from_spec(member, tuple(map(str, range(10))), image_size=8)
    assert fake_quant_layers(teacher.network)
    result = evaluate(runs / "int8").metrics["heads"]["fused"]["top1"]
    assert result > evaluate(runs / "base").metrics["heads"]["fused"]["top1"] - 0.1


@pytest.mark.parametrize("form", FORMATS)
def test_float_export_formats_raise(runs, tmp_path, form):
    with raises(ConfigError, runs / "int8", "student.qat", "'int8'", "quantize") as error:
        export(runs / "int8", tmp_path / "out", format=form)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_loss_landscape_of_qat_run_raises(runs):
    item = LandscapePoint("one", runs / "int8", runs / "int8" / "best")
    with raises(ConfigError, "one:", "student.qat", "'int8'"):
        load_landscape_data([item], LandscapeOptions(), root=None, device=torch.device("cpu"))


OTHERWISE = {
    "method = dynamic": QuantizeOptions(method="dynamic"),
    "calibration_images = 64": QuantizeOptions(calibration_images=64),
    "calibration_method = entropy": QuantizeOptions(calibration_method="entropy"),
    "percentile = 99.9": QuantizeOptions(percentile=99.9),
    "quantize_attention = True": QuantizeOptions(quantize_attention=True),
}


@pytest.mark.parametrize("option", OTHERWISE)
def test_quantize_with_other_settings_raises(runs, tmp_path, option):
    pytest.importorskip("onnxruntime")
    with raises(ConfigError, option, runs / "int8", "student.qat") as error:
        quantize(runs / "int8", tmp_path / "out", OTHERWISE[option])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_quantize_with_unknown_ranges_raises(runs, tmp_path):
    pytest.importorskip("onnxruntime")
    shutil.copytree(runs / "int8", tmp_path / "run")
    best = tmp_path / "run" / "best"
    student, model_info = load_student(best)
    weights = student.network.state_dict()
    write_student(
        best, {n: 0 * w if n in range_names(weights) else w for n, w in weights.items()}, model_info
    )
    (best / "manifest.json").unlink()
    with (
        mock.patch(
            "deit.deploy.quantize.export_float_onnx", side_effect=AssertionError("exported first")
        ),
        raises(CheckpointError, tmp_path / "run", "student.qat", "'int8'"),
    ):
        quantize(tmp_path / "run", tmp_path / "out", QuantizeOptions())
    assert not (tmp_path / "out").exists()


def test_accuracy_drop_message_suggests_qat(runs, tmp_path):
    """For a student without fake quantization; the other message is tested below."""
    pytest.importorskip("onnxruntime")
    with (
        mock.patch(
            "deit.deploy.quantize.final_head", lambda heads, tops=[0.5, 0.9]: {"top1": tops.pop()}
        ),
        pytest.raises(CheckpointError) as error,
    ):
        quantize(runs / "base", tmp_path / "out", QuantizeOptions())
    result = str(error.value)
    run = runs / "base"
    assert f"deit finetune --from {run} --schedule int8 --out {run}-int8" in result
    assert "calibration_method percentile" in result


def test_qat_commands_from_run_to_int8_file(runs, command_server, tmp_path, capsys, monkeypatch):
    """The int8 file matches the run; without quantization its weights give other outputs."""
    pytest.importorskip("onnxruntime")
    arguments = [
        "finetune",
        "--from",
        runs / "base",
        "--schedule",
        "int8",
        "--optim.epochs",
        "1",
    ]
    done = command_server.run(
        *arguments, "--optim.warmup_epochs", "0", "--out", "run", cwd=tmp_path
    )
    assert done.code == 0, done.err
    assert re.search(r"^qat\s+11\b", done.out, re.MULTILINE)
    assert "deit quantize run" in done.out
    assert "deit export" not in done.out
    monkeypatch.chdir(tmp_path)
    with mock.patch("deit.deploy.quantize.check_accuracy_drop", wraps=check_accuracy_drop) as drop:
        assert run_command("quantize", ["run", "--max-drop", "100"], "deit quantize") == 0
    (known, _, *others), mode = drop.call_args
    with pytest.raises(CheckpointError) as refused:
        check_accuracy_drop(known, -100, *others, **mode)
    lines = str(refused.value)
    assert "exclude" in lines
    assert not any(word in lines for word in ("finetune", "calibration_method", "dynamic"))
    output = " ".join(capsys.readouterr().out.split())
    assert "fake quantization" in output
    result = json.loads(Path("run/quantized-static/quantization.json").read_text())
    assert f"{result['vs_run']['sqnr_db']['fused']:.1f} dB" in output
    assert result["calibration"]["method"] == "trained"
    evaluated = evaluate(Path("run")).metrics["heads"]
    assert "fake quantization" in Path("run/quantized-static/README.md").read_text()
    # Weights have 7 bits where sums of 8-bit products saturate: not those that were trained.
    assert result["reduce_range"] is int8_sums_saturate(int8_flags())
    if result["reduce_range"]:
        assert min(result["vs_run"]["agreement"].values()) > 0.9
        return
    for head, row in result["int8"]["heads"].items():
        assert row["top1"] == pytest.approx(evaluated[head]["top1"], abs=0.003)
        assert result["vs_run"]["agreement"][head] > 0.995
        assert result["vs_run"]["sqnr_db"][head] > 12 + result["sqnr_db"][head]


@pytest.mark.slow
def test_two_processes_learn_the_ranges_of_one(runs, command_server, tmp_path):
    arguments = [
        "finetune",
        "--from",
        runs / "base",
        "--schedule",
        "int8",
        "--student.drop_path",
        "0",
    ]
    arguments += [
        "--optim.epochs",
        "2",
        "--optim.warmup_epochs",
        "1",
        "--run.linear_backend",
        "torch",
    ]
    for count in (1, 2):
        done = command_server.run_processes(
            *arguments, "--out", str(count), processes=count, cwd=tmp_path
        )
        assert [process.code for process in done] == [0] * count, done[0].err + done[-1].err
    for file in ("model", "average"):
        names = [tmp_path / str(count) for count in (1, 2)]
        process, two = (
            ranges_of(run_folder.latest_checkpoint(out) / f"{file}.safetensors") for out in names
        )
        torch.testing.assert_close(process, two, rtol=0.02, atol=0.02)
