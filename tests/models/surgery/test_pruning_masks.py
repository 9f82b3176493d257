"""Pruning masks: prunable weights, exact counts, nested levels, random controls."""

import pytest
import torch
from torch import nn

from deit.config.schema import Config
from deit.config.sparsity import SCOPES, densities_of, groups_of
from deit.core.errors import CheckpointError, ConfigError
from deit.models.registry import create_network
from deit.models.surgery.pruning_masks import (
    PRUNE,
    PruningMasks,
    all_ones,
    apply,
    check_fits,
    is_masked,
    keep_largest,
    mask_summary,
    num_remaining,
    prunable,
    prune_in,
    random_like,
    read_masks,
)
from tests.helpers.errors import raises

EVERY_SCOPE = (*SCOPES, "2:4", "1:3")


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a": torch.randn(6, 12), "b": torch.randn(4, 12), "c": 0.4 * torch.randn(5, 24)}


# What may be pruned


@pytest.mark.parametrize("name", ["deit_micro", "vit_micro"])
def test_prunable_of_vit_is_four_layers_per_block(name):
    network = create_network(Config().replace(student={"name": name}).student, 10)
    result = prunable(network)
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert list(result) == [f"blocks.{at}.{layer}.weight" for at in range(6) for layer in layers]
    assert sum(item.numel() for item in result.values()) == 6 * 12 * 96**2


@pytest.mark.parametrize(
    "name", ["small_convnet", "dense", "rednet_micro", "regnety_002_small_stem", "timm:resnet18"]
)
def test_prunable_excludes_first_layer_and_heads(name):
    network = create_network(Config().replace(student={"name": name}).student, 10)
    layers = [
        f"{index}.weight"
        for index, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    assert list(prunable(network)) == layers[1:-1]


def test_prunable_lists_shared_weight_once():
    first, shared = nn.Linear(4, 4), nn.Linear(4, 4)
    other = nn.Linear(4, 4)
    other.weight = shared.weight
    assert list(prunable(nn.Sequential(first, shared, other))) == ["1.weight"]


# Counts


def test_prune_largest_by_hand():
    scores = {"a": torch.tensor([[3.0, 1.0], [2.0, 5.0]]), "b": torch.tensor([[4.0, 0.5]])}
    result = keep_largest(scores, all_ones(scores), 3)
    assert result["a"].tolist() == [[True, False], [False, True]]
    assert result["b"].tolist() == [[True, False]]


@pytest.mark.parametrize("count", range(9))
def test_prune_of_equal_scores_keeps_the_first(count):
    scores = {"a": torch.ones(2, 2), "b": torch.zeros(4, 1)}
    result = keep_largest(scores, all_ones(scores), count)
    flat = torch.cat([item.flatten() for item in result.values()])
    assert flat.tolist() == [True] * count + [False] * (8 - count)


def test_prune_ranks_kept_zero_before_pruned_weight():
    scores = {"a": torch.tensor([[0.0, 0.0, 7.0]])}
    masks = {"a": torch.tensor([[False, True, True]])}
    assert keep_largest(scores, masks, 2)["a"].tolist() == [[False, True, True]]
    with pytest.raises(ValueError, match=r"\b3\b.*\b2\b"):
        keep_largest(scores, masks, 3)


@pytest.mark.parametrize("scope", EVERY_SCOPE)
def test_pruned_levels_are_nested_and_exact(scope):
    result = weights()
    masks = all_ones(result)
    total = num_remaining(masks)
    for density in densities_of(scope, levels=11, rate=0.2):
        scores = {name: torch.randn_like(item).abs() for name, item in result.items()}
        after = prune_in(scope)(scores, masks, density)
        assert all((~masks[name] & after[name]).sum() == 0 for name in masks)
        if scope == "global":
            assert num_remaining(after) == round(total * density)
        else:
            for mask in after.values():
                assert mask.sum() == round(mask.numel() * density)
        masks = after
    removed = prune_in("global")(result, masks, 0.0)
    assert num_remaining(removed) == 0


def test_prune_with_density_one_keeps_everything():
    masks = all_ones(weights())
    for scope in SCOPES:
        assert num_remaining(prune_in(scope)(weights(), masks, 1.0)) == num_remaining(masks)


def test_prune_groups_keeps_largest_of_each_group():
    row = torch.tensor([[1.0, 4.0, 3.0, 2.0, 9.0, 8.0, 7.0, 6.0]])
    result = prune_in("2:4")({"a": row}, all_ones({"a": row}), 0.5)["a"]
    assert result.int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]
    kernels = torch.randn(3, 8, 5, 5).abs()
    result = prune_in("1:4")({"a": kernels}, all_ones({"a": kernels}), 0.25)["a"]
    groups = result.movedim(1, -1).reshape(-1, 4)
    assert groups.sum(dim=1).tolist() == [1] * len(groups)
    chosen = kernels.movedim(1, -1).reshape(-1, 4)[groups]
    assert torch.equal(chosen, kernels.movedim(1, -1).reshape(-1, 4).amax(dim=1))


