"""Lanczos: a symmetric matrix, known by its products, as a small tridiagonal one."""

from collections.abc import Callable

import torch
from torch import Tensor

from deit.errors import NumericsError

Product = Callable[[Tensor], Tensor]
"""v -> H v for a symmetric H, vectors [size]."""


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
