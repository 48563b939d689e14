from __future__ import annotations

from typing import Any

import pytest
import torch

import torchimplicit as ti
from torchimplicit.linear import GMRES, MINRES, KrylovOrDense, LinearSolver
from torchimplicit.testing.linear_suite import LinearSolverSuite, matrix_operator

D = torch.float64


class TestKrylovOrDense(LinearSolverSuite):
    iterative = False

    def make(self, **options: Any) -> LinearSolver:
        return KrylovOrDense(**options)


class TestDenseAtOnce(LinearSolverSuite):
    """The Krylov method gives up after a step."""

    iterative = False

    def make(self, **options: Any) -> LinearSolver:
        return KrylovOrDense(krylov=GMRES(max_steps=1), **options)


def shift(n: int) -> torch.Tensor:
    """A cyclic shift: no Krylov method gets anywhere before step n."""
    return torch.eye(n, dtype=D).roll(1, 0)


@pytest.mark.parametrize("apart", [False, True])
def test_what_stagnates_is_factorized_alone(apart):
    n = 200
    easy = (
        torch.eye(n, dtype=D) + 0.01 * torch.randn(n, n, dtype=D, generator=torch.Generator().manual_seed(0)) / n**0.5
    )
    a = torch.stack((easy, shift(n), easy, easy))
    b = torch.zeros(4, n, dtype=D)
    b[:, 0] = 1
    fields = {} if apart else {"restrict": None}
    found = KrylovOrDense().solve(matrix_operator(a, **fields), b)
    assert found.report.converged.all()
    torch.testing.assert_close((a @ found.value[:, :, None])[:, :, 0], b)
    assert found.report.steps.max() <= n // 2
    assert found.report.evaluations <= 2.1 * n


def test_matrices_too_large_leave_it_the_krylov_methods():
    n = 60
    b = torch.eye(1, n, dtype=D)
    few = KrylovOrDense(krylov=GMRES(max_steps=5), entries=n * n - 1).solve(matrix_operator(shift(n)[None]), b)
    assert not few.report.converged.any()  # a factorization would have solved it


def test_the_defaults_of_ill_conditioned_adjoints():
    n = 200
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=D)).Q
    matrix = q @ torch.diag(torch.logspace(0, -6, n, dtype=D)) @ q.T
    x = torch.randn(1, n, generator=g, dtype=D, requires_grad=True)
    weight = torch.linspace(1, 2, n, dtype=D)
    problem = ti.Minimum(lambda z, x: 0.5 * ((z @ matrix) * z).sum(1) - (z * x).sum(1))
    solution = ti.solve(problem, torch.zeros(1, n, dtype=D), x)
    (solution.value * weight).sum().backward()
    exact = torch.linalg.solve(matrix, weight)
    assert (x.grad[0] - exact).norm() <= 1e-8 * exact.norm()
    assert solution.adjoint.converged.all()
    assert solution.adjoint.evaluations <= 2 * n


def test_the_default_adjoint_of_a_boundary_value_problem():
    n = 200
    h = 1 / (n + 1)

    def f(z, c):  # -u'' + c exp(u) = 1, Bratu's, by finite differences
        around = torch.nn.functional.pad(z, (1, 1))
        return (2 * z - around[:, 2:] - around[:, :-2]) / h**2 + c * torch.exp(z) - 1

    c = torch.full((1, 1), 0.5, dtype=D, requires_grad=True)
    solution = ti.solve(ti.Root(f), torch.zeros(1, n, dtype=D), c)
    weight = torch.linspace(1, 2, n, dtype=D)
    (grad,) = torch.autograd.grad((solution.value * weight).sum(), c)
    jacobian = torch.func.jacrev(lambda z: f(z[None], c)[0])(solution.value[0].detach()).detach()
    exact = -(torch.linalg.solve(jacobian.mT, weight) * torch.exp(solution.value[0])).sum()
    assert solution.adjoint.converged.all(), solution.adjoint.summary()
    torch.testing.assert_close(grad[0, 0], exact.detach(), rtol=1e-8, atol=0)


def test_validation():
    with pytest.raises(TypeError, match="krylov"):
        KrylovOrDense(krylov=ti.Dense())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="entries"):
        KrylovOrDense(krylov=MINRES(), entries=-1)
