"""Basin volumes of known regions, crossings along single rays, and the reported quality."""

import json
import math
from dataclasses import asdict

import pytest
import torch

from deit.analysis.basin_volume import basin_volume, first_crossing
from deit.core.errors import ConfigError
from tests.helpers.errors import raises
from tests.helpers.loss_surfaces import assert_unchanged, snapshot, student, surface


def log_ball(size):
    return size / 2 * math.log(math.pi) - math.lgamma(size / 2 + 1)


def well(curvatures):
    """sum(curvature * w^2) / 2 as a function, and its minimum."""
    curvatures = torch.as_tensor(curvatures, dtype=torch.float64)
    return lambda point: (curvatures * point**2).sum().item() / 2, torch.zeros_like(curvatures)


def volume(value, point, **options):
    return basin_volume(value, point, **{"loss_rise": 0.1, "largest_radius": 100.0, **options})


@pytest.mark.parametrize("size", [1, 2, 3, 50, 5000])
@pytest.mark.parametrize(("curvature", "loss_rise"), [(1.0, 0.1), (30.0, 2.0)])
def test_basin_volume_of_isotropic_well_is_exact(size, curvature, loss_rise):
    radius = math.sqrt(2 * loss_rise / curvature)
    basin = volume(*well([curvature] * size), rays=4, loss_rise=loss_rise, tolerance=1e-6)
    assert basin.log_radii == pytest.approx([math.log(radius)] * 4, abs=1e-6)
    exact = log_ball(size) + size * math.log(radius)
    assert basin.log_volume == pytest.approx(exact, abs=1e-6 * size + 1e-9)
    assert basin.log_volume_per_weight == pytest.approx(exact / size, abs=1e-6)
    assert basin.effective_rays == pytest.approx(4, rel=1e-3)
    assert basin.log_radius_quantiles == pytest.approx([math.log(radius)] * 5, abs=1e-6)
    assert (basin.size, basin.value, basin.threshold) == (size, 0, loss_rise)
    assert basin.censored == 0


def test_basin_volume_of_balls_is_exact():
    """An interval of length 2 r, a disk of pi r^2, a ball of 4/3 pi r^3."""
    for size, exact in ((1, 2), (2, math.pi), (3, 4 / 3 * math.pi)):
        basin = volume(*well([1.0] * size), loss_rise=0.5, rays=3, tolerance=1e-8)
        assert math.exp(basin.log_volume) == pytest.approx(exact, rel=1e-6)


def test_basin_volume_of_ellipse_with_many_rays_is_close():
    """pi a b, within the error of the mean."""
    basin = volume(*well([2.0, 32.0]), loss_rise=1.0, rays=2000, tolerance=1e-4)
    assert math.exp(basin.log_volume) == pytest.approx(math.pi * 1 * 0.25, rel=0.06)
    assert basin.log_radius_quantiles[0] == pytest.approx(math.log(0.25), abs=0.01)
    assert basin.log_radius_quantiles[-1] == pytest.approx(0, abs=0.01)
    assert 0.3 * 2000 < basin.effective_rays < 0.9 * 2000


def test_basin_volume_around_off_center_point_averages_both_radii():
    """The rays of a shifted interval have two lengths."""
    basin = volume(
        lambda w: (w[0].item() - 0.3) ** 2,
        torch.zeros(1, dtype=torch.float64),
        loss_rise=1 - 0.09,
        rays=64,
        tolerance=1e-8,
    )
    assert basin.value == pytest.approx(0.09)
    assert basin.threshold == pytest.approx(1)
    radii = [math.exp(log_radius) for log_radius in basin.log_radii]
    assert all(min(abs(r - 1.3), abs(r - 0.7)) < 1e-6 for r in radii)
    share = sum(r > 1 for r in radii) / 64
    assert math.exp(basin.log_volume) == pytest.approx(2 * (1.3 * share + 0.7 * (1 - share)))


