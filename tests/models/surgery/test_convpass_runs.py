"""Runs with Convpass adapters: the saved weights and their base."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deit.analysis.landscape_options import LandscapeOptions
from deit.analysis.landscape_runs import landscape_points, load_landscape_data, surface_of
from deit.cli import run_command
from deit.config.finetune_schedules import FINETUNE_SCHEDULES, with_init
from deit.config.presets import LOSS_PRESETS
from deit.config.recipes.handwriting import digits, digits_teacher
from deit.config.schema import Config
from deit.config.teachers import teacher_specs
from deit.config.validation import load_config
from deit.core import run_folder
from deit.core.errors import CheckpointError, ConfigError
from deit.core.json_io import load_json_as
from deit.deploy.export import export
from deit.evaluation.evaluate import evaluate
from deit.evaluation.load_run import student_at_resolution
from deit.models import load_weights
from deit.models.load_weights import load_weights_from, saved_weights
from deit.models.metadata import BASE, AdapterBase, read_base
from deit.models.parameters import trainable_parameters
from deit.models.saved_student import load_student, save_weights
from deit.models.surgery.pruning_masks import MASKS, read_masks
from deit.models.teacher_sources import teacher_from_spec
from deit.models.weight_files import digest_of
from deit.training.build import build_run
from deit.training.train import train
from tests.helpers.commands import tree
from tests.helpers.errors import raises
from tests.helpers.images import random_batch
from tests.helpers.resume_helpers import assert_same_end, stop_at
from tests.helpers.trained import trained

pytest.importorskip("sklearn")
SMALL = {"depth": 2, "embed_dim": 96, "num_heads": 3, "drop_path": 0.1}
EPOCHS = 2
QUICK = {"epochs": EPOCHS, "batch_size": 64, "warmup_epochs": 1, "ema_epochs": 0.5}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of a teacher, of a student (the base), and of adapters trained on it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("convpass")
    teacher = digits_teacher().replace(optim={"epochs": 3}, data={"train_fraction": 0.2})
    trained(teacher, folder / "teacher")
    train(base_config(folder), folder / "base")
    train(config_of(folder), folder / "adapted")
    return folder


def base_config(folder: Path) -> Config:
    return digits().replace(
        data={"train_fraction": 0.2},
        student=SMALL,
        teacher={"source": (str(folder / "teacher"),), "allow_near_chance": True},
        optim=QUICK,
        run={"linear_backend": "torch"},
    )


def config_of(folder: Path, **more: dict) -> Config:
    """Return the configuration of adapters on the student of the folder."""
    config = FINETUNE_SCHEDULES["convpass"](
        base_config(folder).replace(init={"weights": str(folder / "base")})
    )
    return config.replace(**{**more, "optim": {**QUICK, "lr": 5e-3, **more.get("optim", {})}})


def folders_of(run: Path) -> list[Path]:
    return [run / "best", *(path for _, path in run_folder.list_checkpoints(run))]


def test_checkpoints_store_adapters_and_heads_only(runs):
    network = load_student(runs / "adapted" / "best")[0].network
    adapter_names = trainable_parameters(network, "adapters")
    assert len(adapter_names) == 2 * 2 * 6 + 4
    whole = (runs / "base" / "best" / "model.safetensors").stat().st_size
    for folder in folders_of(runs / "adapted"):
        assert set(load_file(folder / "model.safetensors")) == adapter_names
        assert (folder / "model.safetensors").stat().st_size < whole / 15
        assert BASE in json.loads((folder / "manifest.json").read_text())["files"]
        assert not (folder / MASKS).exists()
    for folder in folders_of(runs / "adapted")[1:]:
        assert set(load_file(folder / "average.safetensors")) == adapter_names
        moments = load_file(folder / "optimizer.safetensors")
        assert {name.partition("/")[2] for name in moments} == adapter_names
        for name, value in load_file(folder / "model.safetensors").items():
            assert value.any(), name  # of what began as zero as well


def test_base_is_recorded_and_logged(runs):
    weights = load_file(runs / "base" / "best" / "model.safetensors")
    expected = AdapterBase(str(runs / "base"), "../base", digest_of(weights), "deit")
    assert all(read_base(folder) == expected for folder in folders_of(runs / "adapted"))
    assert read_base(runs / "base" / "best") is None
    assert not (runs / "base" / "best" / BASE).exists()
    notes = json.loads((runs / "adapted" / "init.json").read_text())
    assert notes["weights"] == expected.weights
    assert re.search(r"\b4\b.*\badapters\b", " ".join(notes["notes"]))


def test_loaded_student_combines_base_and_adapters(runs):
    before = load_file(runs / "base" / "best" / "model.safetensors")
    for name in ("best", *(path.name for path in folders_of(runs / "adapted")[1:])):
        folder = runs / "adapted" / name
        saved = load_file(folder / "model.safetensors")
        result = load_student(folder)[0].network.state_dict()
        for key, value in result.items():
            assert torch.equal(value, saved[key] if key in saved else before[key]), key
        assert not torch.equal(result["head.weight"], before["head.weight"])
    best = load_student(runs / "adapted" / "best")[0]
    hits = evaluate(runs / "adapted").metrics["heads"]["fused"]["top1"]
    assert hits > evaluate(runs / "base").metrics["heads"]["fused"]["top1"] - 0.1
    (member,) = teacher_specs(
        digits().replace(teacher={"source": (str(runs / "adapted"),)}).teacher
    )
    names = tuple(map(str, range(10)))
    teacher = teacher_from_spec(member, names, image_size=8)
    views = torch.rand(4, 3, 8, 8)
    heads = best.eval()(views)
    mean = (heads.class_logits.softmax(1) + heads.distillation_logits[:, 0].softmax(1)) / 2
    assert torch.equal(teacher(views).argmax(1), mean.argmax(1))


def test_run_trains_adapters_with_base_in_evaluation_mode(runs):
    network = build_run(config_of(runs)).student.train().network
    training = {name for name, module in network.named_modules() if module.training}
    assert training == {name for name, _ in network.named_modules() if ".adapter" in name}


def test_run_starts_with_outputs_of_base(runs):
    began = build_run(config_of(runs)).student.eval()(random_batch(8))
    before = load_student(runs / "base" / "best")[0].eval()(random_batch(8))
    assert torch.equal(began.class_logits, before.class_logits)
    assert torch.equal(began.distillation_logits, before.distillation_logits)


def test_adapter_model_json_loads(runs, tmp_path):
    shutil.copytree(runs / "base" / "best", tmp_path / "best")
    (tmp_path / "best" / "manifest.json").unlink()
    path = tmp_path / "best" / "model.json"
    model_info = json.loads(path.read_text())
    for name in ("adapters", "adapter_dim", "adapter_scale"):
        del model_info["student"][name]
    path.write_text(json.dumps(model_info))
    assert load_student(tmp_path / "best")[1] == load_student(runs / "base" / "best")[1]


@pytest.mark.parametrize("fault", ["step:2:term", "step:5:term", "metrics:1:term"])
def test_adapter_run_resumes_bit_equal(runs, tmp_path, fault, monkeypatch):
    stop_at(config_of(runs), tmp_path / "run", fault)
    looked_for, find = [], load_weights.find_base
    monkeypatch.setattr(load_weights, "find_base", lambda *at: looked_for.append(at) or find(*at))
    train(config_of(runs), tmp_path / "run", resume=True)
    assert len(looked_for) == 1  # of all files of the checkpoint: it is read and its digest taken
    assert_same_end(tmp_path / "run", runs / "adapted")
    assert (tmp_path / "run" / "best" / BASE).is_file()
    weights = load_file(run_folder.latest_checkpoint(tmp_path / "run") / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def moved(runs: Path, to: Path, *names: str) -> None:
    for name in names:
        shutil.copytree(runs / name, to / name)


def test_missing_or_changed_base_raises(runs, tmp_path):
    runs = _copied(runs, tmp_path)
    run, before = runs / "adapted", runs / "base" / "best"
    shutil.copytree(before, tmp_path / "kept")
    weights = load_file(before / "model.safetensors")
    weights["norm.bias"][3] += 1e-6
    (before / "manifest.json").unlink()
    save_weights(before / "model.safetensors", weights)
    names = (run / "best", runs / "base", read_base(run / "best").weights[:12])
    other = digest_of(weights)[:12]
    for load in (lambda: load_student(run / "best"), lambda: load_weights_from(str(run))):
        with raises(CheckpointError, *names, other) as error:
            load()
        assert "\n" not in str(error.value)
    shutil.rmtree(runs / "base")
    with raises(CheckpointError, *names) as error:
        load_student(run / "best")
    assert "\n" not in str(error.value)
    assert other not in str(error.value)
    with raises(CheckpointError, *names):
        evaluate(run)
    shutil.copytree(tmp_path / "kept", runs / "base" / "best")
    load_student(run / "best")


def _copied(runs: Path, to: Path) -> Path:
    """Copy base and adapters to another folder; the adapters record only that path."""
    moved(runs, to / "there", "base", "adapted")
    for folder in folders_of(to / "there" / "adapted"):
        base = json.loads((folder / BASE).read_text())
        (folder / BASE).write_text(json.dumps({**base, "source": str(to / "there" / "base")}))
        (folder / "manifest.json").unlink()
    return to / "there"


def test_base_moved_with_run_is_found(runs, tmp_path, monkeypatch):
    copied = _copied(runs, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    copied.rename(tmp_path / "elsewhere" / "now")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "elsewhere/now/adapted/best", Path("elsewhere/now/adapted/best")):
        result = load_student(path)[0].network.state_dict()
        expected = load_student(runs / "adapted" / "best")[0].network.state_dict()
        assert all(torch.equal(result[name], value) for name, value in expected.items())
    monkeypatch.chdir(tmp_path / "elsewhere/now/adapted/best")
    load_student(Path("."))


def test_base_of_moved_run_is_found_at_original_path(runs, tmp_path):
    moved(runs, tmp_path / "deep" / "er", "adapted")
    load_student(tmp_path / "deep" / "er" / "adapted" / "best")


@pytest.mark.parametrize("damaged", [False, True])
def test_other_weights_at_relative_path_are_skipped(runs, tmp_path, damaged):
    """They are skipped, and the weights at the absolute path are used."""
    moved(runs, tmp_path, "adapted", "teacher")
    (tmp_path / "teacher").rename(tmp_path / "base")
    if damaged:
        (tmp_path / "base" / "best" / "model.safetensors").write_bytes(b"cut off")
    load_student(tmp_path / "adapted" / "best")


def test_file_with_missing_adapters_raises(runs, tmp_path):
    copied = _copied(runs, tmp_path) / "adapted" / "best"
    weights = load_file(copied / "model.safetensors")
    del weights["blocks.1.adapter2.up.bias"], weights["head_dist.weight"]
    save_weights(copied / "model.safetensors", weights)
    with raises(CheckpointError, copied, "blocks.1.adapter2.up.bias", "head_dist.weight"):
        load_student(copied)


def test_adapters_with_other_resolution_classes_and_tokens(runs, tmp_path):
    """The base is adapted as it was in training, and the adapters with it."""
    config = config_of(
        runs,
        data={"classes": ("1", "3", "7"), "image_size": 16},
        student={"image_size": 16},
        init={"head": "new", "pos_embed_resize": "timm"},
        teacher={"source": ()},
        loss=LOSS_PRESETS["none"],
    )
    train(config, tmp_path / "run")
    student, model_info = load_student(tmp_path / "run" / "best")
    run = build_run(config)
    began = run.student.network.state_dict()
    for name, value in student.network.state_dict().items():
        is_trained = name in trainable_parameters(student.network, "adapters")
        assert torch.equal(value, began[name]) != is_trained, name
    assert model_info.class_names == ("1", "3", "7")
    assert read_base(tmp_path / "run" / "best").kernel == "timm"
    larger, _ = student_at_resolution(runs / "adapted" / "best", 16)
    assert larger.eval()(random_batch(16)).class_logits.shape == (3, 10)


def test_adapters_initialized_from_adapters(runs, tmp_path):
    """Further training starts from their values; their base is then the previous run."""
    start = str(runs / "adapted")
    still = {"lr": 1e-12, "min_lr": 0, "warmup_lr": 0, "weight_decay": 0}
    config = with_init(config_of(runs), start, load_weights_from(start).student)
    train(config.replace(optim=still), tmp_path / "on")
    assert read_base(tmp_path / "on" / "best").source == start
    actual, expected = (
        load_student(run / "best")[0] for run in (tmp_path / "on", runs / "adapted")
    )
    for name, value in expected.network.state_dict().items():
        torch.testing.assert_close(actual.network.state_dict()[name], value, atol=1e-8, rtol=0)


def test_init_from_adapters_keeps_scale(runs):
    """Shapes do not show the scale; for untrained adapters any scale is valid."""
    start = {"weights": str(runs / "adapted")}
    for which in ("adapters", "all"):
        other = {"student": {"adapter_scale": 0.01}, "optim": {"trainable": which}}
        with raises(CheckpointError, start["weights"], "0.01", "--student.adapter_scale 0.1"):
            build_run(config_of(runs, init=start, **other))
    build_run(config_of(runs, init=start))
    build_run(config_of(runs, student={"adapter_scale": 0.01}))


def test_trainable_all_saves_all_weights(runs, tmp_path):
    config = with_init(config_of(runs), str(runs / "adapted"), None)
    config = config.replace(optim={"trainable": "all", "epochs": 1, "warmup_epochs": 0})
    train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "best" / BASE).exists()
    weights = load_file(tmp_path / "run" / "best" / "model.safetensors")
    assert {name for name in weights if "adapter" in name}
    assert set(weights) == set(load_student(runs / "adapted" / "best")[0].network.state_dict())


def test_pruned_base_stays_pruned(runs, tmp_path):
    weights = load_file(runs / "base" / "best" / "model.safetensors")
    name = "blocks.0.mlp.fc1.weight"
    masks = {name: torch.rand(weights[name].shape) > 0.5}
    save_weights(tmp_path / "m.safetensors", masks)
    start = {"weights": str(runs / "base"), "pruning_masks": str(tmp_path / "m.safetensors")}
    train(base_config(runs).replace(init=start), tmp_path / "pruned")
    config = config_of(runs, init={"weights": str(tmp_path / "pruned")})
    train(config, tmp_path / "run")
    result = load_weights_from(str(tmp_path / "run"))
    assert not result.weights[name][~masks[name]].any()
    assert torch.equal(result.masks[name], read_masks(tmp_path / "m.safetensors")[name])
    for kind in ("best", "last"):  # a landscape moves along what is kept alone
        (point,) = landscape_points([tmp_path / "run"], LandscapeOptions(checkpoint=kind))
        assert torch.equal(point.masks()[name], masks[name])
    view = load_landscape_data(
        [point], LandscapeOptions(images=8), root=None, device=torch.device("cpu")
    )
    sizes = [surface_of(point, view, masked=masked).size for masked in (False, True)]
    assert sizes[0] - sizes[1] == (~masks[name]).sum()
    (plain,) = landscape_points([runs / "adapted"], LandscapeOptions())
    assert plain.masks() == {}


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_two_processes_train_and_save_the_same_weights(runs, command_server, tmp_path, shard):
    """Sharded or not; and they resume, with the remaining weights from the base."""
    arguments = ["finetune", "--from", runs / "base", "--schedule", "convpass", "--loss", "none"]
    arguments += ["--optim.epochs", "2", "--optim.ema_epochs", "1", "--run.sharding", shard]
    arguments += ["--run.timeout_s", "30", "--out", tmp_path / "run"]
    two = {"processes": 2, "of_node": 2, "cwd": tmp_path}
    done = command_server.run_processes(*arguments, DEIT_FAULT="metrics:1:term", **two)
    assert [process.code for process in done] == [143, 143], done[0].err + done[1].err
    done = command_server.run_processes(*arguments, "--resume", **two)
    assert [process.code for process in done] == [0, 0], done[0].err + done[1].err
    folder = run_folder.latest_checkpoint(tmp_path / "run")
    before = load_weights_from(str(runs / "base")).weights
    network = load_student(folder)[0].network
    adapter_names = trainable_parameters(network, "adapters")
    for file in ("model", "average"):
        assert set(load_file(folder / f"{file}.safetensors")) == adapter_names
    for name, value in network.state_dict().items():
        assert name in adapter_names or torch.equal(value, before[name]), name
    moments = load_file(folder / "optimizer.safetensors")
    assert {name.partition("/")[2] for name in moments} == adapter_names


@pytest.mark.parametrize("form", ["timm", "transformers"])
def test_export_formats_without_adapters_raise(runs, tmp_path, form):
    pytest.importorskip("transformers")
    with raises(ConfigError, "student.adapters = 'convpass'", "format onnx") as error:
        export(runs / "adapted", tmp_path / "out", format=form)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_exported_graphs_include_adapters(runs, tmp_path, form):
    """`export` compares all outputs with the original."""
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    out = export(runs / "adapted", tmp_path / "out", format=form, images=64)
    assert (out / f"model.{form}").is_file()


@pytest.mark.parametrize("objective", ["none", "deit-hard"])
def test_adapters_command_line(runs, tmp_path, objective, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--from", str(runs / "base"), "--schedule", "convpass", "--loss", objective]
    arguments += ["--student.adapters", "convpass_attention", "--optim.epochs", "1", "--out", "run"]
    assert run_command("finetune", arguments, "finetune_deit.py") == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert re.search(r"\badapters\b.* 6,388 ", output)  # the number of trained parameters
    (note,) = json.loads((tmp_path / "run" / "init.json").read_text())["notes"]
    assert re.search(r"\b2\b.*\badapters\b", note)
    config = load_config(tmp_path / "run" / "config.json")
    assert (config.optim.trainable, config.student.adapters) == ("adapters", "convpass_attention")
    assert load_json_as(tmp_path / "run" / "best" / BASE, AdapterBase).weights
    weights = saved_weights(tmp_path / "run" / "best", load_student(tmp_path / "run" / "best")[1])
    assert len(weights) > len(load_file(tmp_path / "run" / "best" / "model.safetensors"))
    finished = tree(tmp_path / "run")
    assert run_command("finetune", [*arguments, "--resume"], "finetune_deit.py") == 0
    assert tree(tmp_path / "run") == finished
