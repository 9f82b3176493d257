"""Structured pruning: scores by hand, slicing against masks, shapes of the configuration."""

import pytest
import torch
from safetensors.torch import load_file

from deit.config.schema import Config
from deit.config.sections.student import StudentConfig
from deit.config.validation import validate
from deit.core.errors import ConfigError
from deit.deploy.export_formats import FORMATS
from deit.models.cost import macs_of_image
from deit.models.registry import create_network
from deit.models.saved_student import ModelInfo, load_student, student_from_info, write_student
from deit.models.surgery.structured_pruning import (
    KeptUnits,
    TaylorScorer,
    macs_of,
    magnitudes,
    pruned_config,
    select_top,
    slice_weights,
    units_for_macs,
)
from deit.models.weight_files import load_weights
from tests.helpers.errors import raises

SMALL = StudentConfig(
    name="deit_micro", image_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3
)
UNITS = KeptUnits(((0, 2), (1,)), (tuple(range(0, 96, 3)), (5, 6, 90)))


def network_of(student: StudentConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    network = create_network(student, 5)
    with torch.no_grad():
        for parameter in network.parameters():  # biases too
            parameter.normal_(std=0.2)
    return network.eval()


# Networks of other shapes


def test_blocks_have_configured_heads_and_units():
    student = pruned_config(SMALL, UNITS)
    assert (student.heads_per_block, student.mlp_hidden_per_block) == ((2, 1), (32, 3))
    network = create_network(student, 5)
    for block, heads, hidden in zip(network.blocks, (2, 1), (32, 3)):
        attention = block.attn
        assert (attention.num_heads, attention.head_dim, attention.attn_dim) == (
            heads,
            8,
            8 * heads,
        )
        assert attention.scale == 8**-0.5
        assert attention.qkv.weight.shape == (3 * 8 * heads, 24)
        assert block.mlp.fc1.out_features == block.mlp.fc2.in_features == hidden
    assert network.blocks[0].attn.qkv.bias.abs().max() == 0  # as initialized by timm
    assert network.blocks[1].mlp.fc2.weight.detach().std().item() == pytest.approx(0.02, rel=0.3)


def test_single_value_applies_to_all_blocks():
    student = Config(student=SMALL).replace(student={"heads_per_block": (2,)}).student
    assert student.block_heads == (2, 2)
    assert student.block_hidden == (96, 96)
    assert SMALL.block_heads == (3, 3)


def test_unchanged_shapes_keep_initial_weights():
    torch.manual_seed(3)
    item = create_network(SMALL, 5).state_dict()
    torch.manual_seed(3)
    other = create_network(SMALL, 5).state_dict()
    assert all(torch.equal(item[name], other[name]) for name in item)


@pytest.mark.parametrize(
    ("student", "names"),
    [
        ({"heads_per_block": (1, 2, 3)}, ("student.heads_per_block = (1, 2, 3)", "6 blocks")),
        (
            {"mlp_hidden_per_block": (8,) * 5},
            ("student.mlp_hidden_per_block = (8, 8, 8, 8, 8)", "6 blocks"),
        ),
        (
            {"name": "small_convnet", "heads_per_block": (1,)},
            ("student.heads_per_block = (1,)", "student.name", "'small_convnet'"),
        ),
    ],
)
def test_invalid_shapes_raise(student, names):
    config = Config().replace(student={"name": "deit_micro", **student}, loss={"kind": "none"})
    with raises(ConfigError, *names):
        validate(config)


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_export_of_pruned_network_to_other_libraries_raises(name):
    model_info = ModelInfo(pruned_config(SMALL, UNITS), ("a", "b"), (0.5,) * 3, (0.5,) * 3, 1.0)
    with raises(
        ConfigError, "student.heads_per_block", "student.mlp_hidden_per_block", "format onnx"
    ):
        FORMATS[name].check(student_from_info(model_info), model_info)


# The cut


@pytest.mark.parametrize("fused", [True, False])
def test_sliced_network_equals_zeroed_network(fused):
    """Removed heads and units have zero weights in the following layer."""
    network, images = network_of(SMALL), torch.randn(3, 3, 16, 16)
    slimmed = create_network(pruned_config(SMALL, UNITS), 5).eval()
    weights = slice_weights(network.state_dict(), UNITS, head_width=8)
    load_weights(slimmed, weights, origin="here")
    with torch.no_grad():
        for block, heads, hidden in zip(network.blocks, UNITS.heads, UNITS.hidden):
            for head in set(range(3)) - set(heads):
                block.attn.proj.weight[:, 8 * head : 8 * head + 8] = 0
            removed = sorted(set(range(96)) - set(hidden))
            block.mlp.fc2.weight[:, removed] = 0
        for parameter in (network, slimmed):
            for block in parameter.blocks:
                block.attn.fused_attn = fused
        expected, result = network.forward_features(images), slimmed.forward_features(images)
    assert (expected - result).abs().max() < 1e-5 * expected.abs().max()
    assert sum(parameter.numel() for parameter in weights.values()) == sum(
        parameter.numel() for parameter in slimmed.parameters()
    )


def test_slice_of_all_units_is_identity():
    every = KeptUnits(((0, 1, 2),) * 2, (tuple(range(96)),) * 2)
    weights = network_of(SMALL).state_dict()
    result = slice_weights(weights, every, head_width=8)
    assert all(torch.equal(result[name], item) for name, item in weights.items())


def test_saved_pruned_student_loads_equal(tmp_path):
    model_info = ModelInfo(pruned_config(SMALL, UNITS), ("a", "b"), (0.5,) * 3, (0.5,) * 3, 1.0)
    student = student_from_info(model_info)
    write_student(tmp_path, student.network.state_dict(), model_info)
    copied, known = load_student(tmp_path)
    assert known == model_info
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        actual, expected = student.eval()(images), copied.eval()(images)
    assert torch.equal(actual.class_logits, expected.class_logits)
    assert set(load_file(tmp_path / "model.safetensors")) == set(student.network.state_dict())


# Scores


def test_taylor_scores_are_squared_first_order_changes():
    """Compared with central differences of each image's loss, by gates of 1 +- 1e-3, in float64."""
    network = network_of(SMALL).double()
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3])
    observer = TaylorScorer(network)
    for part in (slice(0, 3), slice(3, 4)):  # however they are cut into batches
        with observer.on(network):
            logits = network(images[part])
            observer.add(torch.nn.functional.cross_entropy(logits, labels[part], reduction="sum"))
    result = observer.scores()

    def losses() -> torch.Tensor:
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(network(images), labels, reduction="none")

    for index, block in enumerate(network.blocks):
        for kind, layer, count in (("heads", block.attn.proj, 3), ("hidden", block.mlp.fc2, 96)):
            wide = layer.in_features // count
            for part in range(0, count, 1 if kind == "heads" else 17):
                changed = []
                for gate in (1.001, 0.999):
                    column = layer.weight.data[:, part * wide : (part + 1) * wide]
                    before = column.clone()
                    column.mul_(gate)
                    changed.append(losses())
                    column.copy_(before)
                slope = (changed[0] - changed[1]) / 0.002
                score = getattr(result, kind)[index][part]
                assert score == pytest.approx(slope.square().sum().item(), rel=1e-3)


