"""The list of docs/performance.md: what is offered to the compiler, and what is not, with the words that say why."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import torchimplicit as ti
from torchimplicit.errors import CaptureWarning
from torchimplicit.gradients import Gradient
from torchimplicit.linear import LinearSolver
from torchimplicit.solvers import Solver

DIM = 4
MAP = ti.FixedPoint(lambda z, x: torch.tanh(0.3 * z + x))
ROOT = ti.Root(lambda z, x: z - torch.tanh(0.3 * z + x))
ENERGY = ti.Minimum(lambda z, x: (torch.cosh(z) - z * x).sum(-1))
PLANE = ti.LinearEquality(torch.ones(DIM, dtype=torch.float64), 1.0)
ON_PLANE = ti.Minimum(ENERGY.energy, constraint=PLANE)


def joint(**options: Any) -> ti.JointInference:
    return ti.JointInference(
        lambda z, x, y: torch.tanh(0.3 * z + x + y),
        lambda z, x, y: (z - 1).square().sum(-1),
        **{"step_size": 0.1, **options},
    )


@pytest.fixture
def offered(monkeypatch):
    """The plans of what would be compiled; nothing is, and the eager loop serves."""
    plans: list[Any] = []
    monkeypatch.setattr("torchimplicit.captured.capture.bind", lambda problem, plan, *_: plans.append(plan))
    return plans


def said(problem: Any, z0: Any = None, dtype: torch.dtype = torch.float64, **options: Any) -> list[str]:
    """The warnings of a solve with a derivative."""
    x = torch.linspace(-0.5, 0.7, 3 * DIM, dtype=dtype).reshape(3, DIM).requires_grad_()
    start = torch.full_like(x, 0.25).detach()
    if isinstance(problem, ti.JointInference):
        z0 = start, start
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ti.solve(problem, start if z0 is None else z0, x, compile=True, **options)
    return [str(w.message) for w in told if issubclass(w.category, CaptureWarning)]


COMPILED: list[tuple[Any, dict[str, Any]]] = [
    (MAP, {}),
    (ti.FixedPoint(MAP.f, batched=False), {}),
    (ROOT, {}),
    (ENERGY, {}),
    (ON_PLANE, {}),
    (ON_PLANE, {"solver": ti.LBFGS()}),
    (joint(), {"solver": ti.Anderson(max_steps=200)}),
    (joint(constraint=ti.Box(-1, 1)), {"solver": ti.Broyden(max_steps=200)}),
    (joint(constraint=ti.L2Ball(1.0)), {"solver": ti.FixedPointIteration(max_steps=500)}),
    (MAP, {"solver": ti.FixedPointIteration()}),
    (MAP, {"solver": ti.FixedPointIteration(steps=5)}),
    (MAP, {"solver": ti.Anderson(steps=5)}),
    (MAP, {"solver": ti.Broyden(steps=5)}),
    (ENERGY, {"solver": ti.GradientDescent(step_size=0.3, steps=5)}),
    (MAP, {"solver": ti.Anderson(max_steps=200, return_last=True)}),
    (MAP, {"solver": ti.NewtonKrylov()}),
    (ROOT, {"solver": ti.NewtonKrylov(linear_solver=ti.GMRES())}),
    (ENERGY, {"solver": ti.LBFGS()}),
    (ENERGY, {"solver": ti.NewtonKrylov()}),
    (MAP, {"dtype": torch.bfloat16}),
]

EAGER: list[tuple[Any, dict[str, Any], str]] = [
    (ti.Minimum(ENERGY.energy, constraint=ti.Box(-1, 1)), {}, "on a constraint is not compiled"),
    (ti.Minimum(ENERGY.energy, constraint=ti.L2Ball(1.0)), {}, "on a constraint is not compiled"),
    (ti.Minimum(ENERGY.energy, constraint=PLANE, eliminate=True), {}, "constraint is eliminated"),
    (ti.Minimum(ENERGY.energy, metric=ti.Metric(2 * torch.eye(DIM, dtype=torch.float64))), {}, "with a metric"),
    (ti.LeastSquares(lambda z, x: z - torch.tanh(0.3 * z + x)), {}, "LeastSquares is not compiled"),
    (joint(step_size=lambda step: 0.1), {"solver": ti.Anderson(max_steps=200)}, "schedule"),
    (joint(), {"solver": ti.Anderson(steps=3)}, "given number of steps of a JointInference"),
    (joint(), {"solver": ti.NewtonKrylov()}, "NewtonKrylov for a JointInference"),
    (ENERGY, {"solver": ti.LBFGS(steps=3)}, "given number of steps of LBFGS"),
    (ENERGY, {"solver": ti.LBFGS(preconditioner=lambda r: r)}, "LBFGS with a preconditioner"),
    (ROOT, {"solver": ti.NewtonKrylov(steps=2)}, "given number of steps of NewtonKrylov"),
    (ON_PLANE, {"solver": ti.NewtonKrylov()}, "NewtonKrylov on a constraint"),
    (ROOT, {"solver": ti.NewtonKrylov(linear_solver=ti.LSMR())}, "NewtonKrylov with LSMR"),
    (ROOT, {"solver": ti.NewtonKrylov(), "dtype": torch.bfloat16}, "NewtonKrylov in torch.bfloat16"),
    (MAP, {"solver": ti.Anderson(keep_trajectory=True)}, "keep_trajectory"),
    (MAP, {"solver": ti.Anderson(keep_trace=True)}, "keep_trace"),
    (MAP, {"dtype": torch.complex128}, "complex"),
]


@pytest.mark.parametrize(("problem", "options"), COMPILED)
def test_what_is_compiled(offered, problem, options):
    assert not said(problem, **options)
    (plan,) = offered
    assert plan.adjoint is not None


@pytest.mark.parametrize(("problem", "options", "words"), EAGER)
def test_what_is_not(offered, problem, options, words):
    (told,) = said(problem, **options)
    assert words in told
    assert not offered


SOLVERS = {ti.FixedPointIteration, ti.Anderson, ti.Broyden, ti.GradientDescent, ti.LBFGS, ti.NewtonKrylov}
OTHER_SOLVERS: list[tuple[Any, Solver]] = [
    (ti.Root(lambda z, x: z - torch.tanh(0.3 * z + x.sum(1, keepdim=True))), ti.Chandrupatla(low=-2.0, high=2.0)),
    (ROOT, ti.LevenbergMarquardt()),
    (ENERGY, ti.NewtonCG()),
    (ti.Minimum(ENERGY.energy, constraint=ti.Box(-1, 1)), ti.ProjectedNewton()),
    (ROOT, ti.PseudoTransient()),
    (MAP, ti.ReversibleIteration()),
    (ROOT, ti.TrustRegion()),
]


def public(kind: type) -> set[type]:
    return {c for c in vars(ti).values() if isinstance(c, type) and issubclass(c, kind) and not inspect.isabstract(c)}


def test_every_solver_is_on_one_side(offered):
    others = {type(solver) for _, solver in OTHER_SOLVERS}
    assert others | SOLVERS | {ti.Polyalgorithm} == public(Solver)  # which compiles its first member
    for problem, solver in OTHER_SOLVERS:
        narrow = torch.zeros(3, 1, dtype=torch.float64) if isinstance(solver, ti.Chandrupatla) else None
        (told,) = said(problem, z0=narrow, solver=solver)
        assert f"{type(solver).__name__} is not compiled" in told or "on a constraint" in told
    assert not offered


LINEAR = {ti.Neumann, ti.CG, ti.MINRES, ti.BiCGStab, ti.Dense, ti.GMRES}


def test_every_linear_solver_is_on_one_side(offered):
    assert {ti.LSMR} | LINEAR == public(LinearSolver)
    for kind in LINEAR:
        problem, solver = (ENERGY, ti.LBFGS()) if kind in (ti.CG, ti.MINRES) else (MAP, ti.Anderson())
        assert not said(problem, solver=solver, gradient=ti.Implicit(linear_solver=kind()))
        assert offered.pop().adjoint is not None
    jacobi = ti.GMRES(preconditioner=lambda r: r)
    for linear_solver in (ti.LSMR(), jacobi, ti.Neumann(rtol=0.0, max_steps=4)):
        (told,) = said(MAP, solver=ti.Anderson(), gradient=ti.Implicit(linear_solver=linear_solver))
        assert f"its backward pass alone: {type(linear_solver).__name__}" in told
        assert offered.pop().adjoint is None


BOTH_PASSES = {ti.Implicit, ti.UnrolledPhantom, ti.NeumannPhantom, ti.OneStep}
FORWARD: dict[type, tuple[Any, Solver]] = {
    ti.AdaptivePhantom: (MAP, ti.Anderson()),
    ti.DampedImplicit: (ENERGY, ti.LBFGS()),
    ti.Envelope: (joint(), ti.Anderson(max_steps=200)),
    ti.EquilibriumPropagation: (ENERGY, ti.LBFGS()),
    ti.FixedInput: (joint(), ti.Anderson(max_steps=200)),
    ti.UnbiasedNeumann: (MAP, ti.Anderson()),
}
NOT_AT_ALL: list[tuple[Any, Solver, Gradient]] = [
    (MAP, ti.Anderson(), ti.Unrolled()),
    (MAP, ti.Broyden(), ti.SharedInverse()),
    (MAP, ti.ReversibleIteration(), ti.Reversible()),
    (ti.LeastSquares(lambda z, x: z - torch.tanh(0.3 * z + x)), ti.LevenbergMarquardt(), ti.GaussNewton()),
]


def test_every_estimator_is_on_one_side(offered):
    eager = {type(gradient) for *_, gradient in NOT_AT_ALL}
    assert BOTH_PASSES | FORWARD.keys() | eager | {ti.WhenUnconverged} == public(Gradient)  # which has two of them
    for kind in BOTH_PASSES:
        assert not said(MAP, solver=ti.Anderson(), gradient=kind())
        plan = offered.pop()
        assert plan.adjoint is not None or plan.continuation is not None
    for kind, (problem, solver) in FORWARD.items():
        assert not said(problem, solver=solver, gradient=kind())
        plan = offered.pop()
        assert plan.adjoint is None
        assert plan.continuation is None
    for problem, solver, gradient in NOT_AT_ALL:
        assert len(said(problem, solver=solver, gradient=gradient)) == 1
    assert not offered
    for gradient in (ti.UnrolledPhantom(), ti.OneStep()):  # on a plane, forward alone
        (told,) = said(ON_PLANE, solver=ti.LBFGS(), gradient=gradient)
        assert "on a constraint, estimates are not compiled" in told
        assert offered.pop().adjoint is None


def test_transforms_are_eager_silently(offered):
    z0 = torch.zeros(3, DIM, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CaptureWarning)
        torch.func.jacrev(lambda x: ti.solve(MAP, z0, x, compile=True).value)(torch.ones_like(z0))
    assert not offered


def test_the_page_says_so():
    page = (Path(__file__).parents[2] / "docs/performance.md").read_text()
    (table,) = re.findall(r"\| \| compiled \| as without.*?\n\n", page, re.DOTALL)
    rows = {row.split("|")[1].strip(): row.split("|")[2:4] for row in table.strip().splitlines()}

    def named(cell: str) -> set[str]:
        return set(re.findall(r"`(\w+)", cell))

    compiled, _ = map(named, rows["solvers"])
    assert {kind.__name__ for kind in SOLVERS} <= compiled
    assert not compiled & {kind.__name__ for kind in public(Solver) - SOLVERS}
    compiled, eager = map(named, rows["named linear solvers"])
    assert {kind.__name__ for kind in LINEAR} == compiled
    assert "LSMR" in eager
    compiled, eager = map(named, rows["estimators"])
    assert {kind.__name__ for kind in BOTH_PASSES} == compiled
    assert {type(gradient).__name__ for *_, gradient in NOT_AT_ALL if not isinstance(gradient, ti.GaussNewton)} <= eager
