"""The volume of a basin, from how far the loss stays low along random rays from a minimum."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deit.core.console import ProgressFn
from deit.core.errors import ConfigError
from deit.core.rng import Keys, normal


@dataclass(frozen=True)
class BasinVolume:
    """The size of the region around a point where a function stays below a threshold.

    Each ray from the point counts up to its first crossing of the threshold. Compare log volumes
    per weight, or radii: volumes of different dimensions have no common unit. Rescaling query
    against key weights changes all of these values, although it leaves the outputs of the network
    unchanged.

    size: number of dimensions, n. value: the function at the point. threshold: value that ends a
    ray. log_volume: natural logarithm, in units of the weights. log_volume_per_weight: divided by
    n. The volume is estimated from the mean of radius^n. A few rays dominate that mean, and the
    estimate is usually too low. effective_rays: number of rays that contribute; with one or two the
    estimate is only a lower bound. censored: rays that never crossed. They count with
    largest_radius, so with any of them the estimate is a lower bound too. log_radii: natural
    logarithm for each ray, in units of the scales if there are scales. log_radius_quantiles: at 0,
    1/4, 1/2, 3/4, 1. evaluations: calls of the function per ray; one more was made at the point.

    >>> ball = basin_volume(lambda point: float(point.square().sum()), torch.zeros(3),
    ...                     loss_rise=1.0, largest_radius=10.0, rays=8)
    >>> round(math.exp(ball.log_volume))  # 4 pi / 3
    4
    """

    size: int
    value: float
    threshold: float
    largest_radius: float
    log_volume: float
    log_volume_per_weight: float
    effective_rays: float
    censored: int
    log_radii: tuple[float, ...]
    log_radius_quantiles: tuple[float, ...]
    evaluations: tuple[int, ...]
    seed: int


def basin_volume(
    value: Callable[[Tensor], float],
    point: Tensor,
    *,
    loss_rise: float,
    largest_radius: float,
    rays: int = 64,
    seed: int = 0,
    scales: Tensor | None = None,
    tolerance: float = 0.01,
    progress: ProgressFn = iter,
) -> BasinVolume:
    """Estimate the volume of the region around a point where value < value(point) + loss_rise.

    V = omega_n mean(r^n) over directions uniform on the sphere, omega_n the volume of the unit ball
    (Huang et al. 2020, "Understanding generalization through visualizations"). On an ellipsoid with
    a condition number of 1e4 it is about 1 nat per weight too low for any affordable rays.

    value: a loss on fixed images, or a divergence from the outputs at the point. point: [size].
    rays: number of random directions; ray k does not depend on it. largest_radius: radius at which
    a ray is censored, in units of the scales. scales: length of a step along each weight, [size], 0
    for weights that do not move. Scales near 1 / sqrt(curvature) improve the estimate (Scherlis and
    Belrose 2025). tolerance: relative error of a radius. Raises ConfigError for an invalid argument
    or if the value at the point is not finite.
    """
    scales = torch.ones_like(point) if scales is None else scales
    size = int(scales.count_nonzero())
    _check(scales, point, rays=rays, largest_radius=largest_radius, tolerance=tolerance)
    value_at_point = value(point)
    threshold = value_at_point + loss_rise
    if not value_at_point < threshold < math.inf:
        limits = f"should be finite and above {value_at_point}"
        raise ConfigError(f"loss_rise {loss_rise}: the threshold {threshold} {limits}")
    log_radii, evaluations, censored = [], [], 0
    for ray in progress(range(rays)):
        step = scales * _unit_vector(seed, ray, scales)
        below = _CountCalls(lambda t, step=step: value(point + t * step) < threshold)
        radius = first_crossing(below, largest_radius, tolerance)
        censored += radius is None
        log_radii.append(math.log(largest_radius if radius is None else radius))
        evaluations.append(below.calls)
    logs = torch.tensor(log_radii, dtype=torch.float64)
    quantiles = torch.linspace(0, 1, 5, dtype=torch.float64)
    jacobian = scales[scales != 0].double().log().sum().item()
    log_volume, effective_rays = log_mean_volume(logs, size)
    log_volume += jacobian
    return BasinVolume(
        size=size,
        value=value_at_point,
        threshold=threshold,
        largest_radius=largest_radius,
        log_volume=log_volume,
        log_volume_per_weight=log_volume / size,
        effective_rays=effective_rays,
        censored=censored,
        log_radii=tuple(log_radii),
        log_radius_quantiles=tuple(logs.quantile(quantiles).tolist()),
        evaluations=tuple(evaluations),
        seed=seed,
    )


def log_mean_volume(log_radii: Tensor, size: int) -> tuple[float, float]:
    """Return log(omega_n mean(r^n)) and the effective number of rays.

    The latter is (sum w)^2 / sum w^2 with w = r^n (Kish 1965). Both are computed from logarithms,
    because r^n overflows a float. log_radii: float64 [rays].
    """
    weights = size * log_radii
    total = weights.logsumexp(dim=0).item()
    log_ball = size / 2 * math.log(math.pi) - math.lgamma(size / 2 + 1)
    effective = math.exp(2 * total - (2 * weights).logsumexp(dim=0).item())
    return log_ball + total - math.log(len(log_radii)), effective


_DOUBLINGS = 10
_SMALLEST = 1e-12


def first_crossing(
    below: Callable[[float], bool], largest: float, tolerance: float
) -> float | None:
    """Return the first t > 0 at which a function crosses its threshold, or None beyond `largest`.

    below: whether the function is below the threshold at t; True at 0. tolerance: relative. Tests
    largest / 1024 and its doublings, then bisects the interval before the first t that is not
    below. A rise and fall between two tested points is missed. Raises ConfigError if the function
    is above the threshold at every t that is distinguishable from 0.
    """
    low, high = 0.0, largest / 2**_DOUBLINGS
    while below(high):
        if high >= largest:
            return None
        low, high = high, 2 * high
    while high > (1 + tolerance) * low:
        middle = (low + high) / 2
        if below(middle):
            low = middle
        else:
            high = middle
        if high < _SMALLEST * largest:
            raise ConfigError(
                f"the loss is above its threshold at a distance of only {high:.1e}: use a larger "
                "loss_rise, or compute in float64"
            )
    return math.sqrt(low * high)


class _CountCalls:
    """Wraps a function and counts its calls."""

    def __init__(self, function: Callable[[float], bool]) -> None:
        self._function = function
        self.calls = 0

    def __call__(self, argument: float) -> bool:
        self.calls += 1
        return self._function(argument)


def _unit_vector(seed: int, ray: int, scales: Tensor) -> Tensor:
    """Sample a unit vector, uniform on the sphere of the weights whose scale is not 0."""
    vector = normal(Keys(seed, 0, torch.tensor([ray])), "volume/ray", len(scales))[0]
    vector[(scales == 0).cpu()] = 0.0
    return (vector / torch.linalg.vector_norm(vector)).to(scales)


def _check(
    scales: Tensor, point: Tensor, *, rays: int, largest_radius: float, tolerance: float
) -> None:
    if scales.shape != point.shape or not (scales >= 0).all() or not scales.any():
        raise ConfigError(f"scales: should be {len(point)} numbers, none below 0 and not all 0")
    for name, value, is_valid, advice in (
        ("rays", rays, rays >= 1, "at least 1"),
        ("largest_radius", largest_radius, 0 < largest_radius < math.inf, "positive and finite"),
        ("tolerance", tolerance, 1e-9 <= tolerance < 1, "in [1e-9, 1)"),
    ):
        if not is_valid:
            raise ConfigError(f"{name} {value}: should be {advice}")
