"""Directions through the weights of a network: the lines and planes its loss is looked at along."""

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


def random_direction(surface: LossSurface, *, seed: int, number: int = 0) -> Tensor:
    """A Gaussian direction [size] whose every filter is as long as the filter of the weights where
    the surface stands (Li et al. 2018, section 4).

    A filter is a slice along the first dimension, as the weights of one output; of tensors
    [1, tokens, width], the tokens and the position embedding, a row. Biases and the weights of
    norms, with one dimension, stay where they are. Each tensor is drawn by its name, so that what
    is drawn for a weight depends neither on the masks nor on the other tensors; masked weights are
    left out before lengths are taken.
    number: of the direction; directions of one seed are independent.
    """
    keys = Keys(seed, number, torch.tensor([0]))
    drawn = {
        name: normal(keys, f"direction/{name}", own.numel())[0].view(own.shape).to(own)
        for name, own in surface.weights.parameters.items()
    }
    return _normalised(surface, surface.weights.flatten(drawn))


def filter_scales(surface: LossSurface) -> Tensor:
    """How far one step along a random ray should go along each weight, [size], so that a radius of
    1 moves every filter by about its own length: the unit of `random_direction`, for the scales of
    `basin_volume`. 0 for what that leaves where it is."""
    scales = _normalised(surface, torch.ones_like(surface.point))
    # Of a unit vector, a filter's share has the length sqrt(weights in the filter / all that move).
    return scales * math.sqrt(scales.count_nonzero())


def _normalised(surface: LossSurface, vector: Tensor) -> Tensor:
    """A vector with its filters as long as those of the weights where the surface stands."""
    space = surface.weights
    weights, free = space.unflatten(surface.point), space.unflatten(vector)
    return space.flatten({name: _scaled(free[name], weights[name]) for name in weights})


def _scaled(drawn: Tensor, weight: Tensor) -> Tensor:
    """With the filters of one tensor as long as those of the other."""
    if weight.ndim < 2:
        return torch.zeros_like(drawn)
    kept = 1 if weight.ndim == 3 and weight.shape[0] == 1 else 0
    others = [dimension for dimension in range(weight.ndim) if dimension != kept]
    lengths = torch.linalg.vector_norm(drawn, dim=others, keepdim=True)
    wanted = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    # A filter that is masked as a whole has no length on either side.
    return drawn * torch.where(lengths > 0, wanted / lengths, 0.0)


@dataclass(frozen=True)
class LossLine:
    """What was measured between two points: at places in [0, 1], from the first to the second."""

    places: tuple[float, ...]
    values: dict[str, tuple[float, ...]]

    def barrier(self, name: str) -> float:
        """How far a value rises above the straight line between its ends, at most; 0 or more
        (Entezari et al. 2022)."""
        values = self.values[name]
        first, last = values[0], values[-1]
        # So written, it is 0 to the bit where all values are equal.
        return max(v - (first + a * (last - first)) for a, v in zip(self.places, values))

    def instability(self, name: str) -> float:
        """How far a value rises above the mean of its ends, at most; 0 or more (the error barrier
        of Frankle et al. 2020, who call networks connected where it is below 2 % of error)."""
        values = self.values[name]
        return max(values) - (values[0] + values[-1]) / 2


def line(
    surface: LossSurface,
    start: Tensor,
    end: Tensor,
    measure: Measure,
    *,
    points: int = 21,
    watch: ProgressFn = iter,
) -> LossLine:
    """Means over all images, at equal distances on the straight line between two points.

    Between networks of different masks, on the surface of the wider one: points between them are
    denser than the sparser end. points: how many, with both ends. Raises ConfigError,
    NumericsError where a value is not finite.
    """
    if points < 2:
        raise ConfigError(f"a line of {points} points: should be at least 2, its ends")
    places = tuple(number / (points - 1) for number in range(points))
    # lerp meets both ends, and any two equal weights, to the bit.
    measured = [
        _measured(surface, torch.lerp(start, end, places[number]), measure)
        for number in watch(range(points))
    ]
    return LossLine(places, {name: tuple(row[name] for row in measured) for name in measured[0]})


class WeightPlane(NamedTuple):
    """All points origin + x first + y second; vectors [size]. The axes need be neither of length 1
    nor orthogonal."""

    origin: Tensor
    first: Tensor
    second: Tensor

    def at(self, x: float, y: float) -> Tensor:
        """The point with these coordinates."""
        return self.origin + x * self.first + y * self.second

    def cosine(self) -> float:
        """Of the angle between the axes."""
        axes = torch.stack([self.first, self.second]).double()
        return torch.cosine_similarity(axes[0], axes[1], dim=0).item()

    def project(self, point: Tensor) -> tuple[float, float, float]:
        """x, y of the nearest point of the plane, and how far away that is in weight space."""
        axes = torch.stack([self.first, self.second]).double()
        away = point.double() - self.origin.double()
        coordinates = torch.linalg.solve(axes @ axes.T, axes @ away)
        distance = torch.linalg.vector_norm(away - coordinates @ axes)
        return (*coordinates.tolist(), distance.item())


def random_plane(surface: LossSurface, *, seed: int) -> WeightPlane:
    """The plane through where the surface stands, along two filter-normalised directions.

    Pictures of it compare networks only with the same images, span and colours; even so they
    predict generalisation badly.
    """
    first, second = (random_direction(surface, seed=seed, number=number) for number in (0, 1))
    return WeightPlane(surface.point, first, second)


def plane_through(origin: Tensor, second: Tensor, third: Tensor) -> WeightPlane:
    """The plane through three points, with orthonormal axes (Gram and Schmidt): the second point
    lies on the first axis. Coordinates are distances in weight space.

    Raises ConfigError if the three lie on one line.
    """
    axes: list[Tensor] = []
    for name, point in (("second", second), ("third", third)):
        way = point.double() - origin.double()
        length = torch.linalg.vector_norm(way)
        for axis in axes:
            way = way - (axis @ way) * axis
        left = torch.linalg.vector_norm(way)
        if not left > 1e-6 * length:
            raise ConfigError(f"{name}: on one line with the points before it; no plane has it")
        axes.append(way / left)
    return WeightPlane(origin, axes[0].to(origin), axes[1].to(origin))


@dataclass(frozen=True)
class LossGrid:
    """What was measured on a plane: values by name, rows of equal y with a number for each x."""

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
    watch: ProgressFn = iter,
) -> LossGrid:
    """Means over all images at each crossing of a grid on a plane.

    xs, ys: coordinates on the axes. Raises NumericsError where a value is not finite.
    """
    measured = [
        _measured(surface, plane.at(xs[number % len(xs)], ys[number // len(xs)]), measure)
        for number in watch(range(len(xs) * len(ys)))
    ]
    rows = [measured[start : start + len(xs)] for start in range(0, len(measured), len(xs))]
    values = {name: tuple(tuple(one[name] for one in row) for row in rows) for name in measured[0]}
    return LossGrid(tuple(xs), tuple(ys), values)


def _measured(surface: LossSurface, point: Tensor, measure: Measure) -> Mapping[str, float]:
    found = surface.evaluate(point, measure)
    for name, value in found.items():
        if not math.isfinite(value):
            raise NumericsError(f"{name} is {value} at a point of weight space: look at less of it")
    return found
