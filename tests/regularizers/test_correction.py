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


def test_single_losses_and_any_weights(leaves):
    solution = solved(OneStep(), leaves)
    single = fixed_point_correction(solution, loss, count=3, reduce=False)
    torch.testing.assert_close(single, torch.stack([loss(z) for z in solution.states(3)]))
    weights = [0.5, 3.0, 7.0]
    for given in (weights, torch.tensor(weights)):
        found = fixed_point_correction(solution, loss, count=3, weights=given)
        torch.testing.assert_close(found, (torch.tensor(weights, dtype=F64) * single).sum())
    long = fixed_point_correction(solution, loss, count=1000, weights=list(range(1000)))
    every = torch.stack([loss(z) for z in solution.states(1000)])
    torch.testing.assert_close(long, (torch.arange(1000, dtype=F64)[-len(every) :] * every).sum())
    with pytest.raises(ValueError, match="2 weights were given for count=3"):
        fixed_point_correction(solution, loss, count=3, weights=[1.0, 2.0])


def test_refuses(leaves):
    kept, plain = solved(Implicit(), leaves), solved(Implicit(), leaves, keep_trajectory=False)
    with pytest.raises(ValueError, match=r"solve with a solver that has keep_trajectory=True, for example Anderson"):
        fixed_point_correction(plain, loss)
    with pytest.raises(ValueError, match=r"gamma is 0.0, but must lie in \(0, 1\]"):
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


class TestMinimaOnTheWay:
    """An iterate of a minimization, treated as the minimum of the energy tilted, once for all, so that it is one."""

    weight = torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=F64)

    @staticmethod
    def energy(z, x, s):
        return (0.5 * s * (z - x) ** 2 + torch.cosh(z)).sum(1)

    def leaves(self):
        x = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        return x, torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=F64).requires_grad_()

    def stated(self, kind):
        constraint = None if kind == "free" else ti.LinearEquality(self.weight, 2.0)
        metric = None
        if kind == "metric":
            metric = ti.Metric(torch.eye(4, dtype=F64) + 0.3)
        return ti.Minimum(self.energy, constraint, metric=metric, eliminate=kind == "eliminated")

    def solved(self, kind, gradient, leaves):
        solver = ti.GradientDescent(step_size=0.02, momentum=0.5, rtol=1e-3, keep_trajectory=True)
        return ti.solve(self.stated(kind), torch.zeros(3, 4, dtype=F64), *leaves, solver=solver, gradient=gradient)

    def by_differences(self, kind, states, x, s, direction):
        """Of the sum of the losses of the states, each the minimum of its tilted energy, in ``s`` along a direction."""
        constraint = None if kind == "free" else ti.LinearEquality(self.weight, 2.0)
        step, total = 1e-4, 0.0
        for state in states:
            leaf = state.detach().requires_grad_()
            (tilt,) = torch.autograd.grad(self.energy(leaf, x.detach(), s.detach()).sum(), leaf)

            def tilted(z, s, tilt=tilt):
                return self.energy(z, x.detach(), s) - (tilt * z).sum(1)

            up, down = (
                ti.solve(
                    ti.Minimum(tilted, constraint),
                    state.detach(),
                    s.detach() + k * step * direction,
                    solver=ti.LBFGS(rtol=0.0, atol=1e-12),
                ).value
                for k in (1, -1)
            )
            total += float((loss(up) - loss(down)).detach()) / (2 * step)
        return total

    @pytest.mark.parametrize("kind", ["free", "constrained", "eliminated", "metric"])
    @pytest.mark.parametrize("random", [False, True])
    @pytest.mark.parametrize(
        "gradient",
        [Implicit(), ti.EquilibriumPropagation(nudge=None, solver=ti.LBFGS(atol=1e-11))],
        ids=lambda g: type(g).__name__,
    )
    def test_against_finite_differences(self, kind, random, gradient):
        x, s = leaves = self.leaves()
        solution = self.solved(kind, gradient, leaves)
        generator = torch.Generator().manual_seed(3)
        found = fixed_point_correction(
            solution, noted := Noted(), count=4, gamma=1.0, random=random, generator=generator
        )
        direction = torch.tensor([1.0, -0.5, 0.3, 0.2], dtype=F64)
        along = float(torch.autograd.grad(found, s)[0] @ direction)
        assert len(noted.states) == 4
        assert along == pytest.approx(self.by_differences(kind, noted.states, x, s, direction), rel=1e-5)

    def test_without_the_tilt_it_would_be_wrong_many_times_over(self):
        """From an early iterate the nudged minimization runs to the solution, and the difference is divided by beta."""
        x, s = leaves = self.leaves()
        state = self.solved("free", Implicit(), leaves).trajectory[3].detach()
        exact = ti.solve(
            ti.Minimum(self.energy), state, x, s, solver=ti.LBFGS(rtol=0.0, atol=1e30), gradient=Implicit()
        ).value
        (right,) = torch.autograd.grad(loss(exact), s)
        nudge = 1e-3
        leaf = state.clone().requires_grad_()
        (u,) = torch.autograd.grad(loss(leaf), leaf)
        nudged = ti.Minimum(lambda z: self.energy(z, x.detach(), s.detach()) + nudge * (u * z).sum(1))
        above = ti.solve(nudged, state, solver=ti.LBFGS(rtol=0.0, atol=1e-10)).value
        (wrong,) = torch.autograd.grad((self.energy(above, x, s) - self.energy(state, x, s)).sum() / nudge, s)
        assert float(wrong.norm()) > 50 * float(right.norm())


class Noted:
    """The loss, and what it was called with."""

    def __init__(self):
        self.states = []

    def __call__(self, z):
        self.states.append(z.detach())
        return loss(z)
