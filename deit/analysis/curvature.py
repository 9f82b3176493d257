"""Eigenvalues, trace and spectral density of a matrix that is given by its products."""

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
    """Eigenvalues at both ends of a spectrum, the outermost first, with their residuals.

    A residual is the norm of H v - value v for the computed unit vector v; an eigenvalue is at most
    that far from the value. products: number of products with the matrix. converged: whether all
    residuals are within the tolerance.
    """

    largest: tuple[float, ...]
    largest_residuals: tuple[float, ...]
    smallest: tuple[float, ...]
    smallest_residuals: tuple[float, ...]
    products: int
    converged: bool


@dataclass(frozen=True)
class Trace:
    """An estimate of a trace and its standard error over `probes` random vectors."""

    value: float
    standard_error: float
    probes: int


@dataclass(frozen=True)
class SpectralDensity:
    """The density of the eigenvalues of a matrix, with integral 1.

    grid, density: points at equal distances and the density there. width: standard deviation of
    the Gaussian around each Ritz value. ritz_values, weights: the nodes and weights of the
    quadrature, [probes][steps]; the weights of a probe sum to 1. negative_share: share of the
    weights at Ritz values that are negative beyond rounding, in [0, 1].
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
    progress: ProgressFn = iter,
) -> ExtremeEigenvalues:
    """Compute the algebraically largest and smallest eigenvalues by the Lanczos method.

    The basis is fully reorthogonalized. Both ends of the spectrum are computed together, whichever
    is larger in magnitude (power iteration would find only that one). The subspace grows until all
    residuals are below `tolerance` times the largest magnitude, or until it has `steps` dimensions.
    A multiple eigenvalue is repeated only if the subspace closes, that is, if there are fewer
    distinct eigenvalues than steps.

    largest, smallest: number of eigenvalues at each end. like: any vector [size] with the dtype and
    device to compute in. Memory: steps x size numbers of that dtype (50 steps for 5.7 M weights in
    float32: 1.1 GB). Time: one product per step, and one per eigenvalue at the end. Raises
    ConfigError for invalid numbers, NumericsError if a product is not finite.

    >>> diagonal = torch.tensor([-1.0, 2.0, 5.0])
    >>> values = extreme_eigenvalues(lambda v: diagonal * v, diagonal, largest=2)
    >>> [round(value, 3) for value in (*values.largest, *values.smallest)]
    [5.0, 2.0, -1.0]
    """
    steps, num_values = min(steps, len(like)), largest + smallest
    if min(largest, smallest) < 0 or not 0 < num_values <= steps:
        raise ConfigError(
            f"{largest} largest and {smallest} smallest eigenvalues in {steps} steps of a matrix "
            f"of {len(like)} rows: should be at least one, and no more than steps and rows"
        )
    krylov = Krylov(product, _gaussian(seed, 0, like), max_steps=steps)
    indices = torch.cat([torch.arange(-1, -largest - 1, -1), torch.arange(smallest)])
    for step in progress(range(1, steps + 1)):
        closed = krylov.step()
        values, vectors = krylov.ritz()
        radius = values.abs().max()
        if step >= num_values:
            # Residuals estimated from the tridiagonal matrix (Parlett 1998, chapter 13). They are
            # tested at half the tolerance, because the exact ones below contain rounding errors.
            residuals = krylov.remainder * vectors[-1, indices].abs()
            if (residuals <= tolerance * radius / 2).all():
                break
        if closed and step < steps:
            krylov.restart(_gaussian(seed, step, like))
    eigenvalues, residuals = krylov.ritz_with_residuals(indices)
    converged = bool((torch.tensor(residuals) <= tolerance * radius).all())
    return ExtremeEigenvalues(
        largest=eigenvalues[:largest],
        largest_residuals=residuals[:largest],
        smallest=eigenvalues[largest:],
        smallest_residuals=residuals[largest:],
        products=krylov.products,
        converged=converged,
    )


def trace(
    product: Product,
    like: Tensor,
    *,
    probes: int = 32,
    seed: int = 0,
    progress: ProgressFn = iter,
) -> Trace:
    """Estimate the trace by the mean of v.Hv over vectors of random signs (Hutchinson 1990).

    The variance of a single v.Hv is twice the sum of squares off the diagonal. like: as in
    `extreme_eigenvalues`. Memory: two vectors. Raises ConfigError for fewer than two probes,
    NumericsError if a product is not finite.

    >>> diagonal = torch.tensor([-1.0, 2.0, 5.0])
    >>> trace(lambda v: diagonal * v, diagonal, probes=4).value  # exact for a diagonal matrix
    6.0
    """
    if probes < 2:
        raise ConfigError(
            f"a trace from {probes} probes: should be at least 2, for a standard error"
        )
    samples = []
    for probe in progress(range(probes)):
        vector = _signs(seed, probe, like)
        samples.append(require_finite(product(vector)).double() @ vector.double())
    values = torch.stack(samples)
    return Trace(values.mean().item(), values.std().item() / math.sqrt(probes), probes)


def spectral_density(
    product: Product,
    like: Tensor,
    *,
    probes: int = 4,
    steps: int = 30,
    width: float = 0.01,
    seed: int = 0,
    progress: ProgressFn = iter,
) -> SpectralDensity:
    """Estimate the density of the eigenvalues by stochastic Lanczos quadrature.

    Sources: Golub and Welsch 1969; Lin, Saad and Yang 2016; Ghorbani, Krishnan and Xiao 2019.
    Each random vector takes `steps` Lanczos steps. The Ritz values are the nodes of a Gauss
    quadrature, and the squared first components of the Ritz vectors are its weights. It is exact
    for polynomials up to degree 2 steps - 1 for that vector.

    width: standard deviation of the Gaussians, as a share of the distance between the outermost
    Ritz values. like, memory: as in `extreme_eigenvalues`. Raises ConfigError for numbers that are
    not positive, NumericsError if a product is not finite.
    """
    if min(probes, steps) < 1 or not width > 0:
        raise ConfigError(
            f"a density from {probes} probes of {steps} steps, width {width}: should be positive"
        )
    ritz_values, weights, steps = [], [], min(steps, len(like))
    for tick in progress(range(probes * steps)):
        probe, step = divmod(tick, steps)
        if step == 0:
            krylov = Krylov(product, _signs(seed, probe, like), max_steps=steps)
            closed = False
        closed = closed or krylov.step()
        if step == steps - 1:
            values, vectors = krylov.ritz()
            ritz_values.append(values)
            weights.append(vectors[0] ** 2)
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
    """Return the grid, density and Gaussian width of masses that sum to 1."""
    low, high = nodes.min().item(), nodes.max().item()
    # If all nodes are equal up to rounding, the width is relative to their value, or to 1 if 0.
    span = max(high - low, 1e-3 * max(abs(low), abs(high))) or 1.0
    deviation = width * span
    count = math.ceil((high - low + 12 * deviation) / (deviation / 4)) + 1
    grid = torch.linspace(low - 6 * deviation, high + 6 * deviation, count, dtype=torch.float64)
    z = (grid[:, None] - nodes) / deviation
    gaussians = torch.exp(-(z**2) / 2) / (deviation * math.sqrt(2 * math.pi))
    return grid, gaussians @ masses, deviation


def _gaussian(seed: int, index: int, like: Tensor) -> Tensor:
    keys = Keys(seed, 0, torch.tensor([index]))
    return normal(keys, "curvature/start", len(like))[0].to(like)


def _signs(seed: int, index: int, like: Tensor) -> Tensor:
    keys = Keys(seed, 0, torch.tensor([index]))
    return (2 * (random_words(keys, "curvature/signs", len(like))[0] & 1) - 1).to(like)


class Krylov:
    """An orthonormal Lanczos basis that grows by one vector per product (Lanczos 1950).

    The matrix in this basis is tridiagonal; it is kept on the CPU in float64. remainder: norm of
    the last product outside the subspace. products: number of products so far.
    """

    def __init__(self, product: Product, start: Tensor, *, max_steps: int) -> None:
        self._product = product
        self._vectors = start.new_empty(max_steps, len(start))
        self._diagonal: list[float] = []
        self._off_diagonal: list[float] = []
        self._next = start / torch.linalg.vector_norm(start)
        self.remainder = 0.0
        self.products = 0

    def step(self) -> bool:
        """Add the next vector to the basis; return whether the subspace is closed.

        The matrix maps a closed subspace into itself, so the Ritz values are eigenvalues.
        """
        if self._diagonal:
            self._off_diagonal.append(self.remainder)
        index = len(self._diagonal)
        self._vectors[index] = self._next
        image = self._multiply(self._next)
        self._diagonal.append((image @ self._next).item())
        image = self._orthogonalize(image, index + 1)
        self.remainder = torch.linalg.vector_norm(image).item()
        size = max(map(abs, self._diagonal + self._off_diagonal))
        if self.remainder <= 100 * torch.finfo(image.dtype).eps * size:
            self.remainder = 0.0
            return True
        self._next = image / self.remainder
        return False

    def restart(self, vector: Tensor) -> None:
        """Continue with another vector after the subspace has closed."""
        vector = self._orthogonalize(vector, len(self._diagonal))
        self._next = vector / torch.linalg.vector_norm(vector)

    def _orthogonalize(self, vector: Tensor, num_vectors: int) -> Tensor:
        """Return the part of a vector that is orthogonal to the first `num_vectors` of the basis.

        Two passes are enough (Giraud et al. 2005).
        """
        basis = self._vectors[:num_vectors]
        for _ in range(2):
            vector = vector - (basis @ vector) @ basis
        return vector

    def _multiply(self, vector: Tensor) -> Tensor:
        self.products += 1
        return require_finite(self._product(vector))

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Return the Ritz values, ascending, and their vectors in the basis as columns; float64."""
        off_diagonal = torch.tensor(self._off_diagonal, dtype=torch.float64)
        diagonal = torch.tensor(self._diagonal, dtype=torch.float64)
        return torch.linalg.eigh(diagonal.diag() + off_diagonal.diag(1) + off_diagonal.diag(-1))

    def ritz_with_residuals(self, indices: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the Ritz values at these indices and their residuals, by one product each."""
        values, vectors = self.ritz()
        residuals = []
        for index in indices.tolist():
            vector = vectors[:, index].to(self._vectors) @ self._vectors[: len(vectors)]
            residual = self._multiply(vector) - values[index].item() * vector
            residuals.append(torch.linalg.vector_norm(residual).item())
        return tuple(values[indices].tolist()), tuple(residuals)


def require_finite(image: Tensor) -> Tensor:
    """Return the product unchanged; raise NumericsError if it is not finite."""
    if not torch.isfinite(image).all():
        raise NumericsError(
            "a product with the Hessian is not finite: the loss is not smooth at these weights"
        )
    return image
