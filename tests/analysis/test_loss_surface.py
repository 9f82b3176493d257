"""Loss surfaces: derivatives against differences, masks, batches, and networks left alone."""

import copy

import pytest
import torch
from torch import nn

from deit.analysis.loss_surface import ParameterVector
from deit.core.errors import ConfigError
from tests.helpers.errors import raises
from tests.helpers.loss_surfaces import (
    NETWORKS,
    NUMBER,
    Tied,
    assert_as_before,
    half_masks,
    images_and_labels,
    loss,
    remembered,
    student,
    surface,
    vectors,
)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_gradient_is_that_of_differences_of_the_value(kind):
    land = surface(NETWORKS[kind]())
    gradient, step = land.gradient(land.point), 1e-6
    for direction in vectors(3, land.point):
        rise = land.value(land.point + step * direction) - land.value(land.point - step * direction)
        assert rise / (2 * step) == pytest.approx((gradient @ direction).item(), rel=1e-5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_second_derivatives_are_those_of_differences_of_the_gradient(kind):
    """Parameter by parameter, so that none, of a LayerNorm for instance, hides in the others."""
    land = surface(NETWORKS[kind](), (5, 7))
    direction, step = vectors(1, land.point)[0], 1e-6
    ahead, behind = (land.gradient(land.point + way * step * direction) for way in (1, -1))
    expected, found = (ahead - behind) / (2 * step), land.hvp(direction)
    assert expected.norm() > 1e-2
    for name, stretch in land.weights.slices.items():
        error = (found[stretch] - expected[stretch]).norm()
        assert error <= 1e-4 * expected[stretch].norm() + 1e-9, name


def test_attention_is_fused_where_second_derivatives_are_asked_for():
    """Else the test above would not meet the kernel that has none."""
    network = student()
    assert all(block.attn.fused_attn for block in network.network.blocks)
    slopes = torch.autograd.grad(
        loss(network, images_and_labels()), network.parameters(), create_graph=True
    )
    with pytest.raises(RuntimeError, match="is not implemented"):
        torch.autograd.grad(sum(slope.sum() for slope in slopes), network.parameters())


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_hessian_is_symmetric(kind):
    land = surface(NETWORKS[kind]())
    first, second = vectors(2, land.point)
    there, back = first @ land.hvp(second), second @ land.hvp(first)
    assert abs(there) > 1e-5
    assert there.item() == pytest.approx(back.item(), rel=1e-8)


def test_the_hessian_is_linear_and_that_of_the_point():
    land = surface(student())
    first, second = vectors(2, land.point)
    both = land.hvp(2 * first - second)
    apart = 2 * land.hvp(first) - land.hvp(second)
    torch.testing.assert_close(both, apart)
    land.value(land.point + 1)  # the surface was elsewhere in between
    torch.testing.assert_close(land.hvp(2 * first - second), both, rtol=0, atol=0)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("sizes", [(5, 7), (1,) * NUMBER, (11, 1)])
def test_how_images_are_cut_into_batches_does_not_matter(kind, sizes):
    network = NETWORKS[kind]()
    whole, cut = surface(network), surface(network, sizes)
    direction = vectors(1, whole.point)[0]
    assert cut.images == whole.images == NUMBER
    assert cut.value(cut.point) == pytest.approx(whole.value(whole.point), rel=1e-12)
    torch.testing.assert_close(cut.gradient(cut.point), whole.gradient(whole.point))
    torch.testing.assert_close(cut.hvp(direction), whole.hvp(direction))


def test_the_value_is_that_of_the_network_in_evaluation_mode():
    network = student("convnet", torch.float32)
    land = surface(network)
    with torch.no_grad():
        expected = loss(network.eval(), images_and_labels(torch.float32)).item()
        training = loss(network.train(), images_and_labels(torch.float32)).item()
    assert land.value(land.point) == pytest.approx(expected, rel=1e-6)
    assert abs(training - expected) > 1e-3


def test_means_have_names():
    def measure(network, batch):
        answers = network(batch[0]).class_logits
        return {
            "loss": loss(network, batch),
            "error": (answers.argmax(1) != batch[1]).double().mean(),
        }

    network = student().eval()
    land = surface(network, (5, 7))
    images, labels = images_and_labels()
    with torch.no_grad():
        wrong = (network(images).class_logits.argmax(1) != labels).double().mean().item()
    found = land.evaluate(land.point, measure)
    assert found == pytest.approx({"loss": land.value(land.point), "error": wrong})


def everything(land):
    direction = vectors(1, land.point)[0]
    land.value(land.point + direction)
    land.gradient(land.point + direction)
    land.hvp(direction)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_network_stays_as_it_was(kind):
    network = NETWORKS[kind]()
    parameters = list(network.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    next(iter(network.children())).eval()
    before = remembered(network)
    land = surface(network)
    everything(land)
    assert_as_before(network, before)

    class Broken(Exception):
        pass

    def breaks(network, batch):
        (network(batch[0]).class_logits.sum() * 2).backward()
        raise Broken

    land = surface(network, loss=breaks)
    for call in (land.gradient, land.hvp):
        with pytest.raises(Broken):
            call(land.point)
    assert_as_before(network, before)


def test_a_loss_that_fails_once_leaves_the_surface_usable():
    failing = [False]

    class Broken(Exception):
        pass

    def sometimes(network, batch):
        if failing[0]:
            raise Broken
        return loss(network, batch)

    land = surface(student(), loss=sometimes)
    expected = land.value(land.point), land.hvp(land.point)
    failing[0] = True
    for call in (land.value, land.gradient, land.hvp):
        with pytest.raises(Broken):
            call(land.point + 1)
    failing[0] = False
    assert land.value(land.point) == expected[0]
    assert torch.equal(land.hvp(land.point), expected[1])


def test_a_surface_is_of_the_network_at_that_moment():
    network = student()
    land = surface(network)
    before = land.value(land.point)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert land.value(land.point) == before


def test_coordinates_are_parameters_by_identity():
    network = Tied()
    land = surface(network)
    assert list(land.weights.slices) == ["idle", "first.weight", "first.bias", "other.bias"]
    assert land.size == len(land.point) == 2 + 9 + 3 + 3
    expected = [network.idle, network.first.weight, network.first.bias, network.other.bias]
    assert torch.equal(land.point, torch.cat([value.detach().flatten() for value in expected]))
    assert land.gradient(land.point)[:2].count_nonzero() == 0  # what nothing depends on


@pytest.mark.parametrize("kind", ["distilled", "convnet"])
def test_a_mask_projects_the_derivatives(kind):
    """P g and P H P of the surface without masks."""
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
    for found, full in (
        (masked.gradient(masked.point + direction), whole.gradient(point)),
        (masked.hvp(direction), whole.hvp(embedded)),
    ):
        projected = masked.weights.flatten(whole.weights.unflatten(full))
        torch.testing.assert_close(found, projected)


def test_vectors_and_tensors_are_the_same():
    network = student()
    masks = half_masks(network)
    weights = ParameterVector(network, masks)
    vector = vectors(1, torch.zeros(weights.size, dtype=torch.float64))[0]
    for name in masks:  # what is there, masked or not, is not looked at
        nn.init.ones_(network.get_parameter(name))
    tensors = weights.unflatten(vector)
    assert torch.equal(weights.flatten(tensors), vector)
    for name, mask in masks.items():
        assert tensors[name][~mask].count_nonzero() == 0
        assert torch.equal(tensors[name][mask], vector[weights.slices[name]])
    with raises(ConfigError, "[3]", f"[{weights.size}]"):
        weights.unflatten(vector[:3])


def test_the_point_of_another_network():
    network, other = student(), student()
    land = surface(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    expected = surface(other)
    assert torch.equal(land.weights.vector_of(other), expected.point)
    assert land.value(land.weights.vector_of(other)) == expected.value(expected.point)
    narrow = land.weights.vector_of(copy.deepcopy(other).float())
    assert narrow.dtype == torch.float64
    torch.testing.assert_close(narrow, expected.point, rtol=1e-6, atol=1e-6)


def changed(kind="distilled", **changes):
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
            lambda: changed("convnet", network__stem__1__running_var=2),
            "network.stem.1.running_var",
        ),
        ("distilled", lambda: changed(mean=0.4), "mean"),
    ],
)
def test_a_network_of_another_make_is_no_point(kind, other, name):
    with pytest.raises(ConfigError) as raised:
        surface(student(kind)).weights.vector_of(other())
    assert raised.value.problems[0].field == name


def test_a_counter_of_batches_does_not_matter():
    land = surface(student("convnet"))
    other = changed("convnet", network__stem__1__num_batches_tracked=5)
    assert torch.equal(land.weights.vector_of(other), land.point)
