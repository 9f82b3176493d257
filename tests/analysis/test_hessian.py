"""Eigenvalues, trace and spectral density of a network's Hessian against the dense matrix."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from deit.analysis.curvature import extreme_eigenvalues, spectral_density, trace
from deit.analysis.loss_surface import LossSurface
from tests.helpers.loss_surfaces import student, surface


class Small(nn.Module):
    """200 weights, with a LayerNorm."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 8)
        ).double()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7)

    def forward(self, inputs):
        return self.layers(inputs)


@pytest.fixture(scope="module")
def small_surface():
    """A surface of 200 weights and its dense Hessian, computed by torch."""
    torch.manual_seed(4)
    network = Small()
    inputs, labels = torch.randn(40, 5).double(), torch.randint(8, (40,))

    def loss(network, batch):
        return cross_entropy(network(batch[0]), batch[1])

    land = LossSurface(network, [(inputs, labels)], loss, sizes=[40])

    def of_point(point):
        pieces = point.split([parameter.numel() for parameter in network.parameters()])
        named = zip(network.named_parameters(), pieces)
        tensors = {name: piece.view_as(parameter) for (name, parameter), piece in named}
        return cross_entropy(functional_call(network, tensors, (inputs,)), labels)

    return land, torch.autograd.functional.hessian(of_point, land.point)


def test_hvp_with_unit_vectors_matches_dense_hessian(small_surface):
    land, hessian = small_surface
    assert land.size == 200
    rows = [land.hvp(unit) for unit in torch.eye(200, dtype=torch.float64)]
    torch.testing.assert_close(torch.stack(rows), hessian, atol=1e-12, rtol=1e-9)


def test_curvature_of_hessian_matches_dense_eigenvalues(small_surface):
    land, hessian = small_surface
    exact = torch.linalg.eigvalsh(hessian)
    assert exact[0] < -1e-3 < 1e-1 < exact[-1]
    eigenvalues = extreme_eigenvalues(land.hvp, land.point, largest=5, smallest=3, tolerance=1e-6)
    assert eigenvalues.converged
    assert eigenvalues.largest == pytest.approx(exact.flip(0)[:5].tolist(), rel=1e-5)
    assert eigenvalues.smallest == pytest.approx(exact[:3].tolist(), rel=1e-4)
    estimate = trace(land.hvp, land.point, probes=1000)
    assert estimate.standard_error < 0.1 * hessian.trace().item()
    assert abs(estimate.value - hessian.trace().item()) < 3 * estimate.standard_error
    density = spectral_density(land.hvp, land.point, probes=32, steps=20)
    nodes, weights = torch.tensor(density.ritz_values), torch.tensor(density.weights)
    for power in (1, 2):
        each = (weights * nodes**power).sum(dim=1)
        expected = (exact**power).mean().item()
        assert each.mean().item() == pytest.approx(expected, abs=4 * each.std().item() / 32**0.5)
        assert each.std().item() < 2 * expected


def test_extreme_eigenvalues_of_vit_in_float32_match_float64():
    """The two largest eigenvalues and the smallest one."""
    results = []
    for dtype in (torch.float32, torch.float64):
        land = surface(student(dtype=dtype), (5, 7))
        results.append(
            extreme_eigenvalues(
                land.hvp, land.point, largest=2, smallest=1, tolerance=1e-4, steps=200
            )
        )
    narrow, wide = results
    assert narrow.converged
    assert wide.converged
    assert narrow.largest == pytest.approx(wide.largest, rel=1e-3)
    assert narrow.smallest == pytest.approx(wide.smallest, rel=1e-3)
