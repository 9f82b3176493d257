"""Masks of pruned students: exact counts, and zeros that hold in training, averages and files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deit.config.recipes.handwriting import digits, digits_teacher
from deit.config.schema import Config
from deit.config.sparsity import SCOPES, densities_of, groups_of
from deit.core import run_folder, run_log
from deit.core.errors import CheckpointError, ConfigError
from deit.models.networks import create_network
from deit.models.saved import save_weights
from deit.models.surgery.pruning_masks import (
    MASKS,
    PRUNE,
    PruningMasks,
    all_ones,
    apply,
    check_fits,
    is_masked,
    keep_largest,
    mask_summary,
    num_kept,
    prunable,
    prune_in,
    random_like,
    read_masks,
)
from deit.training.build import build_run
from deit.training.optimizer import lr_at
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.resume_helpers import same_end, stop_at
from tests.helpers.small_runs import SMALL

EVERY_SCOPE = (*SCOPES, "2:4", "1:3")


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a": torch.randn(6, 12), "b": torch.randn(4, 12), "c": 0.4 * torch.randn(5, 24)}


# What may be pruned


@pytest.mark.parametrize("name", ["deit_micro", "vit_micro"])
def test_of_a_vit_the_four_layers_of_each_block_may_be_pruned(name):
    network = create_network(Config().replace(student={"name": name}).student, 10)
    found = prunable(network)
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert list(found) == [f"blocks.{at}.{layer}.weight" for at in range(6) for layer in layers]
    assert sum(one.numel() for one in found.values()) == 6 * 12 * 96**2


@pytest.mark.parametrize(
    "name", ["small_convnet", "dense", "rednet_micro", "regnety_002_small_stem", "timm:resnet18"]
)
def test_of_any_network_neither_the_first_layer_nor_the_head(name):
    network = create_network(Config().replace(student={"name": name}).student, 10)
    layers = [
        f"{place}.weight"
        for place, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    assert list(prunable(network)) == layers[1:-1]


def test_a_shared_weight_is_there_once():
    first, shared = nn.Linear(4, 4), nn.Linear(4, 4)
    other = nn.Linear(4, 4)
    other.weight = shared.weight
    assert list(prunable(nn.Sequential(first, shared, other))) == ["1.weight"]


# Counts


def test_the_largest_by_hand():
    scores = {"a": torch.tensor([[3.0, 1.0], [2.0, 5.0]]), "b": torch.tensor([[4.0, 0.5]])}
    found = keep_largest(scores, all_ones(scores), 3)
    assert found["a"].tolist() == [[True, False], [False, True]]
    assert found["b"].tolist() == [[True, False]]


@pytest.mark.parametrize("number", range(9))
def test_of_equal_ones_exactly_as_many_the_first(number):
    scores = {"a": torch.ones(2, 2), "b": torch.zeros(4, 1)}
    found = keep_largest(scores, all_ones(scores), number)
    flat = torch.cat([one.flatten() for one in found.values()])
    assert flat.tolist() == [True] * number + [False] * (8 - number)


def test_a_zero_that_is_kept_ranks_before_what_is_gone():
    scores = {"a": torch.tensor([[0.0, 0.0, 7.0]])}
    masks = {"a": torch.tensor([[False, True, True]])}
    assert keep_largest(scores, masks, 2)["a"].tolist() == [[False, True, True]]
    with pytest.raises(ValueError, match=r"\b3\b.*\b2\b"):
        keep_largest(scores, masks, 3)


@pytest.mark.parametrize("scope", EVERY_SCOPE)
def test_levels_are_nested_and_exact(scope):
    found = weights()
    masks = all_ones(found)
    total = num_kept(masks)
    for density in densities_of(scope, levels=11, rate=0.2):
        scores = {name: torch.randn_like(one).abs() for name, one in found.items()}
        after = prune_in(scope)(scores, masks, density)
        assert all((~masks[name] & after[name]).sum() == 0 for name in masks)
        if scope == "global":
            assert num_kept(after) == round(total * density)
        else:
            for mask in after.values():
                assert mask.sum() == round(mask.numel() * density)
        masks = after
    gone = prune_in("global")(found, masks, 0.0)
    assert num_kept(gone) == 0


def test_nothing_is_pruned_where_everything_is_kept():
    masks = all_ones(weights())
    for scope in SCOPES:
        assert num_kept(prune_in(scope)(weights(), masks, 1.0)) == num_kept(masks)


def test_each_group_keeps_its_largest():
    row = torch.tensor([[1.0, 4.0, 3.0, 2.0, 9.0, 8.0, 7.0, 6.0]])
    found = prune_in("2:4")({"a": row}, all_ones({"a": row}), 0.5)["a"]
    assert found.int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]
    kernels = torch.randn(3, 8, 5, 5).abs()
    found = prune_in("1:4")({"a": kernels}, all_ones({"a": kernels}), 0.25)["a"]
    groups = found.movedim(1, -1).reshape(-1, 4)
    assert groups.sum(dim=1).tolist() == [1] * len(groups)
    chosen = kernels.movedim(1, -1).reshape(-1, 4)[groups]
    assert torch.equal(chosen, kernels.movedim(1, -1).reshape(-1, 4).amax(dim=1))


@pytest.mark.parametrize("scope", ["2:2", "0:4", "3:2", "some", "2:", "1:4:8"])
def test_a_scope_that_is_none(scope):
    with raises(ConfigError, f"scope {scope}:", "N:M", *SCOPES):
        groups_of(scope)


def test_groups_have_to_fit():
    scores = {"a": torch.ones(4, 6)}
    with raises(ConfigError, "N:4", " a ", "6", *SCOPES):
        prune_in("2:4")(scores, all_ones(scores), 0.5)


def test_levels_of_groups_go_one_by_one():
    assert densities_of("2:4", levels=9, rate=0.2) == (0.75, 0.5)
    assert densities_of("1:4", levels=9, rate=0.2) == (0.75, 0.5, 0.25)
    assert densities_of("global", levels=3, rate=0.2) == pytest.approx((0.8, 0.64, 0.512))
    assert tuple(PRUNE) == SCOPES


@pytest.mark.parametrize("scope", EVERY_SCOPE)
def test_random_masks_have_the_same_counts_in_every_layer(scope):
    found = weights()
    scores = {name: one.abs() for name, one in found.items()}
    masks = prune_in(scope)(scores, all_ones(found), 1 / 3)
    one, same, other = (random_like(masks, scope, seed=seed) for seed in (0, 0, 1))
    for name, mask in masks.items():
        assert one[name].sum() == mask.sum()
        assert torch.equal(one[name], same[name])
        assert not torch.equal(one[name], mask)
        assert not torch.equal(one[name], other[name])
        if groups_of(scope) is not None:
            size = int(scope[-1])
            assert set(one[name].view(-1, size).sum(dim=1).tolist()) == {round(size / 3)}


def test_random_masks_are_random():
    masks = {"a": torch.arange(40_000).view(200, 200) < 10_000}
    found = random_like(masks, "global", seed=3)["a"].float()
    # Means of 200 draws with probability 1/4 have a deviation of 0.031.
    assert (found.mean(dim=0) - 0.25).abs().max() < 0.031 * 4.5
    assert (found.mean(dim=1) - 0.25).abs().max() < 0.031 * 4.5


def test_what_is_told_of_masks():
    qkv = torch.ones(6, 4, dtype=torch.bool)
    qkv[1], qkv[4, :2] = False, False
    told = mask_summary({"blocks.0.attn.qkv.weight": qkv, "fc.weight": torch.zeros(3, 2).bool()})
    assert told["kept"] == 18
    assert told["total"] == 30
    assert told["layers"] == {
        "blocks.0.attn.qkv.q": {"kept": 4, "total": 8, "dead_rows": 1},
        "blocks.0.attn.qkv.k": {"kept": 8, "total": 8, "dead_rows": 0},
        "blocks.0.attn.qkv.v": {"kept": 6, "total": 8, "dead_rows": 0},
        "fc": {"kept": 0, "total": 6, "dead_rows": 3},
    }


# A network under masks


def network_and_masks() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 2))
    masks = prune_in("global")(
        {name: one.abs() for name, one in prunable(network).items()},
        all_ones(prunable(network)),
        0.5,
    )
    return network, masks


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_zeros_hold_under_an_optimizer(kind):
    network, masks = network_and_masks()
    apply(masks, network)
    held = PruningMasks(masks, network)
    if kind == "adamw":
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.3, fused=True)
    else:
        optimizer = torch.optim.SGD(
            network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.3, fused=True
        )
    for _ in range(5):
        network(torch.randn(16, 4)).square().mean().backward()
        held.mask_gradients()
        optimizer.step()
        optimizer.zero_grad()
    assert is_masked(masks, network.state_dict())
    # Without the gradients' masks they do not.
    network(torch.randn(16, 4)).square().mean().backward()
    optimizer.step()
    assert not is_masked(masks, network.state_dict())


def test_a_gradient_that_is_not_finite_stays_so():
    network, masks = network_and_masks()
    weight = network[2].weight
    weight.grad = torch.full_like(weight, torch.nan)
    PruningMasks(masks, network).mask_gradients()
    assert weight.grad.isnan().all()


def test_masks_of_something_else(tmp_path):
    network, _ = network_and_masks()
    for masks, names in (
        ({"2.weight": torch.ones(8, 8)}, ("2.weight", "torch.float32", "bool")),
        ({"7.weight": torch.ones(8, 8).bool()}, ("7.weight",)),
        ({"2.weight": torch.ones(8, 4).bool()}, ("2.weight", (8, 4), (8, 8))),
    ):
        with raises(CheckpointError, "x:", *names):
            check_fits(masks, network, origin="x")
    with raises(CheckpointError, tmp_path / "nothing.safetensors"):
        read_masks(tmp_path / "nothing.safetensors")


# A run under masks

EPOCHS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A teacher, a dense run that kept its updates 0, 5 and 7, and masks of its end."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("masks")
    teacher = digits_teacher().replace(optim={"epochs": 3}, data={"train_fraction": 0.2})
    train(teacher, folder / "teacher")
    config = config_of(folder)
    assert train(config.replace(run={"keep_steps": (5, 7)}), folder / "dense")["step"] == 12
    ends = load_file(run_folder.latest_checkpoint(folder / "dense") / "model.safetensors")
    kept = [name for name in ends if name.endswith(("qkv.weight", "proj.weight", "fc1.weight"))]
    scores = {name: ends[name].abs() for name in kept if name.startswith("blocks")}
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


def test_kept_updates_stay_beside_the_newest(place):
    steps = [step for step, _ in run_folder.list_checkpoints(place / "dense")]
    assert steps == [12, 8, 7, 5]


def test_a_level_begins_where_the_dense_run_was(place):
    """The weights of that update to the bit, but for the masks; its learning rate, its views; no
    moments."""
    run = build_run(ticket(place))
    masks = read_masks(place / "masks.safetensors")
    before = load_file(place / "dense" / "checkpoint-00000005" / "model.safetensors")
    assert (run.state.step, run.state.epoch) == (5, 1)
    for name, value in run.student.network.state_dict().items():
        expected = before[name] * masks[name] if name in masks else before[name]
        assert torch.equal(value, expected), name
        assert torch.equal(run.average.model.network.state_dict()[name], expected), name
    assert not run.optimizer.state
    assert run.state.average_updates == 0


@pytest.fixture(scope="module")
def pruned(place) -> Path:
    train(ticket(place), place / "pruned")
    return place / "pruned"


def test_zeros_hold_in_every_file(place, pruned):
    masks = read_masks(place / "masks.safetensors")
    folders = [pruned / "best", *(path for _, path in run_folder.list_checkpoints(pruned))]
    files = [file for folder in folders for file in folder.glob("*.safetensors")]
    assert {file.name for file in files} == {
        *("model.safetensors", "average.safetensors", "optimizer.safetensors", MASKS)
    }
    for folder in folders:
        assert all(
            torch.equal(masks[name], one) for name, one in read_masks(folder / MASKS).items()
        )
        assert is_masked(masks, load_file(folder / "model.safetensors"))
    for folder in folders[1:]:
        assert is_masked(masks, load_file(folder / "average.safetensors"))
        moments = load_file(folder / "optimizer.safetensors")
        for kind in ("exp_avg", "exp_avg_sq"):
            assert is_masked(masks, {name: moments[f"{kind}/{name}"] for name in masks})
    # And the others have moved.
    dense_start = load_file(place / "dense" / "checkpoint-00000005" / "model.safetensors")
    after = load_file(folders[1] / "model.safetensors")
    for name, mask in masks.items():
        assert (after[name] != dense_start[name])[mask].float().mean() > 0.99


def test_schedule_order_and_views_are_those_of_the_dense_run(place, pruned):
    ours, theirs = (run_log.read(out / run_log.METRICS) for out in (pruned, place / "dense"))
    config = ticket(place)
    assert [row["step"] for row in ours] == [8, 12]
    for mine, dense_row in zip(ours, theirs[1:]):
        assert mine["step"] == dense_row["step"]
        assert mine["epoch"] == dense_row["epoch"]
        assert mine["train"]["lr"] == dense_row["train"]["lr"]
        assert mine["train"]["lr"] == lr_at(mine["step"] - 1, optim=config.optim, steps_per_epoch=4)
    # The teacher, who does not change, said the same of the whole third epoch's views.
    assert ours[1]["train"]["teacher_top1"] == theirs[2]["train"]["teacher_top1"]
    result = run_folder.read_result(pruned)
    assert result["step"] == 12
    assert result["samples_seen"] == 7 * 64


def test_masks_that_keep_everything_change_no_bit(place, tmp_path):
    every = {name: torch.ones_like(mask) for name, mask in read_masks(place / MASKS).items()}
    save_weights(tmp_path / MASKS, every)
    start = {"weights": str(place / "dense" / "checkpoint-00000007"), "start_step": 7}
    for name, masks in (("masked", str(tmp_path / MASKS)), ("plain", "keep")):
        train(config_of(place, init={**start, "pruning_masks": masks}), tmp_path / name)
    ends = [
        run_folder.latest_checkpoint(tmp_path / name) / "model.safetensors"
        for name in ("masked", "plain")
    ]
    assert ends[0].read_bytes() == ends[1].read_bytes()


@pytest.mark.parametrize("step", [6, 8, 11])
def test_a_pruned_run_resumes_to_the_bit(place, pruned, tmp_path, step):
    out = tmp_path / "run"
    stop_at(ticket(place), out, f"update:{step - 5}:term")
    # The file it began with may be gone.
    lost = ticket(place, run={"device": "cpu"})
    (place / "masks.safetensors").rename(place / "gone")
    try:
        train(lost, out, resume=True)
    finally:
        (place / "gone").rename(place / "masks.safetensors")
    same_end(out, pruned)


def test_what_was_pruned_stays_so_in_fine_tuning_unless_one_says_otherwise(place, pruned):
    start = {"weights": str(pruned), "pruning_masks": "keep", "start_step": 0}
    run = build_run(config_of(place, init=start))
    masks = read_masks(pruned / "best" / MASKS)
    assert run.masks is not None
    assert all(torch.equal(masks[name], mask) for name, mask in run.masks.masks.items())
    assert build_run(config_of(place, init={**start, "pruning_masks": "none"})).masks is None


def test_masks_that_do_not_fit_stop_before_anything_is_written(place, tmp_path):
    save_file({"blocks.9.mlp.fc1.weight": torch.ones(2, 2).bool()}, tmp_path / "m.safetensors")
    config = ticket(place).replace(init={"pruning_masks": str(tmp_path / "m.safetensors")})
    with raises(CheckpointError, "init.pruning_masks", "m.safetensors", "blocks.9.mlp.fc1.weight"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_run_begins_behind_its_end(place, tmp_path):
    with raises(ConfigError, "init.start_step = 12"):
        train(config_of(place, init={"start_step": 12}), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_zeros_hold_in_two_processes(zygote, tmp_path, shard):
    """Divided or not, both write what one mask says."""
    words = ("train", *SMALL, "--run.sharding", shard, "--run.timeout_s", "30", "--out")
    alone = zygote.run(*words, tmp_path / "dense", "--run.sharding", "none", cwd=tmp_path)
    assert alone.code == 0, alone.err
    ends = load_file(run_folder.latest_checkpoint(tmp_path / "dense") / "model.safetensors")
    scores = {name: one.abs() for name, one in ends.items() if ".mlp.fc" in name and one.ndim == 2}
    masks = prune_in("global")(scores, all_ones(scores), 0.3)
    save_weights(tmp_path / MASKS, masks)
    pruned = ("--init.pruning_masks", tmp_path / MASKS, "--init.weights", tmp_path / "dense")
    done = zygote.together(*words, tmp_path / "two", *pruned, processes=2, of_node=2, cwd=tmp_path)
    assert [one.code for one in done] == [0, 0], done[0].err + done[1].err
    folder = run_folder.latest_checkpoint(tmp_path / "two")
    assert is_masked(masks, load_file(folder / "model.safetensors"))
    moments = load_file(folder / "optimizer.safetensors")
    assert is_masked(masks, {name: moments[f"exp_avg/{name}"] for name in masks})
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["step"] > 0
