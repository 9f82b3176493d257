"""Convpass adapters: forward pass, initialization, training, interaction with other features."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from deit.config.finetune_schedules import FINETUNE_SCHEDULES, with_init
from deit.config.recipes.handwriting import digits
from deit.config.sections.student import StudentConfig
from deit.config.validation import validate
from deit.core.errors import ConfigError
from deit.models.attention_rollout import rollout, token_cosines
from deit.models.onednn_linear import available, use_onednn
from deit.models.parameters import freeze_except, layer_depths, trainable_parameters
from deit.models.registry import create_network
from deit.models.student import Student
from deit.models.surgery.convpass import Convpass, ConvpassBlock, adapters_of
from tests.helpers.errors import raises
from tests.helpers.images import random_batch

pytest.importorskip("sklearn")
ADAPTER_NAMES = {"convpass": ("adapter1", "adapter2"), "convpass_attention": ("adapter1",)}
"""The adapters of a block by student.adapters."""
TINY = StudentConfig(
    name="deit_micro", image_size=12, patch_size=4, embed_dim=16, depth=2, num_heads=2
)
STUDENTS = {
    "distilled": TINY,
    "plain": replace(TINY, name="vit_micro"),
    "two distillation tokens": replace(TINY, num_distillation_tokens=2),
    "pruned": replace(TINY, heads_per_block=(1, 2), mlp_hidden_per_block=(5, 9)),
    "scaled": replace(TINY, weight_init="scaled"),
}


def network_of(student: StudentConfig, **fields) -> nn.Module:
    torch.manual_seed(3)
    return create_network(replace(student, **fields), 5)


def with_random_adapters(network: nn.Module) -> nn.Module:
    """Return a network whose adapters have random values, as if trained."""
    torch.manual_seed(4)
    for adapter in adapters_of(network).values():
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.5)
    return network


# The forward pass


def by_hand(adapter: Convpass, tokens: torch.Tensor, prefix: int, side: int) -> torch.Tensor:
    def gelu(x):
        return x / (1 + torch.exp(-1.702 * x))

    hidden = gelu(tokens @ adapter.down.weight.T + adapter.down.bias).transpose(1, 2)
    images = [hidden[:, :, index, None, None] for index in range(prefix)]
    images.append(hidden[:, :, prefix:].reshape(*hidden.shape[:2], side, side))
    kernel, bias = adapter.convolution.weight, adapter.convolution.bias
    mixed = [conv2d(image, kernel, bias, padding=1).flatten(2) for image in images]
    result = gelu(torch.cat(mixed, dim=2)).transpose(1, 2)
    return adapter.scale * (result @ adapter.up.weight.T + adapter.up.bias)


@pytest.mark.parametrize("prefix", [0, 1, 2, 4])
@pytest.mark.parametrize("side", [1, 2, 5])
def test_convpass_forward_by_hand(prefix, side):
    adapter = Convpass(7, 3, scale=0.3, prefix=prefix, drop_path=0.0).double().eval()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randn(2, prefix + side**2, 7, dtype=torch.float64)
    expected = by_hand(adapter, tokens, prefix, side)
    torch.testing.assert_close(adapter(tokens), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adapters", ADAPTER_NAMES)
def test_convpass_block_by_hand(adapters):
    """Adapters take the normalized tokens; their output is added to attention and MLP."""
    network = (
        with_random_adapters(network_of(TINY, adapters=adapters, adapter_scale=0.7)).double().eval()
    )
    block = network.blocks[1]
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    normed = block.norm1(x)
    after = x + block.attn(normed) + by_hand(block.adapter1, normed, 2, 3)
    normed = block.norm2(after)
    expected = after + block.mlp(normed)
    if adapters == "convpass":
        expected = expected + by_hand(block.adapter2, normed, 2, 3)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_prefix_tokens_are_not_mixed():
    adapter = Convpass(6, 4, scale=1.0, prefix=3, drop_path=0.0).eval()
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    tokens = torch.randn(1, 3 + 16, 6)
    before = adapter(tokens)
    for index in range(19):
        moved = tokens.clone()
        moved[:, index] += 1
        changed = (adapter(moved) != before).any(dim=2)[0].nonzero().flatten().tolist()
        row, column = divmod(index - 3, 4)
        near = [
            3 + 4 * r + c
            for r in range(max(row - 1, 0), min(row + 2, 4))
            for c in range(max(column - 1, 0), min(column + 2, 4))
        ]
        assert changed == ([index] if index < 3 else near)


def test_non_square_patches_raise():
    adapter = Convpass(4, 2, scale=1.0, prefix=1, drop_path=0.0)
    with raises(ConfigError, "student.adapters"):
        adapter(torch.randn(1, 9, 4))


# How they begin


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("adapters", ADAPTER_NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_untrained_adapters_keep_outputs_bit_equal(name, adapters, training):
    plain, adapted = (network_of(STUDENTS[name], adapters=item) for item in ("none", adapters))
    actual, expected = adapted.state_dict(), plain.state_dict()
    assert [item for item in actual if "adapter" not in item] == list(expected)
    assert all(torch.equal(actual[item], value) for item, value in expected.items())
    outputs = [item.train(training).forward_features(random_batch()) for item in (plain, adapted)]
    assert torch.equal(*outputs)
    with_random_adapters(adapted)
    assert not torch.equal(outputs[0], adapted.forward_features(random_batch()))


@pytest.mark.parametrize("adapters", ADAPTER_NAMES)
def test_adapters_position_and_initialization(adapters):
    network = network_of(TINY, adapters=adapters, adapter_dim=5, adapter_scale=4.0)
    rows = [f"blocks.{block}.{module}" for block in range(2) for module in ADAPTER_NAMES[adapters]]
    assert list(adapters_of(network)) == rows
    for adapter in adapters_of(network).values():
        assert adapter.scale == 4.0
        assert adapter.dropout.p == 0.1
        assert adapter.down.weight.abs().max() <= (6 / (16 + 5)) ** 0.5
        assert adapter.down.weight.std().item() == pytest.approx((2 / (16 + 5)) ** 0.5, rel=0.25)
        kernel = torch.zeros(5, 5, 3, 3)
        kernel[range(5), range(5), 1, 1] = 1
        assert torch.equal(adapter.convolution.weight, kernel)
        for zero in (adapter.up.weight, adapter.up.bias, adapter.down.bias):
            assert not zero.any()
        assert not adapter.convolution.bias.any()
    module, other = (adapters_of(network)[index].down.weight for index in rows[:2])
    assert not torch.equal(module, other)


@pytest.mark.parametrize("adapters", ADAPTER_NAMES)
@pytest.mark.parametrize(("depth", "width", "hidden"), [(12, 768, 8), (3, 48, 5)])
def test_adapters_parameter_count(adapters, depth, width, hidden):
    student = StudentConfig(name="vit_base", image_size=32, embed_dim=width, depth=depth)
    with torch.device("meta"):
        network = create_network(replace(student, adapters=adapters, adapter_dim=hidden), 10)
    result = sum(
        parameter.numel()
        for part in adapters_of(network).values()
        for parameter in part.parameters()
    )
    of_block = len(ADAPTER_NAMES[adapters])
    assert result == of_block * depth * ((2 * hidden + 1) * width + 9 * hidden**2 + 2 * hidden)
    if adapters == "convpass" and depth == 12:
        assert result == 327_552  # of ViT-B in the paper: 0.33 M


# Adapters together with other features of a ViT


def test_gradients_reach_adapters_and_heads_only():
    network = network_of(TINY, adapters="convpass")
    freeze_except(network, "adapters")
    student = Student(with_random_adapters(network), mean=(0.5,) * 3, std=(0.5,) * 3)
    student.frozen_backbone = True
    outputs = student.train()(random_batch())
    (outputs.class_logits.sum() + outputs.distillation_logits.square().sum()).backward()
    for name, parameter in network.named_parameters():
        moved = ".adapter" in name or name.startswith("head")
        assert (parameter.grad is not None and bool(parameter.grad.any())) == moved, name


def test_frozen_layers_are_in_evaluation_mode_adapters_in_training_mode():
    network = network_of(TINY, adapters="convpass", drop_path=0.3, dropout=0.2)
    student = Student(network, mean=(0.5,) * 3, std=(0.5,) * 3)
    student.frozen_backbone = True
    for trained in ("adapters", "heads"):
        freeze_except(network, trained)
        student.train()
        for name, module in network.named_modules():
            assert module.training == (trained == "adapters" and ".adapter" in name), name
        student.eval()
        assert not any(module.training for module in student.modules())
    assert trainable_parameters(network, "heads") == {
        f"{head}.{leaf}" for head in ("head", "head_dist") for leaf in ("weight", "bias")
    }


def test_trainable_all_keeps_parameters_frozen_by_the_network():
    network = network_of(TINY, adapters="convpass")
    network.pos_embed.requires_grad_(False)
    freeze_except(network, "all")
    frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    assert frozen == ["pos_embed"]


@pytest.mark.parametrize("trained", ["adapters", "attention"])
def test_network_without_trainable_part_raises(trained):
    convnet = create_network(StudentConfig(name="small_convnet", image_size=8), 5)
    with raises(ConfigError, "optim.trainable", f"'{trained}'"):
        freeze_except(convnet, trained)


def test_drop_path_drops_branches_independently():
    network = with_random_adapters(network_of(TINY, depth=5, adapters="convpass", drop_path=0.8))
    rates = [getattr(block.adapter1.drop_path, "drop_prob", 0) for block in network.blocks]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    block = network.train().blocks[4]
    block.adapter2.eval(), block.drop_path2.eval(), block.adapter1.dropout.eval()
    tokens = torch.randn(1, 11, 16).expand(64, -1, -1)
    seen = block(tokens)
    assert (
        len({item.sum().item() for item in seen}) == 4
    )  # of attention and adapter either is there


def test_dropout_precedes_up_projection():
    adapter = Convpass(6, 4, scale=1.0, prefix=0, drop_path=0.0).train()
    nn.init.ones_(adapter.up.weight)
    tokens = torch.ones(200, 1, 6)
    values = adapter(tokens)[:, 0]
    assert torch.equal(values[:, 0], values[:, 5])  # dropout precedes the last layer
    assert len(values[:, 0].unique()) > 1


def test_copied_and_compiled_network_outputs_are_equal():
    network = with_random_adapters(network_of(TINY, adapters="convpass")).eval()
    expected = network(random_batch())
    assert torch.equal(copy.deepcopy(network)(random_batch()), expected)
    whole = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(random_batch()), expected)


def test_activation_checkpointing_gradients_are_equal():
    network = with_random_adapters(network_of(TINY, adapters="convpass", drop_path=0.3)).train()
    freeze_except(network, "adapters")
    result = []
    for again in (False, True):
        network.set_grad_checkpointing(again)
        torch.manual_seed(9)
        network.zero_grad()
        network.forward_features(random_batch()).square().sum().backward()
        result.append({name: parameter.grad for name, parameter in network.named_parameters()})
    remaining = [name for name, parameter in result[0].items() if parameter is not None]
    assert len(remaining) == 4 * 6
    assert all(torch.equal(result[0][name], result[1][name]) for name in remaining)


@pytest.mark.skipif(not available(), reason="no oneDNN in this torch")
def test_onednn_outputs_match():
    network = with_random_adapters(network_of(TINY, adapters="convpass")).eval()
    other = copy.deepcopy(network)
    use_onednn(other)
    assert type(other.blocks[0].adapter1.down) is not nn.Linear
    torch.testing.assert_close(other(random_batch()), network(random_batch()), rtol=1e-4, atol=1e-5)


def test_attention_and_cosines_work_with_adapters():
    plain, adapted = (network_of(TINY, adapters=item).eval() for item in ("none", "convpass"))
    assert all(isinstance(block, ConvpassBlock) for block in adapted.blocks)
    assert torch.equal(rollout(plain, random_batch()).maps, rollout(adapted, random_batch()).maps)
    assert torch.equal(token_cosines(plain, random_batch()), token_cosines(adapted, random_batch()))
    depths = layer_depths(adapted)
    assert depths["blocks.1.adapter2.up.weight"] == depths["blocks.1.attn.qkv.weight"]


# The configuration

REFUSED = {
    "a ConvNet": (
        {"student": {"name": "small_convnet", "adapters": "convpass"}},
        ("student.adapters = 'convpass'", "deit_*", "'small_convnet'"),
    ),
    "width without adapters": (
        {"student": {"adapter_dim": 4}},
        ("student.adapter_dim = 4", "student.adapters is 'none'"),
    ),
    "scale without adapters": (
        {"student": {"adapter_scale": 1.0}},
        ("student.adapter_scale = 1.0", "student.adapters is 'none'"),
    ),
    "nothing to train": (
        {"optim": {"trainable": "adapters"}, "init": {"weights": "x"}},
        ("optim.trainable = 'adapters'", "student.adapters convpass"),
    ),
    "on random weights": (
        {"optim": {"trainable": "adapters"}, "student": {"adapters": "convpass"}},
        ("optim.trainable = 'adapters'", "init.weights"),
    ),
    "masks of a file": (
        {
            "optim": {"trainable": "adapters"},
            "student": {"adapters": "convpass"},
            "init": {"weights": "x", "pruning_masks": "m.safetensors"},
        },
        ("init.pruning_masks = 'm.safetensors'", "optim.trainable 'adapters'"),
    ),
    "no masks": (
        {
            "optim": {"trainable": "adapters"},
            "student": {"adapters": "convpass"},
            "init": {"weights": "x", "pruning_masks": "none"},
        },
        ("init.pruning_masks = 'none'", "optim.trainable 'adapters'", " keep"),
    ),
    "blocks that share": (
        {"student": {"adapters": "convpass", "shared_block_size": 2}},
        ("student.adapters = 'convpass'", "student.shared_block_size 2"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_combination_raises(name):
    sections, names = REFUSED[name]
    with raises(ConfigError, *names):
        validate(digits().replace(**sections))


@pytest.mark.parametrize(
    ("leaf", "value"), [("adapter_dim", 0), ("adapter_scale", 0), ("adapters", "lora")]
)
def test_invalid_value_raises(leaf, value):
    with raises(ConfigError, f"student.{leaf}"):
        validate(digits().replace(student={"adapters": "convpass", leaf: value}))


def test_adapter_schedule_matches_paper():
    optim = {"name": "sgd", "momentum": 0.5, "grad_accum_steps": 2, "clip_grad_norm": 1.0}
    before = digits().replace(init={"weights": "x"}, optim=optim)
    tuned = validate(FINETUNE_SCHEDULES["convpass"](before))
    optim, student = tuned.optim, tuned.student
    assert (student.adapters, student.adapter_dim, student.adapter_scale) == ("convpass", 8, 0.1)
    assert (optim.trainable, optim.name) == ("adapters", "adamw")
    assert (optim.lr, optim.lr_base_batch_size, optim.min_lr) == (1e-3, None, 1e-5)
    assert optim.weight_decay == 1e-4
    assert (optim.batch_size, optim.grad_accum_steps, optim.clip_grad_norm) == (32, 2, 1.0)
    assert optim.epochs == round(before.optim.epochs / 3)
    assert optim.warmup_epochs == pytest.approx(optim.epochs / 10)
    assert (tuned.loss, tuned.views, tuned.teacher) == (before.loss, before.views, before.teacher)
    item = before.replace(student={"adapters": "convpass_attention", "adapter_dim": 3})
    assert FINETUNE_SCHEDULES["convpass"](item).student == item.student


def test_init_keeps_adapters_of_weights():
    expected = replace(TINY, adapters="convpass_attention", adapter_dim=3, adapter_scale=10.0)
    config = digits().replace(student={"adapters": "convpass"})
    result = with_init(config, "x", expected).student
    fields = (result.adapters, result.adapter_dim, result.adapter_scale)
    assert fields == ("convpass_attention", 3, 10.0)
    assert with_init(config, "x", TINY).student.adapters == "convpass"