@pytest.mark.parametrize("scope", ["2:2", "0:4", "3:2", "some", "2:", "1:4:8"])
def test_unknown_scope_raises(scope):
    with raises(ConfigError, f"scope = {scope}:", "N:M", *SCOPES):
        groups_of(scope)


def test_groups_not_dividing_inputs_raise():
    scores = {"a": torch.ones(4, 6)}
    with raises(ConfigError, "N:4", " a ", "6", *SCOPES):
        prune_in("2:4")(scores, all_ones(scores), 0.5)


def test_levels_of_groups_decrease_one_by_one():
    assert densities_of("2:4", levels=9, rate=0.2) == (0.75, 0.5)
    assert densities_of("1:4", levels=9, rate=0.2) == (0.75, 0.5, 0.25)
    assert densities_of("global", levels=3, rate=0.2) == pytest.approx((0.8, 0.64, 0.512))
    assert tuple(PRUNE) == SCOPES


@pytest.mark.parametrize("scope", EVERY_SCOPE)
def test_random_masks_have_the_same_counts_in_every_layer(scope):
    result = weights()
    scores = {name: item.abs() for name, item in result.items()}
    masks = prune_in(scope)(scores, all_ones(result), 1 / 3)
    item, same, other = (random_like(masks, scope, seed=seed) for seed in (0, 0, 1))
    for name, mask in masks.items():
        assert item[name].sum() == mask.sum()
        assert torch.equal(item[name], same[name])
        assert not torch.equal(item[name], mask)
        assert not torch.equal(item[name], other[name])
        if groups_of(scope) is not None:
            size = int(scope[-1])
            assert set(item[name].view(-1, size).sum(dim=1).tolist()) == {round(size / 3)}


def test_random_masks_are_random():
    masks = {"a": torch.arange(40_000).view(200, 200) < 10_000}
    result = random_like(masks, "global", seed=3)["a"].float()
    # Means of 200 draws with probability 1/4 have a deviation of 0.031.
    assert (result.mean(dim=0) - 0.25).abs().max() < 0.031 * 4.5
    assert (result.mean(dim=1) - 0.25).abs().max() < 0.031 * 4.5


def test_mask_summary_by_hand():
    qkv = torch.ones(6, 4, dtype=torch.bool)
    qkv[1], qkv[4, :2] = False, False
    result = mask_summary({"blocks.0.attn.qkv.weight": qkv, "fc.weight": torch.zeros(3, 2).bool()})
    assert result["kept"] == 18
    assert result["total"] == 30
    assert result["layers"] == {
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
        {name: item.abs() for name, item in prunable(network).items()},
        all_ones(prunable(network)),
        0.5,
    )
    return network, masks


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_masked_gradients_keep_zeros_under_optimizer(kind):
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


def test_masked_nonfinite_gradient_stays_nonfinite():
    network, masks = network_and_masks()
    weight = network[2].weight
    weight.grad = torch.full_like(weight, torch.nan)
    PruningMasks(masks, network).mask_gradients()
    assert weight.grad.isnan().all()


def test_masks_of_other_network_raise(tmp_path):
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
