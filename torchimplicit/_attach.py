"""The verb for solutions that were found elsewhere."""

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

    ``value`` is held against the problem, by one evaluation and for roots and minima one product with the Jacobian: the
    rule is that of :func:`solve`. Its derivative is the one that :func:`solve` would give it.

    Args:
        problem, args: as for :func:`solve`.
        value: the solution, with the structure of a state; a constant as far as derivatives go.
        gradient: how to differentiate it; ``None``: :class:`Implicit`. One that needs the solver's steps is refused.
        rtol, atol: what it is held to, see :class:`~torchimplicit.solvers.Solver`. Codes that stop at ``1e-8`` do not
            meet the default of float64.
        throw: whether to raise :class:`SolveError` where the problem is not finite at ``value``.

    Returns:
        the :class:`Solution`, whose ``value`` is what was given, with the derivative. ``steps`` are zero; a sample that
        is not solved has ``Status.BREAKDOWN``.

    Raises:
        ValueError, TypeError: bad input, said in words; a ``value`` off the problem's constraint.

    Warns:
        ConvergenceWarning: a sample is not solved to the tolerance.
    """
    if isinstance(gradient, Unrolled):
        raise ValueError("Unrolled differentiates a solver's steps, and there are none here: use Implicit()")
    fixed = pytree.tree_map(lambda t: torch.as_tensor(t) if _is_array(t) else t, detached(value))
    found = solve(problem, fixed, *args, solver=Given(rtol=rtol, atol=atol), gradient=gradient, throw=throw)
    _check_place(fixed, found.value, problem.batched, rtol)
    return replace(found, steps=torch.zeros_like(found.steps))


def _is_array(leaf: Any) -> bool:
    return not isinstance(leaf, Tensor) and hasattr(leaf, "__array_interface__")


def _check_place(given: Any, value: Any, batched: bool, rtol: Tolerance | None) -> None:
    """The solution lies where it was given, but for what a constraint takes off in rounding."""
    pairs = list(zip(pytree.tree_leaves(given), pytree.tree_leaves(value), strict=True))
    if any(is_transformed(t) for pair in pairs for t in pair):
        return
    for before, after in pairs:
        rows = len(before) if batched else 1
        one, other = before.reshape(rows, -1), after.detach().reshape(rows, -1)
        share = max(torch.finfo(one.dtype).eps ** 0.5, default_rtol(one.dtype) if rtol is None else least(rtol))
        if one.numel() and bool((safe_norm(one - other) > share * safe_norm(one)).any()):
            raise ValueError(
                "what attach was given does not lie on the problem's constraint: solve it there, or state the problem "
                "without the constraint"
            )
