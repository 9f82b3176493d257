"""Parameter groups, schedules and the weight average, compared with arithmetic by hand."""

import math
from itertools import pairwise
from typing import get_args, get_type_hints

import pytest
import timm.optim
import torch
from torch import nn

from deit.config.sections.optim import OptimConfig
from deit.config.sections.student import StudentConfig
from deit.core.errors import ConfigError
from deit.deploy.model_card import _OPTIMIZERS
from deit.models.parameters import layer_depths
from deit.models.registry import create_network
from deit.training.lr_schedule import lr_at, set_lr
from deit.training.memory import _fixed_bytes
from deit.training.optimizer import (
    EMA,
    build_optimizer,
    ema_decay,
    layer_lr_scales,
    parameter_groups,
)
from tests.helpers.errors import raises

OPTIM = OptimConfig(
    epochs=10, batch_size=256, lr=1e-3, lr_base_batch_size=512, warmup_epochs=2, warmup_lr=1e-6
)


def lrs(optim, steps_per_epoch):
    total = optim.epochs * steps_per_epoch
    return [lr_at(step, optim=optim, steps_per_epoch=steps_per_epoch) for step in range(total)]


def test_schedule_by_hand():
    curve = lrs(OPTIM, 5)  # 50 steps, 10 of warm-up, peak 1e-3 * 256 / 512
    assert curve[0] == 1e-6
    assert curve[5] == pytest.approx(1e-6 + (5e-4 - 1e-6) / 2)
    assert curve[10] == pytest.approx(5e-4)
    assert curve[-1] == pytest.approx(1e-5)
    # Step 23 is 13 of 39 steps down the cosine: (1 + cos 60 degrees) / 2 = 3/4
    assert curve[23] == pytest.approx(1e-5 + (5e-4 - 1e-5) * 0.75)
    assert all(a < b for a, b in pairwise(curve[:11]))
    assert all(a > b for a, b in pairwise(curve[10:]))


def test_milestone_schedule_by_hand():
    """BiT's schedule for small data sets: 500 steps, 100 of warm-up, decays at 200, 300 and 400."""
    optim = OptimConfig(
        epochs=50,
        batch_size=512,
        lr=0.003,
        warmup_epochs=10,
        warmup_lr=0,
        lr_milestones=(0.4, 0.6, 0.8),
    )
    curve = lrs(optim, 10)
    assert len(curve) == 500
    assert (curve[0], curve[50], curve[100]) == pytest.approx((0, 0.0015, 0.003))
    steps = {199: 0.003, 200: 3e-4, 299: 3e-4, 300: 3e-5, 399: 3e-5, 400: 3e-6, 499: 3e-6}
    for step, lr in steps.items():
        assert curve[step] == pytest.approx(lr), step


def test_schedule_without_warmup_starts_at_the_peak():
    optim = OptimConfig(epochs=2, batch_size=512, lr=1e-3, warmup_epochs=0)
    assert lrs(optim, 4)[0] == pytest.approx(1e-3)


def test_schedule_of_a_single_step_starts_at_the_peak():
    optim = OptimConfig(epochs=1, batch_size=512, lr=1e-3, warmup_epochs=0)
    assert lr_at(0, optim=optim, steps_per_epoch=1) == pytest.approx(1e-3)


def test_no_decay_on_biases_norms_tokens_and_positions_as_in_timm():
    network = create_network(StudentConfig(name="deit_micro"), 10)
    undecayed, decayed = sorted(parameter_groups(network, 0.05), key=lambda g: g["weight_decay"])
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    undecayed_names = {names[id(parameter)] for parameter in undecayed["params"]}
    assert {"cls_token", "dist_token", "pos_embed", "norm.weight", "head.bias"} <= undecayed_names
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    assert {"head.weight", "head_dist.weight", "patch_embed.proj.weight"} <= decayed_names
    assert len(undecayed_names) + len(decayed_names) == len(names)
    reference = timm.optim.param_groups_weight_decay(
        network, 0.05, no_weight_decay_list=network.no_weight_decay()
    )
    timm_names = {
        names[id(p)] for group in reference if not group["weight_decay"] for p in group["params"]
    }
    assert undecayed_names == timm_names | {"dist_token"}
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.05, 0.0)


def test_adamw_step_by_hand():
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(2.0)
    optim = OptimConfig(weight_decay=0.1, beta1=0.9, beta2=0.99)
    optimizer = build_optimizer(layer, optim)
    optimizer.param_groups[0]["lr"] = 0.01
    layer.weight.grad = torch.tensor([[3.0]])
    optimizer.step()
    # First step: both moments are corrected to g and g**2, so the change is lr * g / |g|.
    by_hand = 2.0 * (1 - 0.01 * 0.1) - 0.01 * 3.0 / (3.0 + 1e-8)
    assert layer.weight.item() == pytest.approx(by_hand, rel=1e-6)


def test_ema_decay_warms_up_to_its_horizon():
    for updates, decay in ((0, 0.1), (90, 0.91), (10**6, math.exp(-1 / 1000))):
        value = ema_decay(torch.tensor(float(updates)), horizon=1000)
        assert value.item() == pytest.approx(decay)


