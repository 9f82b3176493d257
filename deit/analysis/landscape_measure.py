"""What is measured of a landscape: around each place, between neighbours, along a whole path."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deit.analysis.basin_volume import basin_volume
from deit.analysis.curvature import extreme_eigenvalues, spectral_density, trace
from deit.analysis.directions import LossLine, grid, line, plane_through, random_plane
from deit.analysis.landscape_options import LandscapeOptions
from deit.analysis.landscape_runs import (
    LandscapeData,
    LandscapePoint,
    measure,
    student_of,
    surface_of,
)
from deit.analysis.loss_surface import LossSurface
from deit.core.console import progress
from deit.experiments.lottery_options import DENSE, TICKET
from deit.models.surgery.pruning_masks import apply

_PROBES, _STEPS = 4, 30  # of the spectral density
_FAR = 4.0  # how far a ray is followed, in lengths of the vector of weights


def _watch(title: str) -> Callable[[range], Iterable[int]]:
    return lambda numbers: progress(numbers, total=len(numbers), title=title)


def at_point(place: LandscapePoint, view: LandscapeData) -> dict[str, Any]:
    """The place itself: how many weights are free, how long their vector is, what is measured
    there, and the length of the gradient, which is 0 in a minimum."""
    surface = surface_of(place, view)
    return {
        "free_weights": surface.size,
        "norm": surface.point.norm().item(),
        "gradient_norm": surface.gradient(surface.point).norm().item(),
        **surface.evaluate(surface.point, measure),
    }


def curvature(
    place: LandscapePoint, view: LandscapeData, asked: LandscapeOptions
) -> dict[str, Any]:
    """Extreme eigenvalues, trace and spectrum of the Hessian among the free weights."""
    surface = surface_of(place, view)
    product, like, seed = surface.hvp, surface.point, asked.seed
    ends = extreme_eigenvalues(
        product,
        like,
        largest=asked.num_eigenvalues,
        smallest=1,
        steps=asked.steps,
        seed=seed,
        watch=_watch(f"{place.name}: eigenvalues, at most"),
    )
    whole = trace(
        product, like, probes=asked.probes, seed=seed, watch=_watch(f"{place.name}: trace")
    )
    spectrum = spectral_density(
        product,
        like,
        probes=_PROBES,
        steps=_STEPS,
        seed=seed,
        watch=_watch(f"{place.name}: spectrum"),
    )
    return {"eigenvalues": asdict(ends), "trace": asdict(whole), "spectrum": asdict(spectrum)}


def volume(place: LandscapePoint, view: LandscapeData, asked: LandscapeOptions) -> dict[str, Any]:
    """The volume of the basin around the place, in the free weights."""
    surface = surface_of(place, view)
    found = basin_volume(
        surface.value,
        surface.point,
        rise=asked.loss_rise,
        largest_radius=_FAR * surface.point.norm().item(),
        rays=asked.rays,
        seed=asked.seed,
        watch=_watch(f"{place.name}: rays"),
    )
    return asdict(found)


def plane(place: LandscapePoint, view: LandscapeData, asked: LandscapeOptions) -> dict[str, Any]:
    """Loss and errors on the plane of two random directions, filters as long as the weights'."""
    surface = surface_of(place, view)
    shown = random_plane(surface, seed=asked.seed)
    axis = torch.linspace(
        -asked.plane_extent, asked.plane_extent, asked.grid, dtype=torch.float64
    ).tolist()
    watch = _watch(f"{place.name}: plane")
    found = asdict(grid(surface, shown, measure, xs=axis, ys=axis, watch=watch))
    return {**found, "cosine": shown.cosine()}


Part = Callable[[LandscapePoint, LandscapeData, LandscapeOptions], dict[str, Any]]
AROUND: dict[str, Part] = {"planes": plane, "curvature": curvature, "volume": volume}
"""What is measured around each place, by the part that asks for it; `here` always is."""


def _line(
    surface: LossSurface, start: Tensor, end: Tensor, asked: LandscapeOptions, title: str
) -> dict[str, Any]:
    found = line(surface, start, end, measure, points=asked.points, watch=_watch(title))
    return {**asdict(found), **_barriers(found)}


def _barriers(found: LossLine) -> dict[str, dict[str, float]]:
    return {
        "barrier": {name: found.barrier(name) for name in found.values},
        "instability": {name: found.instability(name) for name in found.values},
    }


def straight_line(
    first: LandscapePoint, second: LandscapePoint, view: LandscapeData, asked: LandscapeOptions
) -> dict[str, Any]:
    """Along the straight line from one place to another, in all weights."""
    surface = surface_of(first, view, masked=False)
    end = surface.weights.vector_of(student_of(second, view))
    return _line(surface, surface.point, end, asked, f"{first.name} to {second.name}")


def pruning_line(
    first: LandscapePoint, second: LandscapePoint, view: LandscapeData, asked: LandscapeOptions
) -> dict[str, Any]:
    """Along the step of pruning itself: from one place to where the other's masks alone take it."""
    surface = surface_of(first, view, masked=False)
    student = student_of(first, view)
    apply(second.masks(), student.network)
    end = surface.weights.vector_of(student)
    return _line(surface, surface.point, end, asked, f"{first.name} cut to {second.name}")


class Segment(NamedTuple):
    """A line that is looked at: straight from one place to another, or, of kind cut, from it to
    where the other's masks alone take it."""

    kind: str
    first: LandscapePoint
    second: LandscapePoint

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.first.name} {'cut to' if self.kind == 'cut' else 'to'} {self.second.name}"

    def measure(self, view: LandscapeData, asked: LandscapeOptions) -> dict[str, Any]:
        """Along it."""
        return {"line": straight_line, "cut": pruning_line}[self.kind](
            self.first, self.second, view, asked
        )


def segments(places: list[LandscapePoint]) -> list[Segment]:
    """From each run to the next; of a search for tickets from each level to the next and along the
    step of pruning between them, and from each ticket to its controls."""
    found = []
    chain = ticket_path(places)
    for first, second in pairwise(chain):
        found.append(Segment("line", first, second))
        if second.follows(first):
            found.append(Segment("cut", first, second))
    tickets = {place.level: place for place in chain}
    controls = [place for place in places if place not in chain and place.level in tickets]
    return found + [Segment("line", tickets[place.level], place) for place in controls]


def ticket_path(places: list[LandscapePoint]) -> list[LandscapePoint]:
    """The places that follow each other: those of a search without its controls."""
    return [place for place in places if place.kind in ("", DENSE, TICKET)]


def path(
    places: list[LandscapePoint], view: LandscapeData, asked: LandscapeOptions
) -> dict[str, Any]:
    """The loss on the plane through the first place, the middle one and the last, in all weights;
    and where all places are beside it: coordinates, and how far off."""
    surface = surface_of(places[0], view, masked=False)
    points = [surface.weights.vector_of(student_of(place, view)) for place in places]
    shown = plane_through(points[0], points[-1], points[len(points) // 2])
    spots = [shown.project(point) for point in points]
    axes = []
    for spot in zip(*[spot[:2] for spot in spots]):
        low, high = min(spot), max(spot)
        margin = 0.25 * max(high - low, 1e-6)
        span = torch.linspace(low - margin, high + margin, asked.grid, dtype=torch.float64)
        axes.append(span.tolist())
    xs, ys = axes
    found = asdict(grid(surface, shown, measure, xs=xs, ys=ys, watch=_watch("plane of the path")))
    return {**found, "places": {place.name: spot for place, spot in zip(places, spots)}}