SIZE = 200
CONDITION = 1e4
ELLIPSOID = torch.logspace(0, math.log10(CONDITION), SIZE, dtype=torch.float64)
EXACT = log_ball(SIZE) + SIZE / 2 * math.log(2 * 0.1) - ELLIPSOID.log().sum().item() / 2


def test_basin_volume_of_long_ellipsoid_is_too_low_with_few_effective_rays():
    for rays in (16, 256):
        basin = volume(*well(ELLIPSOID), rays=rays)
        assert -1.2 < basin.log_volume_per_weight - EXACT / SIZE < -0.6
        assert 1 <= basin.effective_rays < 5


def test_basin_volume_with_scales_of_the_curvature_is_exact():
    value, point = well(ELLIPSOID)
    basin = volume(value, point, rays=8, scales=3 * ELLIPSOID**-0.5, tolerance=1e-7)
    assert basin.log_volume == pytest.approx(EXACT, abs=1e-4)
    assert basin.log_volume_per_weight == pytest.approx(EXACT / SIZE, abs=1e-6)
    assert basin.effective_rays == pytest.approx(8, rel=1e-4)
    assert basin.log_radii == pytest.approx([math.log(math.sqrt(0.2) / 3)] * 8, abs=1e-6)


def test_basin_volume_with_zero_scales_does_not_move_weights():
    """The result is the volume in the remaining dimensions."""
    moved = []
    curvatures = torch.tensor([1.0, 4.0, 9.0, 16.0], dtype=torch.float64)

    def value(point):
        moved.append(point)
        return (curvatures * point**2).sum().item() / 2

    scales = torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=torch.float64)
    basin = volume(value, torch.zeros(4, dtype=torch.float64), scales=scales, rays=500)
    assert basin.size == 2
    assert torch.stack(moved)[:, [1, 3]].count_nonzero() == 0
    expected = math.log(math.pi * math.sqrt(0.2) * math.sqrt(0.2 / 9))
    assert basin.log_volume == pytest.approx(expected, abs=0.1)


def test_basin_volume_rays_do_not_depend_on_their_number():
    few, many = (volume(*well(ELLIPSOID), rays=rays, seed=5) for rays in (3, 9))
    assert many.log_radii[:3] == few.log_radii
    assert many.evaluations[:3] == few.evaluations
    assert len(set(many.log_radii)) == 9
    assert volume(*well(ELLIPSOID), rays=3, seed=6).log_radii != few.log_radii


def test_basin_volume_directions_are_uniform_on_the_sphere():
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
    """A value that rises with a positive first weight and stays 0 for a negative one."""
    return max(point[0].item(), 0.0)


def test_basin_volume_with_censored_rays_counts_them_at_the_largest_radius():
    point, rays = torch.zeros(3, dtype=torch.float64), 40
    by_limit = {
        limit: volume(half_open, point, rays=rays, largest_radius=limit) for limit in (10.0, 50.0)
    }
    downhill = sum(radius == math.log(10.0) for radius in by_limit[10.0].log_radii)
    for limit, basin in by_limit.items():
        at_limit = [radius for radius in basin.log_radii if radius == math.log(limit)]
        assert basin.censored == len(at_limit)
        assert len(basin.log_radii) == rays  # none dropped
        assert max(basin.log_radii) == math.log(limit)
        assert basin.largest_radius == limit
    assert 10 < by_limit[50.0].censored <= downhill < 35
    assert by_limit[50.0].log_volume > by_limit[10.0].log_volume + 3
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
def test_first_crossing_is_within_tolerance(radius, tolerance):
    crossed_at, calls = crossing(lambda t: t < radius, tolerance=tolerance)
    assert crossed_at == pytest.approx(radius, rel=tolerance)
    assert len(calls) == len(set(calls)) < 11 + math.log2(1024 / radius) * (radius < 1) + 22


