"""Solutions found elsewhere: held against the problem, and given the derivative that a solve would give them."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, hessian, vmap

import torchimplicit as ti
from torchimplicit import FixedPoint, LeastSquares, LinearEquality, Minimum, Root, Status

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


W = 0.3 * normal(4, 4)


def shift(z, c):
    return torch.tanh(z @ W.T) + c


PROBLEMS = {
    "fixed point": FixedPoint(shift),
    "root": Root(lambda z, c: z - shift(z, c)),
    "minimum": Minimum(lambda z, c: (0.5 * (z - c).square() + 0.1 * (z @ W.T).pow(4)).sum(1)),
    "constrained": Minimum(lambda z, c: (0.5 * (z - c).square()).sum(1), LinearEquality(torch.ones(4, dtype=F64), 2.0)),
    "least squares": LeastSquares(lambda z, c: torch.cat((z - shift(z, c), 0.1 * z), dim=1)),
}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_the_derivatives_are_those_of_a_solve(problem):
    c = normal(3, 4, seed=1).requires_grad_()
    start = torch.zeros(3, 4, dtype=F64)
    solved = ti.solve(problem, start, c)
    calls = []
    found = ti.attach(problem, solved.value, c)
    assert found.converged.all()
    assert not found.steps.any()
    torch.testing.assert_close(found.value, solved.value, rtol=0, atol=1e-12)
    for value in (found.value, solved.value):
        (first,) = torch.autograd.grad(value.sin().sum(), c, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), c)
        calls.append((first.detach(), second))
    torch.testing.assert_close(*calls, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_what_is_no_solution_is_told(problem):
    c = normal(3, 4, seed=1)
    value = ti.solve(problem, torch.zeros(3, 4, dtype=F64), c).value
    moved = value.clone()
    moved[1] += torch.tensor([1e-4, -1e-4, 1e-4, -1e-4], dtype=F64)  # in the plane
    with pytest.warns(ti.ConvergenceWarning, match="attach was given"):
        found = ti.attach(problem, moved, c)
    assert found.status.tolist() == [0, int(Status.BREAKDOWN), 0]
    torch.testing.assert_close(found.value, moved)
    assert ti.attach(problem, moved, c, rtol=1e-2).converged.all()


def test_from_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    c = normal(4, seed=1).requires_grad_()

    def f(z, c):
        return z - torch.tanh(W @ z) - c

    found = optimize.root(lambda x: f(torch.from_numpy(x), c.detach()).numpy(), [0.0] * 4, tol=1e-12).x
    value = ti.attach(Root(f, batched=False), found, c).value
    (got,) = torch.autograd.grad(value.sum(), c)
    jacobian = torch.func.jacrev(f)(value.detach(), c.detach())
    torch.testing.assert_close(got, torch.linalg.solve(jacobian.T, torch.ones(4, dtype=F64)))


def test_transforms():
    c = normal(3, 4, seed=1)
    problem = PROBLEMS["fixed point"]
    value = ti.solve(problem, torch.zeros(3, 4, dtype=F64), c).value

    def loss(c, z):
        return ti.attach(problem, z[None], c[None]).value.sin().sum()

    def reference(c):
        return ti.solve(problem, torch.zeros(1, 4, dtype=F64), c[None]).value.sin().sum()

    torch.testing.assert_close(vmap(grad(loss))(c, value), vmap(grad(reference))(c), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(hessian(loss)(c[0], value[0]), hessian(reference)(c[0]), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("gradient", [ti.NeumannPhantom(), ti.UnrolledPhantom(), ti.OneStep()], ids=repr)
def test_estimators_without_steps_serve(gradient):
    c = normal(3, 4, seed=1).requires_grad_()
    problem = PROBLEMS["fixed point"]
    solved = ti.solve(problem, torch.zeros(3, 4, dtype=F64), c, gradient=gradient)
    found = ti.attach(problem, ti.solve(problem, torch.zeros(3, 4, dtype=F64), c).value, c, gradient=gradient)
    grads = [torch.autograd.grad(s.value.sum(), c)[0] for s in (solved, found)]
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "gradient", [ti.Unrolled(), ti.Reversible(), ti.SharedInverse(), ti.EquilibriumPropagation()], ids=repr
)
def test_estimators_that_need_steps_say_so(gradient):
    problem = PROBLEMS["minimum" if isinstance(gradient, ti.EquilibriumPropagation) else "fixed point"]
    with pytest.raises(ValueError):  # noqa: PT011  each says it in its own words
        ti.attach(problem, torch.zeros(3, 4, dtype=F64), normal(3, 4).requires_grad_(), gradient=gradient)


def test_off_the_constraint_is_an_error():
    with pytest.raises(ValueError, match="constraint"):
        ti.attach(PROBLEMS["constrained"], torch.ones(3, 4, dtype=F64), normal(3, 4))


def test_what_is_not_finite_is_an_error():
    value = torch.zeros(3, 4, dtype=F64)
    value[0, 0] = torch.nan
    with pytest.raises(ti.SolveError):
        ti.attach(PROBLEMS["fixed point"], value, normal(3, 4))
