"""Adapting initial weights: positions resized, tokens added and dropped, heads by name."""

import re

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from deit.config.sections.init import InitConfig
from deit.core.errors import CheckpointError
from deit.models.adapt_weights import LoadedWeights
from deit.models.parameters import classifier_names
from deit.models.pos_embed import resize_positions
from tests.helpers.errors import raises
from tests.helpers.weight_files import NAMES, load_adapted, loaded_weights, network

# positions


@pytest.mark.parametrize("prefix", [0, 1, 2, 4])
@pytest.mark.parametrize("side", [3, 6, 9])
def test_resize_keeps_prefix_rows_bit_equal(prefix, side):
    positions = torch.randn(1, prefix + 16, 8)
    result = resize_positions(positions, prefix=prefix, side=side, kernel="deit")
    assert result.positions.shape == (1, prefix + side**2, 8)
    assert torch.equal(result.positions[:, :prefix], positions[:, :prefix])
    assert result.sides == (4, side)
    before, after = (
        p[:, prefix:].norm(dim=-1).mean().item() for p in (positions, result.positions)
    )
    assert result.norms == pytest.approx((before, after))


def test_resize_to_same_size_is_bit_equal():
    positions = torch.randn(1, 18, 8)
    assert torch.equal(
        resize_positions(positions, prefix=2, side=4, kernel="deit").positions, positions
    )


@pytest.mark.parametrize("side", [3, 7, 12])
def test_resize_with_timm_kernel_equals_timm(side):
    positions = torch.randn(1, 18, 8)
    actual = resize_positions(positions, prefix=2, side=side, kernel="timm").positions
    expected = resample_abs_pos_embed(positions, [side, side], num_prefix_tokens=2)
    assert torch.equal(actual, expected)
    other = resize_positions(positions, prefix=2, side=side, kernel="deit").positions
    assert not torch.allclose(actual, other, atol=1e-2)


def test_resize_with_deit_kernel_equals_cubic_convolution_by_hand():
    """Keys' kernel with a = -0.75 at the centers of the new pixels, edges repeated."""

    def weight(distance, a=-0.75):
        d = abs(distance)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    before, after = 4, 6
    matrix = torch.zeros(after, before)
    for new in range(after):
        center = (new + 0.5) * before / after - 0.5
        first = int(torch.tensor(center).floor())
        for index in range(first - 1, first + 3):
            matrix[new, min(max(index, 0), before - 1)] += weight(center - index)
    grid = torch.randn(before, before)
    expected = matrix @ grid @ matrix.T
    positions = grid.reshape(1, before**2, 1)
    result = resize_positions(positions, prefix=0, side=after, kernel="deit").positions
    torch.testing.assert_close(result.reshape(after, after), expected, atol=1e-5, rtol=0)


def test_resize_of_constant_is_constant_and_wrong_prefix_raises():
    positions = torch.ones(1, 18, 3)
    result = resize_positions(positions, prefix=2, side=5, kernel="deit")
    torch.testing.assert_close(result.positions, torch.ones(1, 27, 3))
    for prefix in (1, 3, 18):
        with raises(CheckpointError, "pos_embed", 18):
            resize_positions(positions, prefix=prefix, side=5, kernel="deit")


# fitting


def test_adapt_to_same_network_is_bit_equal():
    before, after = network(seed=0), network(seed=1)
    assert load_adapted(loaded_weights(before), after) == ()
    for name, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], value)


@pytest.mark.parametrize("kernel", ["deit", "timm"])
def test_adapt_to_other_resolution_changes_positions_only(kernel):
    before, after = network(seed=0), network(seed=1, image_size=24)
    notes = load_adapted(
        loaded_weights(before), after, InitConfig(weights="here", pos_embed_resize=kernel)
    )
    assert len(notes) == 1
    assert re.search(rf"4 x 4\D+6 x 6.*{kernel}", notes[0])
    reference = after.state_dict()
    for name, value in before.state_dict().items():
        if name != "pos_embed":
            assert torch.equal(reference[name], value)
    assert torch.equal(reference["pos_embed"][:, :2], before.pos_embed[:, :2])
    expected = resize_positions(before.pos_embed, prefix=2, side=6, kernel=kernel).positions
    assert torch.equal(reference["pos_embed"], expected)


def test_adapt_adds_and_removes_distillation_token():
    plain, student, again = network("vit_micro"), network(seed=1), network("vit_micro", seed=2)
    (note,) = load_adapted(loaded_weights(plain), student)
    assert "1 distillation token" in note
    assert torch.equal(student.dist_token, plain.cls_token)
    assert torch.equal(student.pos_embed[:, 0], plain.pos_embed[:, 0])
    assert torch.equal(student.pos_embed[:, 1], plain.pos_embed[:, 0])
    assert torch.equal(student.pos_embed[:, 2:], plain.pos_embed[:, 1:])
    assert torch.equal(student.head_dist.weight, plain.head.weight)
    # Two equal tokens at the same position: both heads have the same logits.
    tokens = student.forward_features(torch.rand(2, 3, 16, 16))
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1])
    (note,) = load_adapted(loaded_weights(student), again)
    assert "1 distillation token" in note
    for name, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(plain(images), again(images))


