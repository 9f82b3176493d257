"""Volumes of regions that are known, rays one by one, and what is told beside the number."""

import json
import math
from dataclasses import asdict

import pytest
import torch

from deit.analysis.basin_volume import basin_volume, first_crossing
from deit.core.errors import ConfigError
from tests.helpers.errors import raises
from tests.helpers.loss_surfaces import assert_as_before, remembered, student, surface


def log_ball(size):
    return size / 2 * math.log(math.pi) - math.lgamma(size / 2 + 1)


def well(curvatures):
    """sum(curvature * w^2) / 2, and its minimum."""
    curvatures = torch.as_tensor(curvatures, dtype=torch.float64)
    return lambda point: (curvatures * point**2).sum().item() / 2, torch.zeros_like(curvatures)


def volume(value, point, **options):
    return basin_volume(value, point, **{"loss_rise": 0.1, "largest_radius": 100.0, **options})


@pytest.mark.parametrize("size", [1, 2, 3, 50, 5000])
@pytest.mark.parametrize(("curvature", "rise"), [(1.0, 0.1), (30.0, 2.0)])
def test_an_isotropic_well_is_exact(size, curvature, rise):
    radius = math.sqrt(2 * rise / curvature)
    found = volume(*well([curvature] * size), rays=4, loss_rise=rise, tolerance=1e-6)
    assert found.log_radii == pytest.approx([math.log(radius)] * 4, abs=1e-6)
    exact = log_ball(size) + size * math.log(radius)
    assert found.log_volume == pytest.approx(exact, abs=1e-6 * size + 1e-9)
    assert found.log_volume_per_weight == pytest.approx(exact / size, abs=1e-6)
    assert found.effective_rays == pytest.approx(4, rel=1e-3)
    assert found.log_radius_quantiles == pytest.approx([math.log(radius)] * 5, abs=1e-6)
    assert (found.size, found.value, found.threshold) == (size, 0, rise)
    assert found.censored == 0


def test_known_balls():
    """An interval of length 2 r, a circle of pi r^2, a ball of 4/3 pi r^3."""
    for size, exact in ((1, 2), (2, math.pi), (3, 4 / 3 * math.pi)):
        found = volume(*well([1.0] * size), loss_rise=0.5, rays=3, tolerance=1e-8)
        assert math.exp(found.log_volume) == pytest.approx(exact, rel=1e-6)


def test_an_ellipse_by_many_rays():
    """pi a b, within the error of the mean."""
    found = volume(*well([2.0, 32.0]), loss_rise=1.0, rays=2000, tolerance=1e-4)
    assert math.exp(found.log_volume) == pytest.approx(math.pi * 1 * 0.25, rel=0.06)
    assert found.log_radius_quantiles[0] == pytest.approx(math.log(0.25), abs=0.01)
    assert found.log_radius_quantiles[-1] == pytest.approx(0, abs=0.01)
    assert 0.3 * 2000 < found.effective_rays < 0.9 * 2000


def test_a_minimum_off_the_centre():
    """The rays of a shifted interval are of two lengths."""
    found = volume(
        lambda w: (w[0].item() - 0.3) ** 2,
        torch.zeros(1, dtype=torch.float64),
        loss_rise=1 - 0.09,
        rays=64,
        tolerance=1e-8,
    )
    assert found.value == pytest.approx(0.09)
    assert found.threshold == pytest.approx(1)
    radii = [math.exp(one) for one in found.log_radii]
    assert all(min(abs(r - 1.3), abs(r - 0.7)) < 1e-6 for r in radii)
    share = sum(r > 1 for r in radii) / 64
    assert math.exp(found.log_volume) == pytest.approx(2 * (1.3 * share + 0.7 * (1 - share)))


SIZE = 200
CONDITION = 1e4
ELLIPSOID = torch.logspace(0, math.log10(CONDITION), SIZE, dtype=torch.float64)
EXACT = log_ball(SIZE) + SIZE / 2 * math.log(2 * 0.1) - ELLIPSOID.log().sum().item() / 2


def test_a_long_ellipsoid_is_only_bounded_and_says_so():
    for rays in (16, 256):
        found = volume(*well(ELLIPSOID), rays=rays)
        assert -1.2 < found.log_volume_per_weight - EXACT / SIZE < -0.6
        assert 1 <= found.effective_rays < 5


