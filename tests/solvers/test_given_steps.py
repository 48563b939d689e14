"""A number of steps that was asked for, against the loop written by hand."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.testing.solver_suite import HostReads

DIM, BATCH, STEPS = 6, 3, 5
METHODS = (
    ti.FixedPointIteration(),
    ti.FixedPointIteration(damping=0.7),
    ti.Anderson(),
    ti.Anderson(damping=0.8),
    ti.Broyden(),
)


class Counted(torch.nn.Module):
    """A map that counts its calls; ``W`` is captured, ``x`` an argument."""

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        W = torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
        self.W = torch.nn.Parameter(0.9 * W / torch.linalg.matrix_norm(W, 2))
        self.calls = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(z @ self.W + x)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.fixture
def u() -> Tensor:
    return torch.randn(BATCH, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def start() -> Tensor:
    return torch.full((BATCH, DIM), 0.3, dtype=torch.float64)


def plain(f: Counted, z: Tensor, x: Tensor, steps: int, damping: float = 1.0) -> Tensor:
    for _ in range(steps):
        image = f(z, x)
        z = image if damping == 1.0 else z + damping * (image - z)
    return z


def by_hand(kind: str, f: Counted, x: Tensor, steps: int, damping: float) -> Tensor:
    """The loop of somebody who has no library."""
    if kind == "unrolled":
        return plain(f, start(), x, steps, damping)
    if kind == "one step":
        with torch.no_grad():
            z = plain(f, start(), x, steps - 1, damping)
        return plain(f, z, x, 1, damping)
    with torch.no_grad():
        z = plain(f, start(), x, steps, damping)
    assert kind == "phantom"
    return plain(f, z, x, 2, 0.5)


def grads(value: Tensor, u: Tensor, f: Counted, x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, (f.W, x), u)


@pytest.mark.parametrize("steps", [1, 2, STEPS])
@pytest.mark.parametrize("damping", [1.0, 0.7])
@pytest.mark.parametrize(
    ("kind", "gradient"),
    [("unrolled", ti.Unrolled()), ("one step", ti.OneStep()), ("phantom", ti.UnrolledPhantom(steps=2))],
)
def test_value_gradient_and_evaluations_are_those_of_the_loop_written_by_hand(
    kind: str, gradient: Any, damping: float, steps: int, x: Tensor, u: Tensor
) -> None:
    f, g = Counted(), Counted()
    right = by_hand(kind, g, x, steps, damping)
    rights = grads(right, u, g, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solver = ti.FixedPointIteration(damping=damping, steps=steps)
        solution = ti.solve(ti.FixedPoint(f), start(), x, solver=solver, gradient=gradient)
        given = grads(solution.value, u, f, x)
    assert f.calls == g.calls
    assert solution.evaluations == g.calls
    torch.testing.assert_close(solution.value, right, rtol=0, atol=1e-15)
    for one, other in zip(given, rights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-15)
    assert (solution.status == ti.Status.STEPS_TAKEN).all()
    assert (solution.steps == steps).all()
    assert not solution.converged.any()


@pytest.mark.parametrize("solver", METHODS, ids=str)
@pytest.mark.parametrize("gradient", [ti.Implicit(), ti.NeumannPhantom()], ids=str)
def test_other_estimators_differentiate_at_the_last_iterate(solver: Any, gradient: Any, x: Tensor, u: Tensor) -> None:
    f = Counted()
    solution = ti.solve(ti.FixedPoint(f), start(), x, solver=replace(solver, steps=STEPS), gradient=gradient)
    assert f.calls == STEPS + 1  # the one at the last iterate is the backward pass's
    given = grads(solution.value, u, f, x)
    if isinstance(gradient, ti.NeumannPhantom):
        assert f.calls == STEPS + 1
    z = solution.value.detach().requires_grad_()
    out = f(z, x)
    jacobian = torch.stack([torch.autograd.grad(out[:, i].sum(), z, retain_graph=True)[0] for i in range(DIM)], dim=1)
    if isinstance(gradient, ti.Implicit):
        adjoint = torch.linalg.solve((torch.eye(DIM, dtype=z.dtype) - jacobian).mT, u)
    else:
        B = 0.5 * (jacobian + torch.eye(DIM, dtype=z.dtype)).mT
        adjoint = 0.5 * sum(torch.linalg.matrix_power(B, i) for i in range(5)) @ u[:, :, None]
        adjoint = adjoint[:, :, 0]
    for one, other in zip(given, torch.autograd.grad(out, (f.W, x), adjoint), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("solver", METHODS, ids=str)
def test_the_steps_are_those_of_the_solver(solver: Any, x: Tensor) -> None:
    """As many as asked for, whether or not the point was found on the way; none of them asks the host."""
    long = replace(solver, rtol=0.0, atol=1e-300, max_steps=9, keep_trajectory=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", ti.ConvergenceWarning)
        way = ti.solve(ti.FixedPoint(Counted()), start(), x, solver=long).trajectory
    for steps in (0, 1, 4, 9):
        f = Counted()
        with torch.no_grad(), HostReads() as reads:
            solution = ti.solve(ti.FixedPoint(f), start(), x, solver=replace(solver, steps=steps, keep_trajectory=True))
        assert f.calls == steps == solution.evaluations
        assert reads.count <= 1
        torch.testing.assert_close(solution.value, way[steps], rtol=0, atol=0)
        assert len(solution.trajectory) == steps + 1
    last = way[8]
    known = ((Counted()(last, x) - last).norm(dim=1) / Counted()(last, x).norm(dim=1)).detach()
    torch.testing.assert_close(solution.residual, known)


@pytest.mark.parametrize("solver", METHODS, ids=str)
def test_unrolled_through_given_steps_of_any_method(solver: Any, x: Tensor, u: Tensor) -> None:
    f = Counted()
    solver = replace(solver, steps=3)
    solution = ti.solve(ti.FixedPoint(f), start(), x, solver=solver, gradient=ti.Unrolled())
    assert f.calls == 3
    gx = torch.autograd.grad(solution.value, x, u)[0]
    way = torch.randn_like(x)
    ends = []
    for h in (1e-6, -1e-6):
        with torch.no_grad():
            ends.append(ti.solve(ti.FixedPoint(f), start(), x + h * way, solver=solver).value)
    slope = ((ends[0] - ends[1]) * u).sum() / 2e-6
    torch.testing.assert_close((gx * way).sum(), slope, rtol=1e-6, atol=1e-8)


def test_unrolled_differentiates_in_the_start(x: Tensor, u: Tensor) -> None:
    z0 = start().requires_grad_()
    for steps in (0, 3):
        solution = ti.solve(
            ti.FixedPoint(Counted()), z0, x, solver=ti.FixedPointIteration(steps=steps), gradient=ti.Unrolled()
        )
        right = plain(Counted(), z0, x, steps)
        torch.testing.assert_close(
            torch.autograd.grad(solution.value, z0, u)[0], torch.autograd.grad(right, z0, u)[0], rtol=0, atol=1e-15
        )


@pytest.mark.parametrize("solver", METHODS, ids=str)
def test_no_step_returns_the_start_with_the_derivative_there(solver: Any, x: Tensor, u: Tensor) -> None:
    solver = replace(solver, steps=0)
    z0 = start()
    f = Counted()
    problem = ti.FixedPoint(f)
    solution = ti.solve(problem, z0, x, solver=solver, gradient=ti.Unrolled())
    assert torch.equal(solution.value, z0)
    assert not solution.value.requires_grad
    assert f.calls == 0 == solution.evaluations
    assert solution.residual.isnan().all()
    solution = ti.solve(problem, z0, x, solver=solver, gradient=ti.UnrolledPhantom(steps=1, damping=1.0))
    assert f.calls == 1 == solution.evaluations
    assert torch.equal(solution.value, f(z0, x))
    solution = ti.solve(problem, z0, x, solver=solver, gradient=ti.OneStep())
    assert torch.equal(solution.value, z0)
    for one, other in zip(grads(solution.value, u, f, x), grads(f(z0, x), u, f, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-15)
    with torch.no_grad():
        assert torch.equal(ti.solve(problem, z0, x, solver=solver).value, z0)


@pytest.mark.parametrize("gradient", [ti.OneStep(), ti.Implicit(), ti.NeumannPhantom(steps=3)], ids=str)
@pytest.mark.parametrize("captured", ["parameter", "made", "hooked"])
def test_no_step_takes_one_evaluation(gradient: Any, captured: str, x: Tensor, u: Tensor) -> None:
    """The call that finds what the map captures is the one for the backward pass, and what comes out is the same as
    where it cannot be, since saved tensors go through hooks."""
    cell = Counted()
    if captured == "hooked":
        cell.W.register_hook(lambda g: 2 * g)

    def f(z: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        cell.calls += 1
        return torch.tanh(z @ weight + x * y), z * x

    found = []
    for hooks in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t) if hooks else nullcontext():
            cell.calls, weight = 0, cell.W if captured != "made" else 1.0 * cell.W
            solution = ti.solve(
                ti.FixedPoint(f, has_aux=True),
                start(),
                x,
                x.detach(),
                solver=ti.FixedPointIteration(steps=0),
                gradient=gradient,
            )
            loss = (solution.value.sin() * u).sum() + solution.aux.square().sum()
            higher = isinstance(gradient, ti.Implicit)
            grads = torch.autograd.grad(loss, (x, cell.W), create_graph=higher)
            if not hooks and captured == "parameter":
                assert cell.calls == 1
            if higher:
                grads += torch.autograd.grad(sum((g * g).sum() for g in grads), (x, cell.W))
            found.append(grads)
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-13)


def test_one_step_after_an_accelerated_step_is_taken_at_the_value(x: Tensor, u: Tensor) -> None:
    f = Counted()
    solution = ti.solve(ti.FixedPoint(f), start(), x, solver=ti.Anderson(steps=4), gradient=ti.OneStep())
    assert f.calls == 5
    z = solution.value.detach()
    for one, other in zip(grads(solution.value, u, f, x), grads(f(z, x), u, f, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-15)


def test_roots_and_minima() -> None:
    target = torch.randn(BATCH, DIM, dtype=torch.float64).requires_grad_()
    calls = 0

    def root(z: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return z + 0.1 * z**3 - t

    def energy(z: Tensor, t: Tensor) -> Tensor:
        return (0.5 * z.square() + 0.025 * z**4 - t * z).sum(dim=1)

    z0, z = torch.zeros_like(target), torch.zeros_like(target)
    for _ in range(4):
        z = z - 0.5 * (z + 0.1 * z**3 - target)
    for gradient, count in ((ti.Unrolled(), 4), (ti.OneStep(), 4), (ti.UnrolledPhantom(steps=1), 5)):
        calls = 0
        solver = ti.FixedPointIteration(damping=0.5, steps=4)
        solution = ti.solve(ti.Root(root), z0, target, solver=solver, gradient=gradient)
        if not isinstance(gradient, ti.UnrolledPhantom):
            torch.testing.assert_close(solution.value, z, rtol=0, atol=1e-15)
        solution.value.sum().backward()
        assert calls == count
    for problem in (ti.Root(root), ti.Minimum(energy)):
        solution = ti.solve(problem, z0, target, solver=ti.FixedPointIteration(damping=0.5, steps=4))
        torch.testing.assert_close(solution.value, z, rtol=0, atol=1e-15)
        assert 0 < float(solution.residual.amax()) < 0.5
        for method in (ti.Broyden(steps=4), *((ti.LBFGS(steps=4),) if isinstance(problem, ti.Minimum) else ())):
            found = ti.solve(problem, z0, target, solver=method)
            assert (found.status == ti.Status.STEPS_TAKEN).all()
        # far beyond what rounding lets it improve: no word, and no break-down
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = ti.solve(problem, z0, target, solver=ti.NewtonKrylov(steps=12))
        assert (found.status == ti.Status.STEPS_TAKEN).all()
        assert float(root(found.value, target).detach().abs().amax()) < 1e-14
    moved = torch.zeros_like(target)
    velocity = torch.zeros_like(target)
    for _ in range(7):
        velocity = 0.9 * velocity - (moved + 0.1 * moved**3 - target)
        moved = moved + 0.1 * velocity
    solver = ti.GradientDescent(step_size=0.1, steps=7)
    found = ti.solve(ti.Minimum(energy), z0, target, solver=solver, gradient=ti.Unrolled())
    torch.testing.assert_close(found.value, moved, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(
        torch.autograd.grad(found.value.sum(), target)[0], torch.autograd.grad(moved.sum(), target)[0]
    )


def test_trees_and_whole_systems(x: Tensor) -> None:
    def f(state: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return {"y": torch.tanh(0.3 * state["w"] + x), "w": torch.sin(0.5 * state["y"] - 0.2 * state["w"])}

    z0 = {"y": torch.zeros_like(x), "w": torch.ones_like(x)}
    right = z0
    for _ in range(3):
        right = f(right, x)
    for batched in (True, False):
        solution = ti.solve(
            ti.FixedPoint(f, batched=batched), z0, x, solver=ti.FixedPointIteration(steps=3), gradient=ti.Unrolled()
        )
        for name, leaf in right.items():
            torch.testing.assert_close(solution.value[name], leaf, rtol=0, atol=1e-15)
        assert solution.status.shape == ((BATCH,) if batched else ())


def test_a_sample_that_goes_non_finite_is_told() -> None:
    def f(z: Tensor, x: Tensor) -> Tensor:
        return z * x

    z0 = torch.ones(3, 2)
    x = torch.tensor([[0.5], [1e30], [2.0]])
    solver = ti.FixedPointIteration(steps=4)
    with pytest.raises(ti.SolveError, match="1 of 3 samples"):
        ti.solve(ti.FixedPoint(f), z0, x, solver=solver)
    with pytest.warns(ti.ConvergenceWarning):
        solution = ti.solve(ti.FixedPoint(f), z0, x, solver=solver, throw=False)
    assert solution.status.tolist() == [ti.Status.STEPS_TAKEN, ti.Status.NONFINITE, ti.Status.STEPS_TAKEN]
    torch.testing.assert_close(solution.value[2], torch.full((2,), 16.0))


def test_a_test_beside_given_steps_is_refused() -> None:
    for option in ({"rtol": 1e-3}, {"atol": 1e-3}, {"max_steps": 7}, {"check_every": 2}):
        with pytest.raises(ValueError, match=next(iter(option))):
            ti.Anderson(steps=3, **option)
    assert ti.Anderson(rtol=1e-3, max_steps=7, memory=3).given(4) == ti.Anderson(memory=3, steps=4)
    with pytest.raises(ValueError, match="steps"):
        ti.Anderson(steps=-1)
    with pytest.raises(TypeError, match="steps"):
        ti.Anderson(steps=2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("gradient", [ti.OneStep(), ti.UnrolledPhantom(steps=1, damping=1.0), ti.Unrolled()], ids=str)
def test_under_transforms_that_differentiate(gradient: Any, x: Tensor) -> None:
    f = Counted()
    solver = ti.FixedPointIteration(steps=3)

    def loss(x: Tensor) -> Tensor:
        return ti.solve(ti.FixedPoint(f), start(), x, solver=solver, gradient=gradient).value.square().sum()

    (right,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), right, rtol=1e-13, atol=1e-14)
    way = torch.ones_like(x)
    slope = torch.func.jvp(loss, (x.detach(),), (way,))[1]
    torch.testing.assert_close(slope, right.sum(), rtol=1e-12, atol=1e-13)
    if isinstance(gradient, ti.Unrolled):
        return
    both = torch.func.vmap(torch.func.grad(loss))(torch.stack((x.detach(), 2 * x.detach())))
    torch.testing.assert_close(both[0], right, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("solver", [ti.FixedPointIteration(), ti.Anderson(), ti.Broyden()], ids=str)
def test_the_last_iterate_in_place_of_the_best(solver: Any) -> None:
    """A rotation that grows a little, without a point that it leaves alone."""
    turn = 1.02 * torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.where(x > 0, 0.5 * z + x, z @ turn + z.flip(1).cos() / (1e-3 + z.abs()))

    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    z0 = torch.full((2, 2), 0.4, dtype=torch.float64)
    solver = replace(solver, max_steps=7, rtol=1e-12, keep_trajectory=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ti.ConvergenceWarning)
        best = ti.solve(ti.FixedPoint(f), z0, x, solver=solver)
        last = ti.solve(ti.FixedPoint(f), z0, x, solver=replace(solver, return_last=True))
    assert torch.equal(last.status, best.status)
    assert last.status[1] == ti.Status.MAX_STEPS
    assert torch.equal(last.value[1], last.trajectory[-1][1])
    image = f(last.value, x)
    residual = (image - last.value).norm(dim=1) / image.norm(dim=1)
    torch.testing.assert_close(last.residual[1], residual[1])
    assert (f(best.value, x) - best.value).norm(dim=1)[1] < (image - last.value).norm(dim=1)[1]


def test_the_nudged_phase_takes_as_many_steps() -> None:
    """Equilibrium propagation by the solver of the forward pass: its steps were given for both phases."""
    t = torch.randn(BATCH, DIM, dtype=torch.float64).requires_grad_()

    def energy(z: Tensor, t: Tensor) -> Tensor:
        return (0.5 * z.square() - t * z).sum(dim=1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = ti.solve(
            ti.Minimum(energy),
            torch.zeros_like(t),
            t,
            solver=ti.FixedPointIteration(damping=0.5, steps=60),
            gradient=ti.EquilibriumPropagation(),
        )
        solution.value.sum().backward()
    torch.testing.assert_close(t.grad, torch.ones_like(t))
    assert solution.adjoint is not None
    assert (solution.adjoint.status == ti.Status.STEPS_TAKEN).all()