@pytest.mark.parametrize(("tokens", "into"), [(1, 3), (3, 1), (2, 3), (3, 2)])
def test_adapt_changes_number_of_distillation_tokens(tokens, into):
    before = network(num_distillation_tokens=tokens)
    after = network(num_distillation_tokens=into, seed=1)
    load_adapted(loaded_weights(before), after)
    remaining = min(tokens, into)
    assert torch.equal(after.dist_token[:, :remaining], before.dist_token[:, :remaining])
    assert torch.equal(after.pos_embed[:, : 1 + remaining], before.pos_embed[:, : 1 + remaining])
    assert torch.equal(after.pos_embed[:, 1 + into :], before.pos_embed[:, 1 + tokens :])
    for added in range(remaining, into):
        assert torch.equal(after.dist_token[:, added], before.cls_token[:, 0])

    def heads(built):
        return [built.state_dict()[f"{name}.weight"] for name in classifier_names(built)]

    for actual, expected in zip(heads(after)[: 1 + remaining], heads(before)):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("into", [0, 2])
@pytest.mark.parametrize(
    ("token", "names"),
    [(True, ("head_dist.weight", "head_dist.0.weight")), (False, ("head_dist.weight",))],
)
def test_adapt_with_more_distillation_heads_than_tokens_raises(token, names, into):
    weights = network("deit_micro" if token else "vit_micro").state_dict()
    weights |= {name: weights["head.weight"].clone() for name in names}
    fields = {"num_distillation_tokens": into} if into else {}
    after = network("deit_micro" if into else "vit_micro", seed=1, **fields)
    with raises(CheckpointError, *names):
        load_adapted(LoadedWeights(weights, "a file", None, NAMES, None, None), after)


@pytest.mark.parametrize("name", ["deit_micro", "vit_micro", "small_convnet", "rednet_micro"])
def test_adapt_selects_class_rows_by_name(name):
    size = {} if "_micro" in name and name != "rednet_micro" else {"depth": None}
    before = network(name, classes=5, **size)
    after = network(name, classes=3, seed=1, **size)
    (note,) = load_adapted(loaded_weights(before), after, names=("e", "a", "c"))
    assert re.findall(r"\d+", note) == ["3", "5"]
    images = torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(after(images), before(images)[:, [4, 0, 2]])


@pytest.mark.fault("B7")
def test_adapt_other_classes_raises_without_new_heads():
    before, after = network(classes=5), network(classes=3, seed=1)
    with raises(CheckpointError, "'x'", "--init.head"):
        load_adapted(loaded_weights(before), after, names=("a", "b", "x"))
    with raises(CheckpointError, "--init.head") as refused:
        load_adapted(loaded_weights(before, names=None), after, names=("a", "b", "c"))
    assert re.findall(r"\d+", str(refused.value)) == ["5", "3"]
    random = {
        name: after.state_dict()[f"{name}.weight"].clone() for name in classifier_names(after)
    }
    new = InitConfig(weights="here", head="new")
    (note,) = load_adapted(loaded_weights(before), after, new, names=("a", "b", "x"))
    assert re.findall(r"\d+", note) == ["3", "2", "5"]
    for name, value in random.items():
        assert torch.equal(after.state_dict()[f"{name}.weight"], value)
    assert torch.equal(after.blocks[0].mlp.fc1.weight, before.blocks[0].mlp.fc1.weight)


def test_adapt_same_number_of_unnamed_classes_keeps_heads_and_notes_it():
    (note,) = load_adapted(loaded_weights(network(), names=None), network(seed=1))
    assert re.findall(r"\d+", note) == ["5"]


@pytest.mark.fault("B6")
def test_load_weights_lists_differences_before_copying():
    after = network(seed=1, embed_dim=48, num_heads=3)
    before = {name: value.clone() for name, value in after.state_dict().items()}
    with raises(CheckpointError, "here", "cls_token", (1, 1, 96), (1, 1, 48), 11) as refused:
        load_adapted(loaded_weights(network()), after)
    assert len(str(refused.value).splitlines()) == 12  # ten differences and how many more
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.items())


@pytest.mark.fault("B6")
@pytest.mark.parametrize("other", ["small_convnet", "rednet_micro"])
def test_load_weights_of_other_architecture_raises(other):
    after = network(other, depth=None, seed=1)
    with raises(CheckpointError, "here", next(iter(after.state_dict()))):
        load_adapted(loaded_weights(network()), after)


def test_adapt_converts_half_precision_to_network_dtype():
    before, after = network().half(), network(seed=1)
    load_adapted(loaded_weights(before), after)
    assert after.cls_token.dtype == torch.float32
    assert torch.equal(after.cls_token, before.cls_token.float())
