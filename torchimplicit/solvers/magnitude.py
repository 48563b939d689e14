"""Solves whose numbers are so small, or so large, that their squares underflow or overflow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchimplicit.closure import is_transformed
from torchimplicit.precision import safe_norm, widened
from torchimplicit.problems import Point, System
from torchimplicit.problems.fixed_point import FixedPointSystem
from torchimplicit.problems.joint_system import JointSystem
from torchimplicit.problems.minimum import MinimumSystem
from torchimplicit.problems.root import RootSystem
from torchimplicit.solution import Status
from torchimplicit.solvers.base import Evaluator, Solver
from torchimplicit.solvers.outcome import Outcome
from torchimplicit.solvers.review import seen_at
from torchimplicit.solvers.tolerance import Judge
from torchimplicit.state import row_norm

MARGIN = 1e3
"""How far from where squares underflow or overflow norms are taken as they are."""

Solve = Callable[[Solver, System, Tensor, Sequence[Tensor]], Outcome]


@torch.no_grad()
def examined(
    solve: Solve, outcome: Outcome, solver: Solver, system: System, z0: Tensor, params: Sequence[Tensor]
) -> Outcome:
    """The outcome, or where squares underflow or overflow on the way to it, that of the problem in other units. One
    read from the device; what is looked at beyond that is not counted.

    A problem that is small or large as a whole, as one in SI units of atoms is in single precision, is solved again in
    units of its first numbers. Elsewhere a sample that is only said to be solved since the square of its residual
    underflows, as on the way down :math:`e^{-z}`, is not.
    """
    if outcome.norm is None or solver.steps is not None or isinstance(system, JointSystem):
        return outcome
    if any(map(is_transformed, (outcome.z, *params))):
        return outcome
    norm = outcome.norm if outcome.norm.ndim == 1 else outcome.norm.amin(dim=1)
    lowest, highest = _range(norm.dtype)
    size = row_norm(outcome.z)
    low = outcome.report.converged & (norm <= lowest)
    if not bool((low | (size <= lowest) | (size >= highest)).any()):
        return outcome
    extreme = ((size <= lowest) & (outcome.report.converged | (outcome.z != 0).any(dim=1))) | (size >= highest)
    hidden, extremes = torch.stack((low, extreme)).any(dim=1).tolist()
    if not (hidden or extremes):
        return outcome
    point = system.at(outcome.z, params)
    low = low & (point.residual != 0).any(dim=1)
    hidden = hidden and bool(low.any())
    if not (hidden or (extremes and bool((point.residual != 0).any()))):
        return outcome
    other = None if outcome.state is not None else _units(system, z0, params)
    if other is not None:
        return _solved_in(*other, solve, solver, system, z0, params)
    return _confirmed(outcome, low, point, solver, system, z0, params) if hidden else outcome


def _range(dtype: torch.dtype) -> tuple[float, float]:
    """Norms between which squares neither underflow nor overflow."""
    number = torch.finfo(dtype)
    return MARGIN * number.tiny**0.5, number.max**0.5 / MARGIN


def _units(system: System, z0: Tensor, params: Sequence[Tensor]) -> tuple[float, float] | None:
    """What the state and the residual are divided by so that they are of about unit size at first, powers of two;
    ``None`` where they are not extreme, or cannot be."""
    if not isinstance(system, FixedPointSystem | RootSystem | MinimumSystem):
        return None
    if isinstance(system, MinimumSystem) and (system.hyperplane is not None or system.residuals is not None):
        return None
    point = system.at(z0, params)
    r = widened(point.residual).nan_to_num(0.0, 0.0, 0.0)
    state, size = float(z0.abs().amax()), float(r.abs().amax())
    if point.image is not None:
        state = max(state, float(point.image.nan_to_num(0.0, 0.0, 0.0).abs().amax()))
        size = state
    elif state == 0 and size > 0:  # as far as a step goes
        image = Evaluator(system, params).product(z0, (r / size).to(z0.dtype))
        moved = 0.0 if image is None else float(safe_norm(widened(image)).nan_to_num(0.0, 0.0, 0.0).amax())
        state = size / moved if moved > 0 else 0.0
    lowest, highest = _range(r.dtype)
    share = 1e-2 * torch.finfo(r.dtype).eps  # of the first numbers, those to come
    if not (0 < state < math.inf and 0 < size < math.inf):
        return None
    if all(lowest < share * each and each < share * highest for each in (state, size)):
        return None
    return _power(state), _power(size)


def _power(size: float) -> float:
    return 2.0 ** (math.frexp(size)[1] - 1)


def _solved_in(
    state: float,
    size: float,
    solve: Solve,
    solver: Solver,
    system: System,
    z0: Tensor,
    params: Sequence[Tensor],
) -> Outcome:
    """The outcome of the problem whose state is divided by ``state`` and its residual by ``size``."""
    fn, divisor = system.fn, size

    def scaled(z: Tensor, *params: Tensor) -> Tensor:
        out = fn(z * state, *params)
        return out / divisor if not isinstance(system, MinimumSystem) else out / state / divisor

    changes: dict[str, Any] = {}
    if solver.atol is not None:
        changes["atol"] = pytree.tree_map(lambda a: a / size, solver.atol)
    found = solve(replace(solver, **changes), replace(system, fn=scaled), z0 / state, params)
    return replace(
        found,
        z=found.z * state,
        trajectory=tuple(None if z is None else z * state for z in found.trajectory),
        norm=None if found.norm is None else found.norm * size,
        trace=tuple((norm * size, parts) for norm, parts in found.trace),
        state=None,
    )


def _confirmed(
    outcome: Outcome,
    low: Tensor,
    point: Point,
    solver: Solver,
    system: System,
    z0: Tensor,
    params: Sequence[Tensor],
) -> Outcome:
    """The outcome without the samples among ``low`` (bool ``[batch]``) that the rule does not find solved by norms
    which underflow nowhere."""
    z, report, norms_of = outcome.z, outcome.report, system.safe_norms
    assert outcome.norm is not None
    judge = Judge(system, point, solver.rtol, solver.atol)
    size, first = norms_of(torch.stack((point.residual, z0)))
    if judge.measure is not None:
        seen = seen_at(Evaluator(system, params), z)
        if seen is None:
            return outcome
        judge.measure.recent = torch.maximum(norms_of(z), first * (judge.eps / judge.measure.share))
        solved, _, parts = judge.look(*seen, closely=False, norms_of=norms_of)
    elif point.image is not None and isinstance(system, FixedPointSystem):
        terms = norms_of(point.image)
        solved = size <= judge.rtol * (terms + judge.eps * first) + judge.atol
        solved, parts = solved if solved.ndim == 1 else solved.all(dim=1), torch.where(size > 0, size / terms, 0)
    else:
        return outcome
    denied = low & ~solved
    relative = parts if parts.ndim == 1 else parts.amax(dim=1)
    figures = replace(
        report,
        status=report.status.masked_fill(denied, int(Status.BREAKDOWN)),
        residual=torch.where(low, relative.to(report.residual.dtype), report.residual),
    )
    column = low if size.ndim == 1 else low[:, None]
    known = outcome.parts
    return replace(
        outcome,
        report=figures,
        norm=torch.where(column, size, outcome.norm),
        parts=None if known is None else torch.where(column, parts, known),
    )