def test_scales_that_know_the_curvature_make_it_exact():
    value, point = well(ELLIPSOID)
    found = volume(value, point, rays=8, scales=3 * ELLIPSOID**-0.5, tolerance=1e-7)
    assert found.log_volume == pytest.approx(EXACT, abs=1e-4)
    assert found.log_volume_per_weight == pytest.approx(EXACT / SIZE, abs=1e-6)
    assert found.effective_rays == pytest.approx(8, rel=1e-4)
    assert found.log_radii == pytest.approx([math.log(math.sqrt(0.2) / 3)] * 8, abs=1e-6)


def test_scales_of_zero_hold_weights_still():
    """The rest is a volume of fewer dimensions."""
    moved = []
    curvatures = torch.tensor([1.0, 4.0, 9.0, 16.0], dtype=torch.float64)

    def value(point):
        moved.append(point)
        return (curvatures * point**2).sum().item() / 2

    scales = torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=torch.float64)
    found = volume(value, torch.zeros(4, dtype=torch.float64), scales=scales, rays=500)
    assert found.size == 2
    assert torch.stack(moved)[:, [1, 3]].count_nonzero() == 0
    expected = math.log(math.pi * math.sqrt(0.2) * math.sqrt(0.2 / 9))
    assert found.log_volume == pytest.approx(expected, abs=0.1)


def test_a_ray_is_the_same_however_many_there_are():
    few, many = (volume(*well(ELLIPSOID), rays=rays, seed=5) for rays in (3, 9))
    assert many.log_radii[:3] == few.log_radii
    assert many.evaluations[:3] == few.evaluations
    assert len(set(many.log_radii)) == 9
    assert volume(*well(ELLIPSOID), rays=3, seed=6).log_radii != few.log_radii


def test_directions_are_uniform_on_the_sphere():
    points = []

    def value(point):
        points.append(point)
        return 0.0 if len(points) == 1 else 1.0 if point.norm() > 0.5 else 0.0

    size, rays = 20, 400
    volume(value, torch.zeros(size, dtype=torch.float64), rays=rays, loss_rise=0.5, tolerance=0.9)
    units = torch.stack(points[1:])
    units = (units / units.norm(dim=1, keepdim=True)).unique(dim=0)
    rounded = (units * 1e9).round().unique(dim=0) / 1e9
    assert len(rounded) >= rays
    assert rounded.mean(dim=0).abs().max() < 5 / math.sqrt(size * rays)
    square = (rounded.T @ rounded) / len(rounded)
    torch.testing.assert_close(
        square, torch.eye(size, dtype=torch.float64) / size, atol=5 / (size * 20), rtol=0
    )


def half_open(point):
    """Rises where the first weight does, and never on the other side."""
    return max(point[0].item(), 0.0)


def test_rays_that_never_cross_are_counted_and_bound_the_volume():
    point, rays = torch.zeros(3, dtype=torch.float64), 40
    found = {
        limit: volume(half_open, point, rays=rays, largest_radius=limit) for limit in (10.0, 50.0)
    }
    downhill = sum(radius == math.log(10.0) for radius in found[10.0].log_radii)
    for limit, one in found.items():
        at_limit = [radius for radius in one.log_radii if radius == math.log(limit)]
        assert one.censored == len(at_limit)
        assert len(one.log_radii) == rays  # none dropped
        assert max(one.log_radii) == math.log(limit)
        assert one.largest_radius == limit
    assert 10 < found[50.0].censored <= downhill < 35
    assert found[50.0].log_volume > found[10.0].log_volume + 3
    assert volume(*well([1.0] * 3), largest_radius=0.4).censored == 64
    assert volume(*well([1.0] * 3), largest_radius=0.5).censored == 0


def crossing(function, largest=1024.0, tolerance=1e-3):
    calls = []

    def below(t):
        calls.append(t)
        return function(t)

    return first_crossing(below, largest, tolerance), calls


