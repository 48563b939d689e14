"""The default solvers."""

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
"""Accelerated iteration, then methods for maps that do not contract."""

ROOT = Polyalgorithm(
    members=(
        NewtonKrylov(),
        TrustRegion(max_steps=100),
        LevenbergMarquardt(max_steps=200),
        PseudoTransient(step_size=1e10, max_steps=100),
        PseudoTransient(max_steps=100),
    )
)
"""Newton's method with a line search; with a trust region, which follows narrow valleys; with damping; then without a
safeguard, and along a flow, both of which can pass local minima of the residual's norm."""

MINIMUM = Polyalgorithm(members=(LBFGS(max_steps=200), NewtonCG(max_steps=1000), LBFGS()))
"""Samples on which L-BFGS is slow go on by Newton's method; or by L-BFGS again, if there is no second derivative."""

ON_SET = ProjectedNewton()

LEAST_SQUARES = LevenbergMarquardt()

OTHER = Anderson()


def default_solver(problem: Problem) -> Solver:
    """The default solver for ``problem``."""
    if isinstance(problem, LeastSquares):
        return LEAST_SQUARES
    if isinstance(problem, Minimum):
        return ON_SET if problem.on_set else MINIMUM
    if isinstance(problem, Root):
        return ROOT
    return FIXED_POINT if isinstance(problem, FixedPoint) else OTHER
