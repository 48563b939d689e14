"""The equilibrium at an optimized input, found again to full tolerance."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from torchimplicit._solve import solve
from torchimplicit.gradients import Gradient
from torchimplicit.problems import FixedPoint, JointInference, JointState
from torchimplicit.solution import Solution
from torchimplicit.solvers import Solver


class Resolved(NamedTuple):
    """What :func:`resolve` gives.

    Attributes:
        loss: of the exact equilibrium, ``[batch]`` (a scalar if not batched).
        solution: of :math:`z = f(z, x)` at the input.
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
    """The exact equilibrium :math:`z = f(z, x)` at the state's input, and its loss: what an input is worth, whatever
    the joint solve's tolerance was.

    Args:
        problem, args: as they were given to :func:`solve`.
        state: the solution's value. Its ``z`` is the start, so a converged one costs an evaluation or two.
        solver, gradient, throw: as for :func:`solve`. The derivative in the parameters is that at the given x, and runs
            on into x if that carries one.
    """
    if not isinstance(problem, JointInference):
        raise TypeError(f"resolve takes a JointInference and its JointState, and it was given {type(problem).__name__}")
    inference = FixedPoint(problem.f, batched=problem.batched, rowwise=problem.rowwise)
    found = solve(inference, state.z, state.x, *args, solver=solver, gradient=gradient, throw=throw)
    return Resolved(problem.loss(found.value, state.x, *args), found)
