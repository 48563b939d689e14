"""Batches whose rows depend on each other: derivatives against those of the batch as one system."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.derivatives import Derivatives
from torchimplicit.testing.gradient_suite import relative_error

BATCH, DIM = 5, 4


def mean(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(z @ w.mT + 0.4 * z.mean(0, keepdim=True).roll(1, 1) + x)


def batch_norm(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(0.5 * torch.nn.functional.batch_norm(z @ w.mT + x, None, None, training=True))


def attention(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(0.6 * torch.softmax(z @ z.mT, dim=1) @ z @ w.mT + x)


def chain(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Each row sees the one before it."""
    return torch.tanh(z @ w.mT + 0.4 * torch.cat((torch.zeros_like(z[:1]), z[:-1])) + x)


def pair(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """The first and the last row see each other."""
    swapped = torch.cat((z[-1:], torch.zeros_like(z[1:-1]), z[:1]))
    return torch.tanh(z @ w.mT + 0.4 * swapped + x)


def faint(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(z @ w.mT + 1e-6 * z.mean(0, keepdim=True) + x)


MAPS = {f.__name__: f for f in (mean, batch_norm, attention, chain, pair, faint)}
LINEAR = {
    "default": None,
    "dense": ti.Dense(),
    "gmres": ti.GMRES(),
    "bicgstab": ti.BiCGStab(),
    "lsmr": ti.LSMR(),
    "neumann": ti.Neumann(),
    "preconditioned": ti.GMRES(preconditioner=ti.linear.Jacobi()),
}


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, DIM, dtype=torch.float64, generator=generator) for n in (BATCH, DIM))
    return x.requires_grad_(), (0.4 * w / torch.linalg.matrix_norm(w, 2)).requires_grad_()


def as_one(f: Callable[..., Tensor], x: Tensor, w: Tensor, steps: int = 400) -> Tensor:
    """By plain iteration, which autograd differentiates."""
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = f(z, x, w)
    return z


def solved(f: Callable[..., Tensor], x: Tensor, w: Tensor, **options: Any) -> ti.Solution:
    problem = ti.FixedPoint(f)
    return ti.solve(
        problem, torch.zeros_like(x), x, w, solver=ti.FixedPointIteration(rtol=1e-13, max_steps=400), **options
    )


def weighed(z: Tensor, where: str) -> Tensor:
    """A loss that looks at all rows, or at one alone."""
    return z.sin().sum() if where == "all" else z[1].square().sum()


@pytest.mark.parametrize("where", ["all", "one"])
@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("f", MAPS)
def test_gradient(f, linear, where):
    x, w = data()
    expected = torch.autograd.grad(weighed(as_one(MAPS[f], x, w), where), (x, w))
    solution = solved(MAPS[f], x, w, gradient=ti.Implicit(linear_solver=LINEAR[linear]))
    got = torch.autograd.grad(weighed(solution.value, where), (x, w))
    assert solution.adjoint.converged.all()
    assert solution.adjoint.residual.max() < 1e-10
    for g, e in zip(got, expected, strict=True):
        assert relative_error(g, e) < 1e-9


