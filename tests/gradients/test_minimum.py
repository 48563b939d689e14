"""Derivatives of minima, free and under a linear constraint, against Newton's method unrolled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from maps import assert_agree, data
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import torchimplicit as ti
from torchimplicit.testing.gradient_suite import convex_energy

BATCH, DIM = 2, 3
SOLVER = ti.LBFGS(rtol=0.0, atol=1e-10)


@pytest.fixture(autouse=True)
def _quiet(recwarn):
    """The last digit of the minimum is no matter here."""


def minimum(x: Tensor, w: Tensor, weight: Any = None, total: Any = None, gradient: Any = None) -> Tensor:
    """The minima of the samples of x, polished to the last digit by two Newton steps that carry no derivative."""
    constraint = None if weight is None else ti.LinearEquality(weight, total)
    problem = ti.Minimum(convex_energy, constraint)
    return ti.solve(
        problem, torch.zeros_like(x), x, w, solver=SOLVER, gradient=gradient or ti.Implicit(linear_solver=ti.Dense())
    ).value


def newton(x: Tensor, w: Tensor, weight: Any = None, total: Any = None) -> Tensor:
    """The same by Newton steps on the (bordered) system, through which autograd differentiates."""
    rows = [_newton(x[i], w, _row(weight, i, 1), _row(total, i, 0)) for i in range(len(x))]
    return torch.stack(rows)


def _row(t: Any, i: int, shared_ndim: int) -> Any:
    return t[i] if isinstance(t, Tensor) and t.ndim > shared_ndim else t


def _newton(x: Tensor, w: Tensor, weight: Any, total: Any) -> Tensor:
    def energy(z: Tensor) -> Tensor:
        return convex_energy(z, x, w)

    z = torch.zeros_like(x)
    for _ in range(10):
        slope, curvature = grad(energy)(z), hessian(energy)(z)
        if weight is None:
            z = z - torch.linalg.solve(curvature, slope)
            continue
        corner = torch.zeros((1, 1), dtype=x.dtype)
        kkt = torch.cat((torch.cat((curvature, weight[:, None]), 1), torch.cat((weight[None], corner), 1)))
        right = torch.cat((-slope, (total - weight @ z).reshape(1)))
        z = z + torch.linalg.solve(kkt, right)[: len(x)]
    return z


def constraint(kind: str) -> tuple[Any, ...]:
    weight = torch.tensor([[1.0, 2.0, -0.5], [0.4, 1.0, 1.5]], dtype=torch.float64)
    total = torch.tensor([1.0, 2.0], dtype=torch.float64)
    return {"free": (), "shared": (weight[0], total[0]), "per sample": (weight, total)}[kind]


KINDS = ["free", "shared", "per sample"]


@pytest.mark.parametrize("kind", KINDS)
def test_solution(kind):
    x, w = data(BATCH, DIM)
    more = constraint(kind)
    assert_agree(minimum(x, w, *more), newton(x, w, *more), 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_reverse_mode_to_second_order(kind):
    def compute(solve):
        tensors = [t.clone().requires_grad_() for t in (*data(BATCH, DIM), *constraint(kind))]
        first = torch.autograd.grad(solve(*tensors).sin().sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors)
        return [g.detach() for g in (*first, *second)]

    assert_agree(compute(minimum), compute(newton))


@pytest.mark.parametrize("kind", KINDS)
def test_third_order(kind):
    def compute(solve):
        tensors = [
            t.clone().requires_grad_() for t in (*data(1, DIM), *(t[:1] if t.ndim else t for t in constraint(kind)))
        ]
        if kind == "shared":
            tensors[2:] = [t.clone().requires_grad_() for t in constraint(kind)]
        loss = solve(*tensors).sin().sum()
        for _ in range(3):
            grads = torch.autograd.grad(loss, tensors, create_graph=True)
            loss = sum(g.square().sum() for g in grads)
        return [g.detach() for g in grads]

    assert_agree(compute(minimum), compute(newton))


@pytest.mark.parametrize("kind", KINDS)
def test_transforms(kind):
    def compute(solve):
        x, w = data(BATCH, DIM)
        more = constraint(kind)
        tensors = (x, w, *more)
        every = tuple(range(len(tensors)))

        def loss(*tensors):
            return solve(*tensors).sin().sum()

        found = [jvp(solve, tensors, tuple(t.cos() for t in tensors))[1]]
        found += jacrev(solve, argnums=every)(*tensors)
        found += jacfwd(grad(loss, argnums=len(every) - 1), argnums=every)(*tensors)
        found += [vmap(lambda scale: solve(x, scale * w, *more))(torch.tensor([1.0, 0.5], dtype=x.dtype))]
        stacked = [torch.stack((t, 1.1 * t)) for t in tensors]
        return found + list(vmap(grad(loss, argnums=every))(*stacked))

    assert_agree(compute(minimum), compute(newton))


def test_total_per_sample_with_a_shared_weight():
    x, w = data(BATCH, DIM)
    weight, total = constraint("shared")[0], constraint("per sample")[1]

    def compute(solve):
        leaves = [t.clone().requires_grad_() for t in (weight, total)]
        return torch.autograd.grad(solve(x, w, *leaves).sin().sum(), leaves)

    assert_agree(compute(minimum), compute(newton))


def test_minres_serves_the_constrained_adjoint():
    x, w = data(BATCH, DIM)
    gradient = ti.Implicit(linear_solver=ti.MINRES(rtol=1e-13))
    leaves = [t.clone().requires_grad_() for t in (w, *constraint("per sample"))]
    got = torch.autograd.grad(minimum(x, *leaves, gradient=gradient).sin().sum(), leaves)
    expected = torch.autograd.grad(newton(x, *leaves).sin().sum(), leaves)
    assert_agree(got, expected)


def test_not_batched():
    x, w = data(BATCH, DIM)
    weight = torch.tensor([[1.0, 2.0, -0.5], [0.4, 1.0, 1.5]], dtype=torch.float64)
    total = torch.tensor(2.0, dtype=torch.float64)

    def energy(z, w):
        return convex_energy(z, x, w).sum() + 0.1 * (z[0] * z[1]).sum()

    def value(w, weight, total):
        problem = ti.Minimum(energy, ti.LinearEquality(weight, total), batched=False)
        return ti.solve(problem, torch.zeros_like(x), w, solver=SOLVER).value

    def reference(w, weight, total):
        z = torch.zeros(BATCH * DIM, dtype=x.dtype)

        def flat(z):
            return energy(z.reshape(BATCH, DIM), w)

        for _ in range(10):
            column, corner = weight.reshape(-1, 1), torch.zeros((1, 1), dtype=x.dtype)
            kkt = torch.cat((torch.cat((hessian(flat)(z), column), 1), torch.cat((column.T, corner), 1)))
            z = z + torch.linalg.solve(kkt, torch.cat((-grad(flat)(z), total[None] - column.T @ z)))[:-1]
        return z.reshape(BATCH, DIM)

    def compute(solve):
        leaves = [t.clone().requires_grad_() for t in (w, weight, total)]
        first = torch.autograd.grad(solve(*leaves).sin().sum(), leaves, create_graph=True)
        return [g.detach() for g in (*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves))]

    assert_agree(compute(value), compute(reference))
