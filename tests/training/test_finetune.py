"""Fine-tuning a run at a higher resolution, with and without a teacher, of all or some weights."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from deit.config.presets import LOSS_PRESETS
from deit.config.recipes.handwriting import digits
from deit.config.validation import load_config
from deit.core import run_folder, run_log
from deit.core.errors import CheckpointError, ConfigError
from deit.distill.write_targets import write_targets
from deit.evaluation.evaluate import evaluate
from deit.models.pos_embed import resize_positions
from deit.training.finetune import finetune
from deit.training.train import train
from tests.helpers.commands import tree
from tests.helpers.errors import raises
from tests.helpers.finetune_runs import BRIEF, FEW, SMALL, finer, weights
from tests.helpers.resume_helpers import assert_same_end, stop_and_resume

pytest.importorskip("sklearn")
NO_LEARNING = {"lr": 1e-12, "min_lr": 0, "warmup_lr": 0, "weight_decay": 0}
"""A learning rate of almost zero: the weights stay those that a run started from."""


@pytest.mark.fault("B8")
def test_finetune_at_twice_the_resolution_resizes_positions(pretrained, tmp_path, capsys):
    out = tmp_path / "run"
    train(finer(pretrained), out)
    lines = capsys.readouterr().out.splitlines()
    (teacher_line,) = [line for line in lines if str(pretrained / "teacher16") in line]
    assert re.search(r"\b16 px\b.*\d\.\d %", teacher_line)  # the teacher runs at its own size
    notes = json.loads((out / "init.json").read_text())
    assert notes["source"] == str(pretrained / "student")
    (note,) = notes["notes"]
    assert re.search(r"4 x 4 .*\b8 x 8 .*\bdeit\b", note)
    assert any(line.strip() == note for line in lines)
    assert weights(out)["pos_embed"].shape == (1, 66, 16)
    metrics = evaluate(out).metrics
    assert metrics["heads"]["distillation"]["top1"] > 0
    assert run_log.read(out / run_log.METRICS)[0]["train"]["distillation_loss"] > 0


@pytest.mark.fault("A25")
def test_finetune_starts_from_the_weights_of_the_run(pretrained, tmp_path):
    """With a learning rate of almost zero, the weights are those it started from."""
    train(finer(pretrained, optim=NO_LEARNING), tmp_path / "run")
    before, after = weights(pretrained / "student", "best"), weights(tmp_path / "run")
    for name, value in before.items():
        if name == "pos_embed":
            value = resize_positions(value, prefix=2, side=8, kernel="deit").positions
        torch.testing.assert_close(after[name], value, atol=1e-8, rtol=0)


def test_finetune_with_timm_pos_embed_resize_uses_its_kernel(pretrained, tmp_path):
    train(finer(pretrained, optim=NO_LEARNING, init={"pos_embed_resize": "timm"}), tmp_path / "run")
    before, after = weights(pretrained / "student", "best"), weights(tmp_path / "run")
    expected = resize_positions(before["pos_embed"], prefix=2, side=8, kernel="timm").positions
    torch.testing.assert_close(after["pos_embed"], expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("trainable", ["heads", "attention"])
def test_frozen_weights_stay_bit_identical(trainable, pretrained, tmp_path):
    config = finer(
        pretrained,
        student={"drop_path": 0.2},
        optim={"trainable": trainable, "ema_epochs": 1.0},
    )
    train(config, tmp_path / "run")
    before, after = weights(pretrained / "student", "best"), weights(tmp_path / "run")
    average = load_file(run_folder.latest_checkpoint(tmp_path / "run") / "average.safetensors")
    for name, value in before.items():
        is_trained = name.startswith("head") or (trainable == "attention" and ".attn." in name)
        if name == "pos_embed":
            value = resize_positions(value, prefix=2, side=8, kernel="deit").positions
        assert torch.equal(after[name], value) != is_trained, name
        if not is_trained:
            torch.testing.assert_close(average[name], value, atol=1e-7, rtol=1e-6)


def test_resume_with_frozen_weights_is_bit_identical(pretrained, tmp_path):
    config = finer(pretrained, optim={"trainable": "heads", "layer_decay": 0.5})
    uninterrupted, stopped = tmp_path / "uninterrupted", tmp_path / "broken"
    train(config, uninterrupted)
    stop_and_resume(config, stopped, "metrics:1:term")
    assert_same_end(stopped, uninterrupted)


def test_resume_without_the_initial_weights_continues(pretrained, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(pretrained / "student", start)
    config = finer(pretrained, init={"weights": str(start)})
    train(config, tmp_path / "run")
    shutil.rmtree(start)
    train(config, tmp_path / "run", resume=True)
    with raises(CheckpointError, "init.weights", start):
        train(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_finetune_resumes_after_its_source_was_removed(pretrained, tmp_path):
    start, out = tmp_path / "start", tmp_path / "run"
    shutil.copytree(pretrained / "student", start)
    settings = {"resolution": 16, "schedule": "linear-probe", "epochs": 1}
    result = finetune(start, out, **settings)
    config = load_config(out / run_folder.CONFIG)
    assert config.student.image_size == config.data.image_size == 16
    assert (config.optim.epochs, config.optim.trainable) == (1, "heads")
    files = tree(out)
    assert finetune(start, out, **settings, resume=True) == result
    with raises(ConfigError, "optim.trainable"):
        finetune(start, out, **{**settings, "schedule": "short"}, resume=True)
    shutil.rmtree(start)
    del settings["schedule"]
    for spelling in (start, f"{start}/", os.path.relpath(start)):
        assert finetune(spelling, out, **settings, resume=True) == result
    assert tree(out) == files
    for given in ({"schedule": "linear-probe"}, {"config": digits()}):
        with raises(ConfigError, f"source = {start}", "config and schedule"):
            finetune(start, out, **given, resume=True)
    with raises(ConfigError, "resolution = 24", "16 px"):
        finetune(start, out, resolution=24, resume=True)
    with raises(ConfigError, f"source = {tmp_path / 'other'}", start):
        finetune(tmp_path / "other", out, resume=True)
    with raises(ConfigError, "epochs = 2", "1 epoch"):
        finetune(start, out, epochs=2, resume=True)
    with raises(CheckpointError, start):
        finetune(start, tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()
    scratch = shutil.copytree(pretrained / "student", tmp_path / "scratch")
    with raises(ConfigError, f"source = {start}", "random weights"):
        finetune(start, scratch, resume=True)


def test_layer_decay_slows_the_layers_near_the_input(pretrained, tmp_path):
    """With Adam, the first steps are as large as the learning rate, whatever the gradient."""
    constant_lr = {"weight_decay": 0.0, "epochs": 1, "warmup_epochs": 0, "lr": 1e-4, "min_lr": 1e-4}
    mean_changes = {}
    for decay in (1.0, 0.1):
        out = tmp_path / str(decay)
        train(finer(pretrained, optim={**constant_lr, "layer_decay": decay}), out)
        before, after = weights(pretrained / "student", "best"), weights(out)
        for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "head.weight"):
            mean_changes[decay, name] = (after[name] - before[name]).abs().mean().item()
    ratio = {name: mean_changes[0.1, name] / mean_changes[1.0, name] for _, name in mean_changes}
    assert ratio["head.weight"] == pytest.approx(1, rel=0.3)
    assert ratio["blocks.0.mlp.fc1.weight"] == pytest.approx(0.1, rel=0.3)
    assert ratio["patch_embed.proj.weight"] == pytest.approx(0.01, rel=0.5)


def test_finetune_on_other_classes_keeps_or_replaces_head_rows(pretrained, tmp_path):
    three_classes = {"classes": ("1", "3", "7")}
    config = finer(pretrained, data=three_classes, loss=LOSS_PRESETS["none"], optim=NO_LEARNING)
    before = weights(pretrained / "student", "best")
    rows = {name: before[name][[1, 3, 7]] for name in ("head.weight", "head_dist.weight")}
    for heads in ("keep", "new"):
        out = tmp_path / heads
        train(config.replace(init={"head": heads}), out)
        after = weights(out)
        for name, saved_rows in rows.items():
            assert after[name].shape == (3, 16)
            assert torch.allclose(after[name], saved_rows, atol=1e-8, rtol=0) == (heads == "keep")
        _, note = json.loads((out / "init.json").read_text())["notes"]
        assert re.search(r"\b3\b.*\b10\b", note)


def test_finetune_from_stored_targets_is_bit_identical(pretrained, tmp_path):
    config = finer(pretrained, loss=LOSS_PRESETS["deit-hard"])
    train(config, tmp_path / "online")
    write_targets(config, tmp_path / "store")
    stored = config.replace(teacher={"target_stores": (str(tmp_path / "store"),)})
    train(stored, tmp_path / "stored")
    actual, online = weights(tmp_path / "stored"), weights(tmp_path / "online")
    assert all(torch.equal(value, online[name]) for name, value in actual.items())


def test_finetune_from_a_vit_copies_its_class_token_and_head(pretrained, tmp_path):
    vit = digits().replace(
        data=FEW,
        student={"name": "vit_micro", **SMALL},
        loss=LOSS_PRESETS["none"],
        optim=BRIEF,
    )
    train(vit, tmp_path / "plain")
    config = finer(pretrained, init={"weights": str(tmp_path / "plain")}, optim=NO_LEARNING)
    train(config, tmp_path / "run")
    before, after = weights(tmp_path / "plain", "best"), weights(tmp_path / "run")
    torch.testing.assert_close(after["dist_token"], before["cls_token"], atol=1e-8, rtol=0)
    torch.testing.assert_close(after["head_dist.weight"], before["head.weight"], atol=1e-8, rtol=0)
    note, _ = json.loads((tmp_path / "run" / "init.json").read_text())["notes"]
    assert "distillation token" in note