def test_taylor_scorer_removes_its_hooks():
    network = network_of(SMALL)
    observer = TaylorScorer(network)
    with pytest.raises(ZeroDivisionError), observer.on(network):
        _ = 1 / 0
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_magnitudes_by_hand():
    network = network_of(SMALL)
    result = magnitudes(network)
    block = network.blocks[1]
    assert result.heads[1][2] == pytest.approx(block.attn.proj.weight[:, 16:].square().sum().item())
    assert result.hidden[1][7] == pytest.approx(block.mlp.fc2.weight[:, 7].square().sum().item())
    assert [len(item) for item in (*result.heads, *result.hidden)] == [3, 3, 96, 96]


# Which stay


def test_select_top_keeps_largest_and_one_per_block():
    scores = (torch.tensor([5.0, 9.0, 7.0]), torch.tensor([0.1, 0.3, 0.2]))
    assert select_top(scores, 2, scope="global") == ((1,), (1,))
    assert select_top(scores, 3, scope="global") == ((1, 2), (1,))
    assert select_top(scores, 4, scope="global") == ((0, 1, 2), (1,))
    assert select_top(scores, 6, scope="global") == ((0, 1, 2), (0, 1, 2))
    assert select_top(scores, 4, scope="layerwise") == ((1, 2), (1, 2))


@pytest.mark.parametrize("count", range(2, 8))
def test_select_top_of_equal_scores_is_exact(count):
    scores = (torch.ones(4), torch.ones(3))
    assert sum(map(len, select_top(scores, count, scope="global"))) == count


@pytest.mark.parametrize("count", [1, 7])
def test_select_top_of_impossible_count_raises(count):
    with pytest.raises(ValueError, match=rf"\b{count}\b.*\b6\b.*\b2\b"):
        select_top((torch.ones(3), torch.ones(3)), count, scope="global")


# Arithmetic


@pytest.mark.parametrize("name", ["deit_micro", "vit_micro"])
@pytest.mark.parametrize("remaining", [UNITS, KeptUnits(((0,), (0,)), ((0,), (0,)))])
def test_macs_of_match_counter(name, remaining):
    student = pruned_config(
        Config(student=SMALL).replace(student={"name": name}).student, remaining
    )
    blocks = create_network(student, 5).eval().blocks
    tokens = torch.randn(1, 17 + (name == "deit_micro"), 24)
    heads, hidden = (sum(map(len, item)) for item in remaining)
    assert macs_of(student, heads, hidden) == macs_of_image(blocks, tokens)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.25])
def test_units_for_macs_meets_budget(share):
    student = StudentConfig(name="deit_tiny", image_size=224, patch_size=16)
    whole = macs_of(student, 36, 12 * 768)
    heads, hidden = units_for_macs(student, share)
    assert macs_of(student, heads, hidden) <= share * whole
    assert macs_of(student, heads, hidden) > (share - 0.03) * whole
    assert heads == max(round(36 * hidden / (12 * 768)), 12)


def test_units_for_macs_below_minimum_raises():
    with pytest.raises(ValueError, match=r"0\.01"):
        units_for_macs(SMALL, 0.01)
