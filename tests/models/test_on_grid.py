"""A basis on a grid in blocks: the dense arrays' numbers and derivatives, within the memory that is given."""

from __future__ import annotations

import gc
import math
import pickle
from dataclasses import replace

import pytest
import torch

from torchimplicit.models.orbital_free import OrbitalFree, OrbitalFreeConfig, on_grid
from torchimplicit.models.orbital_free.basis import DensityBasis
from torchimplicit.models.orbital_free.on_grid import Memory, OnGrid
from torchimplicit.models.orbital_free.second import hessian, mixed

F64 = torch.float64


def some_basis() -> DensityBasis:
    """Of l up to 4 at three atoms, one of them far from the others."""
    shells = [(atom, l, a) for atom in (0, 1, 2) for l in range(5 - atom) for a in (8.1, 0.7)]
    return DensityBasis(
        centres=torch.tensor([[0.1, 0.2, 0.3], [-1.0, 0.0, 0.5], [0.0, 0.0, 9.0]], dtype=F64),
        atom=torch.tensor([shell[0] for shell in shells]),
        angular=torch.tensor([shell[1] for shell in shells]),
        exponent=torch.tensor([shell[2] for shell in shells], dtype=F64),
    )


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(on_grid, "POINTS", 32)


@pytest.fixture
def points():
    """Sixty about the first atoms, forty about the last."""
    around = torch.randn(100, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    around[60:, 2] += 9
    return around


@pytest.fixture(params=[0, 20_000, math.inf], ids=["nothing kept", "some kept", "all kept"])
def grid(request, points):
    return OnGrid(some_basis(), points, Memory(request.param))


def dense(points) -> torch.Tensor:
    values, gradients = some_basis().evaluate(points)
    return torch.cat((values[None], gradients))  # [4, points, n]


def test_fields_are_those_of_the_dense_arrays(grid, points):
    p = torch.randn(grid.size, dtype=F64)
    for _ in range(2):  # evaluated, and kept where there is room
        torch.testing.assert_close(grid(p), dense(points) @ p, atol=1e-9, rtol=0)
    values, gradients = grid.dense()
    torch.testing.assert_close(torch.cat((values[None], gradients)), dense(points), atol=1e-9, rtol=0)
    assert any(len(place.shells.functions) < grid.size for place in grid.places)  # far functions are left out


def test_products_are_those_of_the_dense_arrays(grid, points):
    weights = torch.randn(4, 4, len(points), dtype=F64)
    weights = weights + weights.transpose(0, 1)
    whole = torch.einsum("kpi,klp,lpj->ij", dense(points), weights, dense(points))
    torch.testing.assert_close(grid.products(weights), whole, atol=1e-8, rtol=1e-9)
    torch.testing.assert_close(
        grid.products(weights[:1, :1]), torch.einsum("pi,p,pj->ij", dense(points)[0], weights[0, 0], dense(points)[0])
    )


def test_derivatives_of_every_order_and_mode(grid, points):
    """Of a sum of fourth powers of the fields."""
    p, v = torch.randn(2, grid.size, dtype=F64, generator=torch.Generator().manual_seed(1)) / grid.size

    def energy(p):
        return grid(p).pow(4).sum()

    def whole(p):
        return (dense(points) @ p).pow(4).sum()

    for take in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(take(energy)(p), take(whole)(p), atol=1e-8, rtol=1e-7)

    def third(f):
        return torch.func.jvp(torch.func.grad(lambda q: torch.func.jvp(f, (q,), (v,))[1]), (p,), (v,))[1]

    torch.testing.assert_close(third(energy), third(whole), atol=1e-8, rtol=1e-7)
    batch = torch.stack((p, v))
    torch.testing.assert_close(torch.func.vmap(grid)(batch), torch.func.vmap(lambda q: dense(points) @ q)(batch))
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(energy))(batch), torch.func.vmap(torch.func.grad(whole))(batch)
    )


def test_what_is_kept_stays_within_the_memory(points):
    memory = Memory(60_000)
    first, second = (OnGrid(some_basis(), points, memory) for _ in range(2))
    p = torch.randn(first.size, dtype=F64)
    first(p)
    held = first.held
    assert 0 < held <= memory.limit
    second(p)
    assert second.held == held  # the one that was not used for longest gave way
    assert first.held == 0
    assert memory.used == held
    del second
    gc.collect()
    assert memory.used == 0


def test_a_grid_goes_to_another_process_without_its_values(grid, points):
    grid(torch.zeros(grid.size, dtype=F64))
    again = pickle.loads(pickle.dumps(grid))
    assert again.held == 0
    p = torch.randn(grid.size, dtype=F64)
    torch.testing.assert_close(again(p), grid(p))
    held = OnGrid.of(*grid.dense())
    torch.testing.assert_close(pickle.loads(pickle.dumps(held))(p), grid(p))


@pytest.mark.parametrize("limit", [0, 20_000, math.inf])
def test_values_in_single_precision_are_one_map(points, limit):
    """Whether they are kept or not: the same numbers, and the exact derivatives of their sums."""
    grid = OnGrid(some_basis(), points, Memory(limit, single=True))
    rounded = dense(points).float().double()
    p = torch.randn(grid.size, dtype=F64)
    for _ in range(2):
        torch.testing.assert_close(grid(p), rounded @ p, atol=1e-9, rtol=0)
    slope = torch.func.grad(lambda q: grid(q).square().sum())(p)
    torch.testing.assert_close(slope, torch.func.grad(lambda q: (rounded @ q).square().sum())(p), atol=1e-7, rtol=1e-9)
    assert grid.held <= limit


def test_moves_to_another_precision(grid):
    single = grid.to(dtype=torch.float32)
    p = torch.randn(grid.size, dtype=F64)
    torch.testing.assert_close(single(p.float()), grid(p).float(), atol=1e-3, rtol=1e-3)
    assert next(iter(single)).values.dtype == torch.float32


def test_a_functional_has_the_derivatives_of_the_dense_arrays(h2):
    """Hydrogen's energy, gradient and Hessian in small blocks, and with arrays that are held."""
    functional = OrbitalFree(OrbitalFreeConfig(hidden=3))
    torch.nn.init.normal_(functional.factor[-1].weight, std=0.1, generator=torch.Generator().manual_seed(0))
    basis, grid = h2.basis._source
    whole = replace(h2, basis=OnGrid.of(*h2.basis.dense()))
    parts = replace(h2, basis=OnGrid(basis, grid, Memory(0)))
    for f in (
        functional,
        torch.func.grad(functional),
        lambda p, m: hessian(functional, p, m),
        lambda p, m: mixed(functional, p, m, ["factor.0.weight"])["factor.0.weight"],
    ):
        torch.testing.assert_close(f(h2.reference, parts), f(h2.reference, whole), atol=1e-9, rtol=1e-9)
