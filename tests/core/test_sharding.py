"""Sharded students: the same training, full checkpoints, exact resumption."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deit.config.recipes.handwriting import digits
from deit.config.sections.run import RunConfig
from deit.config.validation import validate
from deit.core import manifest, run_folder, run_log
from deit.core.errors import ConfigError, SystemFault
from deit.core.sharding import shard_degree
from deit.distill.build import build_accelerator
from deit.models.saved_student import load_student
from tests.helpers.command_server import CommandServer
from tests.helpers.errors import raises
from tests.helpers.processes import Completed, last_json, output_of
from tests.helpers.small_runs import SMALL, STEPS, assert_same_run

ROOT = Path(__file__).parents[2]
ARGUMENTS = (
    *("0" if word == "0.2" else word for word in SMALL),  # drop path depends on the process
    # With accumulation, clipped gradients, and a checkpoint of every step.
    *("--optim.grad_accum_steps", "2", "--optim.clip_grad_norm", "0.5", "--run.timeout_s", "30"),
    *("--run.save_every_steps", "1", "--run.num_checkpoints", "20"),
    # As many steps with fewer images.
    *("--data.train_fraction", "0.2", "--optim.batch_size", "48"),
)


def run(
    command_server: CommandServer,
    out: Path,
    *more: object,
    recipe: tuple[str, ...] = ARGUMENTS,
    processes: int = 2,
    per_node: int = 2,
    fault: str = "",
) -> list[Completed]:
    """Run processes as torchrun starts them. per_node: how many on each node."""
    arguments = ("train", *recipe, "--out", out, "--resume", *more)
    return command_server.run_processes(
        *arguments, processes=processes, of_node=per_node, DEIT_FAULT=fault
    )


def done(*arguments, **options) -> None:
    for process in run(*arguments, **options):
        assert process.code == 0, process.err


def stopped(command_server: CommandServer, out: Path, kind: str, fault: str) -> None:
    """Start a run that a signal stops."""
    ended = run(command_server, out, "--run.sharding", kind, fault=fault)
    assert [process.code for process in ended] == [143, 143], [process.err for process in ended]


@pytest.fixture(scope="module")
def runs(command_server, tmp_path_factory) -> dict[str, Path]:
    """Return the same run with two processes, by value of run.sharding."""
    folder = tmp_path_factory.mktemp("sharded")
    for kind in ("none", "fsdp"):
        first, other = run(command_server, folder / kind, "--run.sharding", kind)
        assert first.code == other.code == 0, first.err + other.err
        line = re.search(r"\b2\b.*run\.sharding fsdp\b", first.out)  # the number of shards
        assert (line is not None) == (kind == "fsdp")
        assert "Warning" not in first.err  # torch warns if a sharded network returns views
    return {kind: folder / kind for kind in ("none", "fsdp")}


@pytest.fixture(scope="module")
def started_runs(command_server, tmp_path_factory) -> dict[str, Path]:
    """Return the same runs, stopped in their second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    for kind in ("none", "fsdp"):
        stopped(command_server, folder / kind, kind, f"step@0:{STEPS + 1}:term")
    return {kind: folder / kind for kind in ("none", "fsdp")}


def tensors(out: Path, step: int) -> dict[str, torch.Tensor]:
    """Return weights, moments and average after a step."""
    files = sorted(run_folder.checkpoint_path(out, step).glob("*.safetensors"))
    assert len(files) == 3
    return {
        f"{file.stem}/{name}": value for file in files for name, value in load_file(file).items()
    }


def assert_close(first: Path, second: Path) -> None:
    """Compare two runs: tensors after two steps, then the losses.

    AdamW turns rounding errors into full steps where a gradient is zero, so tensors differ later.
    """
    for step in (1, 2):
        expected, actual = tensors(first, step), tensors(second, step)
        assert expected.keys() == actual.keys()
        for name, value in expected.items():
            assert actual[name].shape == value.shape, name
            if name.endswith("qkv.bias") and not name.startswith("optimizer"):
                continue  # the gradient of its third for the keys is a rounding error
            assert torch.allclose(actual[name], value, rtol=1e-4, atol=1e-7), name
    last = run_folder.checkpoint_step(run_folder.latest_checkpoint(first))
    expected, actual = tensors(first, last), tensors(second, last)
    for name, value in expected.items():
        difference, scale = (actual[name] - value).abs(), value.abs().max().item()
        if name.endswith("qkv.bias") and difference.ndim:  # without the keys, as above
            difference = torch.cat([difference.chunk(3)[part] for part in (0, 2)])
        assert difference.max().item() <= 0.02 * scale, name
    rows = [run_log.read(out / run_log.METRICS) for out in (first, second)]
    assert len(rows[0]) == len(rows[1]) == 2
    for expected, actual in zip(*rows):
        for name, value in expected["train"].items():
            assert actual["train"][name] == pytest.approx(
                value, abs=0.01 if "top1" in name else 1e-5
            )
        assert actual["validation"] == pytest.approx(expected["validation"], abs=1.5)


