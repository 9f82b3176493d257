"""Fake quantization by hand: weights, layers and their gradients."""

import math
from unittest import mock

import numpy
import pytest
import torch
from torch import nn

from deit.models.surgery.fake_quant import (
    ActivationRanges,
    FakeQuantConv2d,
    FakeQuantLinear,
    activation_scale,
    enable_fake_quant,
    fake_quant_weight,
)
from tests.helpers.images import random_batch

pytest.importorskip("sklearn")


# The arithmetic


def test_fake_quant_weight_by_hand():
    weight = torch.tensor([[1.27, -0.014, 0.016], [-2.54, 0.03, 0.0], [0.0, 0.0, 0.0]])
    result, scale = fake_quant_weight(weight)
    torch.testing.assert_close(scale, torch.tensor([0.01, 0.02, 1.0]))
    expected = [[1.27, -0.01, 0.02], [-2.54, 0.04, 0.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(result, torch.tensor(expected))


def test_fake_quant_weight_zero_row_stays_zero():
    weight = torch.randn(6, 40)
    weight[torch.rand(6, 40) < 0.5] = 0
    result, _ = fake_quant_weight(weight)
    assert not result[weight == 0].any()
    for index in range(6):
        assert torch.equal(fake_quant_weight(weight[index : index + 1])[0][0], result[index])
    assert (result - weight).abs().max() <= weight.abs().max() / 254 + 1e-7


def test_fake_quant_weight_passes_gradient():
    weight = torch.randn(4, 9, requires_grad=True)
    upstream = torch.randn(4, 9)
    (fake_quant_weight(weight)[0] * upstream).sum().backward()
    assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize(
    ("low", "high"),
    [(-1.0, 1.0), (0.0, 6.0), (-3.7, 0.0), (-0.3, 11.0), (-1e-3, 2e-5), (-2.117904, 2.64), (0, 0)],
)
def test_activation_scale_matches_onnx_runtime(low, high):
    pytest.importorskip("onnxruntime")
    from onnxruntime.quantization.quant_utils import compute_scale_zp

    ends = numpy.float32(low), numpy.float32(high)
    zero, scale = compute_scale_zp(*ends, numpy.array(0, "uint8"), numpy.array(255, "uint8"))
    result = activation_scale(*map(torch.tensor, ends))
    assert (result[0].item(), result[1].item()) == (scale.item(), zero.item())


def layer_of(low: float, high: float, *, of: int = 4) -> FakeQuantLinear:
    holder = nn.Sequential(nn.Linear(of, 3))
    enable_fake_quant(holder)
    holder[0].range.copy_(torch.tensor([low, high]))
    return holder.eval()[0]


def test_fake_quant_linear_equals_integer_arithmetic():
    layer = layer_of(-1.0, 4.1, of=50)
    nn.init.normal_(layer.weight, std=10)  # so that a bias in whole steps is another one
    values = 2 * torch.randn(2, 7, 50)
    steps, zero = 5.1 / 255, 50
    given = ((values / steps).round() + zero).clamp(0, 255) - zero
    scales = layer.weight.abs().amax(dim=1) / 127
    weights = (layer.weight / scales[:, None]).round()
    sums = given.long() @ weights.long().T
    expected = sums * steps * scales + layer.bias
    torch.testing.assert_close(layer(values), expected, rtol=0, atol=2e-4)
    # Of single rows the bias is an integer too.
    bias = (layer.bias / (steps * scales)).round()
    rounded = (sums[:, 0] + bias) * steps * scales
    torch.testing.assert_close(layer(values[:, 0]), rounded, rtol=0, atol=2e-4)
    assert (rounded - expected[:, 0]).abs().amax(dim=0).max() > 1e-3


def test_input_gradients_are_zero_outside_range():
    layer = layer_of(-1.0, 2.0, of=5)
    nn.init.ones_(layer.weight)
    values = torch.tensor([[-1.5, -0.9, 0.0, 1.9, 2.5]], requires_grad=True)
    layer(values).sum().backward()
    assert values.grad.tolist() == [[0, 3, 3, 3, 0]]
    assert layer.bias.grad.tolist() == [1, 1, 1]
    inside = torch.tensor([[-1.0, -0.9, 0.0, 1.9, 2.0]])
    assert torch.allclose(layer.weight.grad, inside.expand(3, 5), atol=3 / 255)


def test_fake_quant_conv_equals_integer_arithmetic():
    holder = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2))
    enable_fake_quant(holder)
    given = random_batch(8)
    ranges = ActivationRanges(holder)
    holder.train()(given)
    ranges.update()
    layer = holder.eval()[0]
    assert type(layer) is FakeQuantConv2d
    low, high = given.min(), given.max()
    torch.testing.assert_close(layer.range, torch.stack([low, high]))
    steps, zero = activation_scale(low, high)
    quantized = (((given / steps).round() + zero).clamp(0, 255) - zero) * steps
    scales = layer.weight.abs().amax(dim=(1, 2, 3)) / 127
    weights = (layer.weight / scales.view(-1, 1, 1, 1)).round() * scales.view(-1, 1, 1, 1)
    bias = (layer.bias / (steps * scales)).round() * steps * scales
    expected = nn.functional.conv2d(quantized, weights, bias, stride=2)
    torch.testing.assert_close(holder(given), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_input_gives_nonfinite_output(bad):
    layer = layer_of(-1.0, 1.0)
    values = torch.zeros(3, 4)
    values[1, 2] = bad
    assert layer(values).isnan().all()
    with torch.no_grad():
        layer.weight[0, 0] = bad
    assert not layer(torch.ones(3, 4))[:, 0].isfinite().any()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_fake_quant_under_autocast_uses_float32(precision):
    layer = layer_of(-1.0, 1.0)
    values = torch.rand(2, 6, 4)
    with (
        mock.patch.object(layer, "product", wraps=layer.product) as product,
        torch.autocast("cpu", dtype=precision),
    ):
        result = layer(values.to(precision))
    assert result.dtype == precision
    torch.testing.assert_close(result.float(), layer(values), atol=0.02, rtol=0.02)
    quantized, *_ = product.call_args.args
    assert quantized.dtype == torch.float32
