"""A student divided among processes: the numbers of a whole one, whole files, exact resume."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deit.config.recipes.handwriting import digits
from deit.config.schema import RunConfig
from deit.config.validation import validate
from deit.core import manifest, run_folder, run_log
from deit.core.errors import ConfigError, SystemFault
from deit.core.sharding import shard_degree
from deit.distill.build import build_accelerator
from deit.models.saved import load_student
from tests.helpers.command_server import CommandServer
from tests.helpers.errors import raises
from tests.helpers.processes import Completed, last_json, output_of
from tests.helpers.small_runs import SMALL, STEPS, same

ROOT = Path(__file__).parents[2]
WORDS = (
    *("0" if word == "0.2" else word for word in SMALL),  # drop path: another on other processes
    # Accumulated micro-batches, a gradient that is clipped, every update to be looked at.
    *("--optim.grad_accum_steps", "2", "--optim.clip_grad_norm", "0.5", "--run.timeout_s", "30"),
    *("--run.save_every_steps", "1", "--run.num_checkpoints", "20"),
    # As many updates of fewer images.
    *("--data.train_fraction", "0.2", "--optim.batch_size", "48"),
)


def run(
    command_server: CommandServer,
    out: Path,
    *more: object,
    recipe: tuple[str, ...] = WORDS,
    processes: int = 2,
    of_node: int = 2,
    fault: str = "",
) -> list[Completed]:
    """The processes of a run, as torchrun would start them on nodes of so many."""
    arguments = ("train", *recipe, "--out", out, "--resume", *more)
    return command_server.run_processes(
        *arguments, processes=processes, of_node=of_node, DEIT_FAULT=fault
    )


def done(*arguments, **options) -> None:
    for one in run(*arguments, **options):
        assert one.code == 0, one.err


def stopped(command_server: CommandServer, out: Path, kind: str, fault: str) -> None:
    """Begin a run that a signal stops."""
    ended = run(command_server, out, "--run.sharding", kind, fault=fault)
    assert [one.code for one in ended] == [143, 143], [one.err for one in ended]


@pytest.fixture(scope="module")
def runs(command_server, tmp_path_factory) -> dict[str, Path]:
    """The same run of two processes, by value of run.sharding."""
    place = tmp_path_factory.mktemp("sharded")
    for kind in ("none", "fsdp"):
        first, other = run(command_server, place / kind, "--run.sharding", kind)
        assert first.code == other.code == 0, first.err + other.err
        told = re.search(r"\b2\b.*run\.sharding fsdp\b", first.out)  # into how many parts
        assert (told is not None) == (kind == "fsdp")
        assert not first.err  # torch warns of views that a divided network returns
    return {kind: place / kind for kind in ("none", "fsdp")}


@pytest.fixture(scope="module")
def begun(command_server, tmp_path_factory) -> dict[str, Path]:
    """The same, stopped in their second epoch."""
    place = tmp_path_factory.mktemp("begun")
    for kind in ("none", "fsdp"):
        stopped(command_server, place / kind, kind, f"update@0:{STEPS + 1}:term")
    return {kind: place / kind for kind in ("none", "fsdp")}


def tensors(out: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights, moments and average after an update."""
    files = sorted(run_folder.checkpoint_path(out, step).glob("*.safetensors"))
    assert len(files) == 3
    return {
        f"{file.stem}/{name}": value for file in files for name, value in load_file(file).items()
    }


def assert_close(one: Path, other: Path) -> None:
    """To rounding: tensors after the first updates; later, as AdamW makes whole steps of rounding
    where a gradient is zero, the losses."""
    for step in (1, 2):
        theirs, ours = tensors(one, step), tensors(other, step)
        assert theirs.keys() == ours.keys()
        for name, value in theirs.items():
            assert ours[name].shape == value.shape, name
            if name.endswith("qkv.bias") and not name.startswith("optimizer"):
                continue  # a third of it, the key's, has no gradient but rounding
            assert torch.allclose(ours[name], value, rtol=1e-4, atol=1e-7), name
    last = run_folder.checkpoint_step(run_folder.latest_checkpoint(one))
    theirs, ours = tensors(one, last), tensors(other, last)
    for name, value in theirs.items():
        far, most = (ours[name] - value).abs(), value.abs().max().item()
        if name.endswith("qkv.bias") and far.ndim:  # without the key's, as above
            far = torch.cat([far.chunk(3)[part] for part in (0, 2)])
        assert far.max().item() <= 0.02 * most, name
    rows = [run_log.read(out / run_log.METRICS) for out in (one, other)]
    assert len(rows[0]) == len(rows[1]) == 2
    for theirs, ours in zip(*rows):
        for name, value in theirs["train"].items():
            assert ours["train"][name] == pytest.approx(value, abs=0.01 if "top1" in name else 1e-5)
        assert ours["validation"] == pytest.approx(theirs["validation"], abs=1.5)


def test_divided_it_learns_what_the_whole_one_learns(runs):
    assert_close(runs["none"], runs["fsdp"])


def test_its_files_are_whole_and_load_alone(runs):
    for name in ("best", f"checkpoint-{2 * STEPS:08d}"):
        student, _ = load_student(runs["fsdp"] / name)
        answer = student.eval()(torch.rand(3, 3, 8, 8))
        assert answer.class_logits.shape == (3, 10)


