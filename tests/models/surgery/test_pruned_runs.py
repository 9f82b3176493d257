"""Training with pruning masks: zeros stay zero in files, resumed runs and fine-tuning."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deit.config.recipes.handwriting import digits, digits_teacher
from deit.config.schema import Config
from deit.core import run_folder, run_log
from deit.core.errors import CheckpointError, ConfigError
from deit.models.saved_student import save_weights
from deit.models.surgery.pruning_masks import (
    MASKS,
    all_ones,
    is_masked,
    prune_in,
    read_masks,
)
from deit.training.build import build_run
from deit.training.lr_schedule import lr_at
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.resume_helpers import assert_same_end, stop_at
from tests.helpers.small_runs import SMALL

# A run under masks

EPOCHS = 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of a teacher and of a dense student with steps 0, 5 and 7 kept, and masks of its end."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("masks")
    teacher = digits_teacher().replace(optim={"epochs": 3}, data={"train_fraction": 0.2})
    train(teacher, folder / "teacher")
    config = config_of(folder)
    assert train(config.replace(run={"keep_steps": (5, 7)}), folder / "dense")["step"] == 12
    ends = load_file(run_folder.latest_checkpoint(folder / "dense") / "model.safetensors")
    remaining = [
        name for name in ends if name.endswith(("qkv.weight", "proj.weight", "fc1.weight"))
    ]
    scores = {name: ends[name].abs() for name in remaining if name.startswith("blocks")}
    masks = prune_in("global")(scores, all_ones(scores), 0.4)
    save_weights(folder / "masks.safetensors", masks)
    return folder


def config_of(folder: Path, **more: dict) -> Config:
    config = digits().replace(
        data={"train_fraction": 0.2},
        student={"depth": 2, "embed_dim": 32, "num_heads": 2, "drop_path": 0.1},
        teacher={"source": (str(folder / "teacher"),), "allow_near_chance": True},
        optim={"epochs": EPOCHS, "batch_size": 64, "warmup_epochs": 1, "ema_epochs": 0.5}
        | {"clip_grad_norm": 0.5},
        run={"linear_backend": "torch"},
    )
    return config.replace(**more)


def ticket(folder: Path, **more: dict) -> Config:
    start = {"weights": str(folder / "dense" / "checkpoint-00000005"), "start_step": 5}
    start |= {"pruning_masks": str(folder / "masks.safetensors")}
    return config_of(folder, init=start, **more)


def test_keep_steps_are_kept_with_the_latest(runs):
    steps = [step for step, _ in run_folder.list_checkpoints(runs / "dense")]
    assert steps == [12, 8, 7, 5]


def test_rewound_run_starts_from_dense_checkpoint(runs):
    """It has the weights of that step (masked), its learning rate and views, but no moments."""
    run = build_run(ticket(runs))
    masks = read_masks(runs / "masks.safetensors")
    before = load_file(runs / "dense" / "checkpoint-00000005" / "model.safetensors")
    assert (run.state.step, run.state.epoch) == (5, 1)
    for name, value in run.student.network.state_dict().items():
        expected = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(value, expected), name
        assert torch.equal(run.average.model.network.state_dict()[name], expected), name
    assert not run.optimizer.state
    assert run.state.average_updates == 0


@pytest.fixture(scope="module")
def pruned(runs) -> Path:
    train(ticket(runs), runs / "pruned")
    return runs / "pruned"


def test_pruned_weights_are_zero_in_every_file(runs, pruned):
    masks = read_masks(runs / "masks.safetensors")
    folders = [pruned / "best", *(path for _, path in run_folder.list_checkpoints(pruned))]
    files = [file for folder in folders for file in folder.glob("*.safetensors")]
    assert {file.name for file in files} == {
        *("model.safetensors", "average.safetensors", "optimizer.safetensors", MASKS)
    }
    for folder in folders:
        assert all(
            torch.equal(masks[name], item) for name, item in read_masks(folder / MASKS).items()
        )
        assert is_masked(masks, load_file(folder / "model.safetensors"))
    for folder in folders[1:]:
        assert is_masked(masks, load_file(folder / "average.safetensors"))
        moments = load_file(folder / "optimizer.safetensors")
        for kind in ("exp_avg", "exp_avg_sq"):
            assert is_masked(masks, {name: moments[f"{kind}/{name}"] for name in masks})
    # And the others have moved.
    dense_start = load_file(runs / "dense" / "checkpoint-00000005" / "model.safetensors")
    after = load_file(folders[1] / "model.safetensors")
    for name, mask in masks.items():
        assert (after[name] != dense_start[name])[mask].float().mean() > 0.99


def test_rewound_run_has_schedule_order_and_views_of_dense_run(runs, pruned):
    actual, expected = (run_log.read(out / run_log.METRICS) for out in (pruned, runs / "dense"))
    config = ticket(runs)
    assert [row["step"] for row in actual] == [8, 12]
    for own_rows, dense_row in zip(actual, expected[1:]):
        assert own_rows["step"] == dense_row["step"]
        assert own_rows["epoch"] == dense_row["epoch"]
        assert own_rows["train"]["lr"] == dense_row["train"]["lr"]
        assert own_rows["train"]["lr"] == lr_at(
            own_rows["step"] - 1, optim=config.optim, steps_per_epoch=4
        )
    # The teacher, which does not change, has the same outputs for the views of the third epoch.
    assert actual[1]["train"]["teacher_top1"] == expected[2]["train"]["teacher_top1"]
    result = run_folder.read_result(pruned)
    assert result["step"] == 12
    assert result["samples_seen"] == 7 * 64


def test_all_ones_masks_train_bit_equal(runs, tmp_path):
    every = {name: torch.ones_like(mask) for name, mask in read_masks(runs / MASKS).items()}
    save_weights(tmp_path / MASKS, every)
    start = {"weights": str(runs / "dense" / "checkpoint-00000007"), "start_step": 7}
    for name, masks in (("masked", str(tmp_path / MASKS)), ("plain", "keep")):
        train(config_of(runs, init={**start, "pruning_masks": masks}), tmp_path / name)
    ends = [
        run_folder.latest_checkpoint(tmp_path / name) / "model.safetensors"
        for name in ("masked", "plain")
    ]
    assert ends[0].read_bytes() == ends[1].read_bytes()


@pytest.mark.parametrize("step", [6, 8, 11])
def test_pruned_run_resumes_bit_equal(runs, pruned, tmp_path, step):
    out = tmp_path / "run"
    stop_at(ticket(runs), out, f"step:{step - 5}:term")
    # The file it began with may be gone.
    lost = ticket(runs, run={"device": "cpu"})
    (runs / "masks.safetensors").rename(runs / "gone")
    try:
        train(lost, out, resume=True)
    finally:
        (runs / "gone").rename(runs / "masks.safetensors")
    assert_same_end(out, pruned)


def test_fine_tuning_keeps_pruned_weights_unless_configured(runs, pruned):
    start = {"weights": str(pruned), "pruning_masks": "keep", "start_step": 0}
    run = build_run(config_of(runs, init=start))
    masks = read_masks(pruned / "best" / MASKS)
    assert run.masks is not None
    assert all(torch.equal(masks[name], mask) for name, mask in run.masks.masks.items())
    assert build_run(config_of(runs, init={**start, "pruning_masks": "none"})).masks is None


def test_masks_of_other_network_raise_before_writing(runs, tmp_path):
    save_file({"blocks.9.mlp.fc1.weight": torch.ones(2, 2).bool()}, tmp_path / "m.safetensors")
    config = ticket(runs).replace(init={"pruning_masks": str(tmp_path / "m.safetensors")})
    with raises(CheckpointError, "init.pruning_masks", "m.safetensors", "blocks.9.mlp.fc1.weight"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_start_step_after_end_raises(runs, tmp_path):
    with raises(ConfigError, "init.start_step = 12"):
        train(config_of(runs, init={"start_step": 12}), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_pruned_weights_stay_zero_with_two_processes(command_server, tmp_path, shard):
    """Sharded or not, both processes keep the same weights at zero."""
    arguments = ("train", *SMALL, "--run.sharding", shard, "--run.timeout_s", "30", "--out")
    single_process = command_server.run(
        *arguments, tmp_path / "dense", "--run.sharding", "none", cwd=tmp_path
    )
    assert single_process.code == 0, single_process.err
    ends = load_file(run_folder.latest_checkpoint(tmp_path / "dense") / "model.safetensors")
    scores = {
        name: process.abs()
        for name, process in ends.items()
        if ".mlp.fc" in name and process.ndim == 2
    }
    masks = prune_in("global")(scores, all_ones(scores), 0.3)
    save_weights(tmp_path / MASKS, masks)
    pruned = ("--init.pruning_masks", tmp_path / MASKS, "--init.weights", tmp_path / "dense")
    done = command_server.run_processes(
        *arguments, tmp_path / "two", *pruned, processes=2, of_node=2, cwd=tmp_path
    )
    assert [process.code for process in done] == [0, 0], done[0].err + done[1].err
    folder = run_folder.latest_checkpoint(tmp_path / "two")
    assert is_masked(masks, load_file(folder / "model.safetensors"))
    moments = load_file(folder / "optimizer.safetensors")
    assert is_masked(masks, {name: moments[f"exp_avg/{name}"] for name in masks})
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["step"] > 0
