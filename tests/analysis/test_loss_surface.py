"""Loss surfaces: derivatives against finite differences, masks, batches, unchanged networks."""

import copy

import pytest
import torch
from torch import nn

from deit.analysis.loss_surface import ParameterVector
from deit.core.errors import ConfigError
from tests.helpers.errors import raises
from tests.helpers.loss_surfaces import (
    NETWORKS,
    NUM_IMAGES,
    Tied,
    assert_unchanged,
    half_masks,
    images_and_labels,
    loss,
    snapshot,
    student,
    surface,
    vectors,
)


@pytest.mark.parametrize("kind", NETWORKS)
def test_gradient_matches_central_differences_of_the_value(kind):
    land = surface(NETWORKS[kind]())
    gradient, step = land.gradient(land.point), 1e-6
    for direction in vectors(3, land.point):
        difference = land.value(land.point + step * direction) - land.value(
            land.point - step * direction
        )
        assert difference / (2 * step) == pytest.approx((gradient @ direction).item(), rel=1e-5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_hvp_matches_central_differences_of_the_gradient(kind):
    """For each parameter separately, so that errors of a LayerNorm are not hidden by others."""
    land = surface(NETWORKS[kind](), (5, 7))
    direction, step = vectors(1, land.point)[0], 1e-6
    ahead, behind = (land.gradient(land.point + sign * step * direction) for sign in (1, -1))
    expected, product = (ahead - behind) / (2 * step), land.hvp(direction)
    assert expected.norm() > 1e-2
    for name, part in land.weights.slices.items():
        error = (product[part] - expected[part]).norm()
        assert error <= 1e-4 * expected[part].norm() + 1e-9, name


def test_attention_of_the_test_network_uses_the_fused_kernel():
    """So the test of hvp covers the kernel that has no second derivative."""
    network = student()
    assert all(block.attn.fused_attn for block in network.network.blocks)
    slopes = torch.autograd.grad(
        loss(network, images_and_labels()), network.parameters(), create_graph=True
    )
    with pytest.raises(RuntimeError, match="is not implemented"):
        torch.autograd.grad(sum(slope.sum() for slope in slopes), network.parameters())


@pytest.mark.parametrize("kind", NETWORKS)
def test_hvp_is_symmetric(kind):
    land = surface(NETWORKS[kind]())
    first, second = vectors(2, land.point)
    forward, backward = first @ land.hvp(second), second @ land.hvp(first)
    assert abs(forward) > 1e-5
    assert forward.item() == pytest.approx(backward.item(), rel=1e-8)


def test_hvp_is_linear_and_evaluated_at_the_point():
    land = surface(student())
    first, second = vectors(2, land.point)
    both = land.hvp(2 * first - second)
    separate = 2 * land.hvp(first) - land.hvp(second)
    torch.testing.assert_close(both, separate)
    land.value(land.point + 1)  # evaluate at another point in between
    torch.testing.assert_close(land.hvp(2 * first - second), both, rtol=0, atol=0)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("sizes", [(5, 7), (1,) * NUM_IMAGES, (11, 1)])
def test_surface_does_not_depend_on_batches(kind, sizes):
    network = NETWORKS[kind]()
    whole, batched = surface(network), surface(network, sizes)
    direction = vectors(1, whole.point)[0]
    assert batched.images == whole.images == NUM_IMAGES
    assert batched.value(batched.point) == pytest.approx(whole.value(whole.point), rel=1e-12)
    torch.testing.assert_close(batched.gradient(batched.point), whole.gradient(whole.point))
    torch.testing.assert_close(batched.hvp(direction), whole.hvp(direction))


def test_value_is_computed_in_evaluation_mode():
    network = student("convnet", torch.float32)
    land = surface(network)
    with torch.no_grad():
        expected = loss(network.eval(), images_and_labels(torch.float32)).item()
        training = loss(network.train(), images_and_labels(torch.float32)).item()
    assert land.value(land.point) == pytest.approx(expected, rel=1e-6)
    assert abs(training - expected) > 1e-3


def test_evaluate_returns_named_means():
    def measure(network, batch):
        logits = network(batch[0]).class_logits
        return {
            "loss": loss(network, batch),
            "error": (logits.argmax(1) != batch[1]).double().mean(),
        }

    network = student().eval()
    land = surface(network, (5, 7))
    images, labels = images_and_labels()
    with torch.no_grad():
        error = (network(images).class_logits.argmax(1) != labels).double().mean().item()
    means = land.evaluate(land.point, measure)
    assert means == pytest.approx({"loss": land.value(land.point), "error": error})


def use_surface(land):
    direction = vectors(1, land.point)[0]
    land.value(land.point + direction)
    land.gradient(land.point + direction)
    land.hvp(direction)


@pytest.mark.parametrize("kind", NETWORKS)
def test_surface_leaves_the_network_unchanged(kind):
    network = NETWORKS[kind]()
    parameters = list(network.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    next(iter(network.children())).eval()
    before = snapshot(network)
    land = surface(network)
    use_surface(land)
    assert_unchanged(network, before)

    class Broken(Exception):
        pass

    def breaks(network, batch):
        (network(batch[0]).class_logits.sum() * 2).backward()
        raise Broken

    land = surface(network, loss=breaks)
    for call in (land.gradient, land.hvp):
        with pytest.raises(Broken):
            call(land.point)
    assert_unchanged(network, before)


def test_surface_works_after_a_loss_raised():
    fails = [False]

    class Broken(Exception):
        pass

    def failing_loss(network, batch):
        if fails[0]:
            raise Broken
        return loss(network, batch)

    land = surface(student(), loss=failing_loss)
    expected = land.value(land.point), land.hvp(land.point)
    fails[0] = True
    for call in (land.value, land.gradient, land.hvp):
        with pytest.raises(Broken):
            call(land.point + 1)
    fails[0] = False
    assert land.value(land.point) == expected[0]
    assert torch.equal(land.hvp(land.point), expected[1])


def test_surface_ignores_later_changes_of_the_network():
    network = student()
    land = surface(network)
    before = land.value(land.point)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert land.value(land.point) == before


def test_parameter_vector_counts_shared_parameters_once():
    network = Tied()
    land = surface(network)
    assert list(land.weights.slices) == ["idle", "first.weight", "first.bias", "other.bias"]
    assert land.size == len(land.point) == 2 + 9 + 3 + 3
    expected = [network.idle, network.first.weight, network.first.bias, network.other.bias]
    assert torch.equal(land.point, torch.cat([value.detach().flatten() for value in expected]))
    assert land.gradient(land.point)[:2].count_nonzero() == 0  # the loss does not depend on it


@pytest.mark.parametrize("kind", ["distilled", "convnet"])
def test_masks_project_gradient_and_hvp(kind):
    """P g and P H P, with the derivatives of the surface without masks."""
    network = student(kind)
    masks = half_masks(network)
    whole, masked = surface(network), surface(network, masks=masks)
    removed = sum(int((~mask).sum()) for mask in masks.values())
    assert masked.size == whole.size - removed < whole.size
    direction = vectors(1, masked.point)[0]
    embedded = whole.weights.flatten(masked.weights.unflatten(direction))
    assert embedded.norm().item() == pytest.approx(direction.norm().item())
    point = whole.weights.flatten(masked.weights.unflatten(masked.point + direction))
    assert masked.value(masked.point + direction) == pytest.approx(whole.value(point), rel=1e-12)
    for projected_value, full_value in (
        (masked.gradient(masked.point + direction), whole.gradient(point)),
        (masked.hvp(direction), whole.hvp(embedded)),
    ):
        projected = masked.weights.flatten(whole.weights.unflatten(full_value))
        torch.testing.assert_close(projected_value, projected)


def test_parameter_vector_flatten_inverts_unflatten():
    network = student()
    masks = half_masks(network)
    weights = ParameterVector(network, masks)
    vector = vectors(1, torch.zeros(weights.size, dtype=torch.float64))[0]
    for name in masks:  # the weights of the network do not matter
        nn.init.ones_(network.get_parameter(name))
    tensors = weights.unflatten(vector)
    assert torch.equal(weights.flatten(tensors), vector)
    for name, mask in masks.items():
        assert tensors[name][~mask].count_nonzero() == 0
        assert torch.equal(tensors[name][mask], vector[weights.slices[name]])
    with raises(ConfigError, "[3]", f"[{weights.size}]"):
        weights.unflatten(vector[:3])


def test_vector_of_another_network_has_its_weights():
    network, other = student(), student()
    land = surface(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    expected = surface(other)
    assert torch.equal(land.weights.vector_of(other), expected.point)
    assert land.value(land.weights.vector_of(other)) == expected.value(expected.point)
    from_float32 = land.weights.vector_of(copy.deepcopy(other).float())
    assert from_float32.dtype == torch.float64
    torch.testing.assert_close(from_float32, expected.point, rtol=1e-6, atol=1e-6)


def with_buffers(kind="distilled", **changes):
    network = student(kind)
    with torch.no_grad():
        for name, value in changes.items():
            network.get_buffer(name.replace("__", ".")).fill_(value)
    return network


@pytest.mark.parametrize(
    ("kind", "other", "name"),
    [
        ("distilled", lambda: student("plain"), "network.dist_token"),
        ("two tokens", student, "network.head_dist.0.bias"),
        (
            "convnet",
            lambda: with_buffers("convnet", network__stem__1__running_var=2),
            "network.stem.1.running_var",
        ),
        ("distilled", lambda: with_buffers(mean=0.4), "mean"),
    ],
)
def test_vector_of_different_architecture_or_buffers_is_refused(kind, other, name):
    with pytest.raises(ConfigError) as raised:
        surface(student(kind)).weights.vector_of(other())
    assert raised.value.problems[0].field == name


def test_vector_of_network_with_other_batch_count_is_accepted():
    land = surface(student("convnet"))
    other = with_buffers("convnet", network__stem__1__num_batches_tracked=5)
    assert torch.equal(land.weights.vector_of(other), land.point)
