"""Eigenvalues, traces and spectral densities of known matrices."""

import json
import math
from dataclasses import asdict

import pytest
import torch

from deit.analysis.curvature import Krylov, extreme_eigenvalues, spectral_density, trace
from deit.core.errors import ConfigError, NumericsError
from tests.helpers.errors import raises


def symmetric(eigenvalues, seed=0, dtype=torch.float64):
    """A matrix with these eigenvalues in a random basis."""
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
def test_extreme_eigenvalues_match_dense_solver_at_both_ends(name):
    matrix = symmetric(SPECTRA[name])
    exact = torch.linalg.eigvalsh(matrix)
    largest = min(3, len(matrix) - 1)
    smallest = min(2, len(matrix) - largest)
    radius = exact.abs().max().item()
    eigenvalues = of_matrix(
        extreme_eigenvalues, matrix, largest=largest, smallest=smallest, tolerance=1e-9
    )
    assert eigenvalues.converged
    assert eigenvalues.largest == pytest.approx(exact.flip(0)[:largest].tolist(), abs=1e-9 * radius)
    assert eigenvalues.smallest == pytest.approx(exact[:smallest].tolist(), abs=1e-9 * radius)
    assert max(eigenvalues.largest_residuals + eigenvalues.smallest_residuals) <= 1e-9 * radius
    json.dumps(asdict(eigenvalues), allow_nan=False)


def test_extreme_eigenvalues_with_dominant_negative_end_are_algebraic():
    """The largest eigenvalue is not the largest in magnitude, which power iteration finds."""
    matrix = symmetric(SPECTRA["the negative end dominates"])
    eigenvalues = of_matrix(extreme_eigenvalues, matrix, largest=1, smallest=1)
    assert eigenvalues.largest[0] == pytest.approx(5, rel=1e-3)
    assert eigenvalues.smallest[0] == pytest.approx(-97, rel=1e-3)


@pytest.mark.parametrize(("largest", "smallest"), [(4, 0), (0, 4), (1, 3)])
def test_extreme_eigenvalues_returns_the_requested_number_of_each_end(largest, smallest):
    matrix = symmetric(SPECTRA["a few large ones"])
    exact = torch.linalg.eigvalsh(matrix)
    eigenvalues = of_matrix(extreme_eigenvalues, matrix, largest=largest, smallest=smallest)
    assert len(eigenvalues.largest) == len(eigenvalues.largest_residuals) == largest
    assert len(eigenvalues.smallest) == len(eigenvalues.smallest_residuals) == smallest
    assert eigenvalues.largest == pytest.approx(exact.flip(0)[:largest].tolist(), abs=0.05)
    assert eigenvalues.smallest == pytest.approx(exact[:smallest].tolist(), abs=0.05)


def test_extreme_eigenvalues_with_few_steps_have_valid_residuals():
    """An eigenvalue is within the residual of each value, converged or not."""
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


def test_extreme_eigenvalues_stop_at_the_tolerance():
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
def test_extreme_eigenvalues_restart_when_the_subspace_closes(
    eigenvalues, largest, smallest, dtype
):
    matrix = symmetric(eigenvalues, dtype=dtype)
    result = of_matrix(extreme_eigenvalues, matrix, largest=3, smallest=2, steps=30)
    assert result.converged
    assert result.largest == pytest.approx(largest, abs=1e-4)
    assert result.smallest == pytest.approx(smallest, abs=1e-4)


def test_extreme_eigenvalues_of_one_row():
    eigenvalues = of_matrix(extreme_eigenvalues, torch.tensor([[-4.0]]), largest=1, smallest=0)
    assert eigenvalues.largest == pytest.approx([-4])
    assert eigenvalues.converged


def test_krylov_basis_stays_orthonormal_without_ghost_eigenvalues():
    matrix = symmetric([1e3, *torch.linspace(0, 1, 299).tolist()])
    krylov = Krylov(lambda v: matrix @ v, torch.ones(300, dtype=torch.float64), max_steps=120)
    for _ in range(120):
        krylov.step()
    basis = krylov._vectors
    torch.testing.assert_close(
        basis @ basis.T, torch.eye(120, dtype=torch.float64), atol=1e-13, rtol=0
    )
    values, _ = krylov.ritz()
    assert (values > 500).sum() == 1  # lost orthogonality would add copies ("ghosts") of it


