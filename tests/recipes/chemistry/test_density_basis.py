"""The basis of the density against closed forms, and the hydrogen file against its own basis; all without PySCF."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from torchimplicit.models.orbital_free.basis import DensityBasis
from torchimplicit.models.orbital_free.harmonics import solid_harmonics

LARGEST = 6


def some_basis():
    """Every l up to 6 at two atoms, two exponents each."""
    shells = [(atom, l, a) for atom in (0, 1) for l in range(LARGEST + 1) for a in (0.7, 3.1)]
    return DensityBasis(
        centres=torch.tensor([[0.1, 0.2, 0.3], [-1.0, 0.0, 0.5]], dtype=torch.float64),
        atom=torch.tensor([shell[0] for shell in shells]),
        angular=torch.tensor([shell[1] for shell in shells]),
        exponent=torch.tensor([shell[2] for shell in shells], dtype=torch.float64),
    )


def test_harmonics_are_orthonormal_on_the_sphere():
    z, weight = (torch.from_numpy(one) for one in np.polynomial.legendre.leggauss(LARGEST + 2))
    turn = 2 * LARGEST + 2
    phi = torch.arange(turn, dtype=torch.float64) * (2 * math.pi / turn)
    s = torch.sqrt(1 - z * z)
    r = torch.stack(
        [torch.outer(s, torch.cos(phi)), torch.outer(s, torch.sin(phi)), z[:, None].expand(-1, turn)]
    ).flatten(1)
    q = (weight[:, None] * (2 * math.pi / turn)).expand(-1, turn).flatten()
    Y = torch.cat([jets[0, :, 0] for jets in solid_harmonics(r[None], LARGEST)])
    assert torch.allclose((Y * q) @ Y.T, torch.eye(len(Y), dtype=torch.float64), atol=1e-13)


def test_harmonics_of_low_degree_are_in_the_known_order():
    r = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, y, z = r
    one, two = (jets[0, :, 0] for jets in solid_harmonics(r[None], 2)[1:])
    assert torch.allclose(one, math.sqrt(3 / (4 * math.pi)) * r)
    c = math.sqrt(15 / (4 * math.pi))
    known = torch.stack([x * y, y * z, (2 * z * z - x * x - y * y) / math.sqrt(12), x * z, (x * x - y * y) / 2])
    assert torch.allclose(two, c * known)


def test_derivatives_are_those_of_the_values():
    basis = some_basis()
    points = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, gradients = basis.evaluate(points)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda point: basis.values(point[None])[0]))(points)
    assert torch.allclose(gradients, jacobian.permute(2, 0, 1), atol=1e-12)


def test_functions_and_shells_are_numbered():
    basis = some_basis()
    assert len(basis.integrals()) == int(basis.sizes.sum()) == 2 * 2 * (LARGEST + 1) ** 2
    assert basis.numbers().tolist() == [1, 0] * (2 * (LARGEST + 1))  # the tightest first, whatever the order
    assert basis.spread(basis.angular)[:10].tolist() == [0, 0, *[1] * 6, *[2] * 2]


def test_the_molecule_is_whole(h2):
    n, points = h2.size, len(h2.points)
    shapes = {
        "charges": (2,), "positions": (2, 3), "electrons": (), "overlap": (n, n), "coulomb": (n, n), "weight": (n,),
        "external": (n,), "atom": (n,), "angular": (n,), "shell": (n,),
        "quadrature": (points,), "points": (points, 3), "reference": (n,), "guess": (n,),
        "energy": (), "repulsion": (), "kinetic": (), "exchange_correlation": (),
    }  # fmt: skip
    assert {name: tuple(tensor.shape) for name, tensor in h2.tensors().items()} == shapes
    assert (h2.name, n, points) == ("H2", 40, 4920)
    for name, tensor in h2.tensors().items():
        assert tensor.dtype == (torch.int64 if name in ("charges", "atom", "angular", "shell") else torch.float64)
    assert h2.atom.tolist() == [0] * 20 + [1] * 20
    assert h2.angular.tolist() == ([0] * 6 + [1] * 9 + [2] * 5) * 2
    assert h2.shell.tolist() == ([*range(6)] + [0] * 3 + [1] * 3 + [2] * 3 + [0] * 5) * 2


def test_integrals_of_the_file_fit_the_grid_and_the_basis(h2):
    """Grid level 1 of PySCF: 2.4e-4 at most in the overlaps of normalized functions, as measured."""
    q, (values, _) = h2.quadrature, h2.basis.dense()
    assert torch.allclose(h2.basis.products(q[None, None]), h2.overlap, atol=1e-3)
    assert torch.allclose(q @ values, h2.weight, atol=1e-3)
    distance = torch.linalg.vector_norm(h2.points[:, None] - h2.positions, dim=-1)
    potential = -(h2.charges / distance).sum(dim=1)
    assert torch.allclose((q * potential) @ values, h2.external, atol=2e-3)
    assert torch.allclose(h2.overlap.diagonal(), torch.ones(40, dtype=torch.float64))


def test_attraction_and_repulsion_of_s_functions_have_closed_forms(h2, record):
    """Of Gaussians with charges q, Q: qQ erf(sqrt(ab/(a+b)) R)/R, where a nucleus has an infinite exponent."""

    def energy(q, Q, exponent, R):
        near = 2 * torch.sqrt(exponent / math.pi) * torch.ones_like(R)
        return q * Q * torch.where(R > 0, torch.erf(torch.sqrt(exponent) * R) / R.clamp(min=1e-30), near)

    s = (h2.angular == 0).nonzero().flatten()
    a = record.basis.exponent[record.basis.angular == 0]
    w, places = h2.weight[s], h2.positions[h2.atom[s]]
    to_nuclei = torch.linalg.vector_norm(places[:, None] - h2.positions, dim=-1)
    expected = -energy(w[:, None], h2.charges.double(), a[:, None], to_nuclei).sum(dim=1)
    assert torch.allclose(h2.external[s], expected, rtol=1e-12)
    apart = torch.linalg.vector_norm(places[:, None] - places, dim=-1)
    both = a[:, None] * a / (a[:, None] + a)
    assert torch.allclose(h2.coulomb[s][:, s], energy(w[:, None], w, both, apart), rtol=1e-11)


def test_densities_hold_the_electrons_and_their_energies_are_near(h2, record):
    for p in (h2.reference, h2.guess):
        assert float(h2.count(p)) == pytest.approx(2, abs=1e-10)
        assert float(h2.quadrature @ h2.density(p)) == pytest.approx(2, abs=1e-5)
        assert float(h2.density(p).min()) > 0
    p = h2.reference
    assert float(p @ h2.coulomb @ p) / 2 == pytest.approx(record.hartree, abs=5e-4)
    assert float(h2.external @ p) == pytest.approx(record.attraction, abs=1e-9)
    total = h2.kinetic + record.attraction + record.hartree + h2.exchange_correlation + h2.repulsion
    assert float(total) == pytest.approx(float(h2.energy), abs=1e-10)
    assert float(h2.repulsion) == pytest.approx(1 / float((h2.positions[0] - h2.positions[1]).norm()), rel=1e-12)


def test_the_fit_is_the_constrained_minimum():
    from torchimplicit.recipes.density.compute import constrained_fit

    generator = np.random.default_rng(0)
    root = generator.normal(size=(6, 6))
    J, w, b = root @ root.T + np.eye(6), generator.normal(size=6), generator.normal(size=(6, 2))
    held, values = np.stack([w, generator.normal(size=6)], axis=1), np.array([[3.0, 3.0], [-1.0, 0.5]])
    p = constrained_fit(J, b, held, values)
    assert np.allclose(held.T @ p, values)
    slope = J @ p - b  # along what is held alone
    assert np.allclose(slope - held @ np.linalg.lstsq(held, slope)[0], 0)