def test_sharded_training_matches_unsharded_training(runs):
    assert_close(runs["none"], runs["fsdp"])


def test_checkpoint_of_a_sharded_run_is_full(runs):
    for name in ("best", f"checkpoint-{2 * STEPS:08d}"):
        student, _ = load_student(runs["fsdp"] / name)
        output = student.eval()(torch.rand(3, 3, 8, 8))
        assert output.class_logits.shape == (3, 10)


def test_stopped_and_resumed_sharded_run_is_bit_identical(command_server, runs, tmp_path):
    out = tmp_path / "run"
    stopped(command_server, out, "fsdp", "step@1:3:term")
    assert 3 <= run_folder.checkpoint_step(run_folder.latest_checkpoint(out)) < 2 * STEPS
    done(command_server, out, "--run.sharding", "fsdp")
    assert_same_run(out, runs["fsdp"])


@pytest.mark.parametrize("processes", [1, 2])
def test_run_resumes_with_another_sharding(processes, command_server, runs, started_runs, tmp_path):
    for first, then in (("fsdp", "none"), ("none", "fsdp")):
        out = Path(shutil.copytree(started_runs[first], tmp_path / first))
        ended = run(command_server, out, "--run.sharding", then, processes=processes)
        assert [process.code for process in ended] == [0] * processes, ended[0].err
        assert re.search(rf"run\.sharding\b.*\b{first}\b.*\b{then}\b", ended[0].err)
        assert_close(runs["none"], out)


def test_nonfinite_step_is_skipped_by_all_processes(command_server, runs, tmp_path):
    for kind in runs:
        done(command_server, tmp_path / kind, "--run.sharding", kind, fault="loss@1:4:nan")
        assert run_folder.read_result(tmp_path / kind)["skipped"] == 1
    assert_close(tmp_path / "none", tmp_path / "fsdp")
    before, after = tensors(tmp_path / "fsdp", 1), tensors(tmp_path / "fsdp", 2)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    "more",
    [
        ("--run.activation_checkpointing",),
        pytest.param(("--run.linear_backend", "onednn"), marks=pytest.mark.slow),
        pytest.param(("--optim.clip_grad_norm", "none"), marks=pytest.mark.slow),
        pytest.param(("--run.precision", "bf16"), marks=pytest.mark.slow),
        ("--optim.trainable", "attention", "--init.weights", "best"),
    ],
    ids=lambda more: more[0].rpartition(".")[2],
)
@pytest.mark.slow
def test_sharding_with_other_student_options(more, command_server, runs, tmp_path):
    """Activation checkpointing, other linear layers, frozen weights."""
    best = runs["none"] / "best"
    more = [str(best) if word == "best" else word for word in more]
    for kind in runs:
        done(command_server, tmp_path / kind, "--run.sharding", kind, *more)
    assert_close(tmp_path / "none", tmp_path / "fsdp")


@pytest.mark.slow
def test_sharding_of_a_network_with_batch_norm(command_server, tmp_path):
    """The running statistics are those of the first process, as in DDP."""
    network = (
        *("digits-teacher", "--optim.batch_size", "48", "--optim.epochs", "2"),
        *("--data.train_fraction", "0.2"),
        *("--optim.warmup_epochs", "1", "--optim.ema_epochs", "1", "--run.eval_every_epochs", "1"),
        *("--run.save_every_steps", "1", "--run.num_checkpoints", "30"),
    )
    for kind in ("none", "fsdp"):
        done(command_server, tmp_path / kind, "--run.sharding", kind, recipe=network)
    assert_close(tmp_path / "none", tmp_path / "fsdp")


def test_missing_best_weights_are_gathered_by_all_processes(command_server, started_runs, tmp_path):
    """Only the main process checks for them, but all processes gather the weights to write."""
    out = Path(shutil.copytree(started_runs["fsdp"], tmp_path / "run"))
    shutil.rmtree(out / "best")
    newest = run_folder.latest_checkpoint(out)
    state = json.loads((newest / run_folder.STATE).read_text())
    state["best"]["top1"] = 2.0  # so that no later epoch is better
    (newest / run_folder.STATE).write_text(json.dumps(state))
    names = [file.name for file in newest.iterdir() if file.name != manifest.MANIFEST]
    manifest.write_manifest(newest, manifest.digests(newest, names), step=state["step"])
    done(command_server, out, "--run.sharding", "fsdp")
    assert load_student(out / "best")


