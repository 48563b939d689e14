"""Linear programs, and energies that are flat along some way, on equalities and inequalities."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacfwd, jacrev, vmap

import torchimplicit as ti
from torchimplicit import Box, LinearEqualities, LinearInequalities, Minimum, NonNegative

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def linear(z: Tensor, cost: Tensor) -> Tensor:
    return (cost * z).sum(1)


def program(cost: Tensor, *parts, start: Tensor | None = None, **options) -> ti.Solution:
    return ti.solve(Minimum(linear, tuple(parts)), torch.zeros_like(cost) if start is None else start, cost, **options)


def least_vertex(cost: Tensor, matrix: Tensor, bound: Tensor) -> Tensor:
    """The least value of one linear program, by all its vertices."""
    best = torch.tensor(torch.inf, dtype=F64)
    for rows in itertools.combinations(range(len(matrix)), matrix.shape[1]):
        a, b = matrix[list(rows)], bound[list(rows)]
        if torch.linalg.matrix_rank(a) == len(a):
            z = torch.linalg.solve(a, b)
            if ((matrix @ z - bound) <= 1e-9).all():
                best = torch.minimum(best, cost @ z)
    return best


@pytest.mark.parametrize(("unit", "price"), [(1.0, 1.0), (1e-6, 1.0), (1e6, 1e-3), (1.0, 1e6)])
def test_vertices(unit, price):
    cost, g, h = price * normal(5, 3), normal(6, 3, seed=1), unit * (normal(6, seed=2).abs() + 0.2)
    box = torch.cat((torch.eye(3, dtype=F64), -torch.eye(3, dtype=F64)))
    matrix, bound = torch.cat((g, box)), torch.cat((h, torch.full((6,), 2 * unit, dtype=F64)))
    for start in (0.0, 1.0, 1e3):
        z0 = start * unit * normal(5, 3, seed=3)
        found = program(cost, LinearInequalities(g, h), Box(-2 * unit, 2 * unit), start=z0)
        assert found.converged.all()
        assert found.steps.max() <= 2
        expected = torch.stack([least_vertex(c, matrix, bound) for c in cost])
        torch.testing.assert_close(linear(found.value, cost), expected, rtol=1e-9, atol=1e-9 * unit * price)


def test_a_vertex_moves_with_its_constraints_and_not_with_the_cost():
    cost, g, h = normal(3, 4), normal(5, 4, seed=1), normal(5, seed=2).abs() + 0.2
    a, b = normal(1, 4, seed=3), 0.1 * normal(1, seed=4)

    def solved(cost: Tensor, g: Tensor, h: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return program(cost, LinearInequalities(g, h), Box(-2.0, 2.0), LinearEqualities(a, b)).value

    given = tuple(t.requires_grad_() for t in (cost, g, h, a, b))
    assert gradcheck(solved, given, fast_mode=True)
    assert gradgradcheck(lambda *sets: solved(cost.detach(), *sets), given[1:], fast_mode=True)
    (slope,) = torch.autograd.grad(solved(*given).sin().sum(), cost)
    assert slope.abs().max() < 1e-13


def test_single_precision():
    cost, g = normal(100, 6).float(), normal(8, 6, seed=1).float()
    parts = (LinearInequalities(g, 1.0), Box(-1.0, 1.0))
    found = program(cost, *parts)
    assert found.converged.all()
    doubled = program(cost.double(), LinearInequalities(g.double(), 1.0), Box(-1.0, 1.0))
    torch.testing.assert_close(
        linear(found.value, cost).double(), linear(doubled.value, cost.double()), rtol=1e-5, atol=1e-5
    )
    quadratic = Minimum(lambda z, cost: 0.5 * z.square().sum(1) + (cost * z).sum(1), parts)
    assert ti.solve(quadratic, torch.zeros_like(cost), 3 * cost).converged.all()


def test_transforms():
    cost, g, h = normal(3, 2, 4), normal(6, 4, seed=1), normal(6, seed=2).abs() + 0.2

    def value(cost: Tensor, h: Tensor) -> Tensor:
        return program(cost, LinearInequalities(g, h), Box(-2.0, 2.0)).value

    each = torch.stack([value(c, h) for c in cost])
    torch.testing.assert_close(vmap(value, in_dims=(0, None))(cost, h), each)
    bounds = h + torch.tensor([[0.0], [0.1], [0.2]], dtype=F64)
    each = torch.stack([jacrev(value, argnums=1)(cost[0], b) for b in bounds])
    torch.testing.assert_close(vmap(jacfwd(value, argnums=1), in_dims=(None, 0))(cost[0], bounds), each)


def test_assignments_whose_vertices_are_degenerate():
    k, eye, one = 4, torch.eye(4, dtype=F64), torch.ones(1, 4, dtype=F64)
    sums = torch.cat((torch.kron(eye, one), torch.kron(one, eye)[:-1]))
    cost = normal(4, k * k)
    found = program(cost, LinearEqualities(sums, 1.0), NonNegative())
    assert found.converged.all()
    for c, value in zip(cost.reshape(-1, k, k), linear(found.value, cost), strict=True):
        least = min(sum(c[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(k)))
        torch.testing.assert_close(value, least)


@pytest.mark.parametrize("rank", [1, 4])
def test_a_hessian_that_is_flat_along_some_way(rank):
    batch, dim = 4, 8
    root = normal(dim, rank)
    matrix, cost = root @ root.T, normal(batch, dim, seed=1)
    g, h = normal(6, dim, seed=2), normal(6, seed=3).abs() + 0.1

    def energy(z: Tensor, cost: Tensor) -> Tensor:
        return 0.5 * ((z @ matrix) * z).sum(1) + (cost * z).sum(1)

    parts = (LinearInequalities(g, h), Box(-1.0, 1.0))
    found = ti.solve(Minimum(energy, parts), torch.zeros_like(cost), cost)
    assert found.converged.all()
    assert found.steps.max() <= 4
    z = found.value  # is the nearest point to where the gradient leads
    near = ti.solve(Minimum(lambda x, y: 0.5 * (x - y).square().sum(1), parts), z, z - (cost + z @ matrix)).value
    torch.testing.assert_close(near, z, rtol=1e-8, atol=1e-8)

    def solved(cost: Tensor) -> Tensor:
        return ti.solve(Minimum(energy, parts), torch.zeros_like(cost), cost).value

    assert gradcheck(solved, cost.requires_grad_(), fast_mode=True)


def test_bounds_that_stand_for_none():
    cost, g, h = normal(3, 4).abs(), normal(6, 4, seed=1), normal(6, seed=2).abs() + 0.2
    for high in (1e20, torch.inf):
        found = program(cost, LinearInequalities(g, h), Box(-1.0, high))
        assert found.converged.all()
        expected = program(cost, LinearInequalities(g, h), Box(-1.0, 1e3)).value
        torch.testing.assert_close(found.value, expected)
        more = LinearInequalities(torch.cat((g, normal(1, 4, seed=3))), torch.cat((h, torch.tensor([high], dtype=F64))))
        torch.testing.assert_close(program(cost, more, Box(-1.0, 1e3)).value, expected)


def test_an_energy_that_falls_without_end_is_told():
    cost = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=F64)
    sides = LinearInequalities(torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64), 1.0)
    with pytest.warns(ti.ConvergenceWarning, match="has no minimum"):
        found = program(cost, sides)
    assert found.status.tolist() == [int(ti.Status.BREAKDOWN), int(ti.Status.CONVERGED)]
    assert float(found.value[1, 0]) == -1


def test_one_of_many_solutions_is_found_and_its_derivative_said_to_be_one_of_many():
    cost = torch.tensor([[1.0, 1.0, 2.0]], dtype=F64, requires_grad=True)
    simplex = (LinearEqualities(torch.ones(1, 3, dtype=F64), 1.0), NonNegative())
    found = program(cost, *simplex)
    assert found.converged.all()
    torch.testing.assert_close(linear(found.value, cost), torch.ones(1, dtype=F64))
    with pytest.warns((ti.ConvergenceWarning, ti.SmoothnessWarning)):
        found.value.square().sum().backward()


def test_the_nearest_point_is_found_from_far_away():
    g, h = normal(6, 4), normal(6, seed=1).abs() + 0.5
    parts = (LinearInequalities(g, h), Box(-2.0, 2.0))
    for far in (1e3, 1e6):
        y = far * normal(8, 4, seed=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = ti.solve(Minimum(lambda z, y: 0.5 * (z - y).square().sum(1), parts), y, y)
        assert found.converged.all()
        z = found.value
        gap = z @ g.T - h
        assert gap.max() < 1e-9 * far
        # <y - z, p - z> <= 0 for every p in the set: for those of the other samples
        rest, others = (y - z) / far, z[None] - z[:, None]
        assert (rest[:, None] * others).sum(dim=2).max() < 1e-8
