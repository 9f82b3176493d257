"""Directions, lines and planes in weight space: filter norms, barriers, projections."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from deit.analysis.directions import (
    LossLine,
    WeightPlane,
    _normalize_filters,
    grid,
    line,
    plane_through,
    random_direction,
    random_plane,
)
from deit.analysis.loss_surface import LossSurface
from deit.core.errors import ConfigError, NumericsError
from tests.helpers.errors import raises
from tests.helpers.loss_surfaces import (
    NETWORKS,
    assert_unchanged,
    half_masks,
    images_and_labels,
    snapshot,
    student,
    surface,
)


def filters(tensor, name):
    """The filters of a tensor as rows, by the name of the tensor."""
    leaf = name.rpartition(".")[2]
    tokens = leaf in ("cls_token", "dist_token", "pos_embed")
    return tensor[0] if tokens else tensor.flatten(1)


def measure(network, batch):
    logits = network(batch[0]).class_logits
    error = (logits.argmax(dim=1) != batch[1]).double().mean()
    return {"loss": cross_entropy(logits, batch[1]), "error": error}


@pytest.mark.parametrize("kind", NETWORKS)
def test_random_direction_filters_have_the_norms_of_the_weights(kind):
    land = surface(NETWORKS[kind]())
    direction = land.weights.unflatten(random_direction(land, seed=1))
    num_filters = set()
    for name, weight in land.weights.unflatten(land.point).items():
        tensor = direction[name]
        if weight.ndim < 2:
            assert tensor.count_nonzero() == 0, name
            continue
        direction_filters, weight_filters = filters(tensor, name), filters(weight, name)
        num_filters.add(len(direction_filters))
        torch.testing.assert_close(direction_filters.norm(dim=1), weight_filters.norm(dim=1))
        # The direction differs from the weights in each filter.
        if weight[0].numel() > 8:
            cosines = torch.cosine_similarity(direction_filters, weight_filters, dim=1)
            assert cosines.abs().mean() < 0.6
    assert len(num_filters) > (1 if kind != "tied" else 0)


def test_random_direction_of_tokens_has_a_filter_per_token():
    """The position embedding has one filter per token, not one in total."""
    network = student()
    with torch.no_grad():
        network.network.pos_embed[0, 0] *= 100
    land = surface(network)
    tensor = land.weights.unflatten(random_direction(land, seed=1))["network.pos_embed"]
    torch.testing.assert_close(tensor[0].norm(dim=1), network.network.pos_embed[0].norm(dim=1))


def test_random_direction_with_masks_has_the_norms_of_the_masked_filters():
    network = student()
    masks = half_masks(network)
    land = surface(network, masks=masks)
    direction = land.weights.unflatten(random_direction(land, seed=1))
    weights = land.weights.unflatten(land.point)
    for name, mask in masks.items():
        assert direction[name][~mask].count_nonzero() == 0
        assert torch.isfinite(direction[name]).all()
        direction_filters, weight_filters = (
            filters(direction[name], name),
            filters(weights[name], name),
        )
        torch.testing.assert_close(direction_filters.norm(dim=1), weight_filters.norm(dim=1))


def test_normalize_filters_of_zero_filter_keeps_it_zero():
    tensor, weight = torch.ones(2, 3), torch.full((2, 3), 5.0)
    tensor[0] = 0
    assert _normalize_filters(tensor, weight).tolist() == [[0, 0, 0], pytest.approx([5, 5, 5])]


def test_random_direction_of_a_weight_does_not_depend_on_masks():
    network = student()
    masks = half_masks(network)
    dense, masked = surface(network), surface(network, masks=masks)
    wide = dense.weights.unflatten(random_direction(dense, seed=1))
    narrow = masked.weights.unflatten(random_direction(masked, seed=1))
    for name, weight in wide.items():
        if name not in masks:
            assert torch.equal(weight, narrow[name])
        elif masks[name].any():
            unmasked = filters(weight * masks[name], name)
            cosines = torch.cosine_similarity(unmasked, filters(narrow[name], name), dim=1)
            assert cosines[unmasked.norm(dim=1) > 0].min().item() == pytest.approx(1)


def test_random_direction_of_tensors_with_equal_shape_differs():
    land = surface(student())
    tensors = land.weights.unflatten(random_direction(land, seed=1))
    first, second = (tensors[f"network.blocks.{k}.attn.qkv.weight"] for k in (0, 1))
    assert torch.cosine_similarity(first, second, dim=1).mean().abs() < 0.3


def test_random_direction_depends_on_seed_and_index():
    land = surface(student("convnet"))
    first, again = (random_direction(land, seed=1) for _ in range(2))
    assert torch.equal(first, again)
    for other in (random_direction(land, seed=2), random_direction(land, seed=1, index=1)):
        assert abs(torch.cosine_similarity(first, other, dim=0).item()) < 0.02


# Lines


class Bowl(nn.Module):
    """A network with one vector of weights."""

    def __init__(self, *weights):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights, dtype=torch.float64))


def bowl(*weights, loss=lambda network, batch: (network.weight**2).sum() / 2):
    return LossSurface(Bowl(*weights), [None], loss, sizes=[1])


def values(**functions):
    return lambda network, batch: {
        name: function(network.weight) for name, function in functions.items()
    }


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_line_over_hill_has_the_barrier_by_hand():
    """-|w|^2 from A to B rises above the chord by a (1 - a) |A - B|^2, at most a quarter of it."""
    loss_line = line(
        bowl(0.0, 0.0),
        vector(1, 2),
        vector(4, 6),
        values(hill=lambda w: -(w**2).sum(), bowl=lambda w: (w**2).sum(), flat=lambda w: 3 * w[0]),
        points=11,
    )
    assert loss_line.positions == pytest.approx([k / 10 for k in range(11)])
    assert loss_line.barrier("hill") == pytest.approx(25 / 4)
    assert loss_line.barrier("bowl") == 0
    assert loss_line.barrier("flat") == pytest.approx(0, abs=1e-12)
    hill = [-((1 + 3 * a) ** 2) - (2 + 4 * a) ** 2 for a in loss_line.positions]
    assert loss_line.values["hill"] == pytest.approx(hill)
    # Above the mean of the ends, -5 and -52: the larger end.
    assert loss_line.instability("hill") == pytest.approx(-5 + 28.5)
    json.dumps(asdict(loss_line), allow_nan=False)


def test_loss_line_barrier_and_instability_by_hand():
    loss_line = LossLine((0.0, 0.25, 0.5, 1.0), {"error": (0.1, 0.4, 0.35, 0.3)})
    assert loss_line.barrier("error") == pytest.approx(0.4 - 0.15)
    assert loss_line.instability("error") == pytest.approx(0.4 - 0.2)


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3])
def test_loss_line_of_equal_values_has_exactly_zero_barrier(value):
    flat = LossLine(tuple(k / 30 for k in range(31)), {"loss": (value,) * 31})
    assert flat.barrier("loss") == flat.instability("loss") == 0


def test_line_from_a_network_to_itself_has_exactly_zero_barrier():
    """In single precision."""
    land = surface(student(dtype=torch.float32), (5, 7))
    loss_line = line(land, land.point, land.point, measure, points=7)
    assert loss_line.barrier("loss") == loss_line.instability("loss") == 0
    assert set(loss_line.values["error"]) == {loss_line.values["error"][0]}


def test_line_ends_have_the_values_of_the_two_networks():
    network, other = student(dtype=torch.float32), student(dtype=torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            nn.init.normal_(parameter, std=0.4)
    before = snapshot(network), snapshot(other)
    land = surface(network)
    end = land.weights.vector_of(other)
    loss_line = line(land, land.point, end, measure, points=3)
    for index, end_network in ((0, network), (-1, other)):
        expected = measure(end_network.eval(), images_and_labels(torch.float32))
        assert loss_line.values["loss"][index] == pytest.approx(expected["loss"].item(), rel=1e-6)
        assert loss_line.values["error"][index] == expected["error"].item()
        end_network.train()
    middle = land.evaluate((land.point + end) / 2, measure)
    assert loss_line.values["loss"][1] == pytest.approx(middle["loss"], rel=1e-6)
    assert loss_line.barrier("loss") >= 0
    assert_unchanged(network, before[0])
    assert_unchanged(other, before[1])


def test_line_with_one_point_or_nonfinite_value_is_refused():
    with raises(ConfigError, "points"):
        line(bowl(0.0), vector(0), vector(1), values(x=lambda w: w[0]), points=1)
    with raises(NumericsError, "steep", math.inf):
        line(bowl(0.0), vector(0), vector(1), values(steep=lambda w: 1 / w[0]))


def test_line_and_grid_report_each_point_to_progress():
    lengths = []

    def record(steps):
        lengths.append(len(steps))
        return iter(steps)

    line(bowl(0.0), vector(0), vector(1), values(x=lambda w: w[0]), points=5, progress=record)
    plane = WeightPlane(vector(0), vector(1), vector(2))
    grid(bowl(0.0), plane, values(x=lambda w: w[0]), xs=[0, 1], ys=[0, 1, 2], progress=record)
    assert lengths == [5, 6]


# Planes


def test_grid_has_a_row_for_each_y():
    plane = WeightPlane(vector(0, 0, 5), vector(1, 0, 0), vector(0, 1, 0))
    loss_grid = grid(
        bowl(0.0, 0.0, 0.0),
        plane,
        values(sum=lambda w: w[0] + 10 * w[1] + 100 * w[2], first=lambda w: w[0]),
        xs=[0, 1, 2],
        ys=[-1, 0],
    )
    assert (loss_grid.xs, loss_grid.ys) == ((0, 1, 2), (-1, 0))
    assert loss_grid.values["sum"] == ((490, 491, 492), (500, 501, 502))
    assert loss_grid.values["first"] == ((0, 1, 2), (0, 1, 2))
    json.dumps(asdict(loss_grid), allow_nan=False)


def test_plane_through_three_points_contains_them():
    first, second, third = torch.randn(3, 50, dtype=torch.float64)
    plane = plane_through(first, second, third)
    assert (plane.first @ plane.second).item() == pytest.approx(0, abs=1e-14)
    assert [plane.first.norm().item(), plane.second.norm().item()] == pytest.approx([1, 1])
    assert plane.cosine() == pytest.approx(0, abs=1e-14)
    length = (second - first).norm().item()
    assert plane.project(first) == pytest.approx((0, 0, 0), abs=1e-12)
    assert plane.project(second) == pytest.approx((length, 0, 0), abs=1e-12)
    x, y, distance = plane.project(third)
    assert distance == pytest.approx(0, abs=1e-12)
    assert y > 0
    assert math.hypot(x, y) == pytest.approx((third - first).norm().item())
    torch.testing.assert_close(plane.at(x, y), third)


def test_plane_project_returns_nearest_point_and_distance():
    """The axes are neither of length 1 nor orthogonal."""
    plane = WeightPlane(vector(1, 1, 1, 1), vector(2, 0, 0, 0), vector(1, 3, 0, 0))
    point = plane.at(0.5, -2.0) + vector(0, 0, 3, 4)
    assert plane.project(point) == pytest.approx((0.5, -2.0, 5.0))
    assert plane.cosine() == pytest.approx(1 / math.sqrt(10))


def test_plane_through_close_points_far_from_origin_is_orthonormal():
    """In float32, at angles where a single Gram-Schmidt pass leaves skewed axes."""
    torch.manual_seed(2)
    center, along = torch.randn(2, 2000)
    second, third = center + along, center + 1.5 * along + 1e-3 * torch.randn(2000)
    plane = plane_through(center, second, third)
    assert abs((plane.first @ plane.second).item()) < 1e-4
    x, y, distance = plane.project(third)
    assert x == pytest.approx(1.5 * along.norm().item(), rel=1e-4)
    assert y == pytest.approx(1e-3 * math.sqrt(2000), rel=0.05)
    assert distance < 1e-3 * y + 1e-4


@pytest.mark.parametrize(
    ("second", "third", "name"),
    [
        ((1, 1), (2, 2), "third"),
        ((0, 0), (1, 0), "second"),
        ((1, 0), (0, 0), "third"),
        ((1, 0), (1, 0), "third"),
    ],
)
def test_plane_through_collinear_points_is_refused(second, third, name):
    with raises(ConfigError, name):
        plane_through(vector(0, 0), vector(*second), vector(*third))


def test_random_plane_of_network_is_spanned_by_two_random_directions():
    network = student()
    land = surface(network, masks=half_masks(network))
    before = snapshot(network)
    plane = random_plane(land, seed=3)
    assert torch.equal(plane.first, random_direction(land, seed=3))
    assert torch.equal(plane.second, random_direction(land, seed=3, index=1))
    assert abs(plane.cosine()) < 0.2
    loss_grid = grid(land, plane, measure, xs=[-0.5, 0, 0.5], ys=[0, 0.5])
    center = land.evaluate(land.point, measure)
    assert loss_grid.values["loss"][0][1] == pytest.approx(center["loss"], rel=1e-12)
    assert len(set(loss_grid.values["loss"][0] + loss_grid.values["loss"][1])) == 6
    assert_unchanged(network, before)
