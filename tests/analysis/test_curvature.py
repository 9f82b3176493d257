"""Eigenvalues, traces and densities of matrices that are known, and of a network's Hessian."""

import json
import math
from dataclasses import asdict

import pytest
import torch

from deit.analysis.curvature import Krylov, extreme_eigenvalues, spectral_density, trace
from deit.core.errors import ConfigError, NumericsError
from tests.helpers.errors import raises


def symmetric(eigenvalues, seed=0, dtype=torch.float64):
    """A matrix of these eigenvalues in no special basis."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(*[len(eigenvalues)] * 2, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(square).Q
    matrix = basis @ torch.as_tensor(eigenvalues, dtype=torch.float64).diag() @ basis.T
    return ((matrix + matrix.T) / 2).to(dtype)


def like(matrix):
    return torch.zeros(len(matrix), dtype=matrix.dtype)


def of_matrix(function, matrix, **options):
    return function(lambda vector: matrix @ vector, like(matrix), **options)


SPECTRA = {
    "a few large ones": [50.0, 20.0, 10.0, *torch.linspace(-1, 1, 97).tolist()],
    "the negative end dominates": [*torch.linspace(-1, 5, 98).tolist(), -40.0, -97.0],
    "all negative": torch.linspace(-9, -1, 60).tolist(),
    "a decay": [3.0 * 0.8**k for k in range(80)],
    "three": [3.0, -1.0, 2.0],
    "large units": [1e8 * value for value in torch.linspace(-1, 2, 50).tolist()],
    "small units": [1e-8 * value for value in torch.linspace(-1, 2, 50).tolist()],
}


@pytest.mark.parametrize("name", SPECTRA)
def test_both_ends_are_those_of_the_dense_matrix(name):
    matrix = symmetric(SPECTRA[name])
    exact = torch.linalg.eigvalsh(matrix)
    number = min(3, len(matrix) - 1)
    smallest = min(2, len(matrix) - number)
    radius = exact.abs().max().item()
    found = of_matrix(
        extreme_eigenvalues, matrix, largest=number, smallest=smallest, tolerance=1e-9
    )
    assert found.converged
    assert found.largest == pytest.approx(exact.flip(0)[:number].tolist(), abs=1e-9 * radius)
    assert found.smallest == pytest.approx(exact[:smallest].tolist(), abs=1e-9 * radius)
    assert max(found.largest_residuals + found.smallest_residuals) <= 1e-9 * radius
    json.dumps(asdict(found), allow_nan=False)


def test_power_iteration_would_have_found_the_other_end():
    """What the second spectrum is for: the largest eigenvalue is not the largest in magnitude."""
    matrix = symmetric(SPECTRA["the negative end dominates"])
    found = of_matrix(extreme_eigenvalues, matrix, largest=1, smallest=1)
    assert found.largest[0] == pytest.approx(5, rel=1e-3)
    assert found.smallest[0] == pytest.approx(-97, rel=1e-3)


@pytest.mark.parametrize(("largest", "smallest"), [(4, 0), (0, 4), (1, 3)])
def test_as_many_of_each_end_as_asked_for(largest, smallest):
    matrix = symmetric(SPECTRA["a few large ones"])
    exact = torch.linalg.eigvalsh(matrix)
    found = of_matrix(extreme_eigenvalues, matrix, largest=largest, smallest=smallest)
    assert len(found.largest) == len(found.largest_residuals) == largest
    assert len(found.smallest) == len(found.smallest_residuals) == smallest
    assert found.largest == pytest.approx(exact.flip(0)[:largest].tolist(), abs=0.05)
    assert found.smallest == pytest.approx(exact[:smallest].tolist(), abs=0.05)


def test_residuals_are_true_where_steps_end_early():
    """An eigenvalue lies within the residual of each value, converged or not."""
    matrix = symmetric(torch.linspace(-5, 5, 200).tolist())
    exact = torch.linalg.eigvalsh(matrix)
    few = of_matrix(extreme_eigenvalues, matrix, largest=3, smallest=3, steps=12)
    assert not few.converged
    assert few.products == 12 + 6
    pairs = zip(few.largest + few.smallest, few.largest_residuals + few.smallest_residuals)
    for value, residual in pairs:
        assert residual > 1e-3 * 5
        assert (exact - value).abs().min() <= residual
    more = of_matrix(extreme_eigenvalues, matrix, largest=3, smallest=3, steps=150)
    assert more.converged
    assert max(more.largest_residuals) < min(few.largest_residuals)


def test_it_stops_as_soon_as_it_is_good_enough():
    matrix = symmetric(SPECTRA["a few large ones"])
    coarse, fine = (
        of_matrix(extreme_eigenvalues, matrix, largest=1, smallest=0, tolerance=tolerance)
        for tolerance in (1e-2, 1e-10)
    )
    assert coarse.products < fine.products < 40
    assert coarse.converged
    assert fine.converged


@pytest.mark.parametrize(
    ("eigenvalues", "largest", "smallest"),
    [
        ([2.0] * 30, [2, 2, 2], [2, 2]),
        ([0.0] * 30, [0, 0, 0], [0, 0]),
        ([7.0] + [1.0] * 29, [7, 1, 1], [1, 1]),
        ([7.0, 7.0] + [1.0] * 26 + [-3.0] * 2, [7, 7, 1], [-3, -3]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_subspace_that_closes_is_left_for_another(eigenvalues, largest, smallest, dtype):
    matrix = symmetric(eigenvalues, dtype=dtype)
    found = of_matrix(extreme_eigenvalues, matrix, largest=3, smallest=2, steps=30)
    assert found.converged
    assert found.largest == pytest.approx(largest, abs=1e-4)
    assert found.smallest == pytest.approx(smallest, abs=1e-4)


def test_one_row():
    found = of_matrix(extreme_eigenvalues, torch.tensor([[-4.0]]), largest=1, smallest=0)
    assert found.largest == pytest.approx([-4])
    assert found.converged


def test_the_basis_stays_orthonormal_where_plain_lanczos_loses_it():
    matrix = symmetric([1e3, *torch.linspace(0, 1, 299).tolist()])
    krylov = Krylov(lambda v: matrix @ v, torch.ones(300, dtype=torch.float64), max_steps=120)
    for _ in range(120):
        krylov.step()
    basis = krylov._vectors
    torch.testing.assert_close(
        basis @ basis.T, torch.eye(120, dtype=torch.float64), atol=1e-13, rtol=0
    )
    values, _ = krylov.ritz()
    assert (values > 500).sum() == 1  # else copies ("ghosts") of the largest appear


def test_single_precision_is_enough():
    matrix = symmetric(SPECTRA["a few large ones"], dtype=torch.float32)
    found = of_matrix(extreme_eigenvalues, matrix, largest=3, smallest=1, tolerance=1e-4)
    assert found.converged
    assert found.largest == pytest.approx([50, 20, 10], rel=1e-4)
    assert found.smallest == pytest.approx([-1], abs=1e-2)


def test_seeds_make_it_repeatable():
    matrix = symmetric(SPECTRA["a decay"])
    options = {"largest": 2, "smallest": 0, "steps": 6}
    first, again, other = (
        of_matrix(extreme_eigenvalues, matrix, seed=seed, **options) for seed in (3, 3, 4)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"largest": 0, "smallest": 0}, 10),
        ({"largest": -1, "smallest": 3}, 10),
        ({"largest": 5, "smallest": 6}, 10),
        ({"largest": 3, "smallest": 3, "steps": 5}, 10),
    ],
)
def test_impossible_numbers_of_eigenvalues_are_refused(options, rows):
    with raises(ConfigError, *options, f"{rows} rows"):
        of_matrix(extreme_eigenvalues, symmetric([1.0] * rows), **options)


@pytest.mark.parametrize("function", [extreme_eigenvalues, trace, spectral_density])
def test_products_that_are_not_finite_are_refused(function):
    with raises(NumericsError, "Hessian"):
        function(lambda vector: vector / 0, torch.zeros(9))


@pytest.mark.parametrize(
    ("function", "options", "ticks"),
    [
        (extreme_eigenvalues, {"largest": 1, "smallest": 1, "steps": 20}, 20),
        (trace, {"probes": 5}, 5),
        (spectral_density, {"probes": 3, "steps": 4}, 12),
    ],
)
def test_progress_can_be_watched(function, options, ticks):
    seen = []

    def watch(steps):
        seen.append(len(steps))
        return iter(steps)

    matrix = symmetric(SPECTRA["a decay"])
    assert of_matrix(function, matrix, progress=watch, **options) == of_matrix(
        function, matrix, **options
    )
    assert seen == [ticks]


# Traces


def test_a_trace_and_its_error():
    """Over many seeds: the mean is right, and errors are as large as they are said to be."""
    matrix = symmetric(torch.linspace(-1, 3, 40).tolist())
    found = [of_matrix(trace, matrix, probes=16, seed=seed) for seed in range(200)]
    values = torch.tensor([one.value for one in found])
    off = (matrix**2).sum() - (matrix.diagonal() ** 2).sum()
    expected = math.sqrt(2 * off / 16)
    assert values.mean().item() == pytest.approx(40, abs=4 * expected / math.sqrt(200))
    assert values.std().item() == pytest.approx(expected, rel=0.15)
    said = torch.tensor([one.standard_error for one in found])
    assert said.mean().item() == pytest.approx(expected, rel=0.05)
    assert all(one.probes == 16 for one in found)


def test_the_trace_of_a_diagonal_matrix_is_exact():
    found = of_matrix(trace, torch.arange(50, dtype=torch.float64).diag(), probes=3)
    assert found.value == pytest.approx(49 * 25)
    assert found.standard_error == pytest.approx(0, abs=1e-9)


def test_one_probe_has_no_error():
    with raises(ConfigError, "probes"):
        of_matrix(trace, symmetric([1.0] * 3), probes=1)


# Densities


def integral(found, power=0):
    grid, density = (torch.tensor(v, dtype=torch.float64) for v in (found.grid, found.density))
    return torch.trapezoid(density * grid**power, grid).item()


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("width", [0.003, 0.05])
def test_a_density_integrates_to_one_and_has_the_moments_of_its_nodes(name, width):
    matrix = symmetric(SPECTRA[name])
    found = of_matrix(spectral_density, matrix, width=width, probes=3, steps=20)
    nodes, weights = torch.tensor(found.ritz_values), torch.tensor(found.weights)
    assert weights.sum(dim=1).tolist() == pytest.approx([1] * 3)
    assert integral(found) == pytest.approx(1, abs=1e-6)
    scale = nodes.abs().max().item()
    mean, second = ((weights * nodes**power).sum().item() / 3 for power in (1, 2))
    assert integral(found, 1) == pytest.approx(mean, abs=1e-5 * scale)
    assert integral(found, 2) == pytest.approx(second + found.width**2, rel=1e-4)
    assert found.width == pytest.approx(width * (nodes.max() - nodes.min()).item())
    json.dumps(asdict(found), allow_nan=False)


def test_the_quadrature_is_exact_for_its_vector():
    """m steps integrate polynomials up to degree 2 m - 1 as v.H^k v does (Golub and Welsch)."""
    matrix, seen = symmetric(torch.linspace(-1, 1.5, 30).tolist()), []

    def product(vector):
        seen.append(vector)
        return matrix @ vector

    steps = 4
    found = spectral_density(product, like(matrix), probes=1, steps=steps)
    nodes, weights = torch.tensor(found.ritz_values[0]), torch.tensor(found.weights[0])
    vector = seen[0]
    assert vector.norm().item() == pytest.approx(1)
    assert vector.abs().std().item() == pytest.approx(0, abs=1e-12)  # random signs
    image = vector
    for power in range(2 * steps + 2):
        of_nodes = (weights * nodes**power).sum().item()
        exact = (vector @ image).item()
        assert (of_nodes == pytest.approx(exact, abs=1e-6)) is (power < 2 * steps)
        image = matrix @ image


def test_moments_of_the_spectrum_by_several_probes():
    eigenvalues = torch.tensor([20.0, 5.0, *torch.linspace(-2, 1, 198).tolist()])
    matrix = symmetric(eigenvalues.tolist())
    found = of_matrix(spectral_density, matrix, probes=200, steps=10)
    nodes, weights = torch.tensor(found.ritz_values), torch.tensor(found.weights)
    for power in (1, 2):
        each = (weights * nodes**power).sum(dim=1)
        error = each.std().item() / math.sqrt(200)
        exact = (eigenvalues**power).mean().item()
        assert error < 0.1 * abs(exact) + 0.02
        assert each.mean().item() == pytest.approx(exact, abs=4 * error)


def test_the_whole_density_of_a_diagonal_matrix():
    """With as many steps as rows, every eigenvalue is a node of weight 1 / n."""
    eigenvalues = torch.linspace(-3, 7, 20, dtype=torch.float64)
    found = of_matrix(spectral_density, eigenvalues.diag(), probes=2, steps=99, width=0.02)
    for row, weights in zip(found.ritz_values, found.weights):
        assert row == pytest.approx(eigenvalues.tolist())
        assert weights == pytest.approx([1 / 20] * 20)
    assert found.negative_share == pytest.approx(6 / 20)
    grid = torch.tensor(found.grid, dtype=torch.float64)
    normal = torch.distributions.Normal(eigenvalues, found.width)
    exact = normal.log_prob(grid[:, None]).exp().mean(dim=1)
    torch.testing.assert_close(torch.tensor(found.density, dtype=torch.float64), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_that_are_rounded_are_not_negative(dtype):
    matrix = symmetric([9.0, 3.0, 1.0] + [0.0] * 97, dtype=dtype)
    found = of_matrix(spectral_density, matrix, probes=8, steps=30)
    assert found.negative_share == 0
    found = of_matrix(spectral_density, -matrix, probes=8, steps=30)
    assert 0 < found.negative_share < 0.2


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_a_density_of_one_eigenvalue_is_one_bell(value):
    found = of_matrix(spectral_density, symmetric([value] * 20), probes=2, steps=10)
    assert [len(row) for row in found.ritz_values] == [1, 1]  # the subspace closed
    assert integral(found) == pytest.approx(1, abs=1e-6)
    assert integral(found, 1) == pytest.approx(value, abs=1e-7)
    assert found.negative_share == (value < 0)


@pytest.mark.parametrize("options", [{"probes": 0}, {"steps": 0}, {"width": 0.0}])
def test_impossible_densities_are_refused(options):
    with raises(ConfigError, *options):
        of_matrix(spectral_density, symmetric([1.0] * 3), **options)