def test_ema_by_hand_averages_weights_and_copies_buffers():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    average = EMA(model, horizon=1e9)
    start = model[0].weight.item()
    model[0].weight.data.fill_(5.0)
    model[1].num_batches_tracked.fill_(7)
    yes, no = torch.tensor(True), torch.tensor(False)
    average.update(model, applied=yes)
    assert average.model[0].weight.item() == pytest.approx(0.1 * start + 0.9 * 5.0)
    average.update(model, applied=no)
    assert average.model[0].weight.item() == pytest.approx(0.1 * start + 0.9 * 5.0)
    assert average.updates == 1
    average.update(model, applied=yes)
    second = 2 / 11 * (0.1 * start + 0.9 * 5.0) + 9 / 11 * 5.0
    assert average.model[0].weight.item() == pytest.approx(second)
    assert average.model[1].num_batches_tracked == 7
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert model[0].weight.requires_grad


def test_independent_weight_decay_does_not_depend_on_lr():
    """As in big_vision, a weight shrinks by schedule * weight_decay, at any learning rate."""
    for lr in (1e-3, 1e-2):
        optim = OptimConfig(
            epochs=2,
            lr=lr,
            lr_base_batch_size=None,
            weight_decay=1e-3,
            independent_weight_decay=True,
        )
        layer = nn.Linear(4, 4, bias=False)
        before = layer.weight.detach().clone()
        optimizer = build_optimizer(layer, optim)
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * lr  # half of the schedule
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
        assert torch.allclose(layer.weight, before * (1 - 0.5 * 1e-3), rtol=1e-6)


@pytest.mark.parametrize("name", ["deit_micro", "vit_micro", "regnety_002_small_stem"])
def test_layer_decay_scales_as_in_timm(name):
    network = create_network(StudentConfig(name=name), 10)
    scales = layer_lr_scales(layer_depths(network), 0.75)
    no_decay = network.no_weight_decay() if hasattr(network, "no_weight_decay") else set()
    reference = timm.optim.param_groups_layer_decay(
        network, 0.05, no_weight_decay_list=no_decay, layer_decay=0.75
    )
    expected = {id(p): group["lr_scale"] for group in reference for p in group["params"]}
    for parameter_name, parameter in network.named_parameters():
        assert scales[parameter_name] == pytest.approx(expected[id(parameter)])
    groups = parameter_groups(network, 0.05, scales)
    assert {id(p): group["lr_scale"] for group in groups for p in group["params"]} == {
        key: pytest.approx(value) for key, value in expected.items()
    }


def test_layer_decay_multiplies_the_scheduled_learning_rate():
    network = create_network(StudentConfig(name="deit_micro", depth=2), 10)
    scales = layer_lr_scales(layer_depths(network), 0.5)
    assert scales["head.weight"] == scales["head_dist.bias"] == 1
    assert scales["blocks.1.attn.qkv.weight"] == scales["norm.weight"] == 0.5
    assert scales["blocks.0.attn.qkv.weight"] == 0.25
    assert scales["cls_token"] == scales["dist_token"] == scales["patch_embed.proj.bias"] == 0.125
    optimizer = build_optimizer(network, OptimConfig(), scales)
    set_lr(optimizer, 0.8)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.8 * scales[name])
    with raises(ConfigError, "optim.layer_decay", "SmallConvNet"):
        layer_depths(create_network(StudentConfig(name="small_convnet"), 10))


@pytest.mark.parametrize("name", get_args(get_type_hints(OptimConfig)["name"]))
def test_optimizer_has_its_name_and_the_estimated_state(name):
    layer = nn.Linear(300, 200, bias=False)
    optimizer = build_optimizer(layer, OptimConfig(name=name))
    assert type(optimizer).__name__ == _OPTIMIZERS[name]
    layer(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    tensors = [layer.weight.grad, *optimizer.state[layer.weight].values()]
    allocated = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert _fixed_bytes(layer, name) == pytest.approx(allocated, rel=1e-3)  # and a step counter


def test_sgd_with_momentum_by_hand():
    """v1 = g1 + w d, w1 = w - lr v1; v2 = m v1 + g2 + w1 d, as in PyTorch."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(2.0)
    optim = OptimConfig(name="sgd", momentum=0.5, weight_decay=0.1)
    optimizer = build_optimizer(layer, optim)
    weight, velocity = 2.0, 0.0
    for gradient in (3.0, -1.0, 2.0):
        set_lr(optimizer, 0.01)
        layer.weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        velocity = 0.5 * velocity + gradient + 0.1 * weight
        weight -= 0.01 * velocity
        assert layer.weight.item() == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("skipped", [0, 1])
def test_sgd_with_found_inf_skips_the_step(momentum, skipped):
    """Also the first step, before there is a momentum buffer."""
    gradients = [torch.randn(3, 3) for _ in range(3)]
    layers = [nn.Linear(3, 3, bias=False) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optim = OptimConfig(name="sgd", momentum=momentum)
    reference, optimizer = (build_optimizer(layer, optim) for layer in layers)
    for index, gradient in enumerate(gradients):
        if index != skipped:
            layers[0].weight.grad = gradient.clone()
            set_lr(reference, 0.1)
            reference.step()
        is_skipped = index == skipped
        layers[1].weight.grad = torch.full((3, 3), math.nan) if is_skipped else gradient.clone()
        optimizer.found_inf = torch.tensor(float(is_skipped))
        set_lr(optimizer, 0.1)
        optimizer.step()
    assert torch.equal(layers[0].weight, layers[1].weight)
