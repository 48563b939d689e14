"""What a solution tells beside its value: states on the way, absolute residuals, traces."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import torchimplicit as ti
from torchimplicit.precision import TORCH_RELEASE

F64 = torch.float64
SOLVERS = (ti.FixedPointIteration(), ti.FixedPointIteration(damping=0.6), ti.Anderson(), ti.Broyden())


def f(z: Tensor, w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(z @ w + x)


@pytest.fixture
def leaves() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(4, 4, dtype=F64, generator=generator) for _ in range(2))
    return (0.8 * w / torch.linalg.matrix_norm(w, 2)).requires_grad_(), x.requires_grad_()


def start() -> Tensor:
    return torch.full((4, 4), 0.1, dtype=F64)


def way(w: Tensor, x: Tensor, steps: int, damping: float = 1.0) -> list[Tensor]:
    states = [start()]
    for _ in range(steps):
        states.append(states[-1] + damping * (f(states[-1], w, x) - states[-1]))
    return states


def sequence_loss(states: list[Tensor]) -> Tensor:
    """Another loss for each state, another weight for each loss."""
    return sum((k + 1) * (state - 0.1 * k).square().sum() for k, state in enumerate(states))  # type: ignore[return-value]


def as_solution(gradient: Any, z: Tensor, before: Tensor, w: Tensor, x: Tensor) -> Tensor:
    """The state with the derivative that each estimator gives, by dense algebra."""
    z = z.detach()
    if isinstance(gradient, ti.UnrolledPhantom):
        for _ in range(gradient.steps):
            z = gradient.damping * f(z, w, x) + (1 - gradient.damping) * z
        return z
    if isinstance(gradient, ti.OneStep):
        return f(before.detach(), w, x)
    image = f(z, w, x)
    slopes = torch.func.vmap(torch.func.jacrev(lambda z, x: f(z, w.detach(), x)))(z, x.detach())
    return z + torch.linalg.solve(torch.eye(4, dtype=F64) - slopes, (image - image.detach())[:, :, None])[:, :, 0]


@pytest.mark.parametrize("selection", [{"at": (1, 2, 5)}, {"every": 2}, {"count": 4}], ids=str)
@pytest.mark.parametrize("gradient", [ti.Unrolled(), ti.OneStep(), ti.UnrolledPhantom(steps=2), ti.Implicit()], ids=str)
def test_a_sequence_loss_is_that_of_the_loop_written_by_hand(
    gradient: Any, selection: dict[str, Any], leaves: tuple[Tensor, Tensor]
) -> None:
    solver = ti.FixedPointIteration(steps=7, keep_trajectory=True)
    solution = ti.solve(ti.FixedPoint(f), start(), *leaves, solver=solver, gradient=gradient)
    states = solution.states(**selection)
    places = {"at": (1, 2, 5, 7), "every": (2, 4, 6, 7), "count": (2, 4, 5, 7)}[next(iter(selection))]
    by_hand = way(*leaves, steps=7)
    if not isinstance(gradient, ti.Unrolled):
        by_hand = [as_solution(gradient, z, by_hand[max(k - 1, 0)], *leaves) for k, z in enumerate(by_hand)]
    theirs = [by_hand[place] for place in places]
    for ours, other in zip(states, theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-14)
    ours, other = (torch.autograd.grad(sequence_loss(s), leaves) for s in (states, theirs))
    torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_unrolled_states_of_a_solve_to_a_tolerance(solver: Any, leaves: tuple[Tensor, Tensor]) -> None:
    """Those of samples that stop early stay where they are; places beyond the end are the solution."""
    solver = replace(solver, rtol=1e-8, keep_trajectory=True)
    captured = leaves[0]
    problem = ti.FixedPoint(lambda z, x: f(z, captured, x))
    solution = ti.solve(problem, start(), leaves[1], solver=solver, gradient=ti.Unrolled())
    states = solution.states(at=(1, 3, 10_000))
    assert states[2] is solution.value is states[3]
    direction = torch.randn_like(leaves[1])
    (slope,) = torch.autograd.grad(sequence_loss(states[:2]), leaves[1])
    ends = []
    for h in (1e-6, -1e-6):
        with torch.no_grad():
            fixed = [
                ti.solve(problem, start(), leaves[1] + h * direction, solver=solver.given(n)).value for n in (1, 3)
            ]
        ends.append(sequence_loss(fixed))
    torch.testing.assert_close((slope * direction).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-6)


def test_captured_weights_get_the_gradients_of_states_too(leaves: tuple[Tensor, Tensor]) -> None:
    w, x = leaves
    problem = ti.FixedPoint(lambda z, x: f(z, w, x))
    for gradient in (ti.OneStep(), ti.UnrolledPhantom(steps=1), ti.Unrolled(), ti.Implicit()):
        solver = ti.FixedPointIteration(steps=4, keep_trajectory=True)
        found = [
            torch.autograd.grad(
                sequence_loss(ti.solve(p, start(), *args, solver=solver, gradient=gradient).states(3)), w
            )
            for p, args in ((problem, (x,)), (ti.FixedPoint(f), (w, x)))
        ]
        torch.testing.assert_close(found[0], found[1])


def test_states_of_a_tree_and_of_a_layer() -> None:
    class Cell(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = torch.nn.Linear(3, 3).double()

        def forward(self, z: Any, x: Tensor) -> Any:
            return torch.tanh(0.3 * self.mix(z[1]) + x), 0.5 * z[0]

    cell, x = Cell(), torch.randn(2, 3, dtype=F64)
    layer = ti.nn.Equilibrium(cell, solver=ti.Anderson(keep_trajectory=True))
    solution = layer.solve(x, z0=(torch.zeros(2, 3, dtype=F64), torch.zeros(2, 3, dtype=F64)))
    states = solution.states(3)
    sum(z[0].square().sum() for z in states).backward()  # type: ignore[union-attr]
    assert cell.mix.weight.grad is not None
    assert all(isinstance(z, tuple) for z in states)
    assert layer.solution is not None
    with pytest.raises(ValueError, match=r"layer\.solve"):
        layer.solution.states(3)
    with pytest.raises(ValueError, match=r"layer\.solve"):
        pickle.loads(pickle.dumps(ti.solve(ti.FixedPoint(torch.cos), x, solver=layer.solver))).states(3)


GRADIENTS = (ti.Unrolled(), ti.OneStep(), ti.UnrolledPhantom(steps=2), ti.Implicit())


@pytest.mark.parametrize("gradient", GRADIENTS, ids=str)
@pytest.mark.parametrize(
    "solver", [ti.FixedPointIteration(steps=9), ti.Anderson(steps=9), ti.Anderson(rtol=1e-9)], ids=str
)
@pytest.mark.parametrize("tree", [False, True])
def test_places_that_were_kept_are_those_of_the_whole_way(
    gradient: Any, solver: Any, tree: bool, leaves: tuple[Tensor, Tensor]
) -> None:
    w, x = leaves
    places, found = (0, 2, 6), []
    problem = ti.FixedPoint(lambda z, x: (f(z[0], w, x), 0.5 * z[1]) if tree else f(z, w, x))
    for kept in (places, True):
        z0 = (start(), start()[:, :2]) if tree else start()
        at = replace(solver, keep_trajectory=kept)
        solution = ti.solve(problem, z0, x, solver=at, gradient=gradient)
        states = solution.states() if kept is not True else solution.states(at=places)
        if tree:
            states = [state[0] for state in states]
        if kept is not True:
            assert [k for k, z in enumerate(solution.trajectory) if z is not None] == list(places)
        found.append((states, torch.autograd.grad(sequence_loss(states), (w, x))))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert len(found[0][0]) == 4


def test_places_are_counted_over_all_solvers_in_turn() -> None:
    """The second one goes on where the first has stopped, and so do the numbers of steps."""
    w, x = 0.9 * torch.linalg.qr(torch.randn(6, 6, dtype=F64)).Q, torch.randn(3, 6, dtype=F64)
    ways = []
    for kept in ((2, 5, 9), True):
        members = (ti.FixedPointIteration(max_steps=4), ti.Anderson(max_steps=4), ti.Broyden())
        solver = ti.Polyalgorithm(members=members, keep_trajectory=kept)
        ways.append(ti.solve(ti.FixedPoint(lambda z, x: torch.tanh(z @ w + x)), x, x, solver=solver).trajectory)
    for place in (2, 5, 9):
        assert torch.equal(ways[0][place], ways[1][place])
    assert all(z is None for place, z in enumerate(ways[0]) if place not in (2, 5, 9))


def test_places_that_were_not_kept_are_named(leaves: tuple[Tensor, Tensor]) -> None:
    solver = ti.FixedPointIteration(steps=6, keep_trajectory=[4, 2])
    assert solver == ti.FixedPointIteration(steps=6, keep_trajectory=(2, 4))
    solution = ti.solve(ti.FixedPoint(f), start(), *leaves, solver=solver)
    assert len(solution.states(at=[4])) == len(solution.states(every=4)) == 2
    with pytest.raises(ValueError, match=r"after 2, 4 steps, but those after 3 are"):
        solution.states(at=[2, 3])
    with pytest.raises(ValueError, match=r"after 2, 4 steps, but those after 1, 3, 5 are"):
        solution.states(6)
    for wrong, error in ((3, TypeError), ("4", TypeError), ([2.0], TypeError), ([-1], ValueError)):
        with pytest.raises(error, match="keep_trajectory"):
            ti.FixedPointIteration(keep_trajectory=wrong)


def test_states_refuses(leaves: tuple[Tensor, Tensor]) -> None:
    solver = ti.FixedPointIteration(steps=4, keep_trajectory=True)
    solution = ti.solve(ti.FixedPoint(f), start(), *leaves, solver=solver)
    for wrong in ({}, {"count": 2, "every": 2}, {"every": 0}, {"at": (-1,)}, {"every": 2, "random": True}):
        with pytest.raises(ValueError, match="states"):
            solution.states(**wrong)
    assert len(solution.states(3, random=True, generator=torch.Generator().manual_seed(0))) == 3
    assert len(solution.states(100)) == 4
    with pytest.raises(ValueError, match="keep_trajectory"):
        ti.solve(ti.FixedPoint(f), start(), *leaves, solver=solver.given(3).__class__(steps=3)).states(2)


@pytest.mark.parametrize("solver", [*SOLVERS, ti.NewtonKrylov()], ids=str)
def test_absolute_residuals_and_traces(solver: Any, leaves: tuple[Tensor, Tensor]) -> None:
    solver = replace(solver, rtol=1e-9, keep_trajectory=True, keep_trace=True)
    for rowwise in (False, True):
        solution = ti.solve(ti.FixedPoint(f, rowwise=rowwise), start(), *leaves, solver=solver)
        image = f(solution.value, *leaves)
        absolute = (image - solution.value).norm(dim=1).detach()
        torch.testing.assert_close(solution.absolute_residual, absolute, rtol=1e-2, atol=1e-15)
        trace = solution.trace
        assert trace is not None
        for k, z in enumerate(solution.trajectory):
            image = f(z, *leaves).detach()
            norm = (image - z.detach()).norm(dim=1)
            torch.testing.assert_close(trace.absolute[k], norm, rtol=1e-9, atol=1e-14)
            torch.testing.assert_close(trace.relative[k], norm / image.norm(dim=1), rtol=1e-9, atol=1e-14)
        assert len(trace.absolute) == len(solution.trajectory)
        torch.testing.assert_close(trace.relative[-1], solution.residual)
        again = pickle.loads(pickle.dumps(solution.figures()))
        assert torch.equal(again.trace.absolute, trace.absolute)
    assert ti.solve(ti.FixedPoint(f), start(), *leaves).trace is None


def test_traces_of_roots_minima_and_whole_systems(leaves: tuple[Tensor, Tensor]) -> None:
    target = leaves[1].detach()

    def root(z: Tensor) -> Tensor:
        return z + z**3 - target

    def energy(z: Tensor) -> Tensor:
        return (0.5 * z.square() + 0.25 * z**4 - target * z).sum(dim=1)

    for problem, solver in (
        (ti.Root(root), ti.NewtonKrylov(keep_trace=True)),
        (ti.Minimum(energy), ti.LBFGS(keep_trace=True)),
    ):
        solution = ti.solve(problem, start(), solver=solver)
        trace = solution.trace
        assert trace is not None
        torch.testing.assert_close(trace.absolute[0], root(start()).norm(dim=1))
        torch.testing.assert_close(solution.absolute_residual, root(solution.value).norm(dim=1), rtol=1e-6, atol=1e-14)
        assert len(trace.absolute) == int(solution.steps.max()) + 1
    solution = ti.solve(ti.FixedPoint(f, batched=False), start(), *leaves, solver=ti.Anderson(keep_trace=True))
    assert solution.absolute_residual is not None
    assert solution.absolute_residual.shape == ()
    assert solution.trace is not None
    assert solution.trace.relative.shape == (int(solution.steps) + 1,)


def test_the_trace_of_given_steps(leaves: tuple[Tensor, Tensor]) -> None:
    solution = ti.solve(ti.FixedPoint(f), start(), *leaves, solver=ti.FixedPointIteration(steps=4, keep_trace=True))
    states = way(*leaves, steps=4)
    assert solution.trace is not None
    norms = torch.stack([(b - a).norm(dim=1) for a, b in pairwise(states)]).detach()
    torch.testing.assert_close(solution.trace.absolute, norms)
    torch.testing.assert_close(solution.absolute_residual, norms[-1])


@pytest.mark.skipif(TORCH_RELEASE < (2, 13), reason="nothing is compiled there")
def test_a_compiled_solve_tells_its_absolute_residual(leaves: tuple[Tensor, Tensor]) -> None:
    w, x = (t.detach() for t in leaves)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ti.errors.CaptureWarning)
        solution = ti.solve(ti.FixedPoint(f), start(), w, x, compile=True)
    torch.testing.assert_close(
        solution.absolute_residual, (f(solution.value, w, x) - solution.value).norm(dim=1), rtol=1e-2, atol=1e-15
    )
