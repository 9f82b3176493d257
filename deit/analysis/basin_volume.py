"""The volume of a basin: how far the loss stays low along random rays from a minimum."""

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
    """How large the region around a point is where a function stays below a threshold.

    The region is what can be seen from the point: on each ray up to the first crossing. Compare
    logarithms per weight, and radii; volumes of different dimensions have no common unit. Rescaling
    query against key weights, which changes no answer, changes all of them.

    size: number of dimensions, n. value: of the function at the point. threshold: where a ray ends.
    log_volume: natural logarithm, in the units of the weights; log_volume_per_weight: divided by n.
    An estimate from a mean of radius^n, which few rays dominate and which is too low as a rule:
    effective_rays says how many of them it rests on; one or two make it a lower bound only.
    censored: rays that never crossed; they count with the largest radius, and then the estimate is
    a lower bound whatever the number of rays. log_radii: natural logarithms, one for each ray, in
    units of the scales where there are some. log_radius_quantiles: at 0, 1/4, 1/2, 3/4, 1.
    evaluations: of the function, for each ray; one more was made at the point.
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
    rise: float,
    largest_radius: float,
    rays: int = 64,
    seed: int = 0,
    scales: Tensor | None = None,
    tolerance: float = 0.01,
    watch: ProgressFn = iter,
) -> BasinVolume:
    """Estimate the volume of the region around a point where value < value(point) + rise.

    V = omega_n mean(r^n) over directions uniform on the sphere, omega_n the volume of the unit ball
    (Huang et al. 2020, "Understanding generalization through visualizations"). On an ellipsoid of
    condition 1e4 the estimate is a nat per weight too low, however many rays one can afford.

    value: a loss on fixed images, or a divergence from the outputs at the point. point: [size].
    rays: random directions; ray k is the same for any number of them. largest_radius: where a ray
    is censored, in units of the scales. scales: length of a step along each weight, [size], 0 for
    weights that stay. Near 1 / sqrt(curvature) they make the estimate better (Scherlis and Belrose
    2025). tolerance: of a radius, relative. Raises ConfigError.
    """
    scales = torch.ones_like(point) if scales is None else scales
    size = int(scales.count_nonzero())
    _check(scales, point, rays=rays, largest_radius=largest_radius, tolerance=tolerance)
    here = value(point)
    threshold = here + rise
    if not here < threshold < math.inf:
        raise ConfigError(
            f"a rise of {rise} above {here}: the threshold should be finite and above the value"
        )
    log_radii, evaluations, censored = [], [], 0
    for ray in watch(range(rays)):
        direction = scales * _direction(seed, ray, scales)
        along = _Counted(lambda t, way=direction: value(point + t * way) < threshold)
        radius = first_crossing(along, largest_radius, tolerance)
        censored += radius is None
        log_radii.append(math.log(largest_radius if radius is None else radius))
        evaluations.append(along.calls)
    logs = torch.tensor(log_radii, dtype=torch.float64)
    jacobian = scales[scales != 0].double().log().sum().item()
    log_volume, effective = log_mean_volume(logs, size)
    return BasinVolume(
        size=size,
        value=here,
        threshold=threshold,
        largest_radius=largest_radius,
        log_volume=log_volume + jacobian,
        log_volume_per_weight=(log_volume + jacobian) / size,
        effective_rays=effective,
        censored=censored,
        log_radii=tuple(log_radii),
        log_radius_quantiles=tuple(
            logs.quantile(torch.linspace(0, 1, 5, dtype=torch.float64)).tolist()
        ),
        evaluations=tuple(evaluations),
        seed=seed,
    )


def log_mean_volume(log_radii: Tensor, size: int) -> tuple[float, float]:
    """log(omega_n mean(r^n)) and the effective number of rays, (sum w)^2 / sum w^2 of w = r^n (Kish
    1965), both from logarithms: r^n itself is no float. log_radii: float64 [rays]."""
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
    """The first t > 0 where a function that is below its threshold at 0 no longer is, to a relative
    tolerance; None if that is beyond `largest`.

    Looks at largest / 1024 and its doublings, then halves the stretch before the first point that
    is not below. What rises and falls again between two of these points is not seen. Raises
    ConfigError if the function is not below at any distance that can be told from 0.
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
                f"{high:.1e} from the point the function is above its threshold: it should be "
                "given a larger rise, or computed in float64"
            )
    return math.sqrt(low * high)


class _Counted:
    """A function that counts its calls."""

    def __init__(self, function: Callable[[float], bool]) -> None:
        self._function = function
        self.calls = 0

    def __call__(self, argument: float) -> bool:
        self.calls += 1
        return self._function(argument)


def _direction(seed: int, ray: int, scales: Tensor) -> Tensor:
    """A unit vector, uniform on the sphere of the weights that move."""
    drawn = normal(Keys(seed, 0, torch.tensor([ray])), "volume/ray", len(scales))[0]
    drawn[(scales == 0).cpu()] = 0.0
    return (drawn / torch.linalg.vector_norm(drawn)).to(scales)


def _check(
    scales: Tensor, point: Tensor, *, rays: int, largest_radius: float, tolerance: float
) -> None:
    if scales.shape != point.shape or not (scales >= 0).all() or not scales.any():
        raise ConfigError(f"scales: should be {len(point)} numbers, none below 0 and not all 0")
    for name, given, fits, advice in (
        ("rays", rays, rays >= 1, "at least 1"),
        ("largest_radius", largest_radius, 0 < largest_radius < math.inf, "positive and finite"),
        ("tolerance", tolerance, 1e-9 <= tolerance < 1, "in [1e-9, 1)"),
    ):
        if not fits:
            raise ConfigError(f"{name} {given}: should be {advice}")
