"""``attach``: the derivative of a solution that was found elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit._solve import solve
from torchimplicit.closure import is_transformed
from torchimplicit.gradients import Gradient, Unrolled
from torchimplicit.precision import default_rtol, safe_norm
from torchimplicit.problems import Problem
from torchimplicit.solution import Solution
from torchimplicit.solvers.given import Given
from torchimplicit.solvers.tolerance import Tolerance, least
from torchimplicit.state import detached


def attach(
    problem: Problem,
    value: Any,
    *args: Any,
    gradient: Gradient | None = None,
    rtol: Tolerance | None = None,
    atol: Tolerance | None = None,
    throw: bool = True,
) -> Solution:
    """Give a solution that was found elsewhere (by SciPy, compiled code, a table) its derivative, without iterating.

    ``value`` is tested by the stopping rule of :func:`solve`, with one evaluation, and for roots and minima one product
    with the Jacobian. Its derivative is the one that :func:`solve` would attach.

    Args:
        problem, args: as for :func:`solve`.
        value: the solution, with the structure of a state. No derivative is taken with respect to it.
        gradient: how to differentiate it; ``None``: :class:`Implicit`. One that needs the solver's steps is refused.
        rtol, atol: the tolerances of the test, see :class:`~torchimplicit.solvers.Solver`. Solvers that stop at
            ``1e-8`` do not meet the default of float64.
        throw: whether to raise :class:`SolveError` where the problem is not finite at ``value``.

    Returns:
        The :class:`Solution`, whose ``value`` is the given one with the derivative attached. ``steps`` are zero; a
        sample that is not solved has ``Status.BREAKDOWN``.

    Raises:
        SolveError: the problem is not finite at a sample's ``value`` (the error carries the solution).
        ValueError: ``value`` violates the problem's constraint, or an input does not fit the problem.
        TypeError: an input is of the wrong type.

    Warns:
        ConvergenceWarning: a sample is not solved to the tolerance.
    """
    if isinstance(gradient, Unrolled):
        raise ValueError("Unrolled differentiates a solver's steps, but there are none here: use Implicit()")
    fixed = pytree.tree_map(lambda t: torch.as_tensor(t) if _is_array(t) else t, detached(value))
    solution = solve(problem, fixed, *args, solver=Given(rtol=rtol, atol=atol), gradient=gradient, throw=throw)
    _check_feasible(fixed, solution.value, problem.batched, rtol)
    return replace(solution, steps=torch.zeros_like(solution.steps))


def _is_array(leaf: Any) -> bool:
    """Return whether ``leaf`` is a NumPy array or the like; without importing NumPy, which is optional."""
    return not isinstance(leaf, Tensor) and hasattr(leaf, "__array_interface__")


def _check_feasible(original: Any, value: Any, batched: bool, rtol: Tolerance | None) -> None:
    """Raise where the projection onto the constraint moved the given value by more than rounding."""
    pairs = list(zip(pytree.tree_leaves(original), pytree.tree_leaves(value), strict=True))
    if any(is_transformed(t) for pair in pairs for t in pair):
        return
    for before, after in pairs:
        rows = len(before) if batched else 1
        one, other = before.reshape(rows, -1), after.detach().reshape(rows, -1)
        share = max(torch.finfo(one.dtype).eps ** 0.5, default_rtol(one.dtype) if rtol is None else least(rtol))
        if one.numel() and bool((safe_norm(one - other) > share * safe_norm(one)).any()):
            raise ValueError(
                "what attach was given does not lie on the problem's constraint: solve with the constraint, or define "
                "the problem without it"
            )
