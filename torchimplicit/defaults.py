"""What is solved with where the user names no solver."""

from __future__ import annotations

from torchimplicit.problems import FixedPoint, LeastSquares, Minimum, Problem, Root
from torchimplicit.solvers import (
    LBFGS,
    Anderson,
    Broyden,
    LevenbergMarquardt,
    NewtonCG,
    NewtonKrylov,
    Polyalgorithm,
    ProjectedNewton,
    PseudoTransient,
    Solver,
    TrustRegion,
)

FIXED_POINT = Polyalgorithm(members=(Anderson(), Broyden(), NewtonKrylov()))
"""Accelerated iteration; then the methods for maps that do not contract."""

ROOT = Polyalgorithm(
    members=(
        NewtonKrylov(),
        TrustRegion(max_steps=100),
        LevenbergMarquardt(max_steps=200),
        PseudoTransient(step_size=1e10, max_steps=100),
        PseudoTransient(max_steps=100),
    )
)
"""Newton's method with a line search; with a trust region, which crosses narrow valleys; with more damping; then
without a safeguard, and along a flow, which both pass by the places where the residual's norm is least."""

MINIMUM = Polyalgorithm(members=(LBFGS(max_steps=200), NewtonCG(max_steps=1000), LBFGS()))
"""What crawls goes on by Newton's method; where the energy has no second derivative, as it began."""

ON_SET = ProjectedNewton()

LEAST_SQUARES = LevenbergMarquardt()

OTHER = Anderson()


def default_solver(problem: Problem) -> Solver:
    """What suits ``problem``."""
    if isinstance(problem, LeastSquares):
        return LEAST_SQUARES
    if isinstance(problem, Minimum):
        return ON_SET if problem.on_set else MINIMUM
    if isinstance(problem, Root):
        return ROOT
    return FIXED_POINT if isinstance(problem, FixedPoint) else OTHER
