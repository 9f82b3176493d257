"""Lines and planes in the weight space of a network, and the loss on them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deit.analysis.loss_surface import LossSurface, Measure
from deit.core.console import ProgressFn
from deit.core.errors import ConfigError, NumericsError
from deit.core.rng import Keys, normal


def random_direction(surface: LossSurface, *, seed: int, index: int = 0) -> Tensor:
    """Sample a filter-normalized Gaussian direction [size] (Li et al. 2018, section 4).

    Every filter of the direction has the norm of the same filter of the weights at
    `surface.point`. A filter is a slice along the first dimension, that is, the weights of one
    output. Of a tensor [1, tokens, width] (tokens, position embedding) it is a row. Tensors with
    one dimension (biases, weights of norms) do not move. Each tensor is sampled by its name, so
    that its values depend neither on the masks nor on other tensors. Masked weights are removed
    before norms are taken.
    index: of the direction; directions of one seed are independent.
    """
    keys = Keys(seed, index, torch.tensor([0]))
    samples = {
        name: normal(keys, f"direction/{name}", weight.numel())[0].view(weight.shape).to(weight)
        for name, weight in surface.weights.parameters.items()
    }
    return _filter_normalized(surface, surface.weights.flatten(samples))


def _filter_normalized(surface: LossSurface, vector: Tensor) -> Tensor:
    """Return a vector whose filters have the norms of those of the weights at the point."""
    space = surface.weights
    weights, tensors = space.unflatten(surface.point), space.unflatten(vector)
    return space.flatten(
        {name: _normalize_filters(tensors[name], weights[name]) for name in weights}
    )


def _normalize_filters(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return a tensor whose filters have the norms of those of `weight`."""
    if weight.ndim < 2:
        return torch.zeros_like(tensor)
    filter_dim = 1 if weight.ndim == 3 and weight.shape[0] == 1 else 0
    dims = [dim for dim in range(weight.ndim) if dim != filter_dim]
    norms = torch.linalg.vector_norm(tensor, dim=dims, keepdim=True)
    target_norms = torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
    # Both norms are 0 where a whole filter is masked.
    return tensor * torch.where(norms > 0, target_norms / norms, 0.0)


@dataclass(frozen=True)
class LossLine:
    """Values along the line between two points.

    positions: in [0, 1], from the first point to the second. values: by name, one per position.

    >>> LossLine((0.0, 0.5, 1.0), {"loss": (1.0, 4.0, 2.0)}).barrier("loss")  # 4 above 1.5
    2.5
    """

    positions: tuple[float, ...]
    values: dict[str, tuple[float, ...]]

    def barrier(self, name: str) -> float:
        """Return the largest rise of a value above the linear interpolation of its ends; >= 0.

        Source: Entezari et al. 2022.
        """
        values = self.values[name]
        first, last = values[0], values[-1]
        # This form of the interpolation gives exactly 0 if all values are equal.
        return max(v - (first + a * (last - first)) for a, v in zip(self.positions, values))

    def instability(self, name: str) -> float:
        """Return the largest rise of a value above the mean of its ends; >= 0.

        This is the error barrier of Frankle et al. 2020, who call two networks connected if it is
        below 2 % error.
        """
        values = self.values[name]
        return max(values) - (values[0] + values[-1]) / 2


def line(
    surface: LossSurface,
    start: Tensor,
    end: Tensor,
    measure: Measure,
    *,
    points: int = 21,
    progress: ProgressFn = iter,
) -> LossLine:
    """Compute means over all images at equal distances on the straight line from start to end.

    For networks with different masks, use the surface of the denser one; points between the ends
    are denser than the sparser end. start, end: [size]. points: number of points, with both ends.
    Raises ConfigError for fewer than two points, NumericsError if a value is not finite.
    """
    if points < 2:
        raise ConfigError(f"a line of {points} points: should have at least 2, its ends")
    positions = tuple(index / (points - 1) for index in range(points))
    # lerp is exact at both ends, and for weights that are equal at both ends.
    rows = [
        _evaluate(surface, torch.lerp(start, end, positions[index]), measure)
        for index in progress(range(points))
    ]
    return LossLine(positions, {name: tuple(row[name] for row in rows) for name in rows[0]})


