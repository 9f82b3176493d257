"""Curvature: eigenvalues, trace and spectral density of a matrix known by its products alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deit.core.console import ProgressFn
from deit.core.errors import ConfigError, NumericsError
from deit.core.rng import Keys, normal, random_words

Product = Callable[[Tensor], Tensor]
"""v -> H v for a symmetric H, vectors [size]."""


@dataclass(frozen=True)
class ExtremeEigenvalues:
    """Eigenvalues at both ends of a spectrum, the outermost first, and how good they are.

    A residual is the norm of H v - value v for the unit vector v found: an eigenvalue lies no
    farther than that from the value. converged: whether all are within the tolerance. products: how
    often the matrix was multiplied.
    """

    largest: tuple[float, ...]
    largest_residuals: tuple[float, ...]
    smallest: tuple[float, ...]
    smallest_residuals: tuple[float, ...]
    products: int
    converged: bool


@dataclass(frozen=True)
class Trace:
    """An estimate of a trace, and the standard error of it over so many random vectors."""

    value: float
    standard_error: float
    probes: int


@dataclass(frozen=True)
class SpectralDensity:
    """The eigenvalues of a matrix as a density over the line, of integral 1.

    grid, density: its values at equal distances. width: standard deviation of the Gaussian
    around each Ritz value. ritz_values, weights: what it is made of, a row a probe; the weights of
    a row sum to 1. negative_share: of all weights, at Ritz values negative beyond rounding.
    """

    grid: tuple[float, ...]
    density: tuple[float, ...]
    width: float
    ritz_values: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    negative_share: float


def extreme_eigenvalues(
    product: Product,
    like: Tensor,
    *,
    largest: int = 5,
    smallest: int = 1,
    steps: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
    watch: ProgressFn = iter,
) -> ExtremeEigenvalues:
    """The algebraically largest and smallest eigenvalues, by Lanczos with full orthogonalisation.

    Both ends are found together, whichever is larger in magnitude; power iteration would find only
    that one. The subspace grows until all residuals are below `tolerance` times the largest
    magnitude, or has `steps` dimensions. An eigenvalue that several directions share is found again
    only where the subspace closes (fewer different eigenvalues than steps).

    like: any vector [size] of the dtype and device to compute in. Memory: steps x size numbers of
    that dtype; 50 steps for 5.7 M weights in float32 are 1.1 GB. Time: a product a step, and one
    for each eigenvalue at the end. Raises ConfigError, NumericsError.
    """
    steps, wanted = min(steps, len(like)), largest + smallest
    if min(largest, smallest) < 0 or not 0 < wanted <= steps:
        raise ConfigError(
            f"{largest} largest and {smallest} smallest eigenvalues in {steps} steps of a matrix "
            f"of {len(like)} rows: should be at least one, and no more than steps and rows"
        )
    krylov = Krylov(product, _gaussian(seed, 0, like), room=steps)
    ends = torch.cat([torch.arange(-1, -largest - 1, -1), torch.arange(smallest)])
    for step in watch(range(1, steps + 1)):
        closed = krylov.step()
        values, rows = krylov.ritz()
        radius = values.abs().max()
        if step >= wanted:
            # What the tridiagonal matrix says of the residual (Parlett 1998, chapter 13).
            # Half the tolerance: those that are measured in the end are rounded.
            residuals = krylov.remainder * rows[-1, ends].abs()
            if (residuals <= tolerance * radius / 2).all():
                break
        if closed and step < steps:
            krylov.restart(_gaussian(seed, step, like))
    found, residuals = krylov.ritz_with_residuals(ends)
    close = bool((torch.tensor(residuals) <= tolerance * radius).all())
    return ExtremeEigenvalues(
        *(found[:largest], residuals[:largest], found[largest:], residuals[largest:]),
        products=krylov.products,
        converged=close,
    )


def trace(
    product: Product, like: Tensor, *, probes: int = 32, seed: int = 0, watch: ProgressFn = iter
) -> Trace:
    """Hutchinson's estimate (1990): the mean of v.Hv over vectors of random signs.

    Its variance is twice the sum of squares off the diagonal. like: as in `extreme_eigenvalues`.
    Memory: two vectors. Raises ConfigError, NumericsError.
    """
    if probes < 2:
        raise ConfigError(f"a trace from {probes} probes: should be at least 2, for its error")
    found = []
    for probe in watch(range(probes)):
        vector = _signs(seed, probe, like)
        found.append(finite(product(vector)).double() @ vector.double())
    values = torch.stack(found)
    return Trace(values.mean().item(), values.std().item() / math.sqrt(probes), probes)


def spectral_density(
    product: Product,
    like: Tensor,
    *,
    probes: int = 4,
    steps: int = 30,
    width: float = 0.01,
    seed: int = 0,
    watch: ProgressFn = iter,
) -> SpectralDensity:
    """The density of eigenvalues by stochastic Lanczos quadrature (Golub and Welsch 1969; Lin, Saad
    and Yang 2016; Ghorbani, Krishnan and Xiao 2019).

    From each random vector so many steps of Lanczos: the Ritz values are the nodes and the squared
    first entries of their vectors the weights of a Gauss quadrature, exact for polynomials up to
    degree 2 steps - 1 as far as the vector is typical.
    width: of the Gaussians, as a share of the distance between the outermost Ritz values.
    like, memory: as in `extreme_eigenvalues`. Raises ConfigError, NumericsError.
    """
    if min(probes, steps) < 1 or not width > 0:
        raise ConfigError(
            f"a density from {probes} probes of {steps} steps, width {width}: should be positive"
        )
    ritz_values, weights, steps = [], [], min(steps, len(like))
    for tick in watch(range(probes * steps)):
        probe, step = divmod(tick, steps)
        if step == 0:
            krylov = Krylov(product, _signs(seed, probe, like), room=steps)
            closed = False
        closed = closed or krylov.step()
        if step == steps - 1:
            values, rows = krylov.ritz()
            ritz_values.append(values)
            weights.append(rows[0] ** 2)
    nodes, masses = torch.cat(ritz_values), torch.cat(weights) / probes
    grid, density, deviation = _smoothed(nodes, masses, width)
    rounding = 100 * torch.finfo(like.dtype).eps * nodes.abs().max()
    return SpectralDensity(
        grid=tuple(grid.tolist()),
        density=tuple(density.tolist()),
        width=deviation,
        ritz_values=tuple(tuple(values.tolist()) for values in ritz_values),
        weights=tuple(tuple(masses.tolist()) for masses in weights),
        negative_share=masses[nodes < -rounding].sum().item(),
    )


def _smoothed(nodes: Tensor, masses: Tensor, width: float) -> tuple[Tensor, Tensor, float]:
    """Grid, density and width of masses (of sum 1) spread by Gaussians."""
    low, high = nodes.min().item(), nodes.max().item()
    # Where all are one but for rounding, a share of that one; of nothing, a share of 1.
    span = max(high - low, 1e-3 * max(abs(low), abs(high))) or 1.0
    deviation = width * span
    count = math.ceil((high - low + 12 * deviation) / (deviation / 4)) + 1
    grid = torch.linspace(low - 6 * deviation, high + 6 * deviation, count, dtype=torch.float64)
    away = (grid[:, None] - nodes) / deviation
    bells = torch.exp(-(away**2) / 2) / (deviation * math.sqrt(2 * math.pi))
    return grid, bells @ masses, deviation


def _gaussian(seed: int, number: int, like: Tensor) -> Tensor:
    keys = Keys(seed, 0, torch.tensor([number]))
    return normal(keys, "curvature/start", len(like))[0].to(like)


def _signs(seed: int, number: int, like: Tensor) -> Tensor:
    keys = Keys(seed, 0, torch.tensor([number]))
    return (2 * (random_words(keys, "curvature/signs", len(like))[0] & 1) - 1).to(like)


class Krylov:
    """Orthonormal vectors that grow by one with each product, and the matrix among them, which is
    tridiagonal (Lanczos 1950), on the CPU in float64."""

    def __init__(self, product: Product, start: Tensor, *, room: int) -> None:
        self._product = product
        self._vectors = start.new_empty(room, len(start))
        self._diagonal: list[float] = []
        self._beside: list[float] = []
        self._next = start / torch.linalg.vector_norm(start)
        self.remainder = 0.0
        self.products = 0

    def step(self) -> bool:
        """Take in the next vector; whether the subspace is closed then: the matrix leads nowhere
        else, so its Ritz values are eigenvalues."""
        if self._diagonal:
            self._beside.append(self.remainder)
        place = len(self._diagonal)
        self._vectors[place] = self._next
        image = self._multiply(self._next)
        self._diagonal.append((image @ self._next).item())
        image = self._orthogonal(image, place + 1)
        self.remainder = torch.linalg.vector_norm(image).item()
        size = max(map(abs, self._diagonal + self._beside))
        if self.remainder <= 100 * torch.finfo(image.dtype).eps * size:
            self.remainder = 0.0
            return True
        self._next = image / self.remainder
        return False

    def restart(self, vector: Tensor) -> None:
        """Go on from another vector, after the subspace closed."""
        vector = self._orthogonal(vector, len(self._diagonal))
        self._next = vector / torch.linalg.vector_norm(vector)

    def _orthogonal(self, vector: Tensor, number: int) -> Tensor:
        """Its part orthogonal to the first vectors; twice is enough (Giraud and others 2005)."""
        known = self._vectors[:number]
        for _ in range(2):
            vector = vector - (known @ vector) @ known
        return vector

    def _multiply(self, vector: Tensor) -> Tensor:
        self.products += 1
        return finite(self._product(vector))

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values, ascending, and as columns their vectors in the basis; float64."""
        beside = torch.tensor(self._beside, dtype=torch.float64)
        diagonal = torch.tensor(self._diagonal, dtype=torch.float64)
        return torch.linalg.eigh(diagonal.diag() + beside.diag(1) + beside.diag(-1))

    def ritz_with_residuals(self, ends: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The Ritz values of these indices, and their residuals by a product each."""
        values, rows = self.ritz()
        residuals = []
        for end in ends.tolist():
            vector = rows[:, end].to(self._vectors) @ self._vectors[: len(rows)]
            away = self._multiply(vector) - values[end].item() * vector
            residuals.append(torch.linalg.vector_norm(away).item())
        return tuple(values[ends].tolist()), tuple(residuals)


def finite(image: Tensor) -> Tensor:
    """A product, unless it is not finite: then NumericsError."""
    if not torch.isfinite(image).all():
        raise NumericsError("a product with the Hessian is not finite: the loss is not smooth here")
    return image