def test_extreme_eigenvalues_in_single_precision_converge():
    matrix = symmetric(SPECTRA["a few large ones"], dtype=torch.float32)
    eigenvalues = of_matrix(extreme_eigenvalues, matrix, largest=3, smallest=1, tolerance=1e-4)
    assert eigenvalues.converged
    assert eigenvalues.largest == pytest.approx([50, 20, 10], rel=1e-4)
    assert eigenvalues.smallest == pytest.approx([-1], abs=1e-2)


def test_extreme_eigenvalues_depend_on_the_seed_only():
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
def test_extreme_eigenvalues_with_invalid_numbers_are_refused(options, rows):
    with raises(ConfigError, *options, f"{rows} rows"):
        of_matrix(extreme_eigenvalues, symmetric([1.0] * rows), **options)


@pytest.mark.parametrize("function", [extreme_eigenvalues, trace, spectral_density])
def test_curvature_with_nonfinite_products_is_refused(function):
    with raises(NumericsError, "Hessian"):
        function(lambda vector: vector / 0, torch.zeros(9))


@pytest.mark.parametrize(
    ("function", "options", "num_steps"),
    [
        (extreme_eigenvalues, {"largest": 1, "smallest": 1, "steps": 20}, 20),
        (trace, {"probes": 5}, 5),
        (spectral_density, {"probes": 3, "steps": 4}, 12),
    ],
)
def test_curvature_reports_each_product_to_progress(function, options, num_steps):
    recorded = []

    def record(steps):
        recorded.append(len(steps))
        return iter(steps)

    matrix = symmetric(SPECTRA["a decay"])
    assert of_matrix(function, matrix, progress=record, **options) == of_matrix(
        function, matrix, **options
    )
    assert recorded == [num_steps]


# Traces


def test_trace_over_many_seeds_has_the_estimated_standard_error():
    """The mean is right, and the errors are as large as the standard errors predict."""
    matrix = symmetric(torch.linspace(-1, 3, 40).tolist())
    estimates = [of_matrix(trace, matrix, probes=16, seed=seed) for seed in range(200)]
    values = torch.tensor([estimate.value for estimate in estimates])
    off = (matrix**2).sum() - (matrix.diagonal() ** 2).sum()
    expected = math.sqrt(2 * off / 16)
    assert values.mean().item() == pytest.approx(40, abs=4 * expected / math.sqrt(200))
    assert values.std().item() == pytest.approx(expected, rel=0.15)
    standard_errors = torch.tensor([estimate.standard_error for estimate in estimates])
    assert standard_errors.mean().item() == pytest.approx(expected, rel=0.05)
    assert all(estimate.probes == 16 for estimate in estimates)


def test_trace_of_diagonal_matrix_is_exact():
    estimate = of_matrix(trace, torch.arange(50, dtype=torch.float64).diag(), probes=3)
    assert estimate.value == pytest.approx(49 * 25)
    assert estimate.standard_error == pytest.approx(0, abs=1e-9)


def test_trace_with_one_probe_is_refused():
    with raises(ConfigError, "probes"):
        of_matrix(trace, symmetric([1.0] * 3), probes=1)


# Densities


def integral(spectrum, power=0):
    grid, density = (
        torch.tensor(v, dtype=torch.float64) for v in (spectrum.grid, spectrum.density)
    )
    return torch.trapezoid(density * grid**power, grid).item()


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("width", [0.003, 0.05])
def test_spectral_density_has_integral_one_and_moments_of_its_nodes(name, width):
    matrix = symmetric(SPECTRA[name])
    spectrum = of_matrix(spectral_density, matrix, width=width, probes=3, steps=20)
    nodes, weights = torch.tensor(spectrum.ritz_values), torch.tensor(spectrum.weights)
    assert weights.sum(dim=1).tolist() == pytest.approx([1] * 3)
    assert integral(spectrum) == pytest.approx(1, abs=1e-6)
    scale = nodes.abs().max().item()
    mean, second = ((weights * nodes**power).sum().item() / 3 for power in (1, 2))
    assert integral(spectrum, 1) == pytest.approx(mean, abs=1e-5 * scale)
    assert integral(spectrum, 2) == pytest.approx(second + spectrum.width**2, rel=1e-4)
    assert spectrum.width == pytest.approx(width * (nodes.max() - nodes.min()).item())
    json.dumps(asdict(spectrum), allow_nan=False)


