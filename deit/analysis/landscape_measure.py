"""Measurements of a loss landscape: around each point, between points, and along a path."""

from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deit.analysis.basin_volume import basin_volume
from deit.analysis.curvature import extreme_eigenvalues, spectral_density, trace
from deit.analysis.directions import grid, line, plane_through, random_plane
from deit.analysis.landscape_options import LandscapeOptions
from deit.analysis.landscape_runs import (
    LandscapeData,
    LandscapePoint,
    loss_and_errors,
    student_of,
    surface_of,
)
from deit.analysis.loss_surface import LossSurface
from deit.core.console import ProgressFn, progress
from deit.experiments.lottery_options import DENSE, TICKET
from deit.models.surgery.pruning_masks import apply

_PROBES, _STEPS = 4, 30  # of the spectral density
_MAX_RADIUS = 4.0  # of a ray, in norms of the weight vector


def _progress(title: str) -> ProgressFn:
    return lambda steps: progress(steps, total=len(steps), title=title)


def at_point(point: LandscapePoint, data: LandscapeData) -> dict[str, Any]:
    """Return number and norm of the free weights, norm of the gradient, loss and errors."""
    surface = surface_of(point, data)
    return {
        "free_weights": surface.size,
        "norm": surface.point.norm().item(),
        "gradient_norm": surface.gradient(surface.point).norm().item(),
        **surface.evaluate(surface.point, loss_and_errors),
    }


def curvature(
    point: LandscapePoint, data: LandscapeData, options: LandscapeOptions
) -> dict[str, Any]:
    """Return extreme eigenvalues, trace and spectrum of the Hessian of the free weights."""
    surface = surface_of(point, data)
    product, like, seed = surface.hvp, surface.point, options.seed
    eigenvalues = extreme_eigenvalues(
        product,
        like,
        largest=options.num_eigenvalues,
        smallest=1,
        steps=options.steps,
        seed=seed,
        progress=_progress(f"{point.name}: eigenvalues, at most"),
    )
    hessian_trace = trace(
        product,
        like,
        probes=options.probes,
        seed=seed,
        progress=_progress(f"{point.name}: trace"),
    )
    spectrum = spectral_density(
        product,
        like,
        probes=_PROBES,
        steps=_STEPS,
        seed=seed,
        progress=_progress(f"{point.name}: spectrum"),
    )
    return {
        "eigenvalues": asdict(eigenvalues),
        "trace": asdict(hessian_trace),
        "spectrum": asdict(spectrum),
    }


def volume(point: LandscapePoint, data: LandscapeData, options: LandscapeOptions) -> dict[str, Any]:
    """Return the volume of the basin around the point, in the space of the free weights."""
    surface = surface_of(point, data)
    basin = basin_volume(
        surface.value,
        surface.point,
        loss_rise=options.loss_rise,
        largest_radius=_MAX_RADIUS * surface.point.norm().item(),
        rays=options.rays,
        seed=options.seed,
        progress=_progress(f"{point.name}: rays"),
    )
    return asdict(basin)


def plane(point: LandscapePoint, data: LandscapeData, options: LandscapeOptions) -> dict[str, Any]:
    """Return loss and errors on the plane of two filter-normalized random directions."""
    surface = surface_of(point, data)
    weight_plane = random_plane(surface, seed=options.seed)
    extent = options.plane_extent
    axis = torch.linspace(-extent, extent, options.grid, dtype=torch.float64).tolist()
    values = grid(
        surface,
        weight_plane,
        loss_and_errors,
        xs=axis,
        ys=axis,
        progress=_progress(f"{point.name}: plane"),
    )
    return {**asdict(values), "cosine": weight_plane.cosine()}


Part = Callable[[LandscapePoint, LandscapeData, LandscapeOptions], dict[str, Any]]
AROUND: dict[str, Part] = {"planes": plane, "curvature": curvature, "volume": volume}
"""What is measured around each point, by the part of the options; `at_point` always is."""