@pytest.mark.slow
def test_gradient_compression_halves_the_traffic(command_server, runs, tmp_path):
    out = tmp_path / "run"
    done(command_server, out, "--run.sharding", "fsdp", "--run.gradient_compression", "bf16")
    exact, rounded = tensors(runs["fsdp"], 1), tensors(out, 1)
    moments = [name for name in exact if "/exp_avg/" in name]
    assert moments
    assert any(not torch.equal(exact[name], rounded[name]) for name in moments)
    for name in moments:
        scale = exact[name].abs().max().item()
        assert torch.allclose(exact[name], rounded[name], rtol=2**-6, atol=0.01 * scale), name
    rows = [run_log.read(path / run_log.METRICS) for path in (runs["fsdp"], out)]
    for expected, actual in zip(*rows, strict=True):
        assert actual["train"]["loss"] == pytest.approx(expected["train"]["loss"], abs=0.02)


def test_hsdp_shards_within_each_node(command_server, runs, tmp_path):
    out = tmp_path / "run"
    done(command_server, out, "--run.sharding", "hsdp", processes=4, per_node=2)
    assert_close(runs["none"], out)


def test_one_process_is_not_sharded(command_server, tmp_path):
    for kind in ("none", "fsdp"):
        done(command_server, tmp_path / kind, "--run.sharding", kind, processes=1)
    assert_same_run(tmp_path / "fsdp", tmp_path / "none")


MEMORY = """
import json, sys
from pathlib import Path
from deit.core.accelerator import destroy_process_group
from deit.config.recipes.handwriting import digits
from deit.config.presets import LOSS_PRESETS
from deit.training.build import build_run
from deit.training.epochs import step_context
from deit.training.loop import MetricAccumulator, train_epoch
from deit.core.sharding import local_tensor

def held(kind):
    small = digits().replace(
        student={"depth": 4, "embed_dim": 64, "num_heads": 2}, teacher={"source": ()},
        loss=LOSS_PRESETS["none"], optim={"ema_epochs": 1}, run={"sharding": kind, "device": "cpu"})
    parts = build_run(small)
    tally = MetricAccumulator(parts.accelerator, {})
    batches = (batch for batch, _ in zip(parts.loader.epoch(0), range(1)))
    for update in train_epoch(step_context(parts), batches, tally, step=0, steps=10):
        assert update.applied
    student = parts.accelerator.unwrap_model(parts.student)
    moments = [state[name] for state in parts.optimizer.state.values()
               for name in ("exp_avg", "exp_avg_sq")]
    tensors = [*student.parameters(), *parts.average.model.parameters(), *moments]
    return sum(local_tensor(one).numel() for one in tensors)

print(json.dumps({kind: held(kind) for kind in ("none", "fsdp")}))
destroy_process_group()
"""


def test_each_process_holds_only_its_shard(command_server, tmp_path):
    """Half of weights, average and moments, except for tensors that cannot be split."""
    script = tmp_path / "memory.py"
    script.write_text(MEMORY)
    sizes = last_json(output_of(command_server, 2, script, cwd=tmp_path))
    assert sizes["fsdp"] / sizes["none"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("sharding", "processes", "per_node", "num_shards"),
    [("none", 8, "8", 1), ("fsdp", 8, "4", 8), ("hsdp", 8, "4", 4), ("hsdp", 1, None, 1)],
)
def test_shard_degree(sharding, processes, per_node, num_shards, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if per_node is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", per_node)
    assert shard_degree(sharding, processes) == num_shards


@pytest.mark.parametrize("per_node", [None, "1", "3"])
def test_hsdp_without_processes_per_node_raises(per_node, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if per_node is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", per_node)
    with raises(SystemFault, "run.sharding", "'hsdp'", "LOCAL_WORLD_SIZE"):
        shard_degree("hsdp", 8)


def test_sharding_with_fp16_of_the_launcher_raises(monkeypatch):
    monkeypatch.setattr("deit.core.accelerator.resolve_precision", lambda *ignored: "fp16")
    with raises(SystemFault, "run.sharding", "fp16"):
        build_accelerator(RunConfig(sharding="fsdp", device="cpu"))


@pytest.mark.parametrize(
    ("field", "value"), [("precision", "fp16"), ("auto_micro_batch", True), ("compile", "default")]
)
def test_options_that_exclude_sharding_raise(field, value):
    config = digits().replace(run={"sharding": "fsdp", field: value}, teacher={"source": ("x",)})
    with raises(ConfigError, f"run.{field}", "run.sharding"):
        validate(config)