class WeightPlane(NamedTuple):
    """The points origin + x first + y second; vectors [size].

    The axes may have any length and any angle between them.
    """

    origin: Tensor
    first: Tensor
    second: Tensor

    def at(self, x: float, y: float) -> Tensor:
        """Return the point [size] with these coordinates."""
        return self.origin + x * self.first + y * self.second

    def cosine(self) -> float:
        """Return the cosine of the angle between the axes."""
        axes = torch.stack([self.first, self.second]).double()
        return torch.cosine_similarity(axes[0], axes[1], dim=0).item()

    def project(self, point: Tensor) -> tuple[float, float, float]:
        """Return x and y of the nearest point of the plane, and its distance in weight space."""
        axes = torch.stack([self.first, self.second]).double()
        offset = point.double() - self.origin.double()
        coordinates = torch.linalg.solve(axes @ axes.T, axes @ offset)
        distance = torch.linalg.vector_norm(offset - coordinates @ axes)
        return (*coordinates.tolist(), distance.item())


def random_plane(surface: LossSurface, *, seed: int) -> WeightPlane:
    """Return the plane through `surface.point` along two filter-normalized random directions.

    Plots of such planes are comparable between networks only with equal images, extent and color
    scale. Even then they predict generalization poorly.
    """
    first, second = (random_direction(surface, seed=seed, index=index) for index in (0, 1))
    return WeightPlane(surface.point, first, second)


def plane_through(origin: Tensor, second: Tensor, third: Tensor) -> WeightPlane:
    """Return the plane through three points, with orthonormal axes (Gram-Schmidt).

    The second point is on the first axis. Coordinates are distances in weight space. origin,
    second, third: [size]. Raises ConfigError if the three points are on one line.
    """
    axes: list[Tensor] = []
    for name, point in (("second", second), ("third", third)):
        vector = point.double() - origin.double()
        length = torch.linalg.vector_norm(vector)
        for axis in axes:
            vector = vector - (axis @ vector) * axis
        orthogonal_length = torch.linalg.vector_norm(vector)
        if not orthogonal_length > 1e-6 * length:
            raise ConfigError(
                f"{name}: the point is on one line with those before it, so no plane is defined"
            )
        axes.append(vector / orthogonal_length)
    return WeightPlane(origin, axes[0].to(origin), axes[1].to(origin))


@dataclass(frozen=True)
class LossGrid:
    """Values on a grid of a plane. values: by name, [ys][xs]."""

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    values: dict[str, tuple[tuple[float, ...], ...]]


def grid(
    surface: LossSurface,
    plane: WeightPlane,
    measure: Measure,
    *,
    xs: Sequence[float],
    ys: Sequence[float],
    progress: ProgressFn = iter,
) -> LossGrid:
    """Compute means over all images at each point of a grid on a plane.

    xs, ys: coordinates on the axes. Raises NumericsError if a value is not finite.
    """
    cells = [
        _evaluate(surface, plane.at(xs[index % len(xs)], ys[index // len(xs)]), measure)
        for index in progress(range(len(xs) * len(ys)))
    ]
    rows = [cells[start : start + len(xs)] for start in range(0, len(cells), len(xs))]
    values = {name: tuple(tuple(cell[name] for cell in row) for row in rows) for name in cells[0]}
    return LossGrid(tuple(xs), tuple(ys), values)


def _evaluate(surface: LossSurface, point: Tensor, measure: Measure) -> Mapping[str, float]:
    """Evaluate a point. Raises NumericsError if a value is not finite."""
    values = surface.evaluate(point, measure)
    for name, value in values.items():
        if not math.isfinite(value):
            raise NumericsError(
                f"{name} is {value} at a point of weight space: use a smaller range of weights"
            )
    return values
