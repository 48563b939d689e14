from __future__ import annotations

import pytest
import torch

import torchimplicit as ti
from torchimplicit import Anderson, FixedPoint, FixedPointIteration, Implicit, OneStep, UnrolledPhantom
from torchimplicit.regularizers import fixed_point_correction

F64 = torch.float64


def f(z, w, x):
    return torch.tanh(z @ w.T + x)


@pytest.fixture
def leaves():
    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(4, 4, dtype=F64, generator=generator) for _ in range(2))
    return (0.8 * w / torch.linalg.matrix_norm(w, 2)).requires_grad_(), x.requires_grad_()


def loss(z):
    return (z - 0.3).square().mean()


def solved(gradient, leaves, **options):
    solver = FixedPointIteration(**{"keep_trajectory": True, "rtol": 1e-6, **options})
    return ti.solve(FixedPoint(f), torch.zeros(4, 4, dtype=F64), *leaves, solver=solver, gradient=gradient)


def attached(gradient, z, w, x):
    """The iterate ``z`` with the derivative that each estimator gives, by hand."""
    z = z.detach()
    if isinstance(gradient, UnrolledPhantom):
        for _ in range(gradient.steps):
            z = gradient.damping * f(z, w, x) + (1 - gradient.damping) * z
        return z
    image = f(z, w, x)
    if isinstance(gradient, OneStep):
        return z + image - image.detach()
    slopes = torch.func.vmap(torch.func.jacrev(lambda z, x: f(z, w.detach(), x)))(z, x.detach())
    moved = torch.linalg.solve(torch.eye(4, dtype=F64) - slopes, (image - image.detach())[:, :, None])
    return z + moved[:, :, 0]


@pytest.mark.parametrize("gradient", [Implicit(), UnrolledPhantom(steps=3), OneStep()], ids=lambda g: type(g).__name__)
@pytest.mark.parametrize(("count", "gamma"), [(1, 0.8), (4, 0.8), (3, 1.0)])
def test_is_the_sum_over_the_iterates(gradient, count, gamma, leaves):
    solution = solved(gradient, leaves)
    found = fixed_point_correction(solution, loss, count=count, gamma=gamma)
    last = len(solution.trajectory) - 1
    indices = [round((k + 1) * last / count) for k in range(count)]
    by_hand = sum(
        gamma ** (count - 1 - k) * loss(attached(gradient, solution.trajectory[i], *leaves))
        for k, i in enumerate(indices)
    )
    torch.testing.assert_close(found, by_hand)
    ours, theirs = torch.autograd.grad(found, leaves), torch.autograd.grad(by_hand, leaves)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_random_indices_are_drawn_without_repetition(leaves):
    solution = solved(Implicit(), leaves)
    seen: list[torch.Tensor] = []

    def noted(z):
        seen.append(z.detach())
        return loss(z)

    values = {
        fixed_point_correction(solution, noted, random=True, generator=torch.Generator().manual_seed(seed)).item()
        for seed in (0, 0, 1, 2)
    }
    assert len(values) == 3
    for run in range(4):
        places = [next(i for i, z in enumerate(solution.trajectory) if torch.equal(z, s)) for s in seen[4 * run :][:4]]
        assert places == sorted(set(places))
        assert places[0] > 0
        assert places[-1] == len(solution.trajectory) - 1


def test_a_short_trajectory_gives_fewer_terms(leaves):
    with pytest.warns(ti.ConvergenceWarning):
        solution = solved(Implicit(), leaves, max_steps=2)
    calls = []
    fixed_point_correction(solution, lambda z: calls.append(z) or loss(z), count=8)
    assert len(calls) == 2


def test_a_solve_that_took_no_step(leaves):
    start = solved(Implicit(), leaves, rtol=1e-12).value.detach()
    solver = Anderson(keep_trajectory=True, rtol=1e-6)
    solution = ti.solve(FixedPoint(f), start, *leaves, solver=solver)
    torch.testing.assert_close(fixed_point_correction(solution, loss), loss(solution.value))


def test_refuses(leaves):
    kept, plain = solved(Implicit(), leaves), solved(Implicit(), leaves, keep_trajectory=False)
    with pytest.raises(ValueError, match=r"solve with a solver that has keep_trajectory=True, for example Anderson"):
        fixed_point_correction(plain, loss)
    with pytest.raises(ValueError, match=r"gamma is 0.0, and must lie in \(0, 1\]"):
        fixed_point_correction(kept, loss, gamma=0.0)
    with pytest.raises(ValueError, match="count is 0, and must be at least 1"):
        fixed_point_correction(kept, loss, count=0)
    with pytest.raises(ValueError, match="the loss must return a scalar tensor"):
        fixed_point_correction(kept, lambda z: z)


@pytest.mark.parametrize("constraint", [None, ti.LinearEquality(torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=F64), 2.0)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_equilibrium_propagation_makes_the_iterates_stationary(symmetric, constraint):
    x = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    stretch = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=F64).requires_grad_()
    problem = ti.Minimum(lambda z, x, s: (s * (z - x) ** 2 + torch.cosh(z)).sum(1), constraint)
    solver = ti.GradientDescent(step_size=0.02, momentum=0.5, rtol=1e-3, keep_trajectory=True)
    grads = []
    nudged = ti.EquilibriumPropagation(nudge=1e-4, symmetric=symmetric, solver=ti.LBFGS(atol=1e-11))
    for gradient in (Implicit(), nudged):
        solution = ti.solve(problem, torch.zeros(3, 4, dtype=F64), x, stretch, solver=solver, gradient=gradient)
        early = fixed_point_correction(solution, loss, count=6, gamma=1.0)
        grads.append(torch.autograd.grad(early, (x, stretch)))
    for exact, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-3 if not symmetric else 1e-5, atol=1e-6)