def _line(
    surface: LossSurface, start: Tensor, end: Tensor, options: LandscapeOptions, title: str
) -> dict[str, Any]:
    loss_line = line(
        surface, start, end, loss_and_errors, points=options.points, progress=_progress(title)
    )
    return {
        "positions": loss_line.positions,
        "values": loss_line.values,
        "barrier": {name: loss_line.barrier(name) for name in loss_line.values},
        "instability": {name: loss_line.instability(name) for name in loss_line.values},
    }


def connecting_line(
    first: LandscapePoint, second: LandscapePoint, data: LandscapeData, options: LandscapeOptions
) -> dict[str, Any]:
    """Return loss and errors on the straight line between two points, in all weights."""
    surface = surface_of(first, data, masked=False)
    end = surface.weights.vector_of(student_of(second, data))
    return _line(surface, surface.point, end, options, f"{first.name} to {second.name}")


def pruning_line(
    first: LandscapePoint, second: LandscapePoint, data: LandscapeData, options: LandscapeOptions
) -> dict[str, Any]:
    """Return loss and errors from the first point to its weights under the masks of the second."""
    surface = surface_of(first, data, masked=False)
    student = student_of(first, data)
    apply(second.masks(), student.network)
    end = surface.weights.vector_of(student)
    return _line(surface, surface.point, end, options, f"{first.name} pruned to {second.name}")


class Segment(NamedTuple):
    """A line to measure.

    kind: `line` goes straight from the first point to the second; `pruning` goes from the first
    point to its weights under the masks of the second, that is, along the pruning step.
    """

    kind: str
    first: LandscapePoint
    second: LandscapePoint

    @property
    def name(self) -> str:
        """The name of the line in tables and plots."""
        link = "pruned to" if self.kind == "pruning" else "to"
        return f"{self.first.name} {link} {self.second.name}"

    def measure(self, data: LandscapeData, options: LandscapeOptions) -> dict[str, Any]:
        """Return loss, errors and barriers along the line."""
        return {"line": connecting_line, "pruning": pruning_line}[self.kind](
            self.first, self.second, data, options
        )


def segments(points: list[LandscapePoint]) -> list[Segment]:
    """Return the lines between points.

    They connect each run with the next one. In a lottery search they connect each level with the
    next one, also along the pruning step, and each ticket with its controls.
    """
    lines = []
    chain = ticket_path(points)
    for first, second in pairwise(chain):
        lines.append(Segment("line", first, second))
        if second.follows(first):
            lines.append(Segment("pruning", first, second))
    tickets = {point.level: point for point in chain}
    controls = [point for point in points if point not in chain and point.level in tickets]
    return lines + [Segment("line", tickets[point.level], point) for point in controls]


def ticket_path(points: list[LandscapePoint]) -> list[LandscapePoint]:
    """Return the points in sequence, without the controls of a lottery search."""
    return [point for point in points if point.kind in ("", DENSE, TICKET)]


def path_plane(
    points: list[LandscapePoint], data: LandscapeData, options: LandscapeOptions
) -> dict[str, Any]:
    """Return loss and errors on the plane through the first, middle and last point.

    The plane is in the space of all weights. `points` has the coordinates of each point on it, and
    the distance of the point from the plane.
    """
    surface = surface_of(points[0], data, masked=False)
    vectors = [surface.weights.vector_of(student_of(point, data)) for point in points]
    weight_plane = plane_through(vectors[0], vectors[-1], vectors[len(vectors) // 2])
    projections = [weight_plane.project(vector) for vector in vectors]
    axes = []
    for coordinates in zip(*[projection[:2] for projection in projections]):
        low, high = min(coordinates), max(coordinates)
        margin = 0.25 * max(high - low, 1e-6)
        axis = torch.linspace(low - margin, high + margin, options.grid, dtype=torch.float64)
        axes.append(axis.tolist())
    xs, ys = axes
    values = grid(
        surface,
        weight_plane,
        loss_and_errors,
        xs=xs,
        ys=ys,
        progress=_progress("plane of the path"),
    )
    by_name = {point.name: projection for point, projection in zip(points, projections)}
    return {**asdict(values), "points": by_name}
