"""``resolve``: the equilibrium at an optimized input, solved again to full tolerance."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from torchimplicit._solve import solve
from torchimplicit.gradients import Gradient
from torchimplicit.problems import FixedPoint, JointInference, JointState
from torchimplicit.solution import Solution
from torchimplicit.solvers import Solver


class Resolved(NamedTuple):
    """The result of :func:`resolve`.

    Attributes:
        loss: that of the exact equilibrium, ``[batch]`` (a scalar if not batched).
        solution: the :class:`Solution` of :math:`z = f(z, x)` at the input.
    """

    loss: Tensor
    solution: Solution


def resolve(
    problem: JointInference,
    state: JointState,
    *args: Any,
    solver: Solver | None = None,
    gradient: Gradient | None = None,
    throw: bool = True,
) -> Resolved:
    """Solve :math:`z = f(z, x)` exactly at the input of a joint solve, and compute its loss: the value of that input,
    independent of the tolerance of the joint solve.

    Args:
        problem, args: as they were given to :func:`solve`.
        state: the solution's value. Its ``z`` is the start, so a converged state costs an evaluation or two.
        solver, gradient, throw: as for :func:`solve`. The derivative with respect to the parameters is that at fixed x;
            it continues into x if x carries a graph.

    Raises:
        TypeError: ``problem`` is not a :class:`JointInference`.
        SolveError: see :func:`solve`.
    """
    if not isinstance(problem, JointInference):
        raise TypeError(f"resolve takes a JointInference and its JointState, not {type(problem).__name__}")
    inference = FixedPoint(problem.f, batched=problem.batched, rowwise=problem.rowwise)
    solution = solve(inference, state.z, state.x, *args, solver=solver, gradient=gradient, throw=throw)
    return Resolved(problem.loss(solution.value, state.x, *args), solution)