def test_first_crossing_of_several_is_found_if_a_test_point_sees_it():
    """A rise above the threshold is found if it contains a test point (2), else it is missed."""
    assert crossing(lambda t: t < 1.2 or 2.5 < t < 100)[0] == pytest.approx(1.2, rel=1e-3)
    assert crossing(lambda t: t < 2.1 or 3.9 < t < 100)[0] == pytest.approx(100, rel=1e-3)
    near = crossing(lambda t: t < 0.2 or 0.7 < t < 0.9)[0]  # below the first test point
    assert near == pytest.approx(0.2, rel=1e-3)


def test_first_crossing_beyond_largest_radius_is_none():
    crossed_at, calls = crossing(lambda t: t < 1025.0)
    assert crossed_at is None
    assert calls == [2.0**k for k in range(11)]
    assert crossing(lambda t: t < 1024.0)[0] == pytest.approx(1024, rel=1e-3)


def test_first_crossing_above_threshold_everywhere_is_refused():
    with raises(ConfigError, "loss_rise", "float64") as caught:
        crossing(lambda t: False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("outside", [math.nan, math.inf])
def test_basin_volume_with_nonfinite_values_treats_them_as_outside(outside):
    def value(point):
        return outside if point.norm() > 3 else 0.0

    basin = volume(value, torch.zeros(5, dtype=torch.float64), tolerance=1e-4, rays=3)
    assert basin.log_radii == pytest.approx([math.log(3)] * 3, abs=1e-4)
    json.dumps(asdict(basin), allow_nan=False)


def test_basin_volume_counts_evaluations():
    calls = []
    value, point = well([1.0, 5.0, 9.0])

    def counted(at):
        calls.append(at)
        return value(at)

    basin = volume(counted, point, rays=5)
    assert sum(basin.evaluations) + 1 == len(calls)
    assert len(basin.evaluations) == 5
    assert max(basin.evaluations) < 20
    assert json.loads(json.dumps(asdict(basin), allow_nan=False))["seed"] == 0


@pytest.mark.parametrize("loss_rise", [0.0, -0.1, math.nan, math.inf, 1e-30])
def test_basin_volume_with_threshold_not_above_value_is_refused(loss_rise):
    with raises(ConfigError, "loss_rise", loss_rise):
        volume(lambda point: 1.0, torch.zeros(2), loss_rise=loss_rise)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_basin_volume_with_nonfinite_value_is_refused(value):
    with raises(ConfigError, "loss_rise", value):
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
def test_basin_volume_with_invalid_argument_names_it(options):
    with pytest.raises(ConfigError) as raised:
        volume(*well([1.0, 1.0]), **options)
    assert [raised.value.problems[0].field] == list(options)


def test_basin_volume_reports_each_ray_to_progress():
    recorded = []

    def record(steps):
        for step in steps:
            recorded.append(step)
            yield step

    volume(*well([1.0, 1.0]), rays=3, progress=record)
    assert recorded == [0, 1, 2]


def test_basin_volume_of_network_is_reproducible_and_leaves_it_unchanged():
    network = student(dtype=torch.float32)
    before = snapshot(network)
    loss_surface = surface(network, (5, 7))
    basin = basin_volume(
        loss_surface.value,
        loss_surface.point,
        loss_rise=0.1,
        largest_radius=4 * loss_surface.point.norm().item(),
        rays=6,
    )
    assert basin.size == loss_surface.size
    assert basin.censored == 0
    assert 1 <= basin.effective_rays <= 6
    for logarithm in basin.log_radii:
        assert 0 < math.exp(logarithm) < basin.largest_radius
    again = basin_volume(
        surface(network).value,
        loss_surface.point,
        loss_rise=0.1,
        largest_radius=basin.largest_radius,
        rays=6,
    )
    assert again.log_radii == pytest.approx(basin.log_radii, abs=0.02)
    assert_unchanged(network, before)