@pytest.mark.parametrize("f", MAPS)
def test_tangent_and_second_order(f):
    x, w = (t.detach() for t in data())
    direction = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
    expected = torch.func.jvp(lambda x: as_one(MAPS[f], x, w), (x,), (direction,))[1]
    got = torch.func.jvp(lambda x: solved(MAPS[f], x, w).value, (x,), (direction,))[1]
    assert relative_error(got, expected) < 1e-9

    def slope(run: Callable[..., Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(weighed(run(leaf), "one"), leaf, create_graph=True)
        return torch.autograd.grad((g * direction).sum(), leaf)[0]

    second = slope(lambda x: solved(MAPS[f], x, w).value)
    assert relative_error(second, slope(lambda x: as_one(MAPS[f], x, w))) < 1e-8


def test_copies_under_vmap():
    """Copies do not depend on each other, and one that is not finite leaves the others alone."""
    x, w = (t.detach() for t in data())
    several = torch.stack((x, 0.5 * x, x.flip(0)))

    def slope(run: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return torch.func.grad(lambda x: weighed(run(mean, x, w), "one"))

    got = torch.func.vmap(slope(lambda *a: solved(*a).value))(several)
    for one, x in zip(got, several, strict=True):
        assert relative_error(one, slope(as_one)(x)) < 1e-9


def test_a_large_batch_is_solved_with_the_matrices_of_single_rows():
    """As one system its matrix would have 2**26 entries."""
    x = torch.linspace(-1, 1, 512 * 16, dtype=torch.float64).reshape(512, 16).requires_grad_()
    w = 0.3 * torch.eye(16, dtype=torch.float64)
    expected = torch.autograd.grad(weighed(as_one(mean, x, w, 60), "one"), x)[0]
    got = torch.autograd.grad(
        weighed(solved(mean, x, w, gradient=ti.Implicit(linear_solver=ti.Dense())).value, "one"), x
    )[0]
    assert relative_error(got, expected) < 1e-9


@pytest.mark.parametrize("linear", [None, ti.MINRES(), ti.CG(), ti.Dense()])
@pytest.mark.parametrize("plane", [False, True])
def test_minimum(plane, linear):
    """Energies of which each sees the mean of all rows."""
    x, w = data()

    def energy(z: Tensor, x: Tensor) -> Tensor:
        return (0.5 * z.square() + 0.1 * z.pow(4) - z * x.sin()).sum(1) + 0.3 * (z @ w * z.mean(0).roll(1)).sum(1).cos()

    constraint = ti.LinearEquality(torch.arange(1.0, DIM + 1, dtype=x.dtype), 1.0) if plane else None
    start = torch.zeros_like(x)
    solver = ti.GradientDescent(step_size=0.3, momentum=0.0, rtol=0.0, atol=1e-13, max_steps=3000)
    solution = ti.solve(
        ti.Minimum(energy, constraint), start, x, solver=solver, gradient=ti.Implicit(linear_solver=linear), throw=False
    )
    got = torch.autograd.grad(weighed(solution.value, "one"), x)[0]
    z = solution.value.detach().flatten()
    hessian = torch.autograd.functional.hessian(lambda z: energy(z.reshape(BATCH, DIM), x.detach()).sum(), z)
    mixed = torch.autograd.functional.jacobian(
        lambda x: torch.func.grad(lambda z: energy(z.reshape(BATCH, DIM), x.reshape(BATCH, DIM)).sum())(z),
        x.detach().flatten(),
    )
    tangent = torch.eye(len(z), dtype=z.dtype)
    if plane:
        n = torch.nn.functional.normalize(torch.arange(1.0, DIM + 1, dtype=z.dtype), dim=0)
        tangent = torch.block_diag(*[torch.linalg.svd(n[None], full_matrices=True)[2][1:].T] * BATCH)
    u = torch.zeros(BATCH, DIM, dtype=z.dtype)
    u[1] = 2 * z.reshape(BATCH, DIM)[1]
    g = tangent @ torch.linalg.solve(tangent.T @ hessian @ tangent, tangent.T @ u.flatten())
    assert solution.adjoint.converged.all()
    assert relative_error(got, -(mixed.T @ g).reshape(BATCH, DIM)) < 1e-9


def test_damped_implicit_shifts_the_whole_batch():
    x, _ = data()

    def energy(z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * (z - x).square().sum(1) + (z * z.roll(1, 0)).sum(1) * 0.4

    start = torch.zeros_like(x)
    solver = ti.GradientDescent(step_size=0.3, momentum=0.0, max_steps=3000)
    for damping in (0.5, None):
        gradient = ti.DampedImplicit(damping=damping, margin=0.3)
        solution = ti.solve(ti.Minimum(energy), start, x, solver=solver, gradient=gradient)
        got = torch.autograd.grad(weighed(solution.value, "one"), x)[0].flatten()
        z = solution.value.detach()
        hessian = torch.autograd.functional.hessian(lambda z: energy(z.reshape(x.shape), x.detach()).sum(), z.flatten())
        values = torch.linalg.eigvalsh(hessian)
        shift = 0.5 if damping else float((0.3 * values[-1] - values[0]).clamp_min(0))
        u = torch.zeros_like(z)
        u[1] = 2 * z[1]
        eye = torch.eye(z.numel(), dtype=z.dtype)
        assert relative_error(got, torch.linalg.solve(hessian + shift * eye, u.flatten())) < 1e-9


@pytest.mark.parametrize(
    "gradient", [ti.SharedInverse(), ti.SharedInverse(refine=3), ti.AdaptivePhantom(tolerance=1e-3)]
)
@pytest.mark.parametrize("f", [mean, chain])
def test_the_residual_that_an_estimate_reports_is_true(f, gradient):
    x, _ = data()
    w = data()[1].detach()
    # the map adds x at the end, so that the gradient in x is the adjoint itself
    problem = ti.FixedPoint(lambda z, x: f(z, torch.zeros_like(x), w) + x)
    solution = ti.solve(problem, torch.zeros_like(x), x, solver=ti.Broyden(max_steps=100), gradient=gradient)
    u = torch.linspace(0.5, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
    (g,) = torch.autograd.grad(solution.value, x, u)
    z = solution.value.detach().requires_grad_()
    residual = u - g + torch.autograd.grad(problem.f(z, x.detach()), z, g)[0]
    true, as_one_system = residual.norm(dim=1) / u.norm(dim=1), residual.norm() / u.norm()
    reported = solution.adjoint.residual
    if bool((reported == reported[0]).all()):  # solved as one system
        true = as_one_system.expand(len(x))
    torch.testing.assert_close(reported, true)
    assert as_one_system < 0.5
    if isinstance(gradient, ti.AdaptivePhantom):
        assert as_one_system <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "gradient",
    [ti.NeumannPhantom(steps=4, damping=0.6), ti.UnbiasedNeumann(steps=4, survival=1e-12, damping=0.6), ti.OneStep()],
)
def test_a_truncated_series_is_that_of_the_whole_batch(gradient, dtype):
    """Rows with a cotangent of zero take part, and so do those with a tiny one."""
    x, w = (t.detach().to(dtype) for t in data())
    x.requires_grad_()
    problem = ti.FixedPoint(lambda z, x: mean(z, torch.zeros_like(x), w) + x)
    solution = ti.solve(problem, torch.zeros_like(x), x, gradient=gradient)
    u = torch.linspace(0.5, 1, x.numel(), dtype=dtype).reshape(x.shape) * torch.tensor(
        [[1.0], [0], [1e-23], [1e-3], [1]]
    )
    (got,) = torch.autograd.grad(solution.value, x, u.to(dtype))
    z = solution.value.detach()
    jacobian = torch.autograd.functional.jacobian(lambda z: mean(z, torch.zeros_like(x), w), z).reshape(2 * [z.numel()])
    steps, damping = (1, 1.0) if isinstance(gradient, ti.OneStep) else (4, 0.6)
    term = u.flatten()
    total = torch.zeros_like(term)
    for _ in range(steps):
        total = total + damping * term
        term = damping * jacobian.T @ term + (1 - damping) * term
    assert relative_error(got.flatten(), total) < 10 * torch.finfo(dtype).eps


def test_it_is_remembered():
    """A second solve with the same function takes fewer products."""
    x, w = data()
    problem = ti.FixedPoint(lambda z, x: mean(z, x, w.detach()))
    costs = []
    for _ in range(2):
        solution = ti.solve(problem, torch.zeros_like(x), x)
        solution.value.sum().backward()
        costs.append(solution.adjoint.evaluations)
    assert costs[1] < costs[0]


def test_rows_that_do_not_depend_on_each_other_pay_one_product():
    x, w = data()
    solutions = []
    for rowwise in (False, True):
        solution = ti.solve(
            ti.FixedPoint(lambda z, x: torch.tanh(z @ w.mT + x), rowwise=rowwise),
            torch.zeros_like(x),
            x,
            gradient=ti.Implicit(linear_solver=ti.Dense()),
        )
        solution.value.sum().backward()
        solutions.append(solution)
    assert [solution.adjoint.evaluations for solution in solutions] == [DIM + 1, DIM + 1]


def test_a_broken_promise_shows_in_the_backward_pass():
    """In the forward pass no row has left the batch."""
    x, w = data()
    problem = ti.FixedPoint(lambda z, x: mean(z, x, w), rowwise=True)
    with pytest.warns(ti.ConvergenceWarning):
        solution = ti.solve(problem, torch.zeros_like(x), x, solver=ti.FixedPointIteration(rtol=0.0, max_steps=20))
    with pytest.raises(ValueError, match="rowwise=True"):
        solution.value.sin().sum().backward()


@pytest.mark.parametrize("f", [mean, batch_norm])
def test_derivatives(f):
    x, w = (t.detach() for t in data())
    t = torch.tensor(1.0, dtype=x.dtype)
    problem = ti.FixedPoint(lambda z, t: f(z, x * t, w))
    solver = ti.FixedPointIteration(rtol=1e-13, max_steps=400)
    solution = ti.solve(problem, torch.zeros_like(x), t.clone().requires_grad_(), solver=solver)
    got = Derivatives(solution).tangent((torch.ones_like(t),))
    expected = torch.func.jvp(lambda t: as_one(f, x * t, w), (t,), (torch.ones_like(t),))[1]
    assert relative_error(got, expected) < 1e-9


def test_a_promise_is_kept_beside_other_problems_of_the_same_code():
    """What is remembered of a function, by its code, is that of problems without the promise."""

    def solution(share, rowwise):
        def f(z, x):
            return z + 0.1 * z.pow(3) - torch.tanh(x + share * z.mean(0, keepdim=True).roll(1, 1))

        root = ti.Root(f, rowwise=rowwise)
        return ti.solve(root, torch.zeros_like(x), x, solver=ti.NewtonKrylov(linear_solver=ti.BiCGStab()))

    x = torch.randn(BATCH, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = x * torch.logspace(-3, 1, BATCH, dtype=torch.float64)[:, None]  # they end one after the other
    assert solution(0.5, rowwise=False).converged.all()
    assert solution(0.0, rowwise=True).converged.all()


@pytest.mark.parametrize("solver", [ti.Anderson, ti.Broyden])
def test_methods_with_a_memory_solve_a_coupled_batch_as_one_system(solver):
    """From where they gave up row by row; and at once in the next solve of the same function."""
    w = torch.linalg.qr(torch.randn(BATCH, BATCH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q
    x = torch.randn(BATCH, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def f(z):
        return torch.tanh(1.7 * w @ z + x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = (
            ti.solve(ti.FixedPoint(f), torch.zeros_like(x), solver=solver(rtol=1e-12, max_steps=60)) for _ in range(2)
        )
    for solution in (first, second):
        assert solution.converged.all()
        assert (f(solution.value) - solution.value).norm(dim=1).max() < 1e-10
    if solver is ti.Anderson:
        assert int(first.steps.max()) > 60 >= int(second.steps.max())


@pytest.mark.parametrize("solver", [ti.LBFGS, ti.NewtonKrylov])
@pytest.mark.parametrize("shared", [True, False])
def test_coupled_energies_on_planes(solver, shared):
    """Each sample on its own plane, all of them one system."""
    x = torch.randn(BATCH, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    weight = 0.5 + x.abs() if not shared else torch.ones(DIM, dtype=torch.float64)
    total = torch.full((BATCH,), 1.5, dtype=torch.float64) if not shared else torch.tensor(1.5, dtype=torch.float64)

    def energy(z):
        mean = z.mean(0, keepdim=True)
        return (0.5 * z.square() + 0.1 * z.pow(4) + 2 * (z - 3 * mean).square() - z * x).sum(1)

    solution = ti.solve(
        ti.Minimum(energy, ti.LinearEquality(weight, total)), torch.zeros_like(x), solver=solver(rtol=1e-10)
    )
    assert solution.converged.all()
    z = solution.value.requires_grad_()
    slope = torch.autograd.grad(energy(z).sum(), z)[0]
    normal = weight.expand_as(x) / weight.expand_as(x).norm(dim=1, keepdim=True)
    assert ((z * weight).sum(1) - total).abs().max() < 1e-12
    assert (slope - (slope * normal).sum(1, keepdim=True) * normal).norm() < 1e-7


@pytest.mark.parametrize("linear", [ti.Neumann(), ti.GMRES(), ti.BiCGStab(), ti.LSMR()])
@pytest.mark.parametrize("f", [pair, chain, mean])
@pytest.mark.parametrize("spread", [(1e-3, 0.1, 1.0, 300.0, 1e4), (1.0, 0.3, 3.0, 0.7, 5.0)])
def test_cotangents_of_different_sizes(f, linear, spread):
    """Rows are solved in units of their own, and a method of products alone may solve just that, coupled."""
    x, w = data()
    sizes = torch.tensor(spread, dtype=x.dtype)[:, None]
    solver = ti.FixedPointIteration(rtol=1e-13, max_steps=400)

    class Map(torch.nn.Module):  # of which nothing is remembered
        def forward(self, z, x):
            return f(z, x, w.detach())

    problem = ti.FixedPoint(Map())
    value = ti.solve(problem, torch.zeros_like(x), x, solver=solver, gradient=ti.Implicit(linear_solver=linear)).value
    (got,) = torch.autograd.grad((value * sizes).sum(), x)
    whole = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad((as_one(f, whole, w.detach()) * sizes).sum(), whole)
    assert relative_error(got, expected) < 1e-8


def test_rows_that_were_seen_apart_are_not_looked_at_for_ever(monkeypatch):
    from torchimplicit.linear import confirmed

    looks, look = [], confirmed.rows_depend
    monkeypatch.setattr(confirmed, "rows_depend", lambda operator: looks.append(1) or look(operator))
    w = 0.9 * torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    x = torch.ones(3, 8, dtype=torch.float64, requires_grad=True)
    problem = ti.FixedPoint(lambda z, x: torch.tanh(z @ w.T + x))
    short = ti.Implicit(linear_solver=ti.GMRES(rtol=1e-14, max_steps=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(6):
            found = ti.solve(problem, torch.zeros(3, 8, dtype=torch.float64), x, gradient=short)
            found.value.square().sum().backward()
            assert (found.adjoint.status == ti.Status.MAX_STEPS).all()
    assert len(looks) == 4
