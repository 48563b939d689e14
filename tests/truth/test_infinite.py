"""Functions that are infinite, or infinitely steep, where a solve begins: solved from there, or said so."""

from __future__ import annotations

import warnings

import pytest
import torch

import torchimplicit as ti

pytestmark = pytest.mark.usefixtures("one_thread")

ENERGIES = {  # the energy of z at c, its minimum for positive z, and a start where it or its slope is not finite
    "steep upward": (lambda z, c: z + 2 * c * z.sqrt(), lambda c: 0 * c, 0.0),
    "steep downward": (lambda z, c: z - 2 * c * z.sqrt(), lambda c: c * c, 0.0),
    "a barrier": (lambda z, c: z - c * z.log(), lambda c: c, 0.0),
    "beyond the barrier": (lambda z, c: z - c * z.log(), lambda c: c, -1.0),
    "a slope that is NaN": (lambda z, c: (z - c) ** 2 + 0.1 * (z * z).sqrt(), lambda c: c - 0.05, 0.0),
    "entropy": (lambda z, c: -torch.special.entr(z) - c * z, lambda c: (c - 1).exp(), 0.0),
    "an infinite Hessian": (lambda z, c: z**1.5 * 2 / 3 - c * z, lambda c: c * c, 0.0),
    "overflow": (lambda z, c: (z - c).exp() - z, lambda c: c, 1e4),
}
SETS = {
    "free": lambda dtype: None,
    "box": lambda dtype: ti.Box(0.0, 20.0),
    "half-line": lambda dtype: ti.Box(0.0, float("inf")),
    "inequalities": lambda dtype: ti.LinearInequalities(-torch.eye(2, dtype=dtype), torch.zeros(2, dtype=dtype)),
    "projection": lambda dtype: ti.Projection(lambda z: z.clamp_min(0)),
}
SOLVERS = {
    "default": None,
    "newton": ti.NewtonKrylov(),
    "anderson": ti.Anderson(),
    "projected newton": ti.ProjectedNewton(),
    "iteration": ti.FixedPointIteration(max_steps=300),
    "lbfgs": ti.LBFGS(),
}
ROOTS = {
    "log": (lambda z, c: z.log() - c.log(), lambda c: c, 0.0),
    "square root": (lambda z, c: z.sqrt() - c, lambda c: c * c, 0.0),
    "reciprocal": (lambda z, c: 1 / z - 1 / c, lambda c: c, 0.0),
    "exponential": (lambda z, c: z.exp() - c.exp(), lambda c: c, 1e4),
}


def solved_or_said(problem, start, c, solver, expected):
    """Solve; every sample that is said to be solved is, and one that is not has left a word and a finite value."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            solution, raised = ti.solve(problem, start, c, solver=solver), False
        except ti.SolveError as error:
            solution, raised = error.solution, True
    accurate = 2e-3 if start.dtype == torch.float32 else 1e-6
    error = ((solution.value - expected).abs() - accurate * expected.abs()).amax(dim=1)
    assert (error[solution.converged] <= accurate).all(), (solution.value, expected, solution.summary())
    told = raised or any(issubclass(one.category, ti.ConvergenceWarning) for one in said)
    assert told or solution.converged.all(), solution.summary()
    assert solution.value.isfinite().all()


def started(bad, dtype):
    start, c = torch.ones(2, 2, dtype=dtype), torch.tensor([[1.0, 0.5], [0.8, 1.2]], dtype=dtype)
    start[0, 0] = bad
    return start, c


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("on", SETS)
def test_a_minimum(on, solver):
    if solver in (("projected newton", "iteration") if on == "free" else ("lbfgs",)):
        return  # refused
    for which, (energy, minimum, bad) in ENERGIES.items():
        if on == "free" and which == "steep upward":
            continue  # it has no minimum
        for dtype in (torch.float32, torch.float64):
            start, c = started(bad, dtype)
            problem = ti.Minimum(lambda z, c, energy=energy: energy(z, c).sum(dim=1), SETS[on](dtype))
            solved_or_said(problem, start, c, SOLVERS[solver], minimum(c))


@pytest.mark.parametrize("solver", ["default", "newton", "anderson", "iteration"])
@pytest.mark.parametrize("kind", ["root", "fixed point", "least squares"])
def test_a_root(kind, solver):
    if kind == "least squares" and solver == "iteration":
        return  # refused
    problems = {
        "root": ti.Root,
        "fixed point": lambda f: ti.FixedPoint(lambda z, c: z - 0.3 * f(z, c)),
        "least squares": ti.LeastSquares,
    }
    for f, root, bad in ROOTS.values():
        for dtype in (torch.float32, torch.float64):
            start, c = started(bad, dtype)
            solved_or_said(problems[kind](f), start, c, SOLVERS[solver], root(c))


@pytest.mark.parametrize("steep", [10.0, 30.0, 60.0])
def test_a_box_is_solved_from_where_its_energy_is_steep(steep):
    """The projected gradient step was measured at the start, and lost in the rounding of the solution."""
    c = torch.tensor([[1.0, 0.5], [0.8, 1.2]], dtype=torch.float64)
    problem = ti.Minimum(lambda z, c: ((z - c).exp() - z).sum(dim=1), ti.Box(0.0, 100.0))
    for solver in (None, ti.NewtonKrylov()):
        solution = ti.solve(problem, torch.full((2, 2), steep, dtype=c.dtype), c, solver=solver)
        assert solution.converged.all(), solution.summary()
        torch.testing.assert_close(solution.value, c, rtol=1e-9, atol=1e-9)


def test_a_start_that_is_not_finite_is_named():
    with pytest.raises(ti.SolveError, match="not finite at the very start of all of them"):
        ti.solve(ti.Minimum(lambda z: (z - z.log()).sum(dim=1)), torch.zeros(2, 1))
