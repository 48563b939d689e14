"""Minima, free and under a linear constraint: the path, the solution and its gradient."""

from __future__ import annotations

import pytest
import torch

import torchimplicit as ti
from torchimplicit import LBFGS, MINRES, Dense, GradientDescent, LinearEquality, Minimum, NewtonKrylov, Status
from torchimplicit.linear import Jacobi

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def quadratic(z, hessian, b):
    """``hessian``: ``[dim, dim]``."""
    return (0.5 * (z @ hessian) * z - b * z).sum(1)


def kkt(hessian, b, weight, total):
    """The minima of the quadratic energy on the constraint, by the bordered system."""
    batch, dim = b.shape
    weight = weight.expand(batch, dim)
    border = torch.cat((hessian.expand(batch, dim, dim), weight[:, :, None]), dim=2)
    last = torch.cat((weight, torch.zeros(batch, 1, dtype=F64)), dim=1)[:, None]
    rhs = torch.cat((b, total.expand(batch)[:, None]), dim=1)
    return torch.linalg.solve(torch.cat((border, last), dim=1), rhs)[:, :dim]


# -- the constraint ----------------------------------------------------------------------------------------------------

WEIGHTS = {"per sample": (normal(3, 6).abs() + 0.1), "shared": (normal(6).abs() + 0.1)}
TOTALS = {
    "per sample": torch.tensor([1.0, -4.0, 10.0], dtype=F64),
    "number": 2.5,
    "scalar": torch.tensor(2.5, dtype=F64),
}
SOLVERS = {
    "lbfgs": LBFGS(keep_trajectory=True),
    "newton": NewtonKrylov(keep_trajectory=True),
    "descent": GradientDescent(step_size=0.05, keep_trajectory=True),
    "anderson": ti.Anderson(damping=0.2, keep_trajectory=True, max_steps=500),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("total", TOTALS.values(), ids=TOTALS)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_the_constraint_holds_along_the_whole_path(solver, weight, total):
    x = normal(3, 6, seed=1)
    problem = Minimum(lambda z, x: ((z - x) ** 2 + 0.1 * z**4).sum(1), constraint=LinearEquality(weight, total))
    solution = ti.solve(problem, torch.zeros_like(x), x, solver=solver)
    assert solution.converged.all(), solution.summary()
    for z in solution.trajectory:
        assert ((weight * z).sum(1) - total).abs().max() <= 1e-8
    slope = 2 * (solution.value - x) + 0.4 * solution.value**3
    multiplier = (slope * weight).sum(1) / (weight * torch.ones_like(x)).square().sum(1)
    assert (slope - multiplier[:, None] * weight).norm() <= 1e-7


def test_a_constraint_on_a_tree():
    x = {"a": normal(2, 2, 2), "b": [normal(2, 1)]}
    weight = {"a": torch.ones(2, 2, dtype=F64), "b": [torch.full((2, 1), 3.0, dtype=F64)]}

    def energy(z, x):
        return (z["a"] - x["a"]).square().sum((1, 2)) + (z["b"][0] - x["b"][0]).square().sum(1)

    zero = {"a": torch.zeros_like(x["a"]), "b": [torch.zeros_like(x["b"][0])]}
    solution = ti.solve(Minimum(energy, constraint=LinearEquality(weight, 5.0)), zero, x)
    total = solution.value["a"].sum((1, 2)) + 3 * solution.value["b"][0].sum(1)
    torch.testing.assert_close(total, torch.full((2,), 5.0, dtype=F64))


def test_a_constraint_on_one_system():
    problem = Minimum(lambda z: z.square().sum(), constraint=LinearEquality(torch.ones(2, 3), 6.0), batched=False)
    torch.testing.assert_close(ti.solve(problem, torch.zeros(2, 3)).value, torch.ones(2, 3))


def test_samples_may_leave_the_batch_on_their_constraints():
    x, weight = normal(32, 6), normal(32, 6, seed=1)
    total = normal(32, seed=2)
    stretch = torch.ones(32, 6, dtype=F64)
    stretch[5] = torch.logspace(0, 2, 6, dtype=F64)

    def energy(z, x, stretch):
        return (stretch * (z - x) ** 2).sum(1)

    values = []
    for rowwise in (False, True):
        problem = Minimum(energy, constraint=LinearEquality(weight, total), rowwise=rowwise)
        solution = ti.solve(problem, torch.zeros_like(x), x, stretch)
        assert solution.converged.all()
        values.append(solution)
    torch.testing.assert_close(values[0].value, values[1].value)
    assert values[1].evaluations < 0.7 * values[0].evaluations


@pytest.mark.parametrize(
    ("weight", "total", "words"),
    [
        (
            torch.ones(5),
            1.0,
            r"weight has a leaf of shape \(5,\) where the state has \(6,\) per sample: give",
        ),
        (torch.ones(2, 6), 1.0, r"or \(3, 6\) for one per sample"),
        ([torch.ones(6)], 1.0, "the constraint's weight has the structure"),
        (torch.ones(6), torch.ones(2), r"total has shape \(2,\): give a number.*\(3,\)"),
        (torch.ones(6), torch.ones(3, 1), r"total has shape \(3, 1\)"),
    ],
)
def test_refuses_a_constraint_that_does_not_fit(weight, total, words):
    problem = Minimum(lambda z: z.square().sum(1), constraint=LinearEquality(weight, total))
    with pytest.raises(ValueError, match=words):
        ti.solve(problem, torch.zeros(3, 6))


def test_refuses_another_constraint():
    with pytest.raises(TypeError, match=r"constraint must be one of LinearEquality.* not Tensor"):
        Minimum(lambda z: z.square().sum(1), constraint=(torch.ones(3), 1.0))


# -- the gradient ------------------------------------------------------------------------------------------------------


def hessian_of(dim: int, cond: float, indefinite: bool = False) -> torch.Tensor:
    """Ill-conditioned along the diagonal: that is what a Jacobi preconditioner is for."""
    diagonal = torch.logspace(0, torch.log10(torch.tensor(cond)).item(), dim, dtype=F64).sqrt()
    noise = normal(dim, dim, seed=dim)
    core = torch.eye(dim, dtype=F64) + 0.2 * (noise + noise.T) / (2 * dim) ** 0.5
    if indefinite:
        core = core * torch.where(torch.arange(dim) % 4 == 0, -1.0, 1.0).double()
        core = 0.5 * (core + core.T)
    return diagonal[:, None] * core * diagonal


def gradients(solver, linear_solver, hessian, b, weight, total, start=None):
    """The solution, and the gradients of a loss of it in everything that the problem depends on."""
    leaves = [t.clone().requires_grad_() for t in (hessian, b, weight, total)]
    problem = Minimum(quadratic, constraint=LinearEquality(leaves[2], leaves[3]))
    gradient = ti.Implicit(linear_solver=linear_solver)
    z0 = torch.zeros_like(b) if start is None else start
    solution = ti.solve(problem, z0, *leaves[:2], solver=solver, gradient=gradient)
    loss = (solution.value * torch.linspace(-1, 1, b.shape[1], dtype=F64)).sum()
    return solution, torch.autograd.grad(loss, leaves)


def exact_gradients(hessian, b, weight, total):
    leaves = [t.clone().requires_grad_() for t in (hessian, b, weight, total)]
    value = kkt(0.5 * (leaves[0] + leaves[0].T), *leaves[1:])
    return torch.autograd.grad((value * torch.linspace(-1, 1, b.shape[1], dtype=F64)).sum(), leaves)


def relative_error(found, exact):
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("cond", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("indefinite", [False, True])
@pytest.mark.parametrize("method", ["dense", "minres"])
def test_the_adjoint_of_an_ill_conditioned_minimum(method, indefinite, cond):
    hessian = hessian_of(40, cond, indefinite)
    problem = (hessian, normal(3, 40, seed=1), normal(3, 40, seed=2), normal(3, seed=3))
    minres = MINRES(preconditioner=Jacobi(), rtol=1e-11, max_steps=400)
    # Newton's method takes one step; to a saddle no method of minimization goes, and so it is the start
    forward = LBFGS(rtol=1e-8) if indefinite else NewtonKrylov(linear_solver=Dense(), rtol=1e-10)
    start = kkt(*problem) if indefinite else None
    solution, found = gradients(forward, Dense() if method == "dense" else minres, *problem, start=start)
    # a saddle is solved for all the same, and named where the solution proves it
    assert (solution.adjoint.converged | (solution.adjoint.status == Status.SADDLE)).all(), solution.adjoint.summary()
    assert indefinite or solution.adjoint.converged.all()
    assert relative_error(found, exact_gradients(*problem)) <= 1e-7
    if method == "minres":
        assert solution.adjoint.steps.max() <= 100


@pytest.mark.parametrize("shared", [False, True])
def test_the_gradient_against_finite_differences(shared):
    x, weight = normal(2, 5), normal(5) if shared else normal(2, 5)
    total = torch.tensor(1.5, dtype=F64) if shared else normal(2, seed=4)

    def value(x, weight, total):
        problem = Minimum(lambda z, x: ((z - x) ** 2 + torch.cosh(z)).sum(1), constraint=LinearEquality(weight, total))
        return ti.solve(problem, torch.zeros_like(x), x, solver=NewtonKrylov(rtol=1e-14, atol=1e-13)).value

    leaves = tuple(t.requires_grad_() for t in (x, weight, total))
    assert torch.autograd.gradcheck(value, leaves, eps=1e-5, atol=1e-7, rtol=1e-7)
    assert torch.autograd.gradgradcheck(value, leaves, eps=1e-5, atol=1e-6, rtol=1e-6)


def test_a_free_minimum_has_the_gradient_of_its_hessian():
    hessian = hessian_of(8, 1e2)
    b = normal(2, 8).requires_grad_()
    solution = ti.solve(Minimum(quadratic), torch.zeros(2, 8, dtype=F64), hessian, b, solver=NewtonKrylov())
    (found,) = torch.autograd.grad(solution.value.sum(), b)
    torch.testing.assert_close(found, torch.linalg.inv(hessian).sum(0).expand(2, 8))


def test_an_adjoint_that_falls_short_says_so():
    hessian = hessian_of(40, 1e6)
    problem = (hessian, normal(2, 40, seed=1), normal(2, 40, seed=2), normal(2, seed=3))
    with pytest.warns(ti.ConvergenceWarning, match="the adjoint solve did not converge: 2 MAX_STEPS.*preconditioner"):
        solution, _ = gradients(NewtonKrylov(rtol=1e-10), MINRES(max_steps=5), *problem)
    assert (solution.adjoint.status == Status.MAX_STEPS).all()
    assert (solution.adjoint.residual > 1e-3).all()


@pytest.mark.parametrize("solver", [Dense(), MINRES(rtol=1e-8, max_steps=50)])
def test_a_singular_adjoint_says_so(solver):
    # a direction within the plane in which the energy is flat, and the loss is not
    diagonal = torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=F64)
    b = torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=F64).requires_grad_()
    problem = Minimum(
        lambda z, b: (0.5 * diagonal * z**2 - b * z).sum(1), LinearEquality(torch.eye(4, dtype=F64)[0], 1.0)
    )
    solution = ti.solve(problem, torch.zeros(1, 4, dtype=F64), b, gradient=ti.Implicit(linear_solver=solver))
    with pytest.warns(ti.ConvergenceWarning, match="the adjoint solve did not converge"):
        solution.value.sum().backward()
    assert solution.adjoint.status.item() in (Status.BREAKDOWN, Status.MAX_STEPS)


def test_small_and_large_minima_have_their_own_default():
    for dim in (20, 300):
        x = normal(2, dim).requires_grad_()
        problem = Minimum(lambda z, x: ((z - x) ** 2).sum(1), LinearEquality(torch.ones(x.shape[1], dtype=F64), 1.0))
        solution = ti.solve(problem, torch.zeros(2, dim, dtype=F64), x)
        (grad,) = torch.autograd.grad(solution.value[:, 0].sum(), x)
        expected = -torch.ones(2, dim, dtype=F64) / dim
        expected[:, 0] += 1
        torch.testing.assert_close(grad, expected)
        assert solution.adjoint.converged.all()