@pytest.mark.parametrize("radius", [1e-7, 0.013, 1.0, 1.5, 700.0, 1023.9])
@pytest.mark.parametrize("tolerance", [0.5, 0.01, 1e-6])
def test_a_crossing_to_its_tolerance(radius, tolerance):
    found, calls = crossing(lambda t: t < radius, tolerance=tolerance)
    assert found == pytest.approx(radius, rel=tolerance)
    assert len(calls) == len(set(calls)) < 11 + math.log2(1024 / radius) * (radius < 1) + 22


def test_the_first_of_several_crossings():
    """A bump at 1.2 to 2.5 hides nothing; one between two looks (2.1 to 3.9) is seen through."""
    assert crossing(lambda t: t < 1.2 or 2.5 < t < 100)[0] == pytest.approx(1.2, rel=1e-3)
    assert crossing(lambda t: t < 2.1 or 3.9 < t < 100)[0] == pytest.approx(100, rel=1e-3)
    near = crossing(lambda t: t < 0.2 or 0.7 < t < 0.9)[0]  # below what is looked at first
    assert near == pytest.approx(0.2, rel=1e-3)


def test_what_lies_beyond_the_largest_radius_is_none():
    found, calls = crossing(lambda t: t < 1025.0)
    assert found is None
    assert calls == [2.0**k for k in range(11)]
    assert crossing(lambda t: t < 1024.0)[0] == pytest.approx(1024, rel=1e-3)


def test_what_is_above_at_once_is_refused():
    with raises(ConfigError, "rise", "float64") as caught:
        crossing(lambda t: False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("outside", [math.nan, math.inf])
def test_what_is_not_finite_lies_outside(outside):
    def value(point):
        return outside if point.norm() > 3 else 0.0

    found = volume(value, torch.zeros(5, dtype=torch.float64), tolerance=1e-4, rays=3)
    assert found.log_radii == pytest.approx([math.log(3)] * 3, abs=1e-4)
    json.dumps(asdict(found), allow_nan=False)


def test_evaluations_are_counted():
    calls = []
    value, point = well([1.0, 5.0, 9.0])

    def counted(where):
        calls.append(where)
        return value(where)

    found = volume(counted, point, rays=5)
    assert sum(found.evaluations) + 1 == len(calls)
    assert len(found.evaluations) == 5
    assert max(found.evaluations) < 20
    assert json.loads(json.dumps(asdict(found), allow_nan=False))["seed"] == 0


@pytest.mark.parametrize("rise", [0.0, -0.1, math.nan, math.inf, 1e-30])
def test_a_threshold_that_is_not_above_the_value_is_refused(rise):
    with raises(ConfigError, "rise", rise):
        volume(lambda point: 1.0, torch.zeros(2), loss_rise=rise)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_refused(value):
    with raises(ConfigError, "rise", value):
        volume(lambda point: value, torch.zeros(2))


@pytest.mark.parametrize(
    "options",
    [
        {"rays": 0},
        {"largest_radius": 0.0},
        {"largest_radius": math.inf},
        {"tolerance": 0.0},
        {"tolerance": 1.0},
        {"scales": torch.ones(3)},
        {"scales": torch.tensor([1.0, -1.0])},
        {"scales": torch.zeros(2)},
    ],
)
def test_impossible_volumes_are_refused(options):
    with pytest.raises(ConfigError) as raised:
        volume(*well([1.0, 1.0]), **options)
    assert [raised.value.problems[0].field] == list(options)


def test_progress_can_be_watched():
    seen = []

    def watch(steps):
        for step in steps:
            seen.append(step)
            yield step

    volume(*well([1.0, 1.0]), rays=3, progress=watch)
    assert seen == [0, 1, 2]


def test_a_network_and_its_volume():
    network = student(dtype=torch.float32)
    before = remembered(network)
    land = surface(network, (5, 7))
    found = basin_volume(
        land.value, land.point, loss_rise=0.1, largest_radius=4 * land.point.norm().item(), rays=6
    )
    assert found.size == land.size
    assert found.censored == 0
    assert 1 <= found.effective_rays <= 6
    for logarithm in found.log_radii:
        assert 0 < math.exp(logarithm) < found.largest_radius
    other = basin_volume(
        surface(network).value,
        land.point,
        loss_rise=0.1,
        largest_radius=found.largest_radius,
        rays=6,
    )
    assert other.log_radii == pytest.approx(found.log_radii, abs=0.02)
    assert_as_before(network, before)