def test_spectral_density_quadrature_is_exact_for_its_vector():
    """m steps integrate polynomials up to degree 2 m - 1 as v.H^k v does (Golub and Welsch)."""
    matrix, vectors = symmetric(torch.linspace(-1, 1.5, 30).tolist()), []

    def product(vector):
        vectors.append(vector)
        return matrix @ vector

    steps = 4
    spectrum = spectral_density(product, like(matrix), probes=1, steps=steps)
    nodes, weights = torch.tensor(spectrum.ritz_values[0]), torch.tensor(spectrum.weights[0])
    vector = vectors[0]
    assert vector.norm().item() == pytest.approx(1)
    assert vector.abs().std().item() == pytest.approx(0, abs=1e-12)  # random signs
    image = vector
    for power in range(2 * steps + 2):
        of_nodes = (weights * nodes**power).sum().item()
        exact = (vector @ image).item()
        assert (of_nodes == pytest.approx(exact, abs=1e-6)) is (power < 2 * steps)
        image = matrix @ image


def test_spectral_density_with_many_probes_has_the_moments_of_the_spectrum():
    eigenvalues = torch.tensor([20.0, 5.0, *torch.linspace(-2, 1, 198).tolist()])
    matrix = symmetric(eigenvalues.tolist())
    spectrum = of_matrix(spectral_density, matrix, probes=200, steps=10)
    nodes, weights = torch.tensor(spectrum.ritz_values), torch.tensor(spectrum.weights)
    for power in (1, 2):
        each = (weights * nodes**power).sum(dim=1)
        error = each.std().item() / math.sqrt(200)
        exact = (eigenvalues**power).mean().item()
        assert error < 0.1 * abs(exact) + 0.02
        assert each.mean().item() == pytest.approx(exact, abs=4 * error)


def test_spectral_density_of_diagonal_matrix_with_all_steps_is_exact():
    """With as many steps as rows, every eigenvalue is a node of weight 1 / n."""
    eigenvalues = torch.linspace(-3, 7, 20, dtype=torch.float64)
    spectrum = of_matrix(spectral_density, eigenvalues.diag(), probes=2, steps=99, width=0.02)
    for row, weights in zip(spectrum.ritz_values, spectrum.weights):
        assert row == pytest.approx(eigenvalues.tolist())
        assert weights == pytest.approx([1 / 20] * 20)
    assert spectrum.negative_share == pytest.approx(6 / 20)
    grid = torch.tensor(spectrum.grid, dtype=torch.float64)
    normal = torch.distributions.Normal(eigenvalues, spectrum.width)
    exact = normal.log_prob(grid[:, None]).exp().mean(dim=1)
    torch.testing.assert_close(torch.tensor(spectrum.density, dtype=torch.float64), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectral_density_ignores_zeros_that_rounding_made_negative(dtype):
    matrix = symmetric([9.0, 3.0, 1.0] + [0.0] * 97, dtype=dtype)
    spectrum = of_matrix(spectral_density, matrix, probes=8, steps=30)
    assert spectrum.negative_share == 0
    spectrum = of_matrix(spectral_density, -matrix, probes=8, steps=30)
    assert 0 < spectrum.negative_share < 0.2


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_spectral_density_of_one_eigenvalue_is_one_gaussian(value):
    spectrum = of_matrix(spectral_density, symmetric([value] * 20), probes=2, steps=10)
    assert [len(row) for row in spectrum.ritz_values] == [1, 1]  # the subspace closed
    assert integral(spectrum) == pytest.approx(1, abs=1e-6)
    assert integral(spectrum, 1) == pytest.approx(value, abs=1e-7)
    assert spectrum.negative_share == (value < 0)


@pytest.mark.parametrize("options", [{"probes": 0}, {"steps": 0}, {"width": 0.0}])
def test_spectral_density_with_nonpositive_numbers_is_refused(options):
    with raises(ConfigError, *options):
        of_matrix(spectral_density, symmetric([1.0] * 3), **options)