def test_stopped_in_the_middle_it_ends_with_the_same_bits(command_server, runs, tmp_path):
    out = tmp_path / "run"
    stopped(command_server, out, "fsdp", "update@1:3:term")
    assert 3 <= run_folder.checkpoint_step(run_folder.latest_checkpoint(out)) < 2 * STEPS
    done(command_server, out, "--run.sharding", "fsdp")
    same(out, runs["fsdp"])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_divided_run_goes_on_whole_and_the_other_way_round(
    processes, command_server, runs, begun, tmp_path
):
    for first, then in (("fsdp", "none"), ("none", "fsdp")):
        out = Path(shutil.copytree(begun[first], tmp_path / first))
        ended = run(command_server, out, "--run.sharding", then, processes=processes)
        assert [one.code for one in ended] == [0] * processes, ended[0].err
        assert re.search(rf"run\.sharding\b.*\b{first}\b.*\b{then}\b", ended[0].err)
        assert_close(runs["none"], out)


def test_an_update_that_is_not_finite_is_left_out_in_every_part(command_server, runs, tmp_path):
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
def test_with_what_else_changes_a_student(more, command_server, runs, tmp_path):
    """Blocks computed again, other layers, frozen weights."""
    best = runs["none"] / "best"
    more = [str(best) if word == "best" else word for word in more]
    for kind in runs:
        done(command_server, tmp_path / kind, "--run.sharding", kind, *more)
    assert_close(tmp_path / "none", tmp_path / "fsdp")


def test_a_network_without_blocks_and_with_statistics(command_server, tmp_path):
    """Batch norm: those of the first process count, as they do in DDP."""
    network = (
        *("digits-teacher", "--optim.batch_size", "48", "--optim.epochs", "2"),
        *("--data.train_fraction", "0.2"),
        *("--optim.warmup_epochs", "1", "--optim.ema_epochs", "1", "--run.eval_every_epochs", "1"),
        *("--run.save_every_steps", "1", "--run.num_checkpoints", "30"),
    )
    for kind in ("none", "fsdp"):
        done(command_server, tmp_path / kind, "--run.sharding", kind, recipe=network)
    assert_close(tmp_path / "none", tmp_path / "fsdp")


def test_without_its_best_weights_all_processes_gather_alike(command_server, begun, tmp_path):
    """The main process alone looks for them, and all take part where better ones are written."""
    out = Path(shutil.copytree(begun["fsdp"], tmp_path / "run"))
    shutil.rmtree(out / "best")
    newest = run_folder.latest_checkpoint(out)
    state = json.loads((newest / run_folder.STATE).read_text())
    state["best"]["top1"] = 2.0  # so that those who remember it find nothing better
    (newest / run_folder.STATE).write_text(json.dumps(state))
    names = [file.name for file in newest.iterdir() if file.name != manifest.MANIFEST]
    manifest.write_manifest(newest, manifest.digests(newest, names), step=state["step"])
    done(command_server, out, "--run.sharding", "fsdp")
    assert load_student(out / "best")


def test_gradients_travel_in_half_the_bytes(command_server, runs, tmp_path):
    out = tmp_path / "run"
    done(command_server, out, "--run.sharding", "fsdp", "--run.gradient_compression", "bf16")
    exact, rounded = tensors(runs["fsdp"], 1), tensors(out, 1)
    moments = [name for name in exact if "/exp_avg/" in name]
    assert moments
    assert any(not torch.equal(exact[name], rounded[name]) for name in moments)
    for name in moments:
        scale = exact[name].abs().max().item()
        assert torch.allclose(exact[name], rounded[name], rtol=2**-6, atol=0.01 * scale), name
    rows = [run_log.read(one / run_log.METRICS) for one in (runs["fsdp"], out)]
    for theirs, ours in zip(*rows, strict=True):
        assert ours["train"]["loss"] == pytest.approx(theirs["train"]["loss"], abs=0.02)


def test_divided_among_the_processes_of_each_node(command_server, runs, tmp_path):
    out = tmp_path / "run"
    done(command_server, out, "--run.sharding", "hsdp", processes=4, of_node=2)
    assert_close(runs["none"], out)


def test_one_process_has_the_whole_student(command_server, tmp_path):
    for kind in ("none", "fsdp"):
        done(command_server, tmp_path / kind, "--run.sharding", kind, processes=1)
    same(tmp_path / "fsdp", tmp_path / "none")


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


def test_each_process_holds_its_part_alone(command_server, tmp_path):
    """Weights, average and both moments: half of all, but for what does not divide."""
    script = tmp_path / "memory.py"
    script.write_text(MEMORY)
    said = output_of(command_server, 2, script, cwd=tmp_path)
    found = last_json(said)
    assert found["fsdp"] / found["none"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("among", "processes", "of_node", "parts"),
    [("none", 8, "8", 1), ("fsdp", 8, "4", 8), ("hsdp", 8, "4", 4), ("hsdp", 1, None, 1)],
)
def test_into_how_many_parts(among, processes, of_node, parts, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if of_node is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", of_node)
    assert shard_degree(among, processes) == parts


@pytest.mark.parametrize("of_node", [None, "1", "3"])
def test_nodes_that_the_launcher_does_not_tell_are_refused(of_node, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if of_node is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", of_node)
    with raises(SystemFault, "run.sharding", "'hsdp'", "LOCAL_WORLD_SIZE"):
        shard_degree("hsdp", 8)


def test_fp16_of_a_launcher_is_refused(monkeypatch):
    monkeypatch.setattr("deit.core.accelerator.resolve_precision", lambda *ignored: "fp16")
    with raises(SystemFault, "run.sharding", "fp16"):
        build_accelerator(RunConfig(sharding="fsdp", device="cpu"))


@pytest.mark.parametrize(
    ("field", "value"), [("precision", "fp16"), ("auto_micro_batch", True), ("compile", "default")]
)
def test_what_needs_the_whole_student_is_refused(field, value):
    config = digits().replace(run={"sharding": "fsdp", field: value}, teacher={"source": ("x",)})
    with raises(ConfigError, f"run.{field}", "run.sharding"):
        validate(config)
