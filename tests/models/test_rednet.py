"""Involutions against a plain reference, their gradients, and the published sizes of RedNet."""

import pytest
import torch
from torch.nn.functional import unfold

from deit.models.rednet import DEPTHS, Involution, RedNet, involve


def reference(features, kernels, stride):
    """Equation 4 as the paper's appendix writes it: unfold, multiply, sum."""
    batch, groups, rows, height, width = kernels.shape
    side = round(rows**0.5)
    columns = unfold(features, side, padding=side // 2, stride=stride)
    columns = columns.view(batch, groups, features.shape[1] // groups, rows, height, width)
    return (columns * kernels[:, :, None]).sum(dim=3).flatten(1, 2)


def random_case(side, stride, height, width, dtype=torch.float32, channels=6, groups=2):
    features = torch.randn(2, channels, height, width, dtype=dtype)
    extent = (-(-height // stride), -(-width // stride))
    return features, torch.randn(2, groups, side**2, *extent, dtype=dtype)


@pytest.mark.parametrize("side", [1, 3, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 7), (5, 8), (1, 1)])
def test_involution_equals_unfolded_sum(side, stride, height, width):
    features, kernels = random_case(side, stride, height, width)
    result = involve(features, kernels, stride=stride)
    assert torch.allclose(result, reference(features, kernels, stride), atol=1e-5)


@pytest.mark.parametrize(("stride", "height"), [(1, 4), (2, 4), (2, 5)])
def test_involution_gradients_match_finite_differences(stride, height):
    case = random_case(3, stride, height, 5, torch.float64, channels=4)
    case = [tensor.requires_grad_() for tensor in case]
    assert torch.autograd.gradcheck(lambda *tensors: involve(*tensors, stride=stride), case)


@pytest.mark.parametrize("extent", [8, 7])
def test_involution_with_stride_covers_odd_sizes(extent):
    layer = Involution(32, 7, stride=2)
    assert layer(torch.randn(2, 32, extent, extent)).shape == (2, 32, 4, 4)


def test_involution_kernel_is_shared_within_groups_only():
    kernels = torch.zeros(1, 2, 9, 3, 3)
    kernels[:, 0, 4] = 1.0  # the first group copies the pixel, the second the one above
    kernels[:, 1, 1] = 1.0
    features = torch.randn(1, 4, 3, 3)
    result = involve(features, kernels)
    assert torch.equal(result[:, :2], features[:, :2])
    assert torch.equal(result[:, 2:, 1:], features[:, 2:, :-1])
    assert torch.equal(result[:, 2:, 0], torch.zeros(1, 2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_involution_of_half_precision_sums_in_float32(dtype):
    features, kernels = random_case(7, 1, 8, 8)
    result = involve(features.to(dtype), kernels.to(dtype))
    assert result.dtype == dtype
    exact = reference(features.to(dtype).float(), kernels.to(dtype).float(), 1)
    assert torch.equal(result, involve(features.to(dtype).float(), kernels.to(dtype)).to(dtype))
    assert torch.allclose(result.float(), exact, rtol=0.02, atol=0.02)


def test_rednet_trains_under_autocast():
    network = RedNet(5, depths=(1, 1), width=32, side=5, stem_stride=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(torch.rand(4, 3, 9, 9))
        loss = logits.float().square().mean()
    loss.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(("name", "millions"), [("26", 9.23), ("38", 12.39), ("50", 15.54)])
def test_rednet_has_published_parameter_count(name, millions):
    network = RedNet(1000, depths=DEPTHS[name])
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(
    ("stem_stride", "side"), [(1, 32), (1, 15), (2, 32), (2, 17), (4, 64), (4, 51)]
)
def test_rednet_accepts_any_image_size(stem_stride, side):
    network = RedNet(3, depths=(1, 1, 1, 1), width=32, stem_stride=stem_stride).eval()
    assert network(torch.rand(2, 3, side, side)).shape == (2, 3)
