"""Directions, lines and planes: lengths of filters, barriers by hand, points on a plane."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from deit.analysis.basin_volume import basin_volume
from deit.analysis.directions import (
    LossLine,
    WeightPlane,
    _normalize_filters,
    filter_scales,
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
    assert_as_before,
    half_masks,
    images_and_labels,
    remembered,
    student,
    surface,
)


def filters(tensor, name):
    """The filters of a tensor as rows, said by hand."""
    leaf = name.rpartition(".")[2]
    tokens = leaf in ("cls_token", "dist_token", "pos_embed")
    return tensor[0] if tokens else tensor.flatten(1)


def measure(network, batch):
    logits = network(batch[0]).class_logits
    wrong = (logits.argmax(dim=1) != batch[1]).double().mean()
    return {"loss": cross_entropy(logits, batch[1]), "error": wrong}


@pytest.mark.parametrize("kind", NETWORKS)
def test_filters_of_a_direction_are_as_long_as_those_of_the_weights(kind):
    land = surface(NETWORKS[kind]())
    direction = land.weights.unflatten(random_direction(land, seed=1))
    seen = set()
    for name, weight in land.weights.unflatten(land.point).items():
        drawn = direction[name]
        if weight.ndim < 2:
            assert drawn.count_nonzero() == 0, name
            continue
        ours, theirs = filters(drawn, name), filters(weight, name)
        seen.add(len(ours))
        torch.testing.assert_close(ours.norm(dim=1), theirs.norm(dim=1))
        # Not the weights themselves: another direction in each filter.
        if weight[0].numel() > 8:
            cosines = torch.cosine_similarity(ours, theirs, dim=1)
            assert cosines.abs().mean() < 0.6
    assert len(seen) > (1 if kind != "tied" else 0)


def test_tokens_are_filters_of_their_own():
    """The position embedding has one filter a token, not one in all."""
    network = student()
    with torch.no_grad():
        network.network.pos_embed[0, 0] *= 100
    land = surface(network)
    drawn = land.weights.unflatten(random_direction(land, seed=1))["network.pos_embed"]
    torch.testing.assert_close(drawn[0].norm(dim=1), network.network.pos_embed[0].norm(dim=1))


def test_masked_weights_stay_and_lengths_are_those_of_what_is_left():
    network = student()
    masks = half_masks(network)
    land = surface(network, masks=masks)
    direction = land.weights.unflatten(random_direction(land, seed=1))
    weights = land.weights.unflatten(land.point)
    for name, mask in masks.items():
        assert direction[name][~mask].count_nonzero() == 0
        assert torch.isfinite(direction[name]).all()
        ours, theirs = filters(direction[name], name), filters(weights[name], name)
        torch.testing.assert_close(ours.norm(dim=1), theirs.norm(dim=1))


def test_a_filter_of_which_nothing_is_drawn_stays():
    drawn, weight = torch.ones(2, 3), torch.full((2, 3), 5.0)
    drawn[0] = 0
    assert _normalize_filters(drawn, weight).tolist() == [[0, 0, 0], pytest.approx([5, 5, 5])]


def test_what_is_drawn_for_a_weight_does_not_depend_on_masks():
    network = student()
    masks = half_masks(network)
    dense, masked = surface(network), surface(network, masks=masks)
    wide = dense.weights.unflatten(random_direction(dense, seed=1))
    narrow = masked.weights.unflatten(random_direction(masked, seed=1))
    for name, weight in wide.items():
        if name not in masks:
            assert torch.equal(weight, narrow[name])
        elif masks[name].any():
            kept = filters(weight * masks[name], name)
            cosines = torch.cosine_similarity(kept, filters(narrow[name], name), dim=1)
            assert cosines[kept.norm(dim=1) > 0].min().item() == pytest.approx(1)


def test_tensors_of_one_shape_are_drawn_apart():
    land = surface(student())
    drawn = land.weights.unflatten(random_direction(land, seed=1))
    first, second = (drawn[f"network.blocks.{k}.attn.qkv.weight"] for k in (0, 1))
    assert torch.cosine_similarity(first, second, dim=1).mean().abs() < 0.3


def test_seeds_and_numbers_give_other_directions():
    land = surface(student("convnet"))
    first, again = (random_direction(land, seed=1) for _ in range(2))
    assert torch.equal(first, again)
    for other in (random_direction(land, seed=2), random_direction(land, seed=1, index=1)):
        assert abs(torch.cosine_similarity(first, other, dim=0).item()) < 0.02


def test_a_ray_in_units_of_filters_moves_each_by_about_its_length():
    network = student("convnet")
    masks = half_masks(network)
    land = surface(network, masks=masks)
    scales = filter_scales(land)
    ray = torch.randn_like(scales) * (scales > 0)
    moved = land.weights.unflatten(scales * ray / ray.norm())
    for name, weight in land.weights.unflatten(land.point).items():
        if weight.ndim < 2:
            assert moved[name].count_nonzero() == 0
        elif masks.get(name, torch.tensor(True)).any():
            ours, theirs = moved[name].flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1)
            kept = theirs > 0
            assert (ours[kept] / theirs[kept]).mean().item() == pytest.approx(1, abs=0.2)
    found = basin_volume(
        land.value, land.point, loss_rise=0.1, largest_radius=4, rays=2, scales=scales
    )
    assert found.size == scales.count_nonzero() < land.size
    assert max(found.log_radii) < 0  # less than their own length


# Lines


class Bowl(nn.Module):
    """A vector of weights and nothing else."""

    def __init__(self, *weights):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights, dtype=torch.float64))


def bowl(*weights, loss=lambda network, batch: (network.weight**2).sum() / 2):
    return LossSurface(Bowl(*weights), [None], loss, sizes=[1])


def values(**functions):
    return lambda network, batch: {name: of(network.weight) for name, of in functions.items()}


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_the_barrier_between_two_points_of_a_hill():
    """-|w|^2 from A to B rises above the chord by a (1 - a) |A - B|^2: at most a quarter of it."""
    found = line(
        bowl(0.0, 0.0),
        vector(1, 2),
        vector(4, 6),
        values(hill=lambda w: -(w**2).sum(), bowl=lambda w: (w**2).sum(), flat=lambda w: 3 * w[0]),
        points=11,
    )
    assert found.positions == pytest.approx([k / 10 for k in range(11)])
    assert found.barrier("hill") == pytest.approx(25 / 4)
    assert found.barrier("bowl") == 0
    assert found.barrier("flat") == pytest.approx(0, abs=1e-12)
    hill = [-((1 + 3 * a) ** 2) - (2 + 4 * a) ** 2 for a in found.positions]
    assert found.values["hill"] == pytest.approx(hill)
    # Above the mean of the ends, -5 and -52: the larger end.
    assert found.instability("hill") == pytest.approx(-5 + 28.5)
    json.dumps(asdict(found), allow_nan=False)


def test_barrier_and_instability_by_hand():
    found = LossLine((0.0, 0.25, 0.5, 1.0), {"error": (0.1, 0.4, 0.35, 0.3)})
    assert found.barrier("error") == pytest.approx(0.4 - 0.15)
    assert found.instability("error") == pytest.approx(0.4 - 0.2)


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3])
def test_equal_values_have_a_barrier_of_zero_to_the_bit(value):
    flat = LossLine(tuple(k / 30 for k in range(31)), {"loss": (value,) * 31})
    assert flat.barrier("loss") == flat.instability("loss") == 0


def test_a_line_from_a_network_to_itself_has_no_barrier():
    """Exactly, in single precision too."""
    land = surface(student(dtype=torch.float32), (5, 7))
    found = line(land, land.point, land.point, measure, points=7)
    assert found.barrier("loss") == found.instability("loss") == 0
    assert set(found.values["error"]) == {found.values["error"][0]}


def test_the_ends_of_a_line_are_the_two_networks():
    network, other = student(dtype=torch.float32), student(dtype=torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            nn.init.normal_(parameter, std=0.4)
    before = remembered(network), remembered(other)
    land = surface(network)
    end = land.weights.vector_of(other)
    found = line(land, land.point, end, measure, points=3)
    for place, one in ((0, network), (-1, other)):
        expected = measure(one.eval(), images_and_labels(torch.float32))
        assert found.values["loss"][place] == pytest.approx(expected["loss"].item(), rel=1e-6)
        assert found.values["error"][place] == expected["error"].item()
        one.train()
    middle = land.evaluate((land.point + end) / 2, measure)
    assert found.values["loss"][1] == pytest.approx(middle["loss"], rel=1e-6)
    assert found.barrier("loss") >= 0
    assert_as_before(network, before[0])
    assert_as_before(other, before[1])


def test_impossible_lines_are_refused():
    with raises(ConfigError, "points"):
        line(bowl(0.0), vector(0), vector(1), values(x=lambda w: w[0]), points=1)
    with raises(NumericsError, "steep", math.inf):
        line(bowl(0.0), vector(0), vector(1), values(steep=lambda w: 1 / w[0]))


def test_progress_can_be_watched():
    seen = []

    def watch(steps):
        seen.append(len(steps))
        return iter(steps)

    line(bowl(0.0), vector(0), vector(1), values(x=lambda w: w[0]), points=5, progress=watch)
    plane = WeightPlane(vector(0), vector(1), vector(2))
    grid(bowl(0.0), plane, values(x=lambda w: w[0]), xs=[0, 1], ys=[0, 1, 2], progress=watch)
    assert seen == [5, 6]


# Planes


def test_a_grid_has_a_row_for_each_y():
    plane = WeightPlane(vector(0, 0, 5), vector(1, 0, 0), vector(0, 1, 0))
    found = grid(
        bowl(0.0, 0.0, 0.0),
        plane,
        values(sum=lambda w: w[0] + 10 * w[1] + 100 * w[2], first=lambda w: w[0]),
        xs=[0, 1, 2],
        ys=[-1, 0],
    )
    assert (found.xs, found.ys) == ((0, 1, 2), (-1, 0))
    assert found.values["sum"] == ((490, 491, 492), (500, 501, 502))
    assert found.values["first"] == ((0, 1, 2), (0, 1, 2))
    json.dumps(asdict(found), allow_nan=False)


def test_the_plane_through_three_points():
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


def test_points_beside_a_plane_are_projected_onto_it():
    """By axes that are neither of length 1 nor orthogonal as well."""
    plane = WeightPlane(vector(1, 1, 1, 1), vector(2, 0, 0, 0), vector(1, 3, 0, 0))
    point = plane.at(0.5, -2.0) + vector(0, 0, 3, 4)
    assert plane.project(point) == pytest.approx((0.5, -2.0, 5.0))
    assert plane.cosine() == pytest.approx(1 / math.sqrt(10))


def test_three_points_far_from_the_origin_and_near_each_other():
    """In float32, at angles that once Gram-Schmidt leaves skew."""
    torch.manual_seed(2)
    centre, along = torch.randn(2, 2000)
    second, third = centre + along, centre + 1.5 * along + 1e-3 * torch.randn(2000)
    plane = plane_through(centre, second, third)
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
def test_three_points_on_a_line_are_refused(second, third, name):
    with raises(ConfigError, name):
        plane_through(vector(0, 0), vector(*second), vector(*third))


def test_a_random_plane_of_a_network():
    network = student()
    land = surface(network, masks=half_masks(network))
    before = remembered(network)
    plane = random_plane(land, seed=3)
    assert torch.equal(plane.first, random_direction(land, seed=3))
    assert torch.equal(plane.second, random_direction(land, seed=3, index=1))
    assert abs(plane.cosine()) < 0.2
    found = grid(land, plane, measure, xs=[-0.5, 0, 0.5], ys=[0, 0.5])
    centre = land.evaluate(land.point, measure)
    assert found.values["loss"][0][1] == pytest.approx(centre["loss"], rel=1e-12)
    assert len(set(found.values["loss"][0] + found.values["loss"][1])) == 6
    assert_as_before(network, before)
